"""The tracer against a real card's figures, a CPU's own allocator, and sums done by hand."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from gptfit.config import RunConfig, derive, make_run
from gptfit.cuda_autocast import LOWER, LOWER_ON_BOTH, SINGLE, SINGLE_UNLESS_TOLD, WIDEST
from gptfit.errors import GptfitError
from gptfit.memory.tape import Event, Item, Mark, rounded
from gptfit.trace import Traced, trace_module, trace_program

MiB = 1 << 20
WORKSPACES_MIB = 2 * 8.125  # cuBLAS's, which a trace does not see

SMALL = {"n_layer": 4, "n_head": 4, "n_embd": 256, "vocab_size": 4096, "bias": True, "optimizer_impl": "foreach"}
SMALL |= {"gradient_accumulation_steps": 1, "grad_clip": 0.0}
TINY = {"n_layer": 2, "n_head": 2, "n_embd": 64, "vocab_size": 512, "block_size": 32, "batch_size": 2}
TINY |= {"gradient_accumulation_steps": 2}

# torch.cuda.max_memory_allocated printed on an RTX 3060 (torch 2.14): dtype, batch_size, block_size, MiB.
RTX_3060 = [
    ("float32", 8, 256, 325.4),
    ("float32", 16, 256, 585.73),
    ("float32", 8, 1024, 1108.5),
    ("float32", 128, 256, 4229.7),
    ("bfloat16", 16, 256, 447.73),
]


def nanogpt_run(**keys: object) -> RunConfig:
    return make_run({"loss": "full", "compile": False, **keys})


def events(traced: Traced) -> list[tuple[int, int]]:
    return [(item.sign, item.buffer.n_bytes) for item in traced.tape.items if isinstance(item, Event)]


@pytest.mark.parametrize(("dtype", "batch_size", "block_size", "mib"), RTX_3060)
def test_a_real_card(dtype: str, batch_size: int, block_size: int, mib: float) -> None:
    run = nanogpt_run(**SMALL, dtype=dtype, batch_size=batch_size, block_size=block_size)
    live_mib = trace_program(run, "nanogpt").live_bytes / MiB
    # The measured loop fetches its batch once; ours holds the next one, int64 inputs and targets, during backward.
    next_batch_mib = 2 * 8 * batch_size * block_size / MiB
    assert live_mib - next_batch_mib + WORKSPACES_MIB == pytest.approx(mib, rel=5e-4)


def test_gpt2_with_fp16() -> None:
    traced = trace_program(nanogpt_run(n_embd=576, batch_size=12, dtype="float16"), "nanogpt")
    assert traced.live_bytes / MiB == pytest.approx(12_545.6, abs=0.5)
    assert traced.peak.phase == "loss backward"


@pytest.mark.parametrize("program", ["nanogpt", "gptfit"])
def test_float16_and_bfloat16_need_the_same(program: str) -> None:
    run = nanogpt_run(**TINY, bias=True, dropout=0.1)
    half, brain = (trace_program(derive(run, dtype=dtype), program) for dtype in ("float16", "bfloat16"))
    # A GradScaler adds scalars, 512 bytes each.
    large = [[event for event in events(traced) if event[1] > 512] for traced in (half, brain)]
    assert large[0] == large[1]
    assert half.saved_for_backward_bytes == brain.saved_for_backward_bytes


@pytest.mark.parametrize("program", ["nanogpt", "gptfit"])
def test_the_second_step_is_steady(program: str) -> None:
    run = nanogpt_run(**TINY)
    second, third = (split(trace_program(run, program, steps=steps)) for steps in (2, 3))
    assert sorted(second[0]) == sorted(third[0])
    assert second[1] == third[1]
    # All that a step takes it gives back: what is there at its end was there at its start.
    assert sum(event.sign * event.buffer.n_bytes for event in second[1] if isinstance(event, Event)) == 0


def split(traced: Traced) -> tuple[list[Item], list[Item]]:
    """What is alive when the step starts, and the step."""
    first = next(i for i, item in enumerate(traced.tape.items) if isinstance(item, Mark) and i > 0)
    return traced.tape.items[1:first], traced.tape.items[first:]


def test_every_free_finds_its_allocation() -> None:
    traced = trace_program(nanogpt_run(**TINY, dropout=0.1), "nanogpt")
    assert traced.tape.expanded_peak_bytes() == traced.live_bytes
    assert sum(b.n_bytes * n for b, n in traced.live_set().items()) == traced.live_bytes


def test_cuda_autocast_not_the_cpus() -> None:
    traced = trace_program(nanogpt_run(**TINY, dtype="bfloat16"), "nanogpt")
    dtypes = {}
    for item in traced.tape.items:
        if isinstance(item, Event):
            dtypes.setdefault(item.buffer.name.split(" #")[0], item.buffer.dtype)
    assert dtypes["transformer.h.0.ln_1: native_layer_norm"] == "float32"
    assert dtypes["_log_softmax"] == "float32"
    assert dtypes["transformer.h.0.mlp.gelu: gelu"] == "bfloat16"
    assert dtypes["lm_head: mm"] == "bfloat16"


def test_autocast_lists_are_torchs() -> None:
    header = Path(torch.__file__).parent / "include/ATen/autocast_mode.h"
    if not header.exists():
        pytest.skip("this build of torch ships no headers")
    text = header.read_text()

    def listed(macro: str) -> set[str]:
        body = re.search(rf"#define {macro}\(_\)((?:.*\\\n)*.*)", text)
        assert body is not None
        return set(re.findall(r"_\((\w+)", body.group(1)))

    # Internal names that Python cannot call, and upsampling, which Python calls interpolate.
    hidden = {"_thnn_fused_lstm_cell", "_thnn_fused_gru_cell", "_scaled_dot_product_flash_attention"}
    single = {name for name in listed("AT_FORALL_FP32") if "upsample" not in name}
    assert listed("AT_FORALL_LOWER_PRECISION_FP") - hidden <= LOWER | LOWER_ON_BOTH
    assert single <= SINGLE
    assert listed("AT_FORALL_FP32_SET_OPT_DTYPE") - {"linalg_matrix_norm"} <= SINGLE_UNLESS_TOLD
    assert listed("AT_FORALL_PROMOTE") <= WIDEST


class Toy(nn.Module):
    """A residual block without a kernel that needs scratch, so that a CPU's allocator sees what a trace sees."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.inner = nn.Linear(width, 4 * width)
        self.last = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = h + self.last(F.gelu(self.inner(h)))
        return (h * h).sum()


