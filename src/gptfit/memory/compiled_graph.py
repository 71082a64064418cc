"""The graph of operations that torch.compile hands to inductor as the backward of blocks that are run again.

The operations of our model and of their gradients, as AOTAutograd of torch 2.13 decomposes and orders them; what
forward kept cuts the graph. What is run again stands right before its first use
(torch/_functorch/partitioners.py, reordering_to_mimic_autograd_engine).
"""

from collections.abc import Iterable, Sequence, Set
from typing import NamedTuple

Shape = tuple[int, ...]

FLOAT = "float32"

# Kinds of operations. Those of POINT compute element by element; those of CALLS call a library.
POINT, VIEW, SUM, MEAN, MOMENTS, ITEM, CAT, RANDOM = "point", "view", "sum", "mean", "moments", "item", "cat", "random"
INPUT, MM, ADDMM, BMM, ATTENTION, ATTENTION_BACKWARD = "input", "mm", "addmm", "bmm", "attention", "attention backward"
FULL, SCATTER = "full", "scatter"
UNSEEN = "unseen"  # what is an operation to the partitioner alone, which counts it
CALLS = (MM, ADDMM, BMM, ATTENTION, ATTENTION_BACKWARD)


class Op:
    """One operation. `data` is what its kind needs beside `args`; `label` names what forward may have kept of it,
    `output` what is handed out."""

    __slots__ = ("args", "data", "dtype", "index", "kind", "label", "output", "shape", "strides")

    def __init__(self, index: int, kind: str, args: "tuple[Op, ...]", shape: Shape, dtype: str, data: object) -> None:
        self.index, self.kind, self.args, self.shape, self.dtype, self.data = index, kind, args, shape, dtype, data
        self.label = self.output = ""
        self.strides: Shape = ()


class Change(NamedTuple):
    """A view: what is done to the dimensions of another, and with which numbers."""

    how: str
    numbers: tuple[int, ...]


def contiguous(shape: Sequence[int]) -> Shape:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


class Graph:
    """Operations in the order in which forward and backward would run them."""

    def __init__(self) -> None:
        self.ops: list[Op] = []

    def op(self, kind: str, args: Iterable[Op], shape: Shape, dtype: str, data: object = None) -> Op:
        made = Op(len(self.ops), kind, tuple(args), shape, dtype, data)
        self.ops.append(made)
        return made

    def input(self, name: str, shape: Shape, dtype: str, strides: Shape = ()) -> Op:
        made = self.op(INPUT, (), shape, dtype)
        made.label, made.strides = name, strides or contiguous(shape)
        return made

    def point(self, *args: Op, dtype: str = "", n: int = 1, numbers: tuple[float | str, ...] = ()) -> Op:
        """`n` operations on each element, which take these numbers."""
        rank = max(len(arg.shape) for arg in args)
        padded = [(1,) * (rank - len(arg.shape)) + arg.shape for arg in args]
        shape = tuple(max(sizes) for sizes in zip(*padded, strict=True))
        dtype = dtype or (FLOAT if any(arg.dtype == FLOAT for arg in args) else args[0].dtype)
        return self.op(POINT, args, shape, dtype, (n, numbers))

    def cast(self, x: Op, dtype: str) -> Op:
        return x if x.dtype == dtype else self.point(x, dtype=dtype, n=0)  # its argument's conversion is counted

    def unseen(self, n: int = 1) -> None:
        for _ in range(n):
            self.op(UNSEEN, (), (), "")

    # ---- views ----------------------------------------------------------------------------------------------------

    def view(self, x: Op, *shape: int) -> Op:
        return x if x.shape == shape else self.op(VIEW, (x,), shape, x.dtype, Change("reshape", shape))

    def permute(self, x: Op, *order: int) -> Op:
        return self.op(VIEW, (x,), tuple(x.shape[i] for i in order), x.dtype, Change("permute", order))

    def slice(self, x: Op, start: int, stop: int) -> Op:
        """Of the last dimension."""
        return self.op(VIEW, (x,), (*x.shape[:-1], stop - start), x.dtype, Change("slice", (start, stop)))

    def expand(self, x: Op, *shape: int) -> Op:
        return x if x.shape == shape else self.op(VIEW, (x,), shape, x.dtype, Change("expand", shape))

    # ---- the rest -------------------------------------------------------------------------------------------------

    def sum(self, x: Op, *dims: int, keep: bool = True, kind: str = SUM) -> Op:
        sizes = [(1 if i in dims else size) for i, size in enumerate(x.shape) if keep or i not in dims]
        return self.op(kind, (x,), tuple(sizes), x.dtype, (dims, keep))

    def moments(self, x: Op) -> tuple[Op, Op]:
        """Variance and mean over the last dimension."""
        shape = (*x.shape[:-1], 1)
        both = self.op(MOMENTS, (x,), shape, FLOAT)
        return self.op(ITEM, (both,), shape, FLOAT, 0), self.op(ITEM, (both,), shape, FLOAT, 1)

    def mm(self, a: Op, b: Op, bias: Op | None = None) -> Op:
        args = (a, b) if bias is None else (a, b, bias)
        return self.op(MM if bias is None else ADDMM, args, (a.shape[0], b.shape[1]), a.dtype)

    def bmm(self, a: Op, b: Op) -> Op:
        return self.op(BMM, (a, b), (*a.shape[:2], b.shape[2]), a.dtype)

    def cat(self, *args: Op) -> Op:
        """Along the last dimension."""
        shape = (*args[0].shape[:-1], sum(arg.shape[-1] for arg in args))
        return self.op(CAT, args, shape, args[0].dtype)


def backward_ops(ops: Sequence[Op], first: int, kept: Set[str]) -> list[Op]:
    """The operations of the backward, from position `first` of `ops` on, each after what it needs of those before it;
    those that are labelled as `kept` are inputs."""
    needed: set[int] = set()
    stack = [op for op in ops[first:] if op.output]
    while stack:
        op = stack.pop()
        if op.index not in needed:
            needed.add(op.index)
            stack += () if op.kind == INPUT or op.label in kept else op.args
    found: list[Op] = []
    seen: set[int] = set()
    for op in ops[first:]:
        if op.index not in needed or op.index in seen:
            continue
        stack, wanted = [op], []
        while stack:
            one = stack.pop()
            if one.index not in seen:
                seen.add(one.index)
                wanted.append(one)
                stack += () if one.kind == INPUT or one.label in kept else one.args
        found += sorted(wanted, key=lambda one: one.index)
    return found
