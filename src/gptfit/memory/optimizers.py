"""What an optimizer keeps for each parameter, and what its step allocates for a moment.

One record an optimizer. Sources: torch/optim/*.py of torch 2.13; each is stepped on a CPU and compared.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from gptfit.memory.autograd import Parameter
from gptfit.memory.tape import Buffer, Event, Item, Loop, make_buffer


@dataclass(frozen=True, slots=True)
class Optimizer:
    """`states` are a parameter's state tensors for one implementation. A step holds `foreach_copies` lists as large
    as the parameters stepped together, or `loop_copies` buffers as large as one parameter, in the parameters' dtype."""

    states: Callable[[Parameter, str], list[Buffer]]
    foreach_copies: int
    loop_copies: int


def state(param: Parameter, name: str, shape: tuple[int, ...] | None = None, dtype: str = "") -> Buffer:
    return make_buffer(
        f"{param.name} {name}", "optimizer state", param.shape if shape is None else shape, dtype or param.dtype
    )


def adamw_states(param: Parameter, impl: str) -> list[Buffer]:
    """Two moments; the step counter lives on the device in the fused implementation alone (torch/optim/adamw.py)."""
    counter = [state(param, "step", (), "float32")] if impl == "fused" else []
    return [*counter, state(param, "exp_avg"), state(param, "exp_avg_sq")]


def adamw8bit_states(param: Parameter, impl: str) -> list[Buffer]:
    """One byte an element and an fp32 scale for each 256, from 4,096 elements on (torchao/optim/adam.py)."""
    n = math.prod(param.shape)
    if n < 4096 or n % 256:
        return [state(param, "exp_avg"), state(param, "exp_avg_sq")]
    moments = ("exp_avg", "exp_avg_sq")
    codes = [state(param, f"{moment} codes", None, "uint8") for moment in moments]
    scales = [state(param, f"{moment} scales", (n // 256,), "float32") for moment in moments]
    return [*codes, *scales]


def adafactor_states(param: Parameter, impl: str) -> list[Buffer]:
    """A row and a column of a matrix, the whole of a vector (torch/optim/_adafactor.py)."""
    if len(param.shape) < 2:
        return [state(param, "variance")]
    rows, columns = param.shape
    return [state(param, "row_var", (rows, 1)), state(param, "col_var", (1, columns))]


def is_muons(param: Parameter) -> bool:
    """Muon takes the matrices of the blocks; AdamW the rest (optim.py)."""
    return len(param.shape) == 2 and "*" in param.name


def muon_states(param: Parameter, impl: str) -> list[Buffer]:
    return [state(param, "momentum_buffer")] if is_muons(param) else adamw_states(param, impl)


OPTIMIZERS = {
    # foreach: _foreach_sqrt(exp_avg_sq) is a list as large as the parameters; for-loop: the square root
    # and its quotient of one parameter; fused: nothing.
    "adamw": Optimizer(adamw_states, foreach_copies=1, loop_copies=2),
    "adamw8bit": Optimizer(adamw8bit_states, foreach_copies=0, loop_copies=4),
    "adafactor": Optimizer(adafactor_states, foreach_copies=2, loop_copies=3),
    "lion": Optimizer(lambda param, impl: [state(param, "exp_avg")], foreach_copies=0, loop_copies=1),
    "muon": Optimizer(muon_states, foreach_copies=1, loop_copies=3),
    "sgd": Optimizer(lambda param, impl: [state(param, "momentum_buffer")], foreach_copies=0, loop_copies=0),
}

# Which implementation each runs, whatever is asked for (optim.py).
ONLY_IMPL = {"adamw8bit": "for-loop", "lion": "for-loop"}


def implementation(name: str, impl: str) -> str:
    if name == "adafactor" and impl == "fused":
        return "foreach"
    return ONLY_IMPL.get(name, impl)


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
    states = OPTIMIZERS[name].states
    return per_parameter(params, n_layer, lambda param: states(param, implementation(name, impl)), 1)


def step_items(params: list[Parameter], n_layer: int, name: str, impl: str) -> list[Item]:
    """The step's temporaries. Parameters are stepped in two groups: matrices, which decay, then the rest.
    Muon orthogonalises its matrices one by one."""
    record = OPTIMIZERS[name]
    impl = implementation(name, impl)
    items: list[Item] = []
    if name == "muon":
        items += one_by_one([param for param in params if is_muons(param)], n_layer, record.loop_copies)
        params = [param for param in params if not is_muons(param)]
    for group in ([p for p in params if len(p.shape) >= 2], [p for p in params if len(p.shape) < 2]):
        if impl == "foreach":
            for sign in (1, -1):
                for copy in range(record.foreach_copies):
                    items += per_parameter(group, n_layer, _temporary(f"temporary {copy}"), sign)
        elif impl == "for-loop":
            items += one_by_one(group, n_layer, record.loop_copies)
    return items


def one_by_one(params: list[Parameter], n_layer: int, copies: int) -> list[Item]:
    """The last of a parameter's temporaries is a local variable, which lives until the next parameter's is made."""
    before = [param for param in params if "*" not in param.name]
    block = [param for param in params if "*" in param.name]
    return [*_chain(before, copies), *([Loop(n_layer, _chain(block, copies))] if block else [])]


def _chain(params: list[Parameter], copies: int) -> list[Item]:
    items: list[Item] = []
    last: list[Item] = []
    for param in params if copies else []:
        buffers = [buffer for copy in range(copies) for buffer in _temporary(f"temporary {copy}")(param)]
        items += [Event(1, buffer) for buffer in buffers]
        items += [Event(-1, buffer) for buffer in buffers[:-1]] + last
        last = [Event(-1, buffers[-1])]
    return items + last


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
    return lambda param: [make_buffer(f"{param.name} {label}", "temporary", param.shape, param.dtype)]