SGD = make_run({"optimizer": "sgd", "optimizer_impl": "for-loop", "dtype": "float32", "compile": False})
SGD = derive(SGD, gradient_accumulation_steps=1, grad_clip=0.0)


def test_a_toy_by_hand() -> None:
    stream, hidden = 4 * 64 * 32, 4 * 64 * 128
    traced = trace_module(Toy, lambda: (torch.empty(64, 32),), SGD)
    # Kept: h before and after the block, the MLP before and after gelu; x is an input, weights are parameters.
    assert traced.saved_for_backward_bytes == 2 * stream + 2 * hidden
    sizes = {name: rounded(4 * parameter.numel()) for name, parameter in Toy().named_parameters()}
    assert traced.n_params == sum(parameter.numel() for parameter in Toy().parameters())
    # The worst instant is gelu's backward: its gradient is made while its input and its output's gradient are
    # there, and the gradients of `last`. Its output is gone.
    gradients = sizes["last.weight"] + sizes["last.bias"]
    inputs = 2 * stream  # the batch in work and the next one
    kept = stream + hidden  # h before the block, which the whole backward of the MLP needs, and gelu's input
    temporaries = stream + 2 * hidden  # the gradient of h after the block, of gelu's output and of its input
    scalars = 3 * 512  # the loss, the loss over one micro-step, and the seed of backward
    assert traced.live_bytes == 2 * sum(sizes.values()) + gradients + inputs + kept + temporaries + scalars


def test_events_are_those_of_a_real_backward() -> None:
    """The same step on real tensors, watched by torch's profiler in the CPU's allocator: an independent witness."""
    traced = trace_module(Toy, lambda: (torch.empty(64, 32),), SGD)
    phases = traced_forward_and_backward(traced)
    model, x = Toy(), torch.randn(64, 32)
    (model(x) / 1).backward()
    model.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        loss = model(x) / 1
        loss.backward()
    recorded = profiler.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
    sizes = [event.nbytes() for event in recorded if event.name() == "[memory]"]  # pyright: ignore[reportAttributeAccessIssue]
    real = [(1 if size > 0 else -1, rounded(abs(size))) for size in sizes]
    assert tidy(real) == tidy(phases)


def traced_forward_and_backward(traced: Traced) -> list[tuple[int, int]]:
    found, phase = [], ""
    for item in traced.tape.items:
        if isinstance(item, Event):
            if phase in ("forward", "backward") and item.buffer.category != "buffer":
                found.append((item.sign, item.buffer.n_bytes))
        else:
            phase = getattr(item, "phase", "")
    return found


def tidy(found: list[tuple[int, int]]) -> list[Any]:
    """Frees that follow each other have no order; scalars and inputs (512 bytes, the batch) differ by loop."""
    runs: list[Any] = []
    for event in found:
        if event[1] <= 512:
            continue
        if event[0] < 0 and runs and isinstance(runs[-1], list):
            runs[-1] = sorted([*runs[-1], event])
        else:
            runs.append([event] if event[0] < 0 else event)
    return runs


def test_checkpointing_recomputes_under_autocast() -> None:
    run = nanogpt_run(**TINY, dropout=0.1)
    plain = trace_program(run, "gptfit")
    saved = trace_program(derive(run, activation_checkpointing="block"), "gptfit")
    assert saved.saved_for_backward_bytes < plain.saved_for_backward_bytes


class Branching(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.first(x)).sum()


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda h: h if h.sum() > 0 else -h, "branch"),
        (lambda h: h[h > 0], "depends on the values"),
        (lambda h: h + torch.zeros(8, device="cuda"), "made on cuda"),
    ],
)
def test_what_cannot_be_traced_is_said_in_a_line(act: Callable[[Tensor], Tensor], words: str) -> None:
    with pytest.raises(GptfitError, match=words) as caught:
        trace_module(lambda: Branching(act), lambda: (torch.empty(4, 8),), SGD)
    assert "\n" not in caught.value.message and caught.value.hint


def test_unknown_program() -> None:
    with pytest.raises(GptfitError, match="unknown program"):
        trace_program(nanogpt_run(**TINY), "minigpt")
