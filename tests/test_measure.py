"""The measuring process: the trainer's steps on a CPU stand for those on a GPU, whose figures are put in."""

import json
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gptfit import measure, train
from gptfit.calibration import Rung, ladder
from gptfit.config import make_run
from gptfit.device import HeldMemory
from gptfit.driver import DriverGpu, DriverProcess
from gptfit.errors import GptfitError
from gptfit.events import Note, Started
from gptfit.gpus import shipped_gpu
from gptfit.measure import Watch, measure_here, measure_rung, process_bytes, reading_of
from gptfit.units import MiB

TINY = make_run(
    {
        **{"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 300, "block_size": 8, "batch_size": 2},
        **{"gradient_accumulation_steps": 1, "dtype": "float32", "compile": False, "expandable_segments": False},
    }
)
CARD = shipped_gpu("rtx4070")


def gpu(used_mib: int, *processes: tuple[int, int | None]) -> DriverGpu:
    listed = tuple(DriverProcess(pid, "python", mib and mib * MiB) for pid, mib in processes)
    return DriverGpu(0, "GPU-1", "card", 12_282 * MiB, 0, used_mib * MiB, "550.54", listed)


@pytest.mark.parametrize(
    "before, now, expected_mib",
    [
        ([gpu(400)], [gpu(900, (7, 450), (8, 50))], 450),  # listed
        ([gpu(400, (8, 50))], [gpu(900, (8, 50))], 500),  # in a container: not listed
        ([gpu(400)], [gpu(900, (7, None))], 500),  # under WSL: listed without a figure
        ([gpu(900)], [gpu(400)], None),  # another process ended meanwhile
        ([], [gpu(900)], None),
        ([gpu(400)], [], None),
    ],
)
def test_what_the_process_holds(before: list[DriverGpu], now: list[DriverGpu], expected_mib: int | None) -> None:
    expected = None if expected_mib is None else expected_mib * MiB
    assert process_bytes(7, "GPU-1", before, now) == expected


def test_another_card_is_not_looked_at() -> None:
    assert process_bytes(7, "GPU-2", [gpu(400)], [gpu(900, (7, 450))]) is None


def test_a_few_steps_of_the_trainer_are_watched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two steps reserve 130 and 125 MiB; 120 are left when the driver says 420 for the process: 430 at the peak."""
    peaks = iter([(95, 130), (90, 125), (0, 0)])  # the trainer asks once more, for its own comparison
    monkeypatch.setattr(train, "held_memory", lambda device: HeldMemory(*(mib * MiB for mib in next(peaks)), 0))
    monkeypatch.setattr(train, "reset_peaks", lambda device: None)
    monkeypatch.setattr(measure, "STEADY_SECONDS", 0.0)
    seen = iter([[gpu(0)], [gpu(420, (os.getpid(), 420))]])
    monkeypatch.setattr(measure, "detect", lambda: next(seen))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 120 * MiB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=11_851 * MiB))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    steps = []
    original = measure.figures

    def figures(watch: Watch) -> dict[str, Any]:
        steps.extend(watch.steps)
        return original(watch)

    monkeypatch.setattr(measure, "figures", figures)
    monkeypatch.setattr(measure, "MIN_STEPS", 2)
    found = measure_here(TINY, "GPU-1", "cpu")
    assert [step.step for step in steps] == [1, 2]
    assert (found["allocated_bytes"], found["reserved_bytes"]) == (90 * MiB, 130 * MiB)
    assert found["process_bytes"] == 430 * MiB
    assert found["total_bytes"] == 11_851 * MiB and found["torch"] == torch.__version__
    assert found["seconds_per_step"] == steps[1].seconds
    assert list(tmp_path.glob("gptfit-*")) == []


def test_short_steps_go_on_until_they_say_something(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "detect", list)
    monkeypatch.setattr(measure, "MAX_STEPS", 7)
    monkeypatch.setattr(measure, "figures", lambda watch: {"steps": len(watch.steps)})
    monkeypatch.setattr(measure, "STEADY_SECONDS", 1e9)
    assert measure_here(TINY, "GPU-1", "cpu") == {"steps": 7}
    monkeypatch.setattr(measure, "STEADY_SECONDS", 0.0)
    assert measure_here(TINY, "GPU-1", "cpu") == {"steps": measure.MIN_STEPS}


def test_another_run_than_asked_for_is_no_reading(tmp_path: Path) -> None:
    watch = Watch(TINY, "GPU-1", [])
    watch(Note("any other note"))
    with pytest.raises(GptfitError, match="out of memory; going on with micro-batches of 1"):
        watch(Note("out of memory; going on with micro-batches of 1, the same tokens a step"))
    other = make_run({**TINY.model_dump(exclude_unset=True), "dtype": "float16"})
    with pytest.raises(GptfitError, match="cannot do dtype=float32"):
        watch(Started(other, "cpu", 1, "", 1, "", 0, tmp_path))


def test_a_process_on_a_machine_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real process, from the run on its stdin to its line."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(GptfitError, match='device "cuda" cannot be used'):
        measure_rung(Rung("tiny", TINY), CARD, gpu(0))


def test_what_a_process_printed_is_its_reading() -> None:
    rung = ladder(CARD, True)[0]
    figures = {"allocated_bytes": 1, "reserved_bytes": 2, "process_bytes": None, "seconds_per_step": 0.5}
    line = json.dumps({**figures, "total_bytes": 3, "torch": "2.13.0"})
    found = reading_of(rung, CARD, gpu(0), 0, f"a compiler's word\n{line}\n", "")
    assert (found.allocated_bytes, found.reserved_bytes, found.process_bytes) == (1, 2, None)
    assert found.machine.driver_total_bytes == 12_282 * MiB and found.machine.gpu == "rtx4070"
    assert make_run(found.config) == rung.run


@pytest.mark.parametrize(
    "out, err, expected",
    [
        ('{"error": "no compiler"}', "", "no compiler"),
        ("", "Traceback\nKilled", "its process ended with code -9: Killed"),
        ("not JSON", "", "its process ended with code -9: it said nothing"),
    ],
)
def test_a_process_that_failed_is_an_error(out: str, err: str, expected: str) -> None:
    with pytest.raises(GptfitError, match=expected):
        reading_of(ladder(CARD, True)[0], CARD, gpu(0), -9, out, err)
