"""Which kernels of several blocks inductor makes one: those that read the same table, or the same mask.

A miniature of torch/_inductor/scheduler.py (fuse_nodes, torch 2.13): pairs that share most bytes first, of those the
nearest; two are fused unless more than MAX_DISTANCE nodes lie between the first part of one and the last of the other,
or one needs what the other makes. On the backends' terms a kernel that makes rows and one that reads them may be fused
however far they are apart; that is how softmaxes of many blocks become one kernel.
"""

from collections.abc import Iterable
from typing import NamedTuple

from gptfit.memory.compiled_plan import Kernel

MAX_DISTANCE = 64  # are_long_distant_nodes

# What softmax is made of, by the ends of its groups' names; the last one is part of its backward.
MAXIMUM, SUM, SOFTMAX, MASKED = "/maximum", "/sum", "/softmax", "/masked"
ROWS = (MAXIMUM, SUM)


def fuse_near(kernels: Iterable[Kernel], kind: str, span: int) -> None:
    """Fuses kernels of groups that end in `kind`, `span` nodes long each, two by two where they are near enough."""
    kernels = list(kernels)
    taken = [kernel.group for kernel in kernels]
    position, first, start = 0, None, 0
    for kernel in kernels:
        if kernel.group.endswith(kind) and taken.count(kernel.group) == 1:
            if first is not None and position + span - start <= MAX_DISTANCE:
                kernel.group = first.group
                first = None
            else:
                first, start = kernel, position
        position += kernel.parts


def fuse_with_next(kernels: Iterable[Kernel], kind: str, other: str) -> None:
    """Fuses kernels of groups that end in `kind` with the next one of `other`, if that is fused with none yet."""
    kernels = list(kernels)
    taken = [kernel.group for kernel in kernels]
    position, last, start = 0, None, 0
    for kernel in kernels:
        if kernel.group.endswith(kind):
            last, start = kernel, position
        elif kernel.group.endswith(other) and last is not None and taken.count(kernel.group) == 1:
            near = position + kernel.parts - 1 - start <= MAX_DISTANCE
            last.group = kernel.group if near else last.group
            last = None
        position += kernel.parts


class Reader(NamedTuple):
    """A kernel that reads the mask: of which block, counted as they run, and between which nodes."""

    kernel: Kernel
    kind: str
    block: int
    first: int
    last: int


class Cluster:
    """Readers that are fused."""

    def __init__(self, reader: Reader) -> None:
        self.readers = [reader]
        self.first, self.last = reader.first, reader.last

    def blocks(self, *kinds: str) -> set[int]:
        return {reader.block for reader in self.readers if reader.kind in kinds}

    def distance(self, other: "Cluster | Reader") -> int:
        return max(abs(self.first - other.last), abs(other.first - self.last))

    def feeds(self, other: "Cluster") -> bool:
        """Whether rows that one makes are read by the other to make rows."""
        return bool(self.blocks(MAXIMUM) & other.blocks(SUM) or self.blocks(SUM) & other.blocks(MAXIMUM))

    def excludes(self, other: "Cluster") -> bool:
        """A block's backward needs its softmax, and the backward of the blocks that ran before; a softmax its rows,
        which are fused with it in the second round at most."""
        if self.blocks(MASKED) and other.blocks(MASKED):
            return True
        return any(
            one.blocks(MASKED) & two.blocks(*ROWS, SOFTMAX) or one.blocks(*ROWS) & two.blocks(SOFTMAX)
            for one, two in ((self, other), (other, self))
        )

    def join(self, other: "Cluster") -> None:
        self.readers += other.readers
        self.first, self.last = min(self.first, other.first), max(self.last, other.last)


