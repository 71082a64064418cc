"""What an optimizer keeps for each parameter, and what its step allocates for a moment.

One record an optimizer. Sources: torch/optim/*.py of torch 2.13; each is stepped on a CPU and compared.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from gptfit.memory.autograd import Parameter
from gptfit.memory.tape import Buffer, Event, Item, Loop, make_buffer

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class State:
    """One state tensor of a parameter: parameter-shaped unless `shape` says otherwise; None where there is none."""

    name: str
    dtype: str = "float32"
    shape: Callable[[Shape], Shape | None] = lambda shape: shape


@dataclass(frozen=True, slots=True)
class Optimizer:
    """`states` for each parameter; `temporaries` gives, for the shapes stepped together and the implementation,
    the groups of buffers that are alive together, one after another."""

    states: tuple[State, ...]
    counter_on_device: frozenset[str] = frozenset()
    foreach_copies: int = 1
    loop_copies: int = 2


def matrix_only(shape: Shape) -> Shape | None:
    return shape if len(shape) >= 2 else None


OPTIMIZERS = {
    # foreach: _foreach_sqrt(exp_avg_sq) is a list as large as the parameters; for-loop: the square root
    # and its quotient of one parameter; fused: nothing.
    "adamw": Optimizer((State("exp_avg"), State("exp_avg_sq")), frozenset({"fused"})),
    "sgd": Optimizer((State("momentum_buffer"),), frozenset(), foreach_copies=0, loop_copies=0),
}


def per_parameter(
    params: Iterable[Parameter], n_layer: int, make: Callable[[Parameter], list[Buffer]], sign: int
) -> list[Item]:
    """Events for each parameter in the model's order; those of the blocks as a loop over them."""
    items: list[Item] = []
    block: list[Item] = []
    for param in params:
        into = block if "*" in param.name else items
        if into is block and not block:
            items.append(Loop(n_layer, block))
        into.extend(Event(sign, buffer) for buffer in make(param))
    return items


def parameter_items(params: Iterable[Parameter], n_layer: int) -> list[Item]:
    return per_parameter(params, n_layer, lambda param: [param.buffer], 1)


def gradient_items(params: Iterable[Parameter], n_layer: int, sign: int) -> list[Item]:
    return per_parameter(params, n_layer, lambda param: [param.gradient], sign)


def state_items(params: Iterable[Parameter], n_layer: int, name: str, impl: str) -> list[Item]:
    """The states, as they are created in the first step."""
    record = OPTIMIZERS[name]

    def make(param: Parameter) -> list[Buffer]:
        buffers = []
        if impl in record.counter_on_device:
            buffers.append(make_buffer(f"{param.name} step", "optimizer state", (), "float32"))
        for state in record.states:
            shape = state.shape(param.shape)
            if shape is not None:
                buffers.append(make_buffer(f"{param.name} {state.name}", "optimizer state", shape, state.dtype))
        return buffers

    return per_parameter(params, n_layer, make, 1)


def step_items(params: list[Parameter], n_layer: int, name: str, impl: str) -> list[Item]:
    """The step's temporaries. Parameters are stepped in two groups: matrices, which decay, then the rest."""
    record = OPTIMIZERS[name]
    items: list[Item] = []
    for group in ([p for p in params if len(p.shape) >= 2], [p for p in params if len(p.shape) < 2]):
        if impl == "foreach":
            for copy in range(record.foreach_copies):
                make = _temporary(f"temporary {copy}")
                items += per_parameter(group, n_layer, make, 1)
            for copy in range(record.foreach_copies):
                items += per_parameter(group, n_layer, _temporary(f"temporary {copy}"), -1)
        elif impl == "for-loop":
            for param in group:
                body: list[Item] = [
                    Event(sign, buffer)
                    for sign in (1, -1)
                    for copy in range(record.loop_copies)
                    for buffer in _temporary(f"temporary {copy}")(param)
                ]
                items.append(Loop(n_layer, body)) if "*" in param.name else items.extend(body)
    return items


def clip_items(params: list[Parameter], n_layer: int) -> list[Item]:
    """clip_grad_norm_: one scalar norm for each gradient, stacked, and the total; the scaling is in place."""

    def norm(param: Parameter) -> list[Buffer]:
        return [make_buffer(f"{param.name} gradient norm", "temporary", (), "float32")]

    n = sum(param.count for param in params)
    stacked = make_buffer("gradient norms", "temporary", (n,), "float32")
    scalars = [
        make_buffer(f"clip {part}", "temporary", (), "float32") for part in ("total norm", "coefficient", "clamped")
    ]
    items = per_parameter(params, n_layer, norm, 1)
    items += [Event(1, stacked), Event(1, scalars[0]), Event(-1, stacked)]
    items += [Event(1, scalars[1]), Event(1, scalars[2])]
    items += per_parameter(params, n_layer, norm, -1)
    items += [Event(-1, scalar) for scalar in scalars]
    return items


def _temporary(label: str) -> Callable[[Parameter], list[Buffer]]:
    return lambda param: [make_buffer(f"{param.name} {label}", "temporary", param.shape, "float32")]
