"""From readings to an overlay: with recorded numbers, or numbers made here, in place of a GPU."""

import datetime
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptfit.accuracy import accuracy
from gptfit.calibration import Machine, Reading, Rung, calibrate, climb, ladder, readings_in, write_rows
from gptfit.config import make_run
from gptfit.driver import DriverGpu
from gptfit.errors import GptfitError
from gptfit.estimate import estimate
from gptfit.gpus import load_gpu, shipped_gpu
from gptfit.overlay import read_overlay
from gptfit.units import GiB, MiB

CARD = shipped_gpu("rtx4070")
TOTAL, CONTEXT, FASTER = 11_851 * MiB, 310 * MiB, 1.3
MACHINE = Machine(
    "rtx4070", "NVIDIA GeForce RTX 4070", TOTAL, 12_282 * MiB, "2.13.0+cu126", "550.54", datetime.date(2026, 3, 1)
)
GPU = DriverGpu(0, "GPU-1", "NVIDIA GeForce RTX 4070", 12_282 * MiB, 11_800 * MiB, 482 * MiB, "550.54")


def reading(rung: Rung) -> Reading:
    """A card that does exactly what is predicted, but with another context, and a third faster."""
    found = estimate(rung.run, "gptfit", CARD)
    assert found.speed is not None
    return Reading(
        rung.name,
        MACHINE,
        rung.run.model_dump(exclude_unset=True),
        found.allocated_bytes,
        found.reserved_bytes,
        found.reserved_bytes + CONTEXT,
        found.speed.seconds_per_step / FASTER,
    )


RUNGS = ladder(CARD, expandable_segments=True)
READINGS = [reading(rung) for rung in RUNGS]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GPTFIT_PROFILES", str(tmp_path / "profiles"))
    return tmp_path / "profiles"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    write_rows(READINGS, path)
    return path


def test_the_ladder_is_what_the_card_can_do() -> None:
    assert [rung.name for rung in RUNGS if rung.run.compile and rung.name.startswith("gpt2")]
    assert {rung.run.dtype for rung in RUNGS} == {"bfloat16"}
    assert {rung.run.dtype for rung in ladder(shipped_gpu("t4"), True)} == {"float16"}
    old = ladder(shipped_gpu("gtx1080ti"), False)
    assert old and not any(rung.run.compile or rung.run.expandable_segments for rung in old)


def test_the_ladder_is_short_on_the_smallest_cards() -> None:
    """Two runs at the least on a card of 4 GB."""
    fits = [rung.name for rung in ladder(shipped_gpu("gtx1650"), True) if fit(rung, "gtx1650")]
    assert len(fits) >= 2 and any(name.startswith("gpt2") for name in fits)


def fit(rung: Rung, card: str) -> bool:
    return estimate(rung.run, "gptfit", shipped_gpu(card)).verdict == "fits"


def test_the_overlay_is_what_the_card_showed() -> None:
    answer = climb(RUNGS, CARD, 0, reading, lambda line: None)
    overlay = answer.overlay
    assert overlay.context_low_bytes == overlay.context_bytes == overlay.context_high_bytes == CONTEXT
    assert (overlay.total_bytes, overlay.driver_bytes) == (TOTAL, 12_282 * MiB - TOTAL)
    assert overlay.speed_factor == pytest.approx(FASTER, abs=1e-4)
    assert (overlay.gpu, overlay.n_runs, overlay.measured_on) == ("rtx4070", len(RUNGS), datetime.date(2026, 3, 1))


def test_runs_that_wait_for_python_say_nothing_of_the_card() -> None:
    """On a fast card the small runs do: ten times as slow as predicted, and in the majority, they change nothing."""
    card = shipped_gpu("h100-sxm")
    machine = replace(MACHINE, gpu="h100-sxm", total_bytes=card.total_bytes, driver_total_bytes=card.box_bytes)
    readings = []
    for rung in ladder(card, True):
        if rung.name not in ("small-eager", "small-compiled", "gpt2-compiled-full"):
            continue
        found = estimate(rung.run, "gptfit", card)
        assert found.speed is not None
        slower = 10 if rung.name.startswith("small") else 1 / FASTER
        readings.append(replace(reading(rung), machine=machine, seconds_per_step=found.speed.seconds_per_step * slower))
    assert calibrate(readings).overlay.speed_factor == pytest.approx(FASTER, abs=1e-4)
    assert calibrate(readings[:2]).overlay.speed_factor == pytest.approx(0.1, abs=1e-3), "where there are no others"


