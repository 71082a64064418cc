"""What an optimizer keeps for each parameter, and what its step allocates for a moment.

One record an optimizer. A step is written as the code that it mirrors, line by line: a local variable holds its
tensor until it is assigned again, so in a loop over parameters the last one's lives on beside the next one's.
Sources: torch/optim/{adam,sgd,_adafactor,_muon}.py of torch 2.13 and optim.py; compared with traces, to the byte.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from gptfit.config import RunConfig
from gptfit.memory.autograd import Parameter
from gptfit.memory.scratch import Scratch, per_parameter
from gptfit.memory.tape import Buffer, Event, Item, Loop, make_buffer

NEWTON_SCHULZ_STEPS = 5  # torch.optim.Muon's default


@dataclass(frozen=True, slots=True)
class Optimizer:
    """`states` are a parameter's state tensors; `step` writes the temporaries of a step over `params`."""

    states: Callable[[Parameter, RunConfig], list[Buffer]]
    step: Callable[[Scratch, list[Parameter], RunConfig], None]


def decay_groups(params: list[Parameter]) -> list[list[Parameter]]:
    """Matrices, which decay, are stepped before the rest (optim.py)."""
    groups = ([p for p in params if len(p.shape) >= 2], [p for p in params if len(p.shape) < 2])
    return [group for group in groups if group]


def state(param: Parameter, name: str, shape: tuple[int, ...] | None = None, dtype: str = "") -> Buffer:
    return make_buffer(
        f"{param.name} {name}", "optimizer state", param.shape if shape is None else shape, dtype or param.dtype
    )


def adamw_states(param: Parameter, run: RunConfig) -> list[Buffer]:
    """Two moments; the step counter lives on the device in the fused implementation alone."""
    counter = [state(param, "step", (), "float32")] if run.optimizer_impl == "fused" else []
    return [*counter, state(param, "exp_avg"), state(param, "exp_avg_sq")]


def adamw_step(w: Scratch, params: list[Parameter], run: RunConfig) -> None:
    for group in decay_groups(params):
        if run.optimizer_impl == "foreach":
            w.listed(group, "square root")
        elif run.optimizer_impl == "for-loop":
            _adamw_loop(w, group)


def _adamw_loop(w: Scratch, params: list[Parameter]) -> None:
    denominator = None
    for param in w.each(params):
        root = w.new(param, "square root")
        denominator = w.new(param, "denominator")
        del root
    del denominator


def adamw16bit_states(param: Parameter, run: RunConfig) -> list[Buffer]:
    return [state(param, moment, None, "bfloat16") for moment in ("exp_avg", "exp_avg_sq")]


def adamw16bit_step(w: Scratch, params: list[Parameter], run: RunConfig) -> None:
    """Both moments in fp32, of one parameter at a time (optim.AdamW16bit)."""
    for group in decay_groups(params):
        for param in w.each(group):
            mean = w.new(param, "mean", None, "float32")
            root = w.new(param, "root", None, "float32")
            del mean, root


def is_quantized(param: Parameter) -> bool:
    n = math.prod(param.shape)
    return n >= 4096 and n % 256 == 0


