"""In which order inductor runs the kernels of a graph, and which of them share a buffer.

torch/_inductor/memory.py (reorder_for_peak_memory) takes the order as written or that of one of its sorts, whichever
has the lowest peak; torch/_inductor/codegen/wrapper.py (memory_plan_reuse) then gives a freed buffer to the next one of
its dtype and size, if it may lie idle in between without raising that peak. As of torch 2.13, CPU lowering, where
kernels that lie between two library calls are one, and let go of what they read together.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from gptfit.memory.tape import DTYPE_BYTES, Buffer, Event, make_buffer


class Made(NamedTuple):
    """What a kernel writes. It takes the place of the first buffer of its size in `over` that nothing else reads.

    What is `fresh` is made by the library itself, which asks nobody for a place; what is `unseen`, too, and nobody asks
    for it. A `part` lies within the buffer that is made of it; inductor counts both where it compares orders.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    category: str = "activation"
    over: tuple[str, ...] = ()
    fresh: bool = False
    unseen: bool = False
    part: bool = False

    @property
    def n_bytes(self) -> int:
        n = DTYPE_BYTES[self.dtype]
        for size in self.shape:
            n *= size
        return n


class Kernel(NamedTuple):
    """One kernel, or a call of a library: what it makes, and the names of what it reads."""

    makes: tuple[Made, ...]
    reads: tuple[str, ...]
    is_call: bool = False


class Uses:
    """Who makes and who reads what in a list of kernels."""

    def __init__(self, kernels: Sequence[Kernel], outputs: frozenset[str]) -> None:
        self.sizes = {made.name: 0 if made.unseen else made.n_bytes for kernel in kernels for made in kernel.makes}
        self.outputs = outputs
        self.readers: defaultdict[str, list[int]] = defaultdict(list)
        for index, kernel in enumerate(kernels):
            for name in set(kernel.reads):
                self.readers[name].append(index)

    def profile(self, kernels: Sequence[Kernel], order: Sequence[int]) -> list[int]:
        """Bytes alive at each kernel in that order, what it makes and reads included."""
        step_of = {index: step for step, index in enumerate(order)}
        change = [0] * (len(order) + 1)
        for step, index in enumerate(order):
            for made in kernels[index].makes:
                change[step] += self.sizes[made.name]
                if made.name not in self.outputs:
                    last = max((step_of[reader] for reader in self.readers.get(made.name, ())), default=step)
                    change[last + 1] -= self.sizes[made.name]
        alive, found = 0, []
        for one in change[:-1]:
            alive += one
            found.append(alive)
        return found


def in_order(kernels: Sequence[Kernel], outputs: frozenset[str]) -> list[Kernel]:
    """The kernels as inductor runs them."""
    uses = Uses(kernels, outputs)
    written = list(range(len(kernels)))
    orders = (written, greedy_order(kernels, uses), depth_first_order(kernels, uses))
    best = min(orders, key=lambda order: max(uses.profile(kernels, order)))
    return [kernels[index] for index in best]


def depth_first_order(kernels: Sequence[Kernel], uses: Uses) -> list[int]:
    """topological_sort_dfs: the kernels that write and read least first, before each what it reads."""
    maker = {made.name: index for index, kernel in enumerate(kernels) for made in kernel.makes}
    reads = [{name for name in kernel.reads if name in maker} for kernel in kernels]
    sizes = [
        sum(uses.sizes[made.name] for made in kernel.makes) + sum(uses.sizes[name] for name in names)
        for kernel, names in zip(kernels, reads, strict=True)
    ]
    order: dict[int, None] = {}
    seen: set[int] = set()

    def visit(index: int) -> None:
        if index not in seen:
            seen.add(index)
            for before in sorted({maker[name] for name in reads[index]}, key=lambda i: (sizes[i], i)):
                visit(before)
            order[index] = None

    for index in sorted(range(len(kernels)), key=lambda i: (sizes[i], i)):
        visit(index)
    return list(order)