def test_the_context_is_the_median_between_its_ends() -> None:
    contexts = [500, 300, 310, 320, 290, 305]
    readings = [
        replace(one, process_bytes=one.reserved_bytes + mib * MiB) for one, mib in zip(READINGS, contexts, strict=True)
    ]
    overlay = calibrate(readings).overlay
    figures = (overlay.context_low_bytes, overlay.context_bytes, overlay.context_high_bytes)
    assert figures == (290 * MiB, 307 * MiB + MiB // 2, 500 * MiB)


def test_a_run_without_a_process_figure_does_not_count_for_the_context() -> None:
    readings = [replace(READINGS[0], process_bytes=None), *READINGS[1:]]
    assert calibrate(readings).overlay.context_bytes == CONTEXT
    with pytest.raises(GptfitError, match="no run says what its process holds"):
        calibrate([replace(one, process_bytes=None) for one in READINGS])


def test_a_run_that_fails_is_left_out_with_its_reason() -> None:
    def measure(rung: Rung) -> Reading:
        if rung.run.compile:
            raise GptfitError("no C compiler")
        return reading(rung)

    told: list[str] = []
    answer = climb(RUNGS, CARD, 0, measure, told.append)
    compiled = [rung.name for rung in RUNGS if rung.run.compile]
    assert answer.left_out == tuple((name, "no C compiler") for name in compiled)
    assert answer.overlay.n_runs == len(RUNGS) - len(compiled) > 0
    assert told[0] == f"measuring small-eager (1 of {len(RUNGS)})" and len(told) == len(RUNGS)


def test_where_nothing_can_be_measured_it_is_one_error() -> None:
    def measure(rung: Rung) -> Reading:
        raise GptfitError("no driver")

    with pytest.raises(GptfitError, match="nothing could be measured: small-eager: no driver"):
        climb(RUNGS, CARD, 0, measure, lambda line: None)


def test_what_is_predicted_not_to_fit_is_not_started() -> None:
    started = []

    def measure(rung: Rung) -> Reading:
        started.append(rung.name)
        return reading(rung)

    answer = climb(RUNGS, CARD, CARD.total_bytes - 2 * GiB, measure, lambda line: None)
    assert started == ["small-eager", "small-compiled"]
    assert {name for name, _ in answer.left_out} == {rung.name for rung in RUNGS} - set(started)


def test_a_slice_of_a_card_is_not_taken_for_the_card() -> None:
    machine = replace(MACHINE, total_bytes=5 * GiB, driver_total_bytes=5 * GiB)
    with pytest.raises(GptfitError, match=r"total_bytes is 5\.00 GiB, but a NVIDIA GeForce RTX 4070 has"):
        calibrate([replace(one, machine=machine) for one in READINGS])


def test_a_speed_beyond_all_cards_is_refused() -> None:
    with pytest.raises(GptfitError, match="times as fast"):
        calibrate([replace(one, seconds_per_step=one.seconds_per_step / 100) for one in READINGS])


@given(allocated=st.integers(1, 2**44), reserved=st.integers(1, 2**44), seconds=st.floats(1e-6, 1e4))
def test_rows_are_read_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, allocated: int, reserved: int, seconds: float
) -> None:
    one = replace(READINGS[0], allocated_bytes=allocated, reserved_bytes=reserved, seconds_per_step=seconds)
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_rows([one, replace(READINGS[1], process_bytes=None)], path)
    assert readings_in(path) == [one, replace(READINGS[1], process_bytes=None)]


