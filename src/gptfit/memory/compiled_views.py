"""Tensors that are not written down yet, and views of them: which part of which buffer each element is read from."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from gptfit.memory.compiled_graph import Change, contiguous

MOST_OPS = 30  # torch/_inductor/config.py, realize_opcount_threshold of a GPU


class Atom(NamedTuple):
    """A part of a dimension: `size` values, each `step` further in dimension `source` of what it is a view of."""

    size: int
    source: int = -1
    step: int = 0


class Read(NamedTuple):
    """Of a buffer: where it starts in each dimension, and for each atom in which one it moves, and by how much."""

    name: str
    starts: tuple[int, ...]
    moves: tuple[tuple[int, int], ...]


class Buffer:
    """A tensor in memory. Its strides are free until something fixes them."""

    __slots__ = ("dtype", "name", "shape", "strides")

    def __init__(self, name: str, shape: Sequence[int], dtype: str, strides: tuple[int, ...] | None = None) -> None:
        self.name, self.shape, self.dtype, self.strides = name, tuple(shape), dtype, strides

    def fix(self) -> None:
        if self.strides is None:
            self.strides = contiguous(self.shape)


class Box:
    """A formula over atoms, or a buffer that it has been written to."""

    __slots__ = ("buffer", "dims", "dtype", "ops", "reads")

    def __init__(
        self, dims: Sequence[tuple[int, ...]], reads: Iterable[Read], ops: frozenset[object], dtype: str
    ) -> None:
        self.dims, self.reads, self.ops, self.dtype = tuple(dims), tuple(dict.fromkeys(reads)), ops, dtype
        self.buffer: Buffer | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(dim) for dim in self.dims)

    @property
    def is_large(self) -> bool:
        return len(self.ops) + len(self.reads) > MOST_OPS


class View(NamedTuple):
    """A box, seen in other dimensions."""

    box: Box
    dims: tuple[tuple[Atom, ...], ...]
    starts: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(atom.size for atom in dim) for dim in self.dims)

    @property
    def is_whole(self) -> bool:
        """Whether it is the box itself."""
        return self == whole(self.box)

    def reads(self) -> list[Read]:
        """What reading it reads, by its own atoms."""
        atoms = [atom for dim in self.dims for atom in dim]
        found = []
        for read in self.box.reads:
            starts = list(read.starts)
            for start, (source, step) in zip(self.starts, read.moves, strict=True):
                if source >= 0:
                    starts[source] += start * step
            moves = []
            for atom in atoms:
                source, step = read.moves[atom.source] if atom.source >= 0 else (-1, 0)
                moves.append((source, step * atom.step) if source >= 0 else (-1, 0))
            found.append(Read(read.name, tuple(starts), tuple(moves)))
        return found


def whole(box: Box) -> View:
    dims, source = [], 0
    for dim in box.dims:
        dims.append(tuple(Atom(size, source + i, 1) for i, size in enumerate(dim)))
        source += len(dim)
    return View(box, tuple(dims), (0,) * source)


def cut(atoms: Sequence[Atom], size: int) -> tuple[tuple[Atom, ...], list[Atom]]:
    """The last of the atoms that make up `size` values, and those before; one is split where need be."""
    left, taken = list(atoms), []
    while size > 1:
        atom = left.pop()
        if atom.size > size:
            left.append(Atom(atom.size // size, atom.source, atom.step * size))
            atom = Atom(size, atom.source, atom.step)
        taken.append(atom)
        size //= atom.size
    return tuple(reversed(taken)) or (Atom(1),), left


def reshaped(view: View, shape: Sequence[int]) -> View:
    atoms = [atom for dim in view.dims for atom in dim if atom.size > 1]
    dims: list[tuple[Atom, ...]] = []
    for size in reversed(shape):
        dim, atoms = cut(atoms, size)
        dims.append(dim)
    return View(view.box, tuple(reversed(dims)), view.starts)


def seen(view: View, change: Change) -> View:
    how, numbers = change
    if how == "reshape":
        return reshaped(view, numbers)
    if how == "permute":
        return view._replace(dims=tuple(view.dims[i] for i in numbers))
    if how == "expand":
        return view._replace(
            dims=tuple(
                dim if math.prod(atom.size for atom in dim) == size else (Atom(size),)
                for dim, size in zip(view.dims, numbers, strict=True)
            )
        )
    start, stop = numbers
    (last,) = view.dims[-1]
    starts = list(view.starts)
    if last.source >= 0:
        starts[last.source] += start * last.step
    return View(view.box, (*view.dims[:-1], (Atom(stop - start, last.source, last.step),)), tuple(starts))


def refined(views: Sequence[View]) -> list[View]:
    """The views, broadcast to one shape, their dimensions made of atoms of the same sizes."""
    rank = max(len(view.dims) for view in views)
    padded = [((Atom(1),),) * (rank - len(view.dims)) + view.dims for view in views]
    columns = []
    for dims in zip(*padded, strict=True):
        size = max(math.prod(atom.size for atom in dim) for dim in dims)
        bounds = {size}
        for dim in dims:
            reach = 1
            for atom in reversed(dim):
                reach *= atom.size
                bounds.add(reach)
        sizes, below = [], 1
        for bound in sorted(bounds - {1}):
            sizes.append(bound // below)
            below = bound
        column = []
        for dim in dims:
            atoms = list(dim) if math.prod(atom.size for atom in dim) == size else [Atom(size)]
            parts: list[Atom] = []
            for part in sizes:
                (one,), atoms = cut([atom for atom in atoms if atom.size > 1], part)
                parts.append(one)
            column.append(tuple(reversed(parts)) or (Atom(1),))
        columns.append(column)
    return [view._replace(dims=tuple(column[i] for column in columns)) for i, view in enumerate(views)]


def places(inner: Sequence[Sequence[Atom]]) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = [()]
    for dim in inner:
        for atom in dim:
            found = [(*one, i) for one in found for i in range(atom.size)]
    return found


def at_place(
    view: View, outer: tuple[tuple[Atom, ...], ...], inner: Sequence[Sequence[Atom]], place: Sequence[int]
) -> View:
    starts = list(view.starts)
    for atom, i in zip((atom for dim in inner for atom in dim), place, strict=True):
        if atom.source >= 0:
            starts[atom.source] += i * atom.step
    return View(view.box, outer, tuple(starts))


def strides_of(view: View, buffer: Buffer) -> list[int]:
    """Of dimensions whose atoms are even steps."""
    assert buffer.strides is not None
    (read,) = view.reads()
    found, index = [], 0
    for dim in view.dims:
        index += len(dim)
        source, step = read.moves[index - 1]
        found.append(step * buffer.strides[source] if source >= 0 else 0)
    return found


def in_order(pairs: Sequence[tuple[int, int]]) -> bool:
    """Whether what is wanted and what is there rank the dimensions alike."""
    wanted = sorted(range(len(pairs)), key=lambda i: pairs[i][0])
    there = sorted(range(len(pairs)), key=lambda i: pairs[i][1])
    return wanted == there


def is_even(dim: Sequence[Atom], view: View, buffer: Buffer) -> bool:
    """Whether the atoms of a dimension are even steps through memory."""
    if len(dim) == 1:
        return True
    assert buffer.strides is not None
    (read,) = view.box.reads
    steps = []
    for atom in dim:
        source, step = read.moves[atom.source] if atom.source >= 0 else (-1, 0)
        steps.append(atom.step * step * buffer.strides[source] if source >= 0 else 0)
    return all(steps[i] == steps[i + 1] * dim[i + 1].size for i in range(len(dim) - 1))
