"""Which kernels of a lean backward inductor makes one: sums of the stream and what norms make of them, and gradients of
norms' parameters. Those that share most bytes first, then the nearest (torch/_inductor/scheduler.py, fuse_nodes)."""

from collections.abc import Iterable
from dataclasses import dataclass

from gptfit.memory.compiled_plan import Kernel, Slot
from gptfit.memory.compiled_schedule import MAX_DISTANCE


def loops_of(kernel: Kernel, positions: str) -> str:
    """In which loops it runs: a flat one, over all numbers; one over rows, where it reads what a row has one of; or
    over sequences as well, where it reads `positions`, which are the same for each."""
    of_rows = "" if "/x at " in kernel.writes[0] else "rows"
    return of_rows + ("sequences" if positions and positions in kernel.reads else "")


@dataclass(slots=True)
class Fused:
    """Kernels of one group, from node `first` to `last`."""

    kernels: list[Kernel]
    first: int
    last: int
    loops: str

    def distance(self, other: "Fused") -> int:
        return max(abs(self.first - other.last), abs(other.first - self.last))

    def names(self) -> set[str]:
        return {name for kernel in self.kernels for name in (*kernel.reads, *kernel.writes)}

    def fits(self, other: "Fused") -> bool:
        """In loops alike; one flat loop alone can be written as any other, but not if something is fused already
        (torch/_inductor/codegen/cpp.py, _can_fuse_nodes_with_compatible_ranges)."""
        alone = any(not one.loops and len(one.kernels) == 1 for one in (self, other))
        return self.distance(other) <= MAX_DISTANCE and (self.loops == other.loops or alone)

    def join(self, other: "Fused") -> None:
        for kernel in other.kernels:
            kernel.group = self.kernels[0].group
        self.kernels += other.kernels
        self.first, self.last = min(self.first, other.first), max(self.last, other.last)
        self.loops = self.loops or other.loops


def fuse_alike(kernels: list[Kernel], slots: dict[str, Slot], kind: str, positions: str = "", first: str = "") -> None:
    """Makes one of kernels of groups that end in `kind`, or of the group `first`, those first that share most bytes,
    then the nearest (torch/_inductor/scheduler.py, fuse_nodes). Nothing that they are made of is made of them."""
    groups: dict[str, Fused] = {}
    position = 0
    for kernel in kernels:
        last = position + kernel.parts - 1
        if kernel.group in groups:
            groups[kernel.group].kernels.append(kernel)
            groups[kernel.group].last = last
        elif kernel.group.endswith(kind) or (first and kernel.group == first):
            groups[kernel.group] = Fused([kernel], position, last, loops_of(kernel, positions))
        position += kernel.parts
    while True:
        found = list(groups.values())
        pairs: list[tuple[int, int, int, int]] = []
        for i, one in enumerate(found):
            for j in range(i + 1, len(found)):
                shared = sum(slots[name].n_bytes for name in one.names() & found[j].names() if name in slots)
                if shared and one.fits(found[j]):
                    pairs.append((-shared, one.distance(found[j]), i, j))
        if not pairs:
            return
        of = list(found)
        for *_, i, j in sorted(pairs):
            one, other = of[i], of[j]
            if one is not other and one.fits(other):
                one.join(other)
                of = [one if each is other else each for each in of]
        groups = {each.kernels[0].group: each for each in of}


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
