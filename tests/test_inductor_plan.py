"""Inductor's plan against figures known from elsewhere, and against the code that torch.compile really builds."""

import shutil
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from gptfit.config import derive, make_run
from gptfit.inductor_plan import first_kernels, runnable
from gptfit.memory.tape import Event, rounded
from gptfit.recorder import Recorder
from gptfit.trace import Traced, trace_module, trace_program

MiB = 1 << 20

TINY = {"n_layer": 1, "n_head": 2, "n_embd": 64, "vocab_size": 1024, "block_size": 64, "batch_size": 4}
TINY |= {"gradient_accumulation_steps": 2}
SGD = make_run({"optimizer": "sgd", "optimizer_impl": "for-loop", "dtype": "float32", "gradient_accumulation_steps": 1})
SGD = derive(SGD, grad_clip=0.0)
TOKENS, VOCAB = 128, 512


class Net(nn.Module):
    """A residual MLP under a norm, and a loss over logits that it returns, detached or not."""

    def __init__(self, detached: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(32, 32)
        self.norm = nn.LayerNorm(32)
        self.inner = nn.Linear(32, 128)
        self.last = nn.Linear(128, 32)
        self.head = nn.Linear(32, VOCAB)
        self.detached = detached

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.first(x)
        h = h + self.last(F.gelu(self.inner(self.norm(h))))
        logits = self.head(h)
        loss = F.cross_entropy(logits, torch.zeros(TOKENS, dtype=torch.int64, device=x.device))
        return (logits.detach() if self.detached else logits), loss


def traced_net(detached: bool = False) -> Traced:
    return trace_module(lambda: Net(detached), lambda: (torch.empty(TOKENS, 32),), SGD, lambda output: output[1])


def logits_at_peak(traced: Traced) -> Counter[str]:
    found: Counter[str] = Counter()
    for buffer, count in traced.live_set().items():
        if buffer.category == "logits":
            found[buffer.dtype] += count
    return found


def test_three_tensors_of_logits_are_alive_at_the_peak() -> None:
    """The logits, their gradient, and zeros for the gradient of the logits that nobody differentiates."""
    run = make_run({**TINY, "batch_size": 64, "loss": "full", "bias": True})
    assert logits_at_peak(trace_program(run, "nanogpt")) == {"bfloat16": 3}


@pytest.mark.parametrize(("detached", "count"), [(False, 3), (True, 2)])
def test_detached_logits_cost_no_zeros(detached: bool, count: int) -> None:
    live = traced_net(detached).live_set()
    assert sum(n for buffer, n in live.items() if buffer.shape == (TOKENS, VOCAB)) == count


def test_compiling_lowers_memory_of_nanogpt() -> None:
    run = make_run({**TINY, "loss": "full"})
    compiled, eager = trace_program(run, "nanogpt"), trace_program(derive(run, compile=False), "nanogpt")
    assert compiled.live_bytes < eager.live_bytes
    assert compiled.saved_for_backward_bytes < eager.saved_for_backward_bytes
    assert compiled.parameters == eager.parameters


def test_checkpointing_is_kept_by_the_partitioner() -> None:
    run = make_run({**TINY, "n_layer": 2, "dropout": 0.1, "norm": "rmsnorm", "position": "rope"})
    plain = trace_program(run, "gptfit")
    block = trace_program(derive(run, activation_checkpointing="block"), "gptfit")
    assert block.saved_for_backward_bytes < 0.7 * plain.saved_for_backward_bytes


def test_the_step_gives_back_what_it_takes() -> None:
    run = make_run({**TINY, "loss": "full"})
    second, third = (trace_program(run, "nanogpt", steps=steps) for steps in (2, 3))
    assert second.live_bytes == third.live_bytes
    assert second.tape.expanded_peak_bytes() == second.live_bytes


def test_generated_code_runs_without_kernels() -> None:
    source = """
class Runner:
    def call(self, args):
        arg0, = args
        args.clear()
        buf0 = empty_strided_cpu((4, 8), (8, 1), torch.float32)
        cpp_fused_add_mul_3(arg0, buf0)
        del arg0
        buf1 = reinterpret_tensor(buf0, (8, 4), (4, 1), 0); del buf0  # reuse
        extern_kernels.mm(buf1, buf1, out=buf1)
        return (buf1, )
"""
    args = [torch.ones(4, 8)]
    (out,) = runnable(source, Recorder())(args)
    assert out.shape == (8, 4) and not args
    assert first_kernels(source.splitlines()) == {"buf0": "add_mul", "buf1": "mm"}


@pytest.mark.slow
def test_gpt_576() -> None:
    traced = trace_program(make_run({"n_embd": 576, "batch_size": 16, "loss": "full"}), "nanogpt")
    assert traced.live_bytes / MiB == pytest.approx(9_998, abs=1)
    assert traced.saved_for_backward_bytes / MiB == pytest.approx(5_673, abs=1)
    assert traced.peak.phase == "backward"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile builds its kernels with g++")
def test_events_are_those_of_real_compiled_code() -> None:
    """The same step, really compiled for the CPU, watched by torch's profiler in its allocator."""
    planned = events_of_a_step(traced_net())
    net, x = Net(), torch.randn(TOKENS, 32)
    compiled = torch.compile(net)
    (compiled(x)[1] / 1).backward()  # compiles
    net.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        output = compiled(x)
        loss = output[1] / 1
        loss.backward()
    recorded = profiler.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
    sizes = [event.nbytes() for event in recorded if event.name() == "[memory]"]  # pyright: ignore[reportAttributeAccessIssue]
    real = [(1 if size > 0 else -1) * rounded(abs(size)) for size in sizes]
    leftover = -4 * TOKENS * VOCAB  # the logits of the step before, which the traced loop lets go here
    planned.remove(leftover)
    assert tidy(real) == tidy(planned)


def events_of_a_step(traced: Traced) -> list[int]:
    found, phase = [], ""
    for item in traced.tape.items:
        if isinstance(item, Event):
            if phase in ("forward", "backward") and item.buffer.category != "buffer":
                found.append(item.sign * item.buffer.n_bytes)
        else:
            phase = getattr(item, "phase", "")
    return found


def tidy(found: list[int]) -> list[tuple[int, ...]]:
    """Without scalars (512 bytes); frees that follow each other have no order."""
    runs: list[tuple[int, ...]] = []
    for size in found:
        if abs(size) <= 512:
            continue
        if size < 0 and runs and runs[-1][0] < 0:
            runs[-1] = tuple(sorted((*runs[-1], size)))
        else:
            runs.append((size,))
    return runs
