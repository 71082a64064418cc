"""Which nodes inductor fuses into one kernel, and in which order the kernels stand.

A miniature of torch 2.13's scheduler (torch/_inductor/scheduler.py, fuse_nodes; choices.py, score_fusion) with the
terms of its CPU backend (torch/_inductor/codegen/cpp.py, CppScheduling): pairs that share most bytes first, of those
the nearest; rounds until nothing is fused any more. Nests of loops, a sum and what reads it row by row, come after all
else.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from gptfit.memory.compiled_loops import Dep, Node
from gptfit.memory.compiled_views import Buffer
from gptfit.memory.tape import DTYPE_BYTES

# torch/_inductor/config.py: max_fusion_size, max_fusion_buffer_group_pairwise_attempts, score_fusion_memory_threshold,
# cpp.max_horizontal_fusion_size; scheduler.py: are_long_distant_nodes, can_fusion_increase_peak_memory.
MOST_NODES, MOST_PAIRS, LEAST_BYTES, MOST_SIDE_BY_SIDE, MAX_DISTANCE, BYTES_FACTOR = 64, 64, 10, 16, 64, 32


class Group:
    """Fused nodes, or one. Sets of nodes are bits of a number. `outer`: the kernels in a nest of loops, which share
    their outermost `depth` loops."""

    __slots__ = ("above", "bits", "calls", "depth", "first", "last", "names", "needs", "nodes", "outer", "reads",
                 "sums", "touches", "vars", "writes")  # fmt: skip

    def __init__(
        self, nodes: Sequence[Node], parts: "Sequence[Group]", outer: "tuple[Group, ...]" = (), depth: int = 0
    ) -> None:
        self.nodes, self.outer, self.depth = tuple(nodes), outer, depth
        self.calls = nodes[0].calls
        self.bits = self.above = 0
        for part in parts:
            self.bits |= part.bits
            self.above |= part.above
        self.first = min((part.first for part in parts), default=0)
        self.last = max((part.last for part in parts), default=0)
        self.writes = {dep: None for node in nodes for dep in node.writes}
        self.reads = {dep: None for node in nodes for dep in node.reads if dep not in self.writes}
        self.touches = {**self.reads, **self.writes}
        self.names = {buffer.name for node in nodes for buffer in node.makes}
        self.needs = {name for node in nodes for name in node.needs} - self.names
        leader = max(nodes, key=lambda node: bool(node.sums))
        self.vars, self.sums = leader.vars, leader.sums

    @property
    def sums_up(self) -> bool:
        return any(node.sums for node in self.nodes)

    def ranges(self) -> set[tuple[int, ...]]:
        return {tuple(math.prod(dim) for dim in node.dims) for node in self.nodes}


class Scheduler:
    """Fuses `nodes`; `outputs` are names of buffers that are handed out."""

    def __init__(self, nodes: Sequence[Node], buffers: Mapping[str, Buffer], outputs: Iterable[str]) -> None:
        self.buffers = buffers
        self.groups: list[Group] = []
        self.group_of: dict[int, Group] = {}
        self.maker: dict[str, int] = {}
        self.readers: defaultdict[str, list[Node]] = defaultdict(list)
        for node in nodes:
            for name in node.needs:
                self.readers[name].append(node)
        self.outputs = set(outputs)
        singles = [Group([node], []) for node in nodes]
        for group in singles:
            (node,) = group.nodes
            for buffer in node.makes:
                self.maker[buffer.name] = node.index
        singles = self.in_order(singles)
        for order, group in enumerate(singles):
            (node,) = group.nodes
            group.first = group.last = order
            group.bits = 1 << node.index
            for name in node.needs:
                if name in self.maker:
                    other = self.maker[name]
                    group.above |= 1 << other | self.group_of[other].above
            self.group_of[node.index] = group
        self.single = dict(self.group_of)
        self.groups = singles
        for _ in range(10):
            before = len(self.groups)
            self.groups = self.once(self.groups)
            if len(self.groups) in (before, 1):
                break

    # ---- order -------------------------------------------------------------------------------------------------------

    def in_order(self, groups: Sequence[Group]) -> list[Group]:
        """topological_sort_schedule: before each what it needs, by name."""
        makers = {name: group for group in groups for name in group.names}
        seen: set[int] = set()
        order: list[Group] = []
        for first in groups:
            stack = [(first, False)]
            while stack:
                group, ready = stack.pop()
                if ready:
                    order.append(group)
                elif id(group) not in seen:
                    seen.add(id(group))
                    stack.append((group, True))
                    needed = [makers[name] for name in sorted(group.needs, reverse=True) if name in makers]
                    stack += [(other, False) for other in needed if id(other) not in seen]
        return order

    # ---- pairs -------------------------------------------------------------------------------------------------------

    def once(self, groups: list[Group]) -> list[Group]:
        by_name: dict[str, list[Group]] = {}
        for group in groups:
            if not group.calls:
                for name in dict.fromkeys(dep.name for dep in group.touches):
                    by_name.setdefault(name, []).append(group)
        possible: list[tuple[Group, Group]] = []
        seen: set[tuple[int, int]] = set()
        for near in by_name.values():
            for i, one in enumerate(near):
                for other in near[i + 1 : i + 1 + MOST_PAIRS]:
                    key = (id(one), id(other))
                    if key not in seen:
                        seen.add(key)
                        if self.can_fuse(one, other):
                            possible.append((one, other))
        inner = [pair for pair in possible if not self.nests(*pair)]
        possible = sorted(inner or possible, key=lambda pair: self.score(*pair), reverse=True)
        for one, other in possible:
            one, other = self.group_of[one.nodes[0].index], self.group_of[other.nodes[0].index]
            if one is not other and self.can_fuse(one, other) and not self.in_a_circle(one, other):
                self.fuse(one, other)
        left = {id(group): group for group in (self.group_of[group.nodes[0].index] for group in groups)}
        return self.in_order(sorted(left.values(), key=lambda group: group.first))

    def bytes_of(self, dep: Dep) -> int:
        return dep.n * DTYPE_BYTES[self.buffers[dep.name].dtype]

    def shared(self, one: Group, other: Group) -> int:
        if len(one.touches) > len(other.touches):
            one, other = other, one
        return sum(self.bytes_of(dep) for dep in one.touches if dep in other.touches)

    @staticmethod
    def distance(one: Group, other: Group) -> int:
        return max(abs(one.first - other.last), abs(other.first - one.last))

    def score(self, one: Group, other: Group) -> tuple[bool, int, int]:
        n_bytes = self.shared(one, other)
        return one.sums_up == other.sums_up and n_bytes > 0, n_bytes, -self.distance(one, other)

    def can_fuse(self, one: Group, other: Group) -> bool:
        if one.calls or other.calls or other.bits & one.above:
            return False
        n_bytes = self.shared(one, other)
        n_nodes = len(one.nodes) + len(other.nodes)
        if not n_bytes or n_nodes > MOST_NODES or self.raises_peak(one, other, n_bytes):
            return False
        if one.bits & other.above:
            fits = (self.alike(one, other) and not one.sums_up) or self.nests(one, other)
            return fits and self.reads_what_is_written(one, other)
        near = n_bytes >= LEAST_BYTES and self.distance(one, other) <= MAX_DISTANCE
        return near and n_nodes <= MOST_SIDE_BY_SIDE and self.alike(one, other)

    def raises_peak(self, one: Group, other: Group, n_bytes: int) -> bool:
        """Whether each could take the place of what it alone reads, and the other could not (as torch guesses)."""
        keys = [
            {
                (buffer.dtype, math.prod(buffer.shape))
                for buffer in (self.buffers[dep.name] for dep in group.reads if dep.name in self.maker)
                if len(self.readers[buffer.name]) + (buffer.name in self.outputs) == 1
            }
            for group in (one, other)
        ]
        return sum(n for _, n in keys[0] & keys[1]) > BYTES_FACTOR * n_bytes

    def reads_what_is_written(self, one: Group, other: Group) -> bool:
        """Whether the other reads as the first writes, and needs nothing that comes between."""
        read = {dep for node in other.nodes for dep in node.reads}
        left = {
            dep.name for dep in read if dep.name in self.maker and dep.name not in other.names and dep not in one.writes
        }
        left |= {name for name in other.needs if name in self.maker and name not in {dep.name for dep in read}}
        if left & one.names:
            return False
        return not any(one.bits & self.group_of[self.maker[name]].above for name in left)

    # ---- the CPU backend ---------------------------------------------------------------------------------------------

    def alike(self, one: Group, other: Group) -> bool:
        """Whether both are one nest of loops, or a sum runs through what the other computes."""
        if one.outer or other.outer:
            return False
        if one.vars == other.vars and one.sums == other.sums:
            return True
        if not one.sums and one.vars == (*other.vars, *other.sums):
            return True
        return self.made_alike(one, other)

    @staticmethod
    def made_alike(one: Group, other: Group) -> bool:
        """Loops that were written alike, and merged in one of them alone."""
        if (
            one.sums
            or other.sums
            or math.prod(one.vars) != math.prod(other.vars)
            or 1 not in (len(one.vars), len(other.vars))
        ):
            return False
        short, long = (one, other) if len(one.vars) < len(other.vars) else (other, one)
        return len(short.nodes) == 1 and len(long.ranges()) == 1 and short.ranges() == long.ranges()

    def nests(self, one: Group, other: Group) -> bool:
        if not one.bits & other.above or (self.alike(one, other) and not one.sums_up):
            return False
        return self.shared_loops(one, other) >= 1

    @staticmethod
    def shared_loops(one: Group, other: Group) -> int:
        """How many outermost loops both have in common."""
        last, first = (one.outer or (one,))[-1], (other.outer or (other,))[0]
        if not last.vars and not first.vars and last.sums and first.sums:
            return 0
        if one.outer and other.outer:
            return one.depth if one.depth == other.depth else 0
        depth = min(len(last.vars), len(first.vars))
        if depth < 1 or last.vars[:depth] != first.vars[:depth]:
            return 0
        nest = one if one.outer else other if other.outer else None
        return depth if nest is None or nest.depth == depth else 0

    def fuse(self, one: Group, other: Group) -> None:
        nodes = (*one.nodes, *other.nodes)
        if self.nests(one, other):
            outer = (one.outer or (one,)) + (other.outer or (other,))
            made = Group(nodes, (one, other), outer, self.shared_loops(one, other))
        else:
            if not (one.outer or other.outer) and one.vars != other.vars and self.made_alike(one, other):
                short, long = (one, other) if len(one.vars) < len(other.vars) else (other, one)
                for node in short.nodes:
                    node.vars = long.vars
            made = Group(nodes, (one, other))
        for node in nodes:
            self.group_of[node.index] = made

    def in_a_circle(self, one: Group, other: Group) -> bool:
        """will_fusion_create_cycle: whether a path leads from one to the other through what else was fused."""
        both = one.bits | other.bits
        above = (one.above | other.above) & ~both
        seen: set[int] = set()
        stack = list(self.groups_in(above))
        while stack:
            group = stack.pop()
            if len(group.nodes) == 1 or id(group) in seen:
                continue
            seen.add(id(group))
            if not group.bits & ~above:
                continue
            if both & group.above:
                return True
            stack += self.groups_in(group.above & ~above)
        return False

    def groups_in(self, bits: int) -> Iterable[Group]:
        found: dict[int, Group] = {}
        while bits:
            low = bits & -bits
            group = self.group_of[low.bit_length() - 1]
            found[id(group)] = group
            bits &= ~(low | group.bits)
        return found.values()
