"""In which order inductor runs the kernels of a graph.

torch 2.13 takes them as they were written, or as one of three sorts puts them, whichever needs least at its peak, as it
estimates that (torch/_inductor/memory.py, reorder_for_peak_memory). What is kept from forward counts until its last
reader has run.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from heapq import heappop, heappush

from gptfit.memory.compiled_plan import GIVEN, OUTPUT, SAVED, Kernel, Slot


class Graph:
    """Who makes and who reads what. `hidden`: bytes that come or go once a kernel has run, and are none of its."""

    def __init__(self, kernels: Sequence[Kernel], slots: Mapping[str, Slot], hidden: Mapping[int, int]) -> None:
        self.kernels = kernels
        self.slots = slots
        self.hidden = hidden
        self.maker = {name: index for index, kernel in enumerate(kernels) for name in kernel.writes}
        self.readers: defaultdict[str, list[int]] = defaultdict(list)
        self.reads = [[name for name in dict.fromkeys(kernel.reads) if name not in kernel.writes] for kernel in kernels]
        for index, names in enumerate(self.reads):
            for name in names:
                self.readers[name].append(index)
        self.size = [
            sum(slots[name].n_bytes for name in kernel.writes) if kernel.alloc < 0 else kernel.alloc
            for kernel in kernels
        ]
        self.before = [sorted({self.maker[name] for name in names if name in self.maker}) for names in self.reads]
        self.after: list[list[int]] = [[] for _ in kernels]
        for index, makers in enumerate(self.before):
            for one in makers:
                self.after[one].append(index)
        self.kept = [name for name in self.readers if slots[name].kind in (SAVED, GIVEN)]

    def goes(self, name: str) -> bool:
        return self.slots[name].kind != OUTPUT

    def peak_bytes(self, order: Sequence[int], at_start: int) -> int:
        """The estimate for an order."""
        step_of = {index: step for step, index in enumerate(order)}
        change = [0] * (len(order) + 1)
        for name in self.kept:
            change[max(step_of[reader] for reader in self.readers[name]) + 1] -= self.slots[name].n_bytes
        for step, index in enumerate(order):
            change[step] += self.size[index] + self.kernels[index].inside
            change[step + 1] += self.hidden.get(index, 0) - self.kernels[index].inside
            for name in self.kernels[index].writes:
                if self.goes(name):
                    last = max((step_of[reader] for reader in self.readers[name]), default=step)
                    change[last + 1] -= self.slots[name].n_bytes
        alive = peak = at_start + sum(self.slots[name].n_bytes for name in self.kept)
        for one in change:
            alive += one
            peak = max(peak, alive)
        return peak


def reordered(
    kernels: list[Kernel], slots: Mapping[str, Slot], hidden: Mapping[int, int], saved_bytes: int, output_bytes: int
) -> list[Kernel]:
    """The kernels as inductor runs them. `saved_bytes` and `output_bytes`: what rounds that one stands for keep and
    hand out."""
    graph = Graph(kernels, slots, hidden)
    orders = (
        list(range(len(kernels))),
        least_peak_first(graph, saved_bytes, output_bytes),
        breadth_first(graph),
        depth_first(graph),
    )
    best = min(orders, key=lambda order: graph.peak_bytes(order, saved_bytes))
    return [kernels[index] for index in best]


def least_peak_first(graph: Graph, saved_bytes: int, output_bytes: int) -> list[int]:
    """topological_sort_lpmf: of the kernels that can run, one that stays below the peak so far and leaves least."""
    slots, size = graph.slots, graph.size
    left = {name: len(readers) for name, readers in graph.readers.items()}
    frees = [
        sum(slots[name].n_bytes for name in names if left[name] == 1 and graph.goes(name))
        + sum(slots[name].n_bytes for name in kernel.writes if name not in left and graph.goes(name))
        for kernel, names in zip(graph.kernels, graph.reads, strict=True)
    ]
    alive = saved_bytes + sum(slots[name].n_bytes for name in graph.kept)
    peak = max(alive, output_bytes + sum(slots[name].n_bytes for name in graph.maker if not graph.goes(name)))
    waits = [len(makers) for makers in graph.before]
    ready = {index for index, n in enumerate(waits) if n == 0}
    order: list[int] = []
    while ready:
        gap = peak - alive
        chosen = min(ready, key=lambda i: (size[i] if size[i] > gap else 0, size[i] - frees[i], i))
        ready.remove(chosen)
        order.append(chosen)
        alive += size[chosen]
        peak = max(peak, alive)
        alive += graph.hidden.get(chosen, 0) - frees[chosen]
        ready.update(freed(graph.after[chosen], waits))
        for name in graph.reads[chosen]:
            left[name] -= 1
            if left[name] == 1 and graph.goes(name):
                for reader in graph.readers[name]:
                    frees[reader] += slots[name].n_bytes
    return order


def freed(followers: Iterable[int], waits: list[int]) -> list[int]:
    """Those that wait for nothing any more."""
    found = []
    for one in followers:
        waits[one] -= 1
        if waits[one] == 0:
            found.append(one)
    return found


def breadth_first(graph: Graph) -> list[int]:
    """topological_sort_bfs: what follows the kernels that ran first."""
    waits = [len(makers) for makers in graph.before]
    heap: list[tuple[list[int], int]] = [([], index) for index, n in enumerate(waits) if n == 0]
    step_of: dict[int, int] = {}
    while heap:
        _, index = heappop(heap)
        step_of[index] = len(step_of)
        for one in freed(graph.after[index], waits):
            heappush(heap, (sorted(step_of[maker] for maker in graph.before[one]), one))
    return list(step_of)


def depth_first(graph: Graph) -> list[int]:
    """topological_sort_dfs: what writes and reads least, and before each what it reads."""
    size = [
        n_bytes + sum(graph.slots[name].n_bytes for name in names)
        for n_bytes, names in zip(graph.size, graph.reads, strict=True)
    ]
    order: dict[int, None] = {}
    seen: set[int] = set()

    def by_size(indices: Iterable[int]) -> list[int]:
        return sorted(indices, key=lambda i: (size[i], i))

    for first in by_size(range(len(size))):
        stack: list[tuple[int, bool]] = [(first, False)]
        while stack:
            index, done = stack.pop()
            if done:
                order[index] = None
            elif index not in seen:
                seen.add(index)
                stack.append((index, True))
                stack += [(one, False) for one in reversed(by_size(graph.before[index])) if one not in seen]
    return list(order)
