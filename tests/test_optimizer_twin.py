"""Every optimizer's step as a twin against a trace of the real one: each allocation and each free of it."""

import math
import re
from collections.abc import Iterable
from itertools import groupby
from typing import Any

import pytest
import torch

from gptfit.config import RunConfig, make_run
from gptfit.memory.autograd import Parameter
from gptfit.memory.optimizers import OPTIMIZERS, adamw8bit_states, adamw8bit_step
from gptfit.memory.scratch import Scratch
from gptfit.memory.step import pieces, steady_step
from gptfit.memory.tape import Buffer, Tape
from gptfit.optim import build_optimizer
from gptfit.trace import trace_program

IMPLS = ("fused", "foreach", "for-loop")
TRACEABLE = sorted(set(OPTIMIZERS) - {"adamw8bit"})  # which compiles its step: below

# Few tokens and much to step: the optimizer's step is the peak.
STEP_IS_PEAK: dict[str, Any] = {
    "n_layer": 2, "n_head": 2, "n_embd": 128, "vocab_size": 2000, "block_size": 8, "batch_size": 1, "compile": False,
    "tie_embeddings": False, "bias": True, "gradient_accumulation_steps": 1,
}  # fmt: skip


def twin_of(run: RunConfig) -> Tape:
    return steady_step(run, pieces(run, "gptfit", whole=False))


def ups_and_downs(tape: Tape) -> list[int]:
    """Bytes of each rise and fall of the optimizer's phase in turn; what is freed at one instant has no order."""
    start = next(n for n, mark in tape.marks() if mark.phase == "optimizer")
    steps = [sign * buffer.n_bytes for sign, _, buffer in tape.expand()][start:]
    return [sum(group) for _, group in groupby(steps, lambda n_bytes: n_bytes > 0)]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", TRACEABLE)
def test_the_step_is_the_peak_and_the_trace_has_it(name, impl):
    run = make_run({**STEP_IS_PEAK, "optimizer": name, "optimizer_impl": impl})
    traced, twin = trace_program(run), twin_of(run)
    assert traced.peak.phase == twin.peak().phase == "optimizer"
    assert twin.peak().live_bytes == traced.live_bytes == twin.expanded_peak_bytes()
    assert ups_and_downs(twin) == ups_and_downs(traced.tape)


# Accumulated gradients; matrices of several shapes, in bf16, with the largest last: what a loop over parameters
# still holds of the one before is another size each time.
MIXED = {"gradient_accumulation_steps": 4, "mlp": "swiglu", "n_kv_head": 1, "qk_norm": True, "bias": False}
MIXED |= {"param_dtype": "bfloat16", "n_embd": 32, "vocab_size": 500, "n_layer": 3}
PLAIN = {"n_layer": 1, "n_embd": 32, "weight_decay": 0.0, "momentum": 0.0, "grad_clip": 0.0}
CASES = [(MIXED, name, impl) for name in TRACEABLE for impl in IMPLS] + [(PLAIN, "sgd", impl) for impl in IMPLS]


@pytest.mark.parametrize("changes, name, impl", CASES)
def test_clipping_and_step_of_other_models(changes, name, impl):
    run = make_run({**STEP_IS_PEAK, **changes, "optimizer": name, "optimizer_impl": impl})
    traced, twin = trace_program(run), twin_of(run)
    assert ups_and_downs(twin) == ups_and_downs(traced.tape)
    assert twin.phases()["optimizer"] == traced.phases["optimizer"]


def parts_of(value: Any) -> list[torch.Tensor]:
    """The plain tensors that a tensor consists of."""
    if type(value) is torch.Tensor:
        return [value]
    return [getattr(value, name) for name in value.__tensor_flatten__()[0]]


def sizes(buffers: Iterable[Buffer]) -> list[tuple[int, str]]:
    return sorted((math.prod(buffer.shape), buffer.dtype) for buffer in buffers)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_torchaos_states_and_the_buffers_of_its_compiled_step():
    pytest.importorskip("torchao.optim")
    from torch._inductor.utils import run_and_get_code

    run = make_run({**STEP_IS_PEAK, "optimizer": "adamw8bit"})
    model = torch.nn.Linear(64, 96, bias=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer: Any = build_optimizer(model, run)
    _, codes = run_and_get_code(optimizer.step)  # what inductor wrote for a CPU

    twins = {name: Parameter(name, tuple(p.shape), "float32", 1) for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        state = [value for key, value in optimizer.state[parameter].items() if key != "step"]
        kept = [(tensor.numel(), str(tensor.dtype)[6:]) for value in state for tensor in parts_of(value)]
        assert sizes(adamw8bit_states(twins[name], run)) == sorted(kept)
    made = re.findall(r"= empty_strided_cpu\(\((.*?)\), .*?, torch\.(\w+)\)", "".join(codes))
    allocated = [(math.prod(int(n) for n in shape.split(",") if n.strip()), dtype) for shape, dtype in made]
    w = Scratch(1)
    adamw8bit_step(w, list(twins.values()), run)
    twin = sizes(buffer for sign, _, buffer in Tape(w.items).expand() if sign > 0)
    # A CPU's loops hand both moments on as fp32 values; a GPU's kernels compute them twice.
    assert sorted([*twin, *2 * [(64 * 96, "float32")]]) == sorted(allocated)
