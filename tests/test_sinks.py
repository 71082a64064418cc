"""Logs hold what metrics.jsonl holds, once a step also after a resume, and no run ends for its log."""

import csv
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gptfit import metrics
from gptfit.errors import GptfitError
from gptfit.events import Event, Note
from gptfit.sinks import SINKS, Logs
from gptfit.train import train
from test_train import dataset as dataset
from test_train import tiny


def run_with(names: str, folder: Path, dataset: Path, max_iters: int, resume: bool = False) -> list[Event]:
    events: list[Event] = []
    logs = Logs(names, events.append)
    train(tiny(dataset, max_iters=max_iters, checkpoint_interval=3), folder, resume, on_event=logs)
    assert not logs.sinks, "all are closed"
    return events


def test_csv_is_metrics_once_a_step_after_a_resume(dataset: Path, tmp_path: Path) -> None:
    run_with("csv", tmp_path, dataset, 4)
    (tmp_path / "checkpoint-00000004.pt").unlink()
    run_with("csv", tmp_path, dataset, 6, resume=True)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    entries = metrics.read(tmp_path)
    assert [row["step"] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    for row, entry in zip(rows, entries, strict=True):
        assert float(row["loss"]) == entry["loss"] and float(row["grad_norm"]) == entry["grad_norm"]
        assert row["val_loss"] == ("" if "val_loss" not in entry else str(entry["val_loss"]))


def test_tensorboard_reads_what_was_trained(dataset: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_with("tensorboard", tmp_path, dataset, 4)
    (tmp_path / "checkpoint-00000004.pt").unlink()
    run_with("tensorboard", tmp_path, dataset, 6, resume=True)
    seen = EventAccumulator(str(tmp_path / "tensorboard"))
    seen.Reload()
    entries = metrics.read(tmp_path)
    got = {event.step: event.value for event in seen.Scalars("loss")}
    assert got == {entry["step"]: pytest.approx(entry["loss"]) for entry in entries} and len(got) == 6
    assert [event.step for event in seen.Scalars("val_loss")] == [e["step"] for e in entries if "val_loss" in e]
    assert "peak_allocated_bytes" not in seen.Tags()["scalars"]  # not known on a CPU


def test_wandb_is_told_and_goes_on_after_a_resume(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []

    def init(**keys: Any) -> Any:
        told.append((keys["id"], keys["resume"], keys["config"]["max_iters"]))
        return SimpleNamespace(
            id="abc", log=lambda values, step: told.append((step, values["loss"])), finish=lambda: told.append("end")
        )

    module = SimpleNamespace(init=init, __spec__=SimpleNamespace(), __name__="wandb")
    monkeypatch.setitem(sys.modules, "wandb", module)
    run_with("wandb", tmp_path, dataset, 3)
    run_with("wandb", tmp_path, dataset, 4, resume=True)
    losses = {entry["step"]: entry["loss"] for entry in metrics.read(tmp_path)}
    expected = [(None, None, 3), (1, losses[1]), (2, losses[2]), (3, losses[3]), "end"]
    assert told == [*expected, ("abc", "allow", 4), (4, losses[4]), "end"]


class Broken:
    def start(self, event: Any) -> None:
        pass

    def step(self, event: Any) -> None:
        raise ConnectionError("nobody answers\nat all")

    def close(self) -> None:
        raise ConnectionError("nor now")


def test_a_log_that_fails_ends_no_run(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SINKS, "broken", Broken)
    events = run_with("broken,csv", tmp_path, dataset, 3)
    notes = [event.text for event in events if isinstance(event, Note)]
    assert notes.count("--log broken failed: nobody answers; going on without it") == 1
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 4


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_missing_package_is_one_line_before_training(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gptfit: Any
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = gptfit("train", "tiny", "--log", package, "--out", str(tmp_path / "out"), "--device", "cpu")
    assert (done.code, (tmp_path / "out").exists()) == (2, False)
    assert f"error: --log {package} needs the package {package}" in done.err
    assert f"hint: pip install {package}" in done.err
    with pytest.raises(GptfitError, match='unknown log "tensorbord"; did you mean tensorboard'):
        Logs("tensorbord")
