"""The kernels of a schedule, as inductor plans memory for them: sizes, lifetimes, and what overwrites what."""

import math
from collections.abc import Mapping, Sequence

from gptfit.memory.compiled_graph import ATTENTION, ATTENTION_BACKWARD, ITEM, SCATTER, contiguous
from gptfit.memory.compiled_loops import Dep, Node
from gptfit.memory.compiled_lowering import Lowering
from gptfit.memory.compiled_plan import FRESH, GIVEN, OUTPUT, SAVED, TEMPORARY, Kernel, Slot, length_in_lines
from gptfit.memory.compiled_schedule import Group, Scheduler
from gptfit.memory.compiled_views import Buffer
from gptfit.memory.tape import DTYPE_BYTES


def size_of(buffer: Buffer) -> int:
    return math.prod(buffer.shape) * DTYPE_BYTES[buffer.dtype]


class Listed:
    """Kernels and slots of what `lowering` made, fused. `saved` are the inputs that backward lets go of."""

    def __init__(self, lowering: Lowering, saved: set[str]) -> None:
        self.lowering = lowering
        self.saved = saved
        self.outputs = set(lowering.named.values())
        self.schedule = Scheduler(lowering.nodes, lowering.buffers, self.outputs)
        self.slots = {name: self.slot(buffer) for name, buffer in lowering.buffers.items()}
        self.kernels = [self.kernel(group) for group in self.schedule.groups]
        self.read_sizes()

    def slot(self, buffer: Buffer) -> Slot:
        name, lowering = buffer.name, self.lowering
        if name in self.schedule.maker:
            kind = OUTPUT if name in self.outputs else TEMPORARY
            if any(item.name == name for item in lowering.items.values()):
                kind = FRESH
            changed = lowering.nodes[self.schedule.maker[name]].op.kind == SCATTER  # a table that is there already
            n_bytes = 0 if changed else size_of(buffer)
            return Slot(n_bytes, self.place_of(buffer, kind), kind, lowering.whole_of.get(name, ""))
        whole = lowering.whole_of.get(name, "")
        kind = SAVED if name in self.saved or whole in self.saved else GIVEN
        return Slot(0, buffer.dtype, kind, whole)  # what is read of it is counted later

    def place_of(self, buffer: Buffer, kind: str) -> str:
        """The dtype; padding no one counts, but the place of what has it can be taken by the like alone."""
        made_by = self.lowering.nodes[self.schedule.maker[buffer.name]]
        padded = length_in_lines(buffer.shape, buffer.dtype) != math.prod(buffer.shape)
        return f"{buffer.dtype} in lines" if padded and kind == TEMPORARY and not made_by.calls else buffer.dtype

    def read_sizes(self) -> None:
        """Of what was kept, inductor counts what the last kernel reads of it."""
        for group in self.schedule.groups:
            for node in group.nodes:
                for dep in node.reads:
                    self.count(dep.name, dep.n)
                if node.calls:
                    for name in node.needs:
                        self.count(name, math.prod(self.lowering.buffers[name].shape))

    def count(self, name: str, n: int) -> None:
        slot = self.slots[name]
        if slot.kind == SAVED:
            self.slots[name] = slot._replace(n_bytes=n * DTYPE_BYTES[slot.dtype])

    def kernel(self, group: Group) -> Kernel:
        (first, *_) = group.nodes
        made = Kernel(
            tuple(buffer.name for node in group.nodes for buffer in node.makes),
            tuple(dict.fromkeys(name for node in group.nodes for name in node.needs)),
            extern=first.calls and not first.no_kernel,
            parts=len(group.nodes),
        )
        if first.calls and first.op.kind in (ATTENTION, ATTENTION_BACKWARD):
            items = [buffer for (index, _), buffer in self.lowering.items.items() if index == first.op.index]
            made.ahead = tuple(item.name for item in items if item.name in self.schedule.maker)
            made.alloc = sum(size_of(self.lowering.buffers[name]) for name in made.ahead)
        elif first.op.kind == ITEM and first.calls:
            made.alloc = 0
        if not first.calls:
            in_passing = self.in_passing(group)
            made.absent = self.removable(group) | in_passing
            made.places = self.places(group, made.absent, in_passing)
        return made

    def removable(self, group: Group) -> frozenset[str]:
        """What its own kernel alone reads. It is never in memory, unless something that stays is written over it."""
        kernels = group.outer or (group,)
        return frozenset(name for one in kernels for name in one.names if self.is_read_within(name, one.nodes))

    def in_passing(self, group: Group) -> frozenset[str]:
        """What a nest of loops makes and reads row by row."""
        if not group.outer or not all(len(one.vars) + len(one.sums) == group.depth + 1 for one in group.outer):
            return frozenset()
        made = [buffer for node in group.nodes if not node.sums for buffer in node.makes]
        return frozenset(b.name for b in made if self.is_read_within(b.name, group.nodes) and self.lies_flat(b))

    def is_read_within(self, name: str, nodes: Sequence[Node]) -> bool:
        return name not in self.outputs and all(node in nodes for node in self.schedule.readers[name])

    def is_joined(self, name: str) -> bool:
        """Whether it is made of parts."""
        maker = self.schedule.maker.get(name)
        return maker is not None and self.lowering.nodes[maker].no_kernel

    def lies_flat(self, buffer: Buffer) -> bool:
        n = math.prod(buffer.shape)
        flat = Dep(buffer.name, 0, (((1,), (n,)),))
        touching = [self.lowering.nodes[self.schedule.maker[buffer.name]], *self.schedule.readers[buffer.name]]
        deps = [dep for node in touching for dep in (*node.reads, *node.writes) if dep.name == buffer.name]
        return buffer.strides == contiguous(buffer.shape) and all(dep == flat for dep in deps)

    def places(self, group: Group, absent: frozenset[str], but: frozenset[str]) -> Mapping[str, tuple[str, ...]]:
        """For each output the inputs that it may overwrite, in turn: read as it is written, and by no other node that
        may still have to run (SchedulerNode.decide_inplace_update); `but` these."""
        found: dict[str, tuple[str, ...]] = {}
        inside = {node.index for node in group.nodes}
        for node in group.nodes:
            (buffer,) = node.makes
            if buffer.name in absent or buffer.name in self.lowering.whole_of or node.op.kind == SCATTER:
                continue
            above = self.schedule.single[node.index].above
            (write,) = node.writes
            sources = []
            for dep in node.reads:
                others = [one for one in self.schedule.readers[dep.name] if one is not node]
                blocked = any(one.index in inside and not above >> one.index & 1 for one in others)
                alike = (dep.start, dep.loops) == (write.start, write.loops)
                again = {
                    one
                    for user in (node, *others)
                    if user.index in inside
                    for one in user.reads
                    if one.name == dep.name
                }
                fixed = dep.name in but or self.is_joined(dep.name)
                if alike and not blocked and len(again) == 1 and not fixed:
                    sources.append(dep.name)
            if sources:
                found[buffer.name] = tuple(sources)
        return found