def adamw8bit_states(param: Parameter, run: RunConfig) -> list[Buffer]:
    """One byte an element, an fp32 scale for each 256 and a table of 256 values, from 4,096 elements on
    (torchao/optim/adam.py and subclass_8bit.py of torchao 0.18)."""
    moments = ("exp_avg", "exp_avg_sq")
    if not is_quantized(param):
        return [state(param, moment) for moment in moments]
    scales = (math.prod(param.shape) // 256,)
    return [
        buffer
        for moment in moments
        for buffer in (
            state(param, f"{moment} codes", None, "uint8"),
            state(param, f"{moment} scales", scales, "float32"),
            state(param, f"{moment} table", (256,), "float32"),
        )
    ]


def adamw8bit_step(w: Scratch, params: list[Parameter], run: RunConfig) -> None:
    """torchao compiles its step for one parameter at a time: the largest of each 256 values of both moments, then
    one kernel does the rest. So inductor lowers it to Triton (torch 2.13, torchao 0.18, 256×1024 and 50304×768; read
    from the code it writes, never run on a GPU); for a CPU it also keeps both moments as fp32 values between loops.
    Smaller parameters need nothing. Where bitsandbytes stands in for torchao, these figures stand in for its own.
    """
    for group in decay_groups(params):
        for param in w.each([p for p in group if is_quantized(p)]):
            blocks = (math.prod(param.shape) // 256,)
            largest = w.new(param, "largest of exp_avg", blocks, "float32")
            largest_sq = w.new(param, "largest of exp_avg_sq", blocks, "float32")
            del largest, largest_sq


def adafactor_states(param: Parameter, run: RunConfig) -> list[Buffer]:
    """A row and a column of a matrix, the whole of a vector."""
    if len(param.shape) < 2:
        return [state(param, "variance")]
    rows, columns = param.shape
    return [state(param, "row_var", (rows, 1)), state(param, "col_var", (1, columns))]


def adafactor_step(w: Scratch, params: list[Parameter], run: RunConfig) -> None:
    """It has no fused form; optim.py runs foreach instead."""
    for group in decay_groups(params):
        (_adafactor_loop if run.optimizer_impl == "for-loop" else _adafactor_foreach)(w, group)


def _adafactor_foreach(w: Scratch, params: list[Parameter]) -> None:
    for param in w.each(params):
        w.new(param, "norm", ())
    if len(params[0].shape) >= 2:
        w.listed(params, "row_mean", lambda p: (p.shape[0], 1))
        w.listed(params, "col_mean", lambda p: (1, p.shape[1]))
        estimates = w.listed(params, "var_estimate")
        w.listed(params, "mean of row_var", lambda p: (1, 1))
    else:
        w.listed(params, "grad_squared")
        estimates = w.listed(params, "var_estimate")
    for param in w.each(params):
        w.new(param, "norm", ())
    del estimates


def _adafactor_loop(w: Scratch, params: list[Parameter]) -> None:
    row_mean = col_mean = squared = estimate = update = None
    for param in w.each(params):
        w.new(param, "norm", ())
        if len(param.shape) >= 2:
            rows, columns = param.shape
            row_mean = w.new(param, "row_mean", (rows, 1))
            col_mean = w.new(param, "col_mean", (1, columns))
            estimate = w.new(param, "var_estimate")
            w.new(param, "mean of row_var", (1, 1))
        else:
            squared = w.new(param, "grad_squared")
            estimate = w.new(param, "var_estimate")
        update = estimate
        w.new(param, "norm", ())
    del row_mean, col_mean, squared, estimate, update


def lion_step(w: Scratch, params: list[Parameter], run: RunConfig) -> None:
    for group in decay_groups(params):
        for param in w.each(group):
            w.new(param, "update")


def is_muons(param: Parameter) -> bool:
    """Muon takes the matrices of the blocks; AdamW the rest (optim.py)."""
    return len(param.shape) == 2 and "*" in param.name


def muon_states(param: Parameter, run: RunConfig) -> list[Buffer]:
    return [state(param, "momentum_buffer")] if is_muons(param) else adamw_states(param, run)


def muon_step(w: Scratch, params: list[Parameter], run: RunConfig) -> None:
    update = None
    for param in w.each([param for param in params if is_muons(param)]):
        update = w.new(param, "update")
        update = _newton_schulz(w, param, update)
    del update
    adamw_step(w, [param for param in params if not is_muons(param)], run)


def _newton_schulz(w: Scratch, param: Parameter, update: object) -> object:
    """Orthogonalises in bf16; an update that is bf16 already is not copied."""
    side = (min(param.shape),) * 2
    ortho = update if param.dtype == "bfloat16" else w.new(param, "orthogonal", None, "bfloat16")
    norm = w.new(param, "norm", (), "bfloat16")
    clamped = w.new(param, "clamped norm", (), "bfloat16")
    del norm, clamped
    gram = gram_update = None
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = w.new(param, "gram matrix", side, "bfloat16")
        gram_update = w.new(param, "gram update", side, "bfloat16")
        ortho = w.new(param, "orthogonal", None, "bfloat16")
    del gram, gram_update
    return ortho


def sgd_states(param: Parameter, run: RunConfig) -> list[Buffer]:
    return [state(param, "momentum_buffer")] if run.momentum else []


def sgd_step(w: Scratch, params: list[Parameter], run: RunConfig) -> None:
    """Weight decay is added to a copy of the gradients, but for the fused implementation."""
    decaying = [param for param in params if len(param.shape) >= 2 and run.weight_decay]
    if run.optimizer_impl == "foreach":
        w.listed(decaying, "decayed gradient")
    elif run.optimizer_impl == "for-loop":
        for param in w.each(decaying):
            w.new(param, "decayed gradient")


OPTIMIZERS = {
    "adamw": Optimizer(adamw_states, adamw_step),
    "adamw16bit": Optimizer(adamw16bit_states, adamw16bit_step),
    "adamw8bit": Optimizer(adamw8bit_states, adamw8bit_step),
    "adafactor": Optimizer(adafactor_states, adafactor_step),
    "lion": Optimizer(lambda param, run: [state(param, "exp_avg")], lion_step),
    "muon": Optimizer(muon_states, muon_step),
    "sgd": Optimizer(sgd_states, sgd_step),
}


def parameter_items(params: Iterable[Parameter], n_layer: int) -> list[Item]:
    return per_parameter(params, n_layer, lambda param: [param.buffer], 1)


def gradient_items(params: Iterable[Parameter], n_layer: int, sign: int) -> list[Item]:
    return per_parameter(params, n_layer, lambda param: [param.gradient], sign)


def state_items(params: Iterable[Parameter], run: RunConfig) -> list[Item]:
    """The states, as they are created in the first step."""
    states = OPTIMIZERS[run.optimizer].states
    return per_parameter(params, run.n_layer, lambda param: states(param, run), 1)


def average_items(params: Iterable[Parameter], run: RunConfig) -> list[Item]:
    """The moving average of the weights, there from the start (ema.py). It is counted with the states: like them it
    is kept for training, as large as the parameters, and used by no forward or backward."""
    return per_parameter(params, run.n_layer, lambda param: [state(param, "ema")], 1) if run.ema_decay else []


def step_items(params: list[Parameter], run: RunConfig) -> list[Item]:
    """The temporaries of a step."""
    w = Scratch(run.n_layer)
    OPTIMIZERS[run.optimizer].step(w, params, run)
    return w.items


def items_in_backward(param: Parameter, run: RunConfig, first: bool) -> list[Item]:
    """The step of one parameter, as soon as its gradient is there; in the `first` step of a run its states are made."""
    record = OPTIMIZERS[run.optimizer]
    made: list[Item] = [Event(1, buffer) for buffer in record.states(param, run)] if first else []
    w = Scratch(1)
    record.step(w, [param], run)
    return made + flat(w.items)


def flat(items: Iterable[Item]) -> list[Item]:
    """The events of loops over one block, without the loops."""
    found: list[Item] = []
    for item in items:
        if isinstance(item, Loop):
            found += flat(item.body) if item.n else []
        else:
            found.append(item)
    return found


def clip_items(params: list[Parameter], n_layer: int) -> list[Item]:
    """clip_grad_norm_: one scalar norm for each gradient, stacked, and the total; the scaling is in place
    (torch/nn/utils/clip_grad.py)."""
    dtype = params[0].dtype
    w = Scratch(n_layer)
    norms = w.listed(params, "gradient norm", lambda param: ())
    stacked = w.scalar("gradient norms", dtype, sum(param.count for param in params))
    total = w.scalar("total norm", dtype)
    del norms, stacked
    shifted = w.scalar("total norm and epsilon", dtype)
    reciprocal = w.scalar("its reciprocal", dtype)
    coefficient = w.scalar("coefficient", dtype)
    del reciprocal, shifted  # divided in Python (Tensor.__rtruediv__), which holds on to its argument
    clamped = w.scalar("clamped coefficient", dtype)
    del clamped, coefficient, total
    return w.items
