"""The values of small tensors while a step is traced: a fake tensor has none, but positions, masks and token ids are
made of numbers that are there.

Each such tensor has a real one beside it, on which the same ops run. So `x.item() for x in linspace(…)`, a branch on
`mask.all()` and `labels != -100` as an index go the way that they go in a real step. What weights or activations enter
into has no value.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils.weak import WeakIdKeyDictionary

aten = torch.ops.aten

# Elements up to which a value is kept: of numbers that shapes and branches hang on, and of others.
MAX_WHOLE = 1 << 20
MAX_FLOATS = 1 << 16

MADE_OF_NUMBERS = {
    aten.arange.default,
    aten.arange.start,
    aten.arange.start_step,
    aten.linspace.default,
    aten.zeros.default,
    aten.ones.default,
    aten.full.default,
    aten.scalar_tensor.default,
    aten.eye.default,
    aten.eye.m,
}
# What stands in a tensor that has the shape of another one, whose values do not matter.
FILLED = {
    aten.zeros_like.default: 0,
    aten.ones_like.default: 1,
    aten.new_zeros.default: 0,
    aten.new_ones.default: 1,
    aten.full_like.default: None,
    aten.new_full.default: None,
}
DRAWN_INTO = {aten.random_.default, getattr(aten.random_, "from"), aten.random_.to}
PERMUTED = {aten.randperm.default, aten.randperm.generator}
DRAWN = {aten.randint.default, aten.randint.low, aten.randint.generator, aten.randint.low_generator, *PERMUTED}


@dataclass(slots=True)
class Known:
    """A value, and whether it is still that: views share a `state`, as they share memory."""

    value: Tensor
    state: list[bool]


class KnownValues:
    """Values of fake tensors, op by op."""

    def __init__(self) -> None:
        self.known: Any = WeakIdKeyDictionary()
        self.generator = torch.Generator().manual_seed(0)

    def of(self, tensor: Tensor) -> Tensor | None:
        """The value of `tensor`, if it is known. A real tensor in a traced step is its own."""
        if not isinstance(tensor, FakeTensor):
            return tensor if type(tensor) is Tensor and tensor.device.type == "cpu" else None
        found = self.known.get(tensor)
        if found is None or not found.state[0]:
            return None
        value = found.value
        return value if value.shape == tensor.shape and value.dtype == tensor.dtype else None

    def all_of(self, args: Any) -> bool:
        """Whether tensors are in `args`, and all of them are known."""
        tensors = list(flat_tensors(args))
        return bool(tensors) and all(self.of(tensor) is not None for tensor in tensors)

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What `func` returns for the values of its arguments, which are all known."""
        with unset_fake_temporarily(), torch.no_grad():
            named = {key: self.real(value) for key, value in kwargs.items()}
            if "device" in named:
                named["device"] = torch.device("cpu")
            return func(*map(self.real, args), **named)

    def real(self, arg: Any) -> Any:
        if isinstance(arg, Tensor):
            return self.of(arg)
        return type(arg)(map(self.real, arg)) if type(arg) in (list, tuple) else arg

    def follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Takes note of the values of `out`, which `func` has returned for fake tensors."""
        if func in DRAWN_INTO and small(out) and not out.is_floating_point():
            with unset_fake_temporarily():  # seeds, as a DataLoader draws them
                self.drop(out)
                drawn = torch.empty(out.shape, dtype=out.dtype).random_(*args[1:], generator=self.generator)
                return self.keep(out, drawn, [True])
        if func in FILLED and small(out):
            fill = FILLED[func] if FILLED[func] is not None else args[-1]
            with unset_fake_temporarily():
                return self.keep(out, torch.full(out.shape, fill, dtype=out.dtype), [True])
        tensors = list(flat_tensors((args, kwargs.values()) if kwargs else args))
        if not tensors:
            return self.make(func, args, kwargs, out)
        values = [self.of(tensor) for tensor in tensors]
        if any(value is None for value in values):
            if func._schema.is_mutable:
                self.forget(func, args, kwargs)
            return None
        outs = list(flat_tensors(out))
        if not outs or not all(map(small, outs)) or torch.Tag.nondeterministic_seeded in func.tags:
            if func._schema.is_mutable:
                self.forget(func, args, kwargs)
            return None
        states = {
            value.untyped_storage()._cdata: self.known[tensor].state
            for tensor, value in zip(tensors, values, strict=True)
            if value is not None and isinstance(tensor, FakeTensor)
        }
        try:
            result = self.run(func, args, kwargs)
        except (RuntimeError, NotImplementedError):  # an op that the CPU has not
            return self.forget(func, args, kwargs)
        for tensor, value in zip(outs, flat_tensors(result), strict=True):
            if isinstance(tensor, FakeTensor):
                self.keep(tensor, value, states.get(value.untyped_storage()._cdata, [True]))
        return None

    def make(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """A tensor that is made of numbers alone. Draws are those of our own seed, the same in each trace; a single
        random number is nearly 1, so that layers which are left out at random stay."""
        if not small(out) or not isinstance(out, FakeTensor):
            return
        if func in MADE_OF_NUMBERS:
            self.keep(out, self.run(func, args, kwargs), [True])
        elif func in DRAWN:
            with unset_fake_temporarily():
                draw = torch.randperm if func in PERMUTED else torch.randint
                self.keep(out, draw(*args, dtype=out.dtype, generator=self.generator), [True])
        elif func is aten.rand.default and out.numel() == 1:
            with unset_fake_temporarily():
                self.keep(out, torch.full(out.shape, 1 - 2**-11, dtype=out.dtype), [True])

    def keep(self, tensor: Tensor, value: Tensor, state: list[bool]) -> None:
        self.known[tensor] = Known(value, state)

    def forget(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What `func` has written into is no longer known, and neither are its views."""
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.drop(value)
        self.drop(kwargs.get("out"))

    def drop(self, written: Any) -> None:
        for tensor in flat_tensors(written):
            found = self.known.get(tensor)
            if found is not None:
                found.state[0] = False


def small(out: Any) -> bool:
    if not isinstance(out, Tensor) or out.layout is not torch.strided:
        return False
    return math.prod(out.shape) <= (MAX_FLOATS if out.is_floating_point() or out.is_complex() else MAX_WHOLE)


def flat_tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple) or type(value).__name__ == "dict_values":
        for part in value:
            yield from flat_tensors(part)