def greedy_order(kernels: Sequence[Kernel], uses: Uses) -> list[int]:
    """topological_sort_lpmf: of the kernels that can run, one that stays below the peak so far and frees most."""
    maker = {made.name: index for index, kernel in enumerate(kernels) for made in kernel.makes}
    size = [sum(uses.sizes[made.name] for made in kernel.makes) for kernel in kernels]
    reads = [{name for name in kernel.reads if name in maker} for kernel in kernels]
    waits = [{maker[name] for name in names} for names in reads]
    left = Counter({name: len(uses.readers.get(name, ())) + (name in uses.outputs) for name in maker})
    frees = [
        sum(uses.sizes[name] for name in names if left[name] == 1)
        + sum(uses.sizes[made.name] for made in kernel.makes if left[made.name] == 0)
        for names, kernel in zip(reads, kernels, strict=True)
    ]
    followers: list[set[int]] = [set() for _ in kernels]
    for index, before in enumerate(waits):
        for one in before:
            followers[one].add(index)
    n_waiting = [len(before) for before in waits]
    ready = {index for index, n in enumerate(n_waiting) if n == 0}
    alive, peak = 0, sum(uses.sizes[name] for name in uses.outputs)
    order: list[int] = []
    while ready:
        gap = peak - alive
        chosen = min(ready, key=lambda i: (size[i] if size[i] > gap else 0, size[i] - frees[i], i))
        ready.remove(chosen)
        order.append(chosen)
        alive += size[chosen]
        peak = max(peak, alive)
        alive -= frees[chosen]
        for one in followers[chosen]:
            n_waiting[one] -= 1
            if n_waiting[one] == 0:
                ready.add(one)
        for name in reads[chosen]:
            left[name] -= 1
            if left[name] == 1:
                for reader in uses.readers[name]:
                    frees[reader] += uses.sizes[name]
    return order


class Place:
    """Memory that one buffer after the other lies in; `freed_at` is the kernel after which it was last let go."""

    def __init__(self, buffer: Buffer) -> None:
        self.buffer = buffer
        self.freed_at = -1
        self.last_free = -1  # position among the events


def planned(kernels: Sequence[Kernel], outputs: frozenset[str]) -> tuple[list[Event], dict[str, Buffer]]:
    """What these kernels, in the order given, allocate and free; and where the `outputs` lie, which stay."""
    uses = Uses(kernels, outputs)
    profile = uses.profile(kernels, range(len(kernels)))
    peak = max(profile)
    last = {name: max(readers) for name, readers in uses.readers.items()}
    places: dict[str, Place] = {}
    pool: defaultdict[tuple[str, int], list[Place]] = defaultdict(list)
    found: list[Event | None] = []
    waiting: list[str] = []  # to be let go when the kernels since the last call have run

    def flush(at: int) -> None:
        for name in waiting:
            place = places.pop(name, None)
            if place is not None:
                place.freed_at, place.last_free = at, len(found)
                found.append(Event(-1, place.buffer))
                if name not in unseen:
                    pool[keys[name]].append(place)
        waiting.clear()

    keys = {made.name: (made.dtype, made.n_bytes) for kernel in kernels for made in kernel.makes}
    unseen = {made.name for kernel in kernels for made in kernel.makes if made.unseen}
    for index, kernel in enumerate(kernels):
        if kernel.is_call:
            flush(index - 1)
        for made in kernel.makes:
            if made.part:
                continue
            key = keys[made.name]
            idle = pool[key]
            over = next((one for one in made.over if last[one] == index and one in places and keys[one] == key), "")
            if over:
                places[made.name] = places.pop(over)
            elif (
                not (made.fresh or made.unseen)
                and idle
                and may_wait(profile, idle[-1].freed_at, index, made.n_bytes, peak)
            ):
                place = places[made.name] = idle.pop()
                found[place.last_free] = None
                for step in range(place.freed_at + 1, index):
                    profile[step] += made.n_bytes
            else:
                place = places[made.name] = Place(make_buffer(made.name, made.category, made.shape, made.dtype))
                found.append(Event(1, place.buffer))
        gone = {*kernel.reads, *(made.name for made in kernel.makes)}
        waiting += sorted(name for name in gone if last.get(name, index) == index and name not in outputs)
        if kernel.is_call:
            flush(index)
    flush(len(kernels) - 1)
    return [event for event in found if event is not None], {name: places[name].buffer for name in outputs}


def may_wait(profile: list[int], freed_at: int, index: int, n_bytes: int, peak: int) -> bool:
    """Whether a place may lie idle between two kernels (should_reuse_buffer)."""
    return freed_at + 1 == index or max(profile[freed_at + 1 : index], default=0) + n_bytes <= peak