def test_accuracy_reads_the_rows(tmp_path: Path, rows: Path) -> None:
    """And sees an error in them: a fifth more than was measured misses the gate."""
    answer = accuracy(rows)
    assert len(answer.rows) == 4 * len(RUNGS)
    predictions = {row.id: row.error for row in answer.rows if row.id.endswith(("allocated", "max_reserved"))}
    assert len(predictions) == 2 * len(RUNGS) and set(predictions.values()) == {0.0}
    assert {row.reason for row in answer.rows if row.role == "excluded"} == {"seconds, not memory"}
    path = tmp_path / "wrong.jsonl"
    write_rows([replace(READINGS[0], allocated_bytes=READINGS[0].allocated_bytes * 6 // 5)], path)
    assert any(line.startswith("small-eager-max_memory_allocated") for line in accuracy(path).missed())


def test_from_rows_the_overlay_is_rebuilt_and_used(folder: Path, rows: Path, gptfit: Any) -> None:
    before = rows.read_bytes()
    result = gptfit("measure", "--from", str(rows))
    assert (result.code, result.err) == (0, "")
    assert [file.name for file in folder.iterdir()] == ["rtx4070.yaml"]
    assert rows.read_bytes() == before
    run = make_run({"batch_size": 8})
    after, shipped = estimate(run, "gptfit", load_gpu("4070")), estimate(run, "gptfit", CARD)
    assert after.process_bytes - after.reserved_bytes == CONTEXT
    assert after.speed is not None and shipped.speed is not None
    assert after.speed.seconds_per_step == pytest.approx(shipped.speed.seconds_per_step / FASTER, rel=1e-4)
    assert "measured on this machine on 2026-03-01" in " ".join(after.assumptions)


def test_the_view_shows_predicted_beside_measured(folder: Path, rows: Path, gptfit: Any) -> None:
    out = gptfit("measure", "--from", str(rows)).out
    words = [line.split() for line in out.splitlines()]
    eager = next(index for index, line in enumerate(words) if line[:1] == ["small-eager"])
    mib = f"{READINGS[0].allocated_bytes / MiB:,.1f}"
    assert words[eager] == ["small-eager", "allocated,", "MiB", mib, mib, "+0.0", "%"]
    assert words[eager + 3][-2:] == ["+30.0", "%"]
    assert any(line[:2] == ["speed", "factor"] and line[-1] == "1.30" for line in words)
    paths = (str(folder), str(rows))
    assert max(len(line) for line in out.splitlines() if not any(path in line for path in paths)) <= 80


def test_json_is_one_object(folder: Path, rows: Path, gptfit: Any) -> None:
    answer = json.loads(gptfit("measure", "--from", str(rows), "--json").out)
    assert answer["schema"] == "gptfit.measure/1"
    assert answer["overlay_file"] == str(folder / "rtx4070.yaml") and answer["rows_file"] == str(rows)
    assert [run["name"] for run in answer["runs"]] == [rung.name for rung in RUNGS]
    assert answer["runs"][0]["reserved_bytes"]["measured"] == READINGS[0].reserved_bytes
    assert answer["overlay"]["context_bytes"] == CONTEXT


def edit(key: str, value: object, at: int = 0) -> Callable[[list[dict[str, Any]]], None]:
    return lambda rows: rows[at].update({key: value})


BROKEN: dict[str, tuple[Callable[[list[dict[str, Any]]], object], str]] = {
    "not of this ladder": (edit("metric", "unspecified_peak"), ':1: the metric "unspecified_peak" is none'),
    "another program": (edit("program", "nanogpt", 2), ":3: expected the program gptfit"),
    "no figure": (edit("mib", None, 1), ":2: mib is missing"),
    "a boolean": (edit("mib", True, 1), ":2: mib is missing or no positive number"),
    "not a number": (edit("value", float("nan"), 3), ":4: value is missing or no positive number"),
    "a date": (edit("measured_on", "yesterday"), ":1: measured_on is no date"),
    "no total": (lambda rows: rows[4].pop("total_mib"), ":5: total_mib is missing"),
    "two cards": (edit("gpu", "rtx4060", 5), ":6: another card"),
    "two days": (edit("measured_on", "2026-03-02", 5), ":6: another card, driver, torch or day"),
    "twice": (lambda rows: rows.append(rows[0]), ": a second max_memory_allocated of small-eager"),
    "a row is gone": (lambda rows: rows.pop(0), ":1: small-eager has no allocated_bytes"),
    "an unknown key": (lambda rows: [row["config"].update(n_layr=3) for row in rows], 'unknown key "n_layr"'),
    "an unknown card": (lambda rows: [row.update(gpu="rtx9999") for row in rows], 'unknown GPU "rtx9999"'),
    "less than its allocator": (edit("mib", 1.0, 2), "a process holds less than its allocator"),
    "more than the card": (edit("mib", 20_000.0, 2), "expected context_low_bytes"),
}


@pytest.mark.parametrize("change, expected", BROKEN.values(), ids=BROKEN)
def test_rows_that_are_none_are_one_line(
    folder: Path, rows: Path, gptfit: Any, change: Callable[[list[dict[str, Any]]], object], expected: str
) -> None:
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    change(lines)
    rows.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    result = gptfit("measure", "--from", str(rows))
    error, hint = result.err.splitlines()
    assert (result.code, result.out) == (2, "")
    assert expected in error and hint.startswith("hint: ")
    assert not folder.exists()


def test_the_rows_that_ship_are_of_other_machines(folder: Path, gptfit: Any) -> None:
    from gptfit.accuracy import ROWS

    result = gptfit("measure", "--from", str(ROWS))
    assert result.code == 2 and result.err.startswith(f"error: {ROWS}:1: run is missing")


def test_rebuilding_imports_nothing_heavy(folder: Path, rows: Path) -> None:
    script = (
        "import sys\nfrom gptfit.cli import main\ntry: main(['measure', '--from', sys.argv[1]])\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules or 'numpy' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(rows)], capture_output=True, text=True, timeout=60)
    assert done.stderr.split() == ["0", "False"]


def test_an_empty_file_is_an_error(tmp_path: Path, gptfit: Any) -> None:
    (tmp_path / "rows.jsonl").write_text("\n")
    assert "there is no measurement in" in gptfit("measure", "--from", str(tmp_path / "rows.jsonl")).err


def test_without_a_gpu_it_is_one_line(folder: Path, gptfit: Any) -> None:
    result = gptfit("measure")
    assert (result.code, result.out) == (2, "")
    assert result.err.splitlines()[0] == "error: there is no GPU here to measure"
    assert not folder.exists()


def test_a_folder_that_cannot_be_made_is_one_line(
    tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, gptfit: Any
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GPTFIT_PROFILES", str(tmp_path / "file" / "profiles"))
    result = gptfit("measure", "--from", str(rows))
    assert result.code == 2 and "cannot make the folder" in result.err.splitlines()[0]


def test_with_a_gpu_all_of_it(folder: Path, gptfit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and overlay are written, also over a broken overlay, and again from the rows the overlay is the same."""
    folder.mkdir()
    (folder / "rtx4070.yaml").write_text("broken: true\n")
    asked = []

    def measure_rung(rung: Rung, profile: object, gpu: DriverGpu) -> Reading:
        asked.append(gpu)
        return reading(rung)

    monkeypatch.setattr("gptfit.driver.detect", lambda: [GPU])
    monkeypatch.setattr("gptfit.measure.measure_rung", measure_rung)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    result = gptfit("measure")
    assert result.code == 0
    assert result.err.splitlines()[-1] == f"measuring gpt2-compiled-full ({len(RUNGS)} of {len(RUNGS)})"
    assert asked == [GPU] * len(RUNGS)
    assert sorted(file.name for file in folder.iterdir()) == ["rtx4070.jsonl", "rtx4070.yaml"]
    first = read_overlay("rtx4070")
    (folder / "rtx4070.yaml").unlink()
    assert gptfit("measure", "--from", str(folder / "rtx4070.jsonl")).code == 0
    assert read_overlay("rtx4070") == first is not None
