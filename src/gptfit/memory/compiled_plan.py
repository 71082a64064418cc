"""From a list of kernels to the memory that inductor's wrapper takes for it: order, lifetimes, reuse of buffers.

A miniature of what torch 2.13 does between fusion and code: fused kernels are sorted so that each stands where its
first part stood, with what it needs before it (torch/_inductor/scheduler.py, topological_sort_schedule); a buffer is
let go of after its last reader, and the next of the same size takes its place, unless that would raise the peak of
the whole graph (torch/_inductor/codegen/wrapper.py, AllocateLine.should_reuse_buffer). On a CPU kernels between two
calls of libraries are one function, whose arguments are let go of when it is called.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from gptfit.memory.tape import DTYPE_BYTES

# What may become of a buffer: it is made and dropped here; handed out at the end; kept from forward; made by an op of
# torch itself, in memory of its own; or handed in, which inductor does not count.
TEMPORARY, OUTPUT, SAVED, FRESH, GIVEN = "temporary", "output", "saved", "fresh", "given"
LIBRARY = "library"  # as FRESH, of inputs whose alignment is known: another may take its place


# torch/_inductor/config.py: padding_alignment_bytes, and padding_stride_threshold in elements.
ROW_ALIGNMENT_BYTES = 128
PADDED_FROM = 1024


def length_in_lines(shape: Sequence[int], dtype: str) -> int:
    """Elements that a kernel's output of three dimensions or more spans: its long strides are whole lines
    (torch/_inductor/ir.py, Layout._pad_strides)."""
    aligned = ROW_ALIGNMENT_BYTES // DTYPE_BYTES[dtype]
    stride = length = 1
    for size in reversed(shape):
        length += (size - 1) * stride
        stride *= size
        if stride > PADDED_FROM and len(shape) > 2:
            stride = -(-stride // aligned) * aligned
    return length


class Slot(NamedTuple):
    """A buffer: `n_bytes` and `dtype` say whose place it can take; `whole` is the buffer that it is a part of."""

    n_bytes: int
    dtype: str
    kind: str = TEMPORARY
    whole: str = ""


@dataclass(slots=True)
class Kernel:
    """What one kernel writes and reads. `extern`: a call of a library. `places`: which of its inputs an output may
    overwrite. `inside` is scratch that is counted and never made; kernels of one `group` are fused. `parts`: how many
    nodes of inductor's graph it is, before any are fused."""

    writes: tuple[str, ...]
    reads: tuple[str, ...]
    extern: bool = False
    places: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    inside: int = 0
    group: str = ""
    parts: int = 1
    absent: frozenset[str] = frozenset()  # of what it writes, what is never in memory, though it is counted
    ahead: tuple[str, ...] = ()  # what its call makes, which later kernels only take out
    alloc: int = -1  # bytes that it is counted with, where they are not those that it writes


class Step(NamedTuple):
    """One allocation or free, `name` that of a buffer; `kernel` is the position in the order."""

    sign: int
    name: str
    kernel: int


def fused(kernels: Iterable[Kernel]) -> list[Kernel]:
    """Kernels of one group made one, in the order in which they can run."""
    merged: dict[str, Kernel] = {}
    found: list[Kernel] = []
    for kernel in kernels:
        if kernel.group and kernel.group in merged:
            one = merged[kernel.group]
            one.writes += kernel.writes
            one.reads += tuple(name for name in kernel.reads if name not in one.reads)
            one.inside += kernel.inside
            one.places = {**one.places, **kernel.places}
            continue
        if kernel.group:
            merged[kernel.group] = kernel
        found.append(kernel)
    return sorted_by_need(found)


def sorted_by_need(kernels: list[Kernel]) -> list[Kernel]:
    """Each in its place, and before it what it needs: depth first."""
    makers = {name: kernel for kernel in kernels for name in kernel.writes}
    seen: set[int] = set()
    order: list[Kernel] = []
    for first in kernels:
        stack: list[tuple[Kernel, bool]] = [(first, False)]
        while stack:
            kernel, ready = stack.pop()
            if ready:
                order.append(kernel)
            elif id(kernel) not in seen:
                seen.add(id(kernel))
                stack.append((kernel, True))
                needed = [makers[name] for name in kernel.reads if name in makers]
                stack += [(other, False) for other in reversed(needed) if other is not kernel]
    return order


