"""The temporaries of a step over all parameters, written as ordinary Python: dropping one writes its free.

What a loop over parameters still holds when it goes on to the next one is held from block to block, too. So the first
block, which is entered with less, is written by itself, and the others are one loop.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby

from gptfit.memory.autograd import Parameter, Shape
from gptfit.memory.tape import Buffer, Event, Item, Loop, make_buffer


def in_block(param: Parameter) -> bool:
    return "*" in param.name


def per_parameter(
    params: Iterable[Parameter], n_layer: int, make: Callable[[Parameter], list[Buffer]], sign: int
) -> list[Item]:
    """Events for each parameter in the model's order; those of the blocks as a loop over them."""
    items: list[Item] = []
    for inside, group in groupby(params, in_block):
        events: list[Item] = [Event(sign, buffer) for param in group for buffer in make(param)]
        items += [Loop(n_layer, events)] if inside else events
    return items


class Temporary:
    """One tensor; in a loop over blocks that of its round."""

    __slots__ = ("block", "buffer", "scratch")

    def __init__(self, scratch: "Scratch", buffer: Buffer) -> None:
        self.scratch, self.buffer, self.block = scratch, buffer, scratch.block
        scratch.items.append(Event(1, buffer))

    def __del__(self) -> None:
        here = self.scratch.block
        if here is None:  # after the loop it is the last block's that is still held
            shift = 0 if self.block is None else self.scratch.n_layer - 1
        else:
            shift = 0 if self.block is None else self.block - here
        self.scratch.items.append(Event(-1, self.buffer, shift))


class TemporaryList:
    """One tensor for each parameter."""

    __slots__ = ("frees", "scratch")

    def __init__(self, scratch: "Scratch", params: list[Parameter], make: Callable[[Parameter], Buffer]) -> None:
        def items(sign: int) -> list[Item]:
            return per_parameter(params, scratch.n_layer, lambda param: [make(param)], sign)

        self.scratch, self.frees = scratch, items(-1)
        scratch.items += items(1)

    def __del__(self) -> None:
        self.scratch.items += self.frees


class Scratch:
    """Writes temporaries to `items`."""

    def __init__(self, n_layer: int) -> None:
        self.n_layer = n_layer
        self.items: list[Item] = []
        self.block: int | None = None  # the first that the loop being written stands for

    def each(self, params: Iterable[Parameter]) -> Iterator[Parameter]:
        """The parameters one after the other: those of the blocks come twice, as the first block's and the others'."""
        for inside, group in groupby(params, in_block):
            if not inside:
                yield from group
                continue
            of_block, outer = list(group), self.items
            for start, n in ((0, 1), (1, self.n_layer - 1)):
                if n:
                    self.block, self.items = start, []
                    yield from of_block
                    outer.append(Loop(n, self.items, start=start))
            self.items, self.block = outer, None

    def new(self, param: Parameter, what: str, shape: Shape | None = None, dtype: str = "") -> Temporary:
        """A tensor, by default like `param`."""
        return Temporary(self, _like(param, what, shape, dtype))

    def listed(
        self, params: list[Parameter], what: str, shape: Callable[[Parameter], Shape] = lambda param: param.shape
    ) -> TemporaryList:
        """A list of tensors, by default as large as the parameters."""
        return TemporaryList(self, params, lambda param: _like(param, what, shape(param), ""))

    def scalar(self, name: str, dtype: str, n: int = 1) -> Temporary:
        return Temporary(self, make_buffer(name, "temporary", (n,), dtype))


def _like(param: Parameter, what: str, shape: Shape | None, dtype: str) -> Buffer:
    return make_buffer(
        f"{param.name} {what}", "temporary", param.shape if shape is None else shape, dtype or param.dtype
    )
