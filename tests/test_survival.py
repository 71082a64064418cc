"""Out of memory at chosen instants, on one process and on one of two: the same tokens, the same losses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from faults import Fault, injected
from gptfit import metrics, survival
from gptfit.config import derive, make_run
from gptfit.errors import GptfitError
from gptfit.events import Event, Note
from gptfit.memory.step import steady_peak
from gptfit.session import Good
from gptfit.train import train
from ranks import Job, train_together
from tokens import few_tokens

torch.set_num_threads(1)

# Steps have 4 sequences for each of 2 blocks: call 5 is in the third micro-batch of one process.
ALONE = {
    "forward, first step": [Fault("forward", 0)],
    "forward, later": [Fault("forward", 2, call=5)],
    "backward": [Fault("backward", 2, call=1)],
    "backward, last micro-batch": [Fault("backward", 3, call=7)],
    "optimizer, first step": [Fault("optimizer", 0)],
    "optimizer, later": [Fault("optimizer", 2)],
    "optimizer, states half made": [Fault("group", 0)],
    "evaluation": [Fault("evaluation", 3, call=1)],
    "twice": [Fault("forward", 1), Fault("backward", 1, call=2)],
}
# Two processes have two micro-batches each; those of a block are calls 0 and 1, then 2 and 3.
OF_TWO = {
    "forward, rank 1": [Fault("forward", 0, rank=1)],
    "forward, second micro-batch": [Fault("forward", 2, rank=0, call=3)],
    "backward, rank 1": [Fault("backward", 2, rank=1, call=0)],
    "backward, last block": [Fault("backward", 3, rank=0, call=3)],
    "forward, both": [Fault("forward", 1, rank=-1, call=1)],
    "optimizer, rank 1": [Fault("optimizer", 0, rank=1)],
    "evaluation, rank 1": [Fault("evaluation", 3, rank=1, call=1)],
    "one after the other": [Fault("forward", 1, rank=0), Fault("backward", 3, rank=1)],
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    few_tokens(folder, 9_000, seed=1)
    return folder


def small(dataset: Path, **changes: Any) -> dict[str, Any]:
    return {
        "n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 257, "block_size": 16, "dataset": str(dataset),
        "batch_size": 6, "gradient_accumulation_steps": 4, "dtype": "float32", "compile": False,
        "learning_rate": 1e-2, "max_iters": 6, "warmup_iters": 1, "eval_interval": 4, "eval_iters": 2,
        "checkpoint_interval": 0, **changes,
    }  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(dataset, tmp_path_factory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    train(make_run(small(dataset)), folder)
    return metrics.read(folder)


def same(folder: Path, wanted: list[dict[str, Any]]) -> None:
    """Every step once, of the same tokens, with the loss of the undisturbed run: another split rounds otherwise."""
    got = metrics.read(folder)
    for key in ("step", "tokens", "lr"):
        assert [entry[key] for entry in got] == [entry[key] for entry in wanted]
    for key in ("loss", "grad_norm"):
        assert [entry[key] for entry in got] == pytest.approx([entry[key] for entry in wanted], rel=2e-5)
    assert got[3]["val_loss"] == pytest.approx(wanted[3]["val_loss"], rel=2e-5)


@pytest.mark.parametrize("name", ALONE)
def test_one_process_goes_on_as_if_nothing_had_happened(dataset, tmp_path, undisturbed, name):
    events: list[Event] = []
    with injected(ALONE[name]):
        train(make_run(small(dataset)), tmp_path, on_event=events.append)
    notes = [event.text for event in events if isinstance(event, Note)]
    same(tmp_path, undisturbed)
    assert sum(note.startswith("out of memory") for note in notes) == len(ALONE[name])
    assert any(note.startswith("why: ") for note in notes) == ("optimizer" not in name)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_one_of_two_processes_takes_the_other_along(dataset, tmp_path, undisturbed, strategy):
    keys = small(dataset, n_gpus=2, strategy=strategy)
    train_together(tmp_path, 2, [Job(name, keys, faults=faults) for name, faults in OF_TWO.items()])
    for name, faults in OF_TWO.items():
        same(tmp_path / name, undisturbed)
        notes = json.loads((tmp_path / f"{name}-rank0.json").read_text())["notes"]
        told = [fault for fault in faults if fault.where != "optimizer" or fault.rank == 0]
        assert sum(note.startswith("out of memory") for note in notes) == len(told), name


@pytest.mark.parametrize("step", [0, 2])
@pytest.mark.parametrize("impl", ["fused", "foreach", "for-loop"])
def test_where_a_parameter_has_moved_it_ends(dataset, tmp_path, step, impl):
    """Out of memory at the second group, when the first has been stepped."""
    with (
        pytest.raises(GptfitError, match="out of memory in the optimizer's step"),
        injected([Fault("group", step, call=1)]),
    ):
        train(make_run(small(dataset, optimizer_impl=impl)), tmp_path)


def session_with(run: Any, good: Good | None) -> Any:
    return type("Session", (), {"run": run, "good": good})()


@pytest.mark.parametrize("room_of", [1, 5, 11, 23])
def test_the_next_micro_batch_is_the_largest_that_fits_the_room(room_of):
    """The room is what the estimate of `room_of` sequences needs: that many fit, one more does not."""
    run = make_run({"batch_size": 24, "gradient_accumulation_steps": 4, "compile": False})
    keys = {"batch_size": room_of, "gradient_accumulation_steps": -(-24 * 4 // room_of)}
    room = steady_peak(derive(run, **keys), "gptfit")[0]
    assert survival.smaller(session_with(run, None), 24, room) == room_of
    assert survival.smaller(session_with(run, None), 24, room - 1) == max(1, room_of - 1)
    assert survival.smaller(session_with(run, None), room_of + 1, 1 << 50) == room_of


def test_a_measured_step_corrects_the_estimate():
    run = make_run({"batch_size": 24, "gradient_accumulation_steps": 4, "compile": False})
    estimated = survival.peak_bytes(run, 24, False)
    room = survival.peak_bytes(run, 12, False)
    assert survival.smaller(session_with(run, Good(24, estimated)), 24, room) == 12
    assert survival.smaller(session_with(run, Good(24, 2 * estimated)), 24, 2 * room) == 12
    assert survival.smaller(session_with(run, Good(24, 2 * estimated)), 24, room) < 12


def test_without_a_known_room_an_eighth_goes():
    run = make_run({"batch_size": 24})
    assert [survival.smaller(session_with(run, None), size, None) for size in (24, 8, 2)] == [21, 7, 1]