def readers_of_mask(kernels: Iterable[Kernel]) -> list[Reader]:
    """In their order; what is fused from the start is one."""
    found: dict[str, Reader] = {}
    blocks: dict[str, int] = {}
    position = 0
    for kernel in kernels:
        place, _, kind = kernel.group.rpartition("/")
        if f"/{kind}" in (MAXIMUM, SUM, SOFTMAX, MASKED):
            block = blocks.setdefault(place, len(blocks))
            reader = Reader(kernel, f"/{kind}", block, position, position + kernel.parts - 1)
            found[kernel.group] = found[kernel.group]._replace(last=reader.last) if kernel.group in found else reader
        position += kernel.parts
    return list(found.values())


def fuse_softmaxes(kernels: list[Kernel]) -> None:
    """Gives kernels that read the mask of attention the group of those that they are fused with."""
    readers = readers_of_mask(kernels)
    clusters = [Cluster(reader) for reader in readers]
    of = list(clusters)
    pairs: list[tuple[bool, bool, int, int, int]] = []
    for i, one in enumerate(readers):
        for j in range(i + 1, len(readers)):
            other = readers[j]
            kinds = (one.kind, other.kind)
            distance = other.first - one.first
            if one.block != other.block and distance <= MAX_DISTANCE:
                unlike = (one.kind in ROWS) != (other.kind in ROWS)  # a reduction and what is none
                pairs.append((unlike, MASKED in kinds, distance, i, j))
    for *_, i, j in sorted(pairs):
        one, other = of[i], of[j]
        near = one.distance(other) <= MAX_DISTANCE or one.feeds(other)
        if one is not other and near and not one.excludes(other) and not in_a_circle(readers, of, one, other):
            join(one, other, of)
    for i, one in enumerate(readers):  # the second round: a block's own
        for j, other in enumerate(readers):
            if one.block == other.block and one.kind == MAXIMUM and other.kind == SUM and of[i] is not of[j]:
                join(of[i], of[j], of)
    for chain in {id(one): one for one in of if one.blocks(MAXIMUM)}.values():
        joins_softmax(chain, of)
    names: dict[str, str] = {}
    for cluster in of:
        for reader in cluster.readers:
            names[reader.kernel.group] = cluster.readers[0].kernel.group
    for kernel in kernels:
        kernel.group = names.get(kernel.group, kernel.group)


def in_a_circle(readers: list[Reader], of: list[Cluster], one: Cluster, other: Cluster) -> bool:
    """Whether, with these two fused, kernels would wait for each other (will_fusion_create_cycle)."""
    cluster_of = {
        (reader.kind, reader.block): id(one if cluster is other else cluster)
        for reader, cluster in zip(readers, of, strict=True)
    }
    needs: dict[int, set[int]] = {}
    above = 0  # the masked scores of the block before
    for (kind, block), cluster in sorted(cluster_of.items(), key=lambda item: item[0][1]):
        before = {MAXIMUM: (), SUM: (MAXIMUM,), SOFTMAX: (MAXIMUM, SUM), MASKED: (SOFTMAX,)}[kind]
        found = {cluster_of.get((name, block), 0) for name in before} | ({above} if kind == MASKED else set[int]())
        needs.setdefault(cluster, set()).update(found - {0, cluster})
        above = cluster if kind == MASKED else above
    while needs:
        free = {cluster for cluster, before in needs.items() if not before & needs.keys()}
        if not free:
            return True
        needs = {cluster: before for cluster, before in needs.items() if cluster not in free}
    return False


def joins_softmax(chain: Cluster, of: list[Cluster]) -> None:
    """The kernel of rows takes in one more, which reads most of them, and of those the nearest: it is a nest of loops
    then, with which nothing is fused."""
    fitting = [one for one in of if one is not chain and one.blocks(SOFTMAX) & chain.blocks(MAXIMUM)]
    fitting = [one for one in fitting if not one.blocks(MASKED)]
    if fitting:
        best = min(fitting, key=lambda one: (-len(one.blocks(SOFTMAX)), chain.distance(one)))
        join(chain, best, of)


def join(one: Cluster, other: Cluster, of: list[Cluster]) -> None:
    one.join(other)
    of[:] = [one if cluster is other else cluster for cluster in of]
