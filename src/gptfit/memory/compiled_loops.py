"""The loops of a node that inductor schedules, and what they touch.

Loops over dimensions that lie together are merged, and run in the order in which most of what they touch lies
(torch/_inductor/ir.py of torch 2.13, simplify_and_reorder and get_fill_order; sizevars.py, _simplify_loops).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cmp_to_key
from typing import NamedTuple

from gptfit.memory.compiled_graph import Op, contiguous
from gptfit.memory.compiled_views import Buffer, Read


class Dep(NamedTuple):
    """What a node touches of a buffer, in a form that is the same wherever the same is touched: steps and sizes of its
    loops, merged where they lie together, those that it does not move in left out at the end."""

    name: str
    start: int
    loops: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]

    @property
    def n(self) -> int:
        return math.prod(math.prod(sizes) for steps, sizes in self.loops if any(steps))


@dataclass(slots=True)
class Node:
    """One node of the schedule. `dims` and `inner` are what it loops over and sums over; `ranges` the loops as they
    were written, `vars` and `sums` as they are run."""

    index: int
    makes: tuple[Buffer, ...]
    op: Op
    calls: bool = False
    no_kernel: bool = False
    dims: tuple[tuple[int, ...], ...] = ()
    inner: tuple[tuple[int, ...], ...] = ()
    touched: tuple[Read, ...] = ()  # by reading
    into: Read | None = None  # what it writes, where that is part of another buffer or of one that is there
    needs: tuple[str, ...] = ()  # names that it reads
    vars: tuple[int, ...] = ()
    sums: tuple[int, ...] = ()
    reads: tuple[Dep, ...] = ()  # in the order in which they are read
    writes: tuple[Dep, ...] = ()


Steps = tuple[tuple[int, ...], ...]  # for each dimension, those of its atoms


def steps_of(read: Read, dims: Sequence[tuple[int, ...]], strides: Sequence[int]) -> Steps:
    found, index = [], 0
    for dim in dims:
        moves = read.moves[index : index + len(dim)]
        found.append(tuple(step * strides[source] if source >= 0 else 0 for source, step in moves))
        index += len(dim)
    return tuple(found)


def loop_order(strides: Sequence[Sequence[int]], sizes: Sequence[int]) -> list[int]:
    """pick_loop_order (torch/_inductor/scheduler.py): the innermost first."""

    def compare(a: int, b: int) -> int:
        if sizes[a] == 1 or sizes[b] == 1:
            return (sizes[a] == 1) - (sizes[b] == 1)
        a_first = sum(s[b] == 0 or s[a] < s[b] for s in strides)
        b_first = sum(s[a] == 0 or s[b] < s[a] for s in strides)
        return b_first - a_first or b - a

    order = list(reversed(range(len(sizes))))
    order.sort(key=cmp_to_key(compare))  # no order of all: where it starts counts
    return order


def set_loops(node: Node, buffers: dict[str, Buffer]) -> None:
    """Fixes the layout of what a node makes by that of what it reads, then orders and merges its loops."""
    (buffer,) = node.makes
    n_outer = len(node.dims)
    every = (*node.dims, *node.inner)
    found: list[tuple[str, int, Steps]] = []
    for read in node.touched:
        strides = buffers[read.name].strides
        assert strides is not None
        start = sum(first * stride for first, stride in zip(read.starts, strides, strict=True))
        found.append((read.name, start, steps_of(read, every, strides)))
    sizes = [math.prod(dim) for dim in node.dims]
    if buffer.strides is None:
        buffer.strides = flexible(buffer.shape, sizes, [steps for _, _, steps in found])
    if node.into is not None and node.into.moves:
        target = buffers[node.into.name]
        assert target.strides is not None
        own = (node.into.name, 0, steps_of(node.into, node.dims, target.strides))
    else:
        own = own_steps(node, buffer)
    own = (own[0], own[1], (*own[2], *((0,) * len(dim) for dim in node.inner)))
    touched = [own, *found]
    outer = ordered(touched, every, range(n_outer))
    inner = ordered(touched, every, range(n_outer, len(every)))
    loops, sums = merged(touched, every, outer), merged(touched, every, inner)
    node.vars = tuple(math.prod(math.prod(every[i]) for i in loop) for loop in loops)
    node.sums = tuple(math.prod(math.prod(every[i]) for i in loop) for loop in sums)
    run = [*loops, *sums]
    node.writes = (dep(own, every, run),)
    node.reads = tuple(dict.fromkeys(dep(one, every, run) for one in found))


def own_steps(node: Node, buffer: Buffer) -> tuple[str, int, Steps]:
    """Where a node writes: the dimensions that it sums over are gone, or of size 1."""
    assert buffer.strides is not None
    sizes = [math.prod(dim) for dim in node.dims]
    places = match(sizes, buffer.shape)
    steps: list[tuple[int, ...]] = []
    for dim, place in zip(node.dims, places, strict=True):
        below, found = 1, []
        for size in reversed(dim):
            found.append(below * buffer.strides[place] if place >= 0 else 0)
            below *= size
        steps.append(tuple(reversed(found)))
    start = 0
    if node.into is not None:
        start = sum(first * stride for first, stride in zip(node.into.starts, buffer.strides, strict=True))
    return buffer.name, start, tuple(steps)


def match(sizes: Sequence[int], shape: Sequence[int]) -> list[int]:
    """Which dimension of the buffer each loop is."""
    if len(sizes) == len(shape):
        return list(range(len(shape)))
    found, place = [], 0
    for size in sizes:
        while shape[place] != size:
            place += 1
        found.append(place)
        place += 1
    return found


def flexible(shape: Sequence[int], sizes: Sequence[int], reads: Sequence[Steps]) -> tuple[int, ...]:
    """Strides in the order in which most that is read lies (ComputedBuffer.get_fill_order)."""
    places = match(sizes, shape)
    strides = [[0] * len(shape) for _ in reads]
    for row, steps in zip(strides, reads, strict=True):
        for i, place in enumerate(places):
            row[place] = steps[i][-1]
    if not reads:
        return contiguous(shape)
    made, step = [0] * len(shape), 1
    for i in loop_order(strides, shape):
        made[i] = step
        step *= shape[i]
    return tuple(made)


def ordered(touched: Sequence[tuple[str, int, Steps]], every: Sequence[tuple[int, ...]], which: range) -> list[int]:
    sizes = [math.prod(every[i]) for i in which]
    strides = [[steps[i][-1] for i in which] for _, _, steps in touched]
    return [which[i] for i in reversed(loop_order(strides, sizes))] if sizes else []


def merged(
    touched: Sequence[tuple[str, int, Steps]], every: Sequence[tuple[int, ...]], order: Sequence[int]
) -> list[list[int]]:
    """The dimensions in that order, those together that are one loop for all that is touched."""
    loops: list[list[int]] = []
    for i in order:
        if math.prod(every[i]) == 1:
            continue
        if loops and all(joins(steps, every, loops[-1][-1], i) for _, _, steps in touched):
            loops[-1].append(i)
        else:
            loops.append([i])
    return loops


def joins(steps: Steps, every: Sequence[tuple[int, ...]], a: int, b: int) -> bool:
    one, other = even(steps[a], every[a]), even(steps[b], every[b])
    return one is not None and other is not None and one == other * math.prod(every[b])


def even(steps: Sequence[int], sizes: Sequence[int]) -> int | None:
    """The step of a dimension whose atoms are even steps."""
    if all(steps[i] == steps[i + 1] * sizes[i + 1] for i in range(len(steps) - 1)):
        return steps[-1]
    return None


def dep(one: tuple[str, int, Steps], every: Sequence[tuple[int, ...]], run: Sequence[Sequence[int]]) -> Dep:
    name, start, steps = one
    loops: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    for loop in run:
        size = math.prod(math.prod(every[i]) for i in loop)
        step = even(steps[loop[-1]], every[loop[-1]])
        entry = ((step,), (size,)) if step is not None else (steps[loop[-1]], every[loop[-1]])
        if loops and len(entry[0]) == len(loops[-1][0]) == 1 and loops[-1][0][0] == entry[0][0] * entry[1][0]:
            loops[-1] = (entry[0], (loops[-1][1][0] * entry[1][0],))
        else:
            loops.append(entry)
    while loops and not any(loops[-1][0]):
        loops.pop()
    return Dep(name, start, tuple(loops))
