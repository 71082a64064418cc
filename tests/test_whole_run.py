"""The phases of a whole run against traces of the same code: evaluation, sampling, the first step."""

from typing import Any

import pytest
import torch

from gptfit.config import RunConfig, make_run
from gptfit.estimate import estimate, under_program
from gptfit.memory.step import pieces, steady_step
from gptfit.memory.tape import Tape
from gptfit.memory.whole_run import run_phases, sampling
from gptfit.model import GPT
from gptfit.recorder import Recorder
from gptfit.trace import as_on_cuda, trace_program

BASE = {"n_layer": 2, "n_head": 4, "n_embd": 128, "vocab_size": 3000, "block_size": 128, "batch_size": 4}
BASE |= {"gradient_accumulation_steps": 2, "compile": False}
LLAMA = {"norm": "rmsnorm", "mlp": "swiglu", "position": "rope", "qk_norm": True, "n_kv_head": 2}

EAGER: list[tuple[str, dict[str, Any]]] = [
    ("nanogpt", {}),
    ("nanogpt", {"dtype": "float32", "dropout": 0.1, "bias": True, "eval_batch_size": 9}),
    ("gptfit", {"loss": "full"}),
    ("gptfit", LLAMA),
    ("gptfit", {"attention": "math", "dropout": 0.1, "eval_batch_size": 16}),
    ("gptfit", {"optimizer": "lion", "dtype": "float32", "activation_checkpointing": "block"}),
]


def phase(run: RunConfig, program: str, name: str) -> int:
    return dict(run_phases(run, program, pieces(run, program)))[name]


def evaluation_alone(run: RunConfig, program: str) -> int:
    """Peak of an evaluation before the first step, with the batch that is there for it."""
    parts = pieces(run, program)
    return Tape([*parts.parameter_items, *parts.batch, *parts.evaluation]).peak().live_bytes


@pytest.mark.parametrize(("program", "keys"), EAGER)
def test_an_evaluation_is_its_trace(program: str, keys: dict[str, Any]) -> None:
    run = under_program(make_run({**BASE, **keys}), program)
    traced = trace_program(run, program, evaluation=True).live_bytes
    assert phase(run, program, "evaluation") == pytest.approx(traced, rel=1e-4)


@pytest.mark.parametrize(
    ("program", "keys"), [("nanogpt", {}), ("gptfit", {"loss": "full"}), ("gptfit", LLAMA | {"eval_batch_size": 32})]
)
def test_a_compiled_evaluation_is_its_trace(program: str, keys: dict[str, Any]) -> None:
    run = under_program(make_run({**BASE, "compile": True, "n_layer": 3, "vocab_size": 500, **keys}), program)
    traced = trace_program(run, program, evaluation=True, steps=0).live_bytes
    standing = evaluation_alone(run, program)
    assert standing == pytest.approx(traced, rel=0.005)


@pytest.mark.parametrize(("program", "keys"), EAGER[:4])
def test_the_first_step_is_its_trace(program: str, keys: dict[str, Any]) -> None:
    run = under_program(make_run({**BASE, **keys}), program)
    traced = trace_program(run, program, steps=1).live_bytes
    assert phase(run, program, "first step") == pytest.approx(traced, rel=1e-3)


@pytest.mark.parametrize(
    ("program", "keys"),
    [
        ("nanogpt", {}),
        ("nanogpt", {"batch_size": 1, "block_size": 64, "n_layer": 4, "gradient_accumulation_steps": 1}),
        ("nanogpt", {"dtype": "float32", "dropout": 0.1, "bias": True}),
        ("nanogpt", {"vocab_size": 65}),
        ("gptfit", {"loss": "full"}),
        ("gptfit", LLAMA),
        ("gptfit", {"dtype": "float32", "activation_checkpointing": "block", "vocab_size": 65}),
    ],
)
def test_peaks_of_the_phases_of_a_step_are_those_of_its_trace(program: str, keys: dict[str, Any]) -> None:
    run = under_program(make_run({**BASE, **keys}), program)
    traced, own = trace_program(run, program).phases, steady_step(run, pieces(run, program, whole=False)).phases()
    names = ["forward", "loss", "loss backward", "backward", "optimizer"]
    assert [own[name] for name in names] == pytest.approx([traced[name] for name in names], rel=0.005)


@pytest.mark.parametrize("keys", [{}, {"logit_softcap": 10.0}, LLAMA, {"tie_embeddings": False, "compile": True}])
def test_sampling_is_its_trace(keys: dict[str, Any]) -> None:
    run = make_run({**BASE, **keys})
    recorder = Recorder()
    with as_on_cuda(recorder):
        model = GPT(run).eval()
        recorder.label_model(model)
        idx = torch.empty(1, run.block_size, dtype=torch.int64)
        start = len(recorder.notes)
        logits = model.logits(idx)
        tape = Tape(recorder.items(start, len(recorder.notes)))
    assert logits.shape == (1, run.vocab_size)
    own = Tape([*pieces(run, "gptfit").parameter_items, *sampling(run, "gptfit")])
    assert own.peak().live_bytes == pytest.approx(tape.peak().live_bytes, rel=1e-3)


def test_a_large_evaluation_decides_the_verdict_and_leaves_the_step_alone() -> None:
    """The peak of the step stays the step's; what the process holds is that of the whole run."""
    small, large = (estimate(make_run({**BASE, "eval_batch_size": size}), "nanogpt") for size in (4, 400))
    assert large.live_bytes == small.live_bytes
    assert large.allocated_bytes == pytest.approx(small.allocated_bytes, rel=0.01)  # blocks are cut up differently
    assert max(large.run_phases, key=lambda phase: phase[1])[0] == "evaluation"
    assert large.reserved_bytes >= large.eval_allocated_bytes > 2 * small.reserved_bytes


def test_loading_in_nanogpt_holds_the_weights_twice() -> None:
    run = under_program(make_run(BASE), "nanogpt")
    n_bytes = 4 * estimate(run, "nanogpt").n_params
    twice = phase(run, "nanogpt", "loading a checkpoint") - phase(make_run(BASE), "gptfit", "loading a checkpoint")
    assert twice == pytest.approx(n_bytes, rel=0.01)