class Plan:
    """The steps of `kernels` in their order. Buffers that are kept from forward are there at the start. `unseen`: bytes
    that are alive from one kernel to before another, and are none of their buffers."""

    def __init__(
        self, kernels: list[Kernel], slots: Mapping[str, Slot], unseen: Iterable[tuple[int, int, int]] = ()
    ) -> None:
        self.kernels = kernels
        self.slots = slots
        self.last: dict[str, int] = {name: index for index, kernel in enumerate(kernels) for name in kernel.writes}
        self.last |= {name: index for index, kernel in enumerate(kernels) for name in kernel.reads}
        self.whole_last()
        self.live = self.live_bytes()
        for start, stop, n_bytes in unseen:
            for index in range(start, stop):
                self.live[index] += n_bytes
        self.peak_bytes = max(self.live, default=0)
        self.steps: list[Step | None] = []
        self.pool: dict[tuple[int, str], list[tuple[str, int, int]]] = {}
        self.storage: dict[str, str] = {}
        self.overwritten: set[str] = set()
        self.pending: list[int] = []
        self.held_by = {item: kernel.writes[0] for kernel in kernels for item in kernel.ahead}  # the tuple of a call
        self.held: dict[str, list[str]] = {}
        for index, kernel in enumerate(kernels):
            self.run(index, kernel)
        self.flush(len(kernels))

    def whole_last(self) -> None:
        """A buffer of parts lives until the last of them is read."""
        for name, slot in self.slots.items():
            if slot.whole and name in self.last:
                self.last[slot.whole] = max(self.last.get(slot.whole, 0), self.last[name])

    def size(self, kernel: Kernel) -> int:
        return sum(self.slots[name].n_bytes for name in kernel.writes) if kernel.alloc < 0 else kernel.alloc

    def live_bytes(self) -> list[int]:
        """Bytes at each kernel, as inductor estimates them: parts and whole are both counted."""
        delta = [0] * (len(self.kernels) + 1)
        for name, last in self.last.items():
            slot = self.slots[name]
            if slot.kind == SAVED:
                delta[0] += slot.n_bytes
            if slot.kind not in (OUTPUT, GIVEN):
                delta[last + 1] -= slot.n_bytes
        for index, kernel in enumerate(self.kernels):
            delta[index] += self.size(kernel) + kernel.inside
            delta[index + 1] -= kernel.inside
        live, total = [], 0
        for change in delta[:-1]:
            total += change
            live.append(total)
        return live

    # ---- the wrapper --------------------------------------------------------------------------------------------

    def run(self, index: int, kernel: Kernel) -> None:
        if kernel.extern:
            self.flush(index - 1)
        absent = kernel.absent - self.written_over(index, kernel) if kernel.absent else kernel.absent
        for name in (*kernel.writes, *kernel.ahead):
            if name not in absent:
                self.allocate(name, index, kernel)
        self.pending.append(index)
        if kernel.extern:
            self.flush(index)

    def allocate(self, name: str, index: int, kernel: Kernel) -> None:
        slot = self.slots[name]
        if slot.whole:
            name, slot = slot.whole, self.slots[slot.whole]
        if name in self.storage:
            return
        source = self.place_of(name, index, kernel)
        if source is not None:
            self.storage[name] = self.storage.pop(source, source)
            self.overwritten.add(source)
            return
        self.storage[name] = name
        if slot.kind not in (FRESH, LIBRARY) and slot.n_bytes:
            free = self.reusable(slot, index)
            if free is not None:
                freed, position, _ = free
                self.steps[position] = None
                if slot.kind != OUTPUT:
                    self.storage[name] = freed
                    return
                self.steps.append(Step(-1, freed, index))
        self.steps.append(Step(1, name, index))

    def written_over(self, index: int, kernel: Kernel) -> set[str | None]:
        """What is in memory after all, as what is written over it stays."""
        return {self.place_of(name, index, kernel) for name in kernel.places if name not in kernel.absent}

    def place_of(self, name: str, index: int, kernel: Kernel) -> str | None:
        """The first of the inputs that `name` may overwrite which nothing reads any more."""
        for source in kernel.places.get(name, ()):
            if self.last[source] == index and self.may_overwrite(source, self.slots[name]):
                return source
        return None

    def may_overwrite(self, source: str, slot: Slot) -> bool:
        """Also what forward kept, which nobody else has (torch/_functorch/config.py, donated_buffer)."""
        there = self.slots[source]
        fits = there.kind in (TEMPORARY, SAVED) and (there.n_bytes, there.dtype) == (slot.n_bytes, slot.dtype)
        return fits and not there.whole and source not in self.overwritten

    def reusable(self, slot: Slot, index: int) -> tuple[str, int, int] | None:
        """The last buffer of this size that was let go of, if holding it until now raises no peak."""
        free = self.pool.get((slot.n_bytes, slot.dtype))
        if not free:
            return None
        start = free[-1][2] + 1
        if start != index:
            if max(self.live[start:index], default=0) + slot.n_bytes > self.peak_bytes:
                return None
            for between in range(start, index):
                self.live[between] += slot.n_bytes
        return free.pop()

    def flush(self, now: int) -> None:
        """Lets go of what the kernels since the last call were the last to read, by name (free_buffers)."""
        gone: dict[str, int] = {}
        for index in self.pending:
            kernel = self.kernels[index]
            for name in dict.fromkeys((*kernel.writes, *kernel.reads)):
                whole = self.slots[name].whole or name
                if self.last[whole] == index:
                    gone.setdefault(whole, index)
        for name in sorted(gone, key=lambda name: name if name.startswith("buf") else ""):
            self.let_go(name, gone[name], now)
        self.pending.clear()

    def let_go(self, name: str, index: int, now: int) -> None:
        slot = self.slots[name]
        if slot.kind == OUTPUT or name in self.overwritten:
            return
        if slot.kind in (SAVED, GIVEN):
            self.steps.append(Step(-1, name, index))
        elif self.held_by.get(name) in self.storage:
            self.held.setdefault(self.held_by[name], []).append(name)
        elif name in self.storage:
            storage = self.storage.pop(name)
            donated = self.slots[storage].kind == SAVED  # no one takes its place again
            if slot.kind != FRESH and not donated:  # the alignment of what is fresh is not known
                self.pool.setdefault((slot.n_bytes, slot.dtype), []).append((storage, len(self.steps), now))
            self.steps.append(Step(-1, storage, index))
            for one in self.held.pop(name, ()):
                self.let_go(one, index, now)
