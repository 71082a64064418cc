"""Whole runs that meet losses that are no numbers, full disks and damaged files."""

import errno
import math
import os
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from gptfit import checkpoint, metrics
from gptfit.errors import GptfitError
from gptfit.events import Event, Note, Started
from gptfit.model import GPT
from gptfit.train import train
from test_train import losses, stop_at, tiny, weights, words_in


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return words_in(tmp_path_factory.mktemp("words"))


def test_a_loss_that_is_no_number_stops_the_run_before_it_is_saved(dataset, tmp_path, monkeypatch):
    real = GPT.forward
    calls = iter(range(99))
    monkeypatch.setattr(GPT, "forward", lambda self, x, y: real(self, x, y) * (math.nan if next(calls) == 12 else 1))
    with pytest.raises(GptfitError, match="step 7: the loss is nan; it is not saved") as caught:
        train(tiny(dataset, eval_interval=0), tmp_path)
    found = checkpoint.latest_valid(tmp_path)
    assert found is not None and found.checkpoint.step == 5
    assert str(found.path) in (caught.value.hint or "")


def bad_at(monkeypatch: pytest.MonkeyPatch, where: str, micro_batches: set[int]) -> None:
    """Makes the losses of those micro-batches, or their gradients alone, no numbers."""
    real, calls = GPT.forward, iter(range(999))

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(_context: Any, loss: torch.Tensor) -> torch.Tensor:
            return loss.clone()

        @staticmethod
        def backward(_context: Any, *grads: torch.Tensor) -> torch.Tensor:
            return grads[0] * math.inf

    def forward(self: GPT, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = real(self, idx, targets)
        if next(calls) not in micro_batches:
            return loss
        return loss * math.nan if where == "loss" else cast(torch.Tensor, Poison.apply(loss))

    monkeypatch.setattr(GPT, "forward", forward)


@pytest.mark.parametrize("where", ["loss", "gradients"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_bad_step_is_left_out_and_counted(dataset, tmp_path, monkeypatch, where, dtype):
    """As if the optimizer had not been asked in that step; what follows sees its own data."""
    run = tiny(dataset, eval_interval=0, on_nan="skip", dtype=dtype, dropout=0.0)
    bad_at(monkeypatch, where, {4, 13})  # in steps 3 and 7
    events: list[Event] = []
    train(run, tmp_path, on_event=events.append)
    notes = [event.text for event in events if isinstance(event, Note)]
    entries = metrics.read(tmp_path)
    if dtype == "float16" and where == "gradients":  # its scaler leaves such steps out at any time
        assert notes == [] and not any("skipped" in entry for entry in entries)
    else:
        assert [note.split(":")[0] for note in notes] == [
            "step 3 is left out, 1 so far", "step 7 is left out, 2 so far",
        ]  # fmt: skip
        assert [entry["step"] for entry in entries if entry.get("skipped")] == [3, 7]
    assert [entry["step"] for entry in entries] == list(range(1, 11))
    after = weights(tmp_path)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in after.values())
    found = checkpoint.latest_valid(tmp_path)
    assert found is not None
    assert {float(state["step"]) for state in found.checkpoint.optimizer["state"].values()} == {8.0}


def test_gradients_that_are_no_numbers_stop_the_run_before_they_are_saved(dataset, tmp_path, monkeypatch):
    bad_at(monkeypatch, "gradients", {9})
    with pytest.raises(GptfitError, match=r"step 5: the norm of the gradients is (nan|inf); it is not saved") as caught:
        train(tiny(dataset, eval_interval=0), tmp_path)
    assert "begin anew with a lower learning_rate" in (caught.value.hint or "")
    assert checkpoint.latest_valid(tmp_path) is None


def test_steps_that_are_all_bad_end_the_run(dataset, tmp_path, monkeypatch):
    bad_at(monkeypatch, "loss", set(range(4, 99)))
    with pytest.raises(GptfitError, match="10 steps in a row were left out, the last one step 12"):
        train(tiny(dataset, eval_interval=0, max_iters=20, on_nan="skip"), tmp_path)


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("what", ["checkpoint", "metrics"])
def test_a_full_disk_is_one_line_and_the_run_goes_on_from_the_previous_checkpoint(dataset, tmp_path, monkeypatch, what):
    run = tiny(dataset)
    train(run, tmp_path / "whole")

    def fill() -> None:
        monkeypatch.setattr(*((os, "fsync", full_disk) if what == "checkpoint" else (metrics.json, "dumps", full_disk)))

    with pytest.raises(GptfitError, match="no space left to write") as caught:
        train(run, tmp_path / "parts", on_event=stop_at(7, fill))
    monkeypatch.undo()
    assert "\n" not in caught.value.message
    found = checkpoint.latest_valid(tmp_path / "parts")
    assert found is not None and (found.checkpoint.step, found.skipped) == (5, ())
    train(run, tmp_path / "parts", resume=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_a_folder_that_cannot_be_written_is_one_line(dataset, tmp_path, monkeypatch):
    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    real = Path.open

    def opened(path: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
        return read_only() if "w" in mode or "a" in mode else real(path, mode, *rest, **options)

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(GptfitError, match=r'cannot write ".*run.yaml": read-only file system'):
        train(tiny(dataset), tmp_path)
    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(GptfitError, match=r'cannot make the folder ".*new": read-only file system'):
        train(tiny(dataset), tmp_path / "new")


def test_a_damaged_newest_checkpoint_is_said_and_the_one_before_it_goes_on(dataset, tmp_path):
    run = tiny(dataset)
    train(run, tmp_path / "whole")
    train(run, tmp_path / "parts")
    newest = checkpoint.checkpoint_paths(tmp_path / "parts")[0]
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    events: list[Event] = []
    train(run, tmp_path / "parts", resume=True, on_event=events.append)
    notes = [event.text for event in events if isinstance(event, Note)]
    assert len(notes) == 1 and newest.name in notes[0] and notes[0].endswith("passed over")
    assert [event.step for event in events if isinstance(event, Started)] == [5]
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
