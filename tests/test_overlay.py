"""A file of measurements stands over the profile, says so, and is refused where it is none."""

import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptfit.config import make_run
from gptfit.errors import GptfitError
from gptfit.estimate import estimate
from gptfit.gpus import load_gpu, overlaid, shipped_gpu
from gptfit.overlay import Overlay, overlay_folder
from gptfit.units import GiB, MiB

FIGURES: dict[str, Any] = {
    "gpu": "rtx4070",
    "measured_on": datetime.date(2026, 3, 1),
    "torch": "2.13.0+cu126",
    "driver": "550.54",
    "n_runs": 6,
    "total_bytes": 12_453 * MiB * 19 // 20,
    "driver_bytes": 450 * MiB,
    "context_bytes": 300 * MiB,
    "context_low_bytes": 290 * MiB,
    "context_high_bytes": 310 * MiB,
    "speed_factor": 1.25,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GPTFIT_PROFILES", str(tmp_path))
    return tmp_path


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "rtx4070.yaml"
    path.write_text(Overlay(**{**FIGURES, **changes}).to_yaml())
    return path


def test_without_a_file_the_profile_is_the_shipped_one(folder: Path) -> None:
    assert load_gpu("rtx4070") == shipped_gpu("rtx4070")
    write(folder)
    assert load_gpu("rtx4060") == shipped_gpu("rtx4060")
    assert shipped_gpu("rtx4070").measured is None


def test_the_estimate_uses_what_was_measured_and_says_so(folder: Path) -> None:
    run = make_run({"batch_size": 4})
    before = estimate(run, "gptfit", load_gpu("rtx4070"))
    write(folder)
    after = estimate(run, "gptfit", load_gpu("NVIDIA GeForce RTX 4070"))
    assert after.process_bytes - after.reserved_bytes == 300 * MiB
    assert after.reserved_bytes == before.reserved_bytes
    assert after.budget is not None and after.budget.total_bytes == FIGURES["total_bytes"]
    assert before.speed is not None and after.speed is not None
    assert after.speed.tokens_per_second == pytest.approx(1.25 * before.speed.tokens_per_second)
    assert after.speed.low == pytest.approx(1.25 * before.speed.low)
    context = next(line for line in after.assumptions if line.startswith("context"))
    assert context.endswith("300.00 MiB measured on this machine on 2026-03-01")
    assert "1.25, measured on this machine on 2026-03-01" in after.speed.source


sizes = st.integers(1, 400 * MiB)


@given(context=st.tuples(sizes, sizes, sizes), driver=sizes, factor=st.floats(0.1, 10), day=st.dates())
def test_what_is_written_is_read_again(
    tmp_path_factory: pytest.TempPathFactory, context: tuple[int, int, int], driver: int, factor: float, day: Any
) -> None:
    low, middle, high = sorted(context)
    figures = {"context_low_bytes": low, "context_bytes": middle, "context_high_bytes": high}
    overlay = Overlay(**{**FIGURES, **figures, "driver_bytes": driver, "speed_factor": factor, "measured_on": day})
    folder = tmp_path_factory.mktemp("profiles")
    (folder / "rtx4070.yaml").write_text(overlay.to_yaml())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPTFIT_PROFILES", str(folder))
        assert load_gpu("rtx4070").measured == overlay


BROKEN = {
    "no YAML": ('gpu: "x', "not YAML"),
    "a list": ("- 1\n- 2\n", "expected keys and values"),
    "empty": ("", "is empty"),
    "an unknown key": ("gpu: rtx4070\ncontext_byte: 3\n", 'unknown key "context_byte"; did you mean context_bytes?'),
    "a key twice": ("gpu: rtx4070\ngpu: rtx4070\n", "duplicate key"),
    "a key is missing": ("gpu: rtx4070\n", "measured_on: field required"),
    "an object": ("gpu: !!python/object/apply:os.system [id]\n", "is refused"),
}
CHANGED = {
    "GB": ("context_bytes: 314572800", "context_bytes: 0.3GB", 'unknown unit "GB"'),
    "negative": ("context_bytes: 314572800", "context_bytes: -1", "is negative"),
    "more than the card": ("context_high_bytes: 325058560", "context_high_bytes: 13GiB", "expected context_low_bytes"),
    "yes for a factor": ("speed_factor: 1.25", "speed_factor: true", "speed_factor: "),
    "no factor": ("speed_factor: 1.25", "speed_factor: 0", "speed_factor: "),
    "not a number": ("speed_factor: 1.25", "speed_factor: .nan", "speed_factor: "),
    "no date": ('"2026-03-01"', '"yesterday"', "measured_on: "),
    "another card's": ('"rtx4070"', '"rtx4090"', "gpu is rtx4090, expected rtx4070"),
    "a slice": (f"total_bytes: {FIGURES['total_bytes']}", "total_bytes: 5GiB", "total_bytes is 5.00 GiB"),
}


@pytest.mark.parametrize("text, expected", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_one_line_that_names_it(folder: Path, gptfit: Any, text: str, expected: str) -> None:
    path = folder / "rtx4070.yaml"
    path.write_text(text)
    result = gptfit("estimate", "gpt2", "--gpu", "rtx4070")
    error, hint = result.err.splitlines()
    assert (result.code, result.out) == (2, "")
    assert str(path) in error and expected in error
    assert hint.startswith("hint: ")


@pytest.mark.parametrize("old, new, expected", CHANGED.values(), ids=CHANGED)
def test_an_impossible_figure_is_refused(folder: Path, old: str, new: str, expected: str) -> None:
    path = write(folder)
    assert path.read_text().count(old) == 1
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(GptfitError) as caught:
        load_gpu("rtx4070")
    assert str(path) in caught.value.message and expected in caught.value.message


def test_a_folder_in_the_file_s_place_is_refused(folder: Path) -> None:
    (folder / "rtx4070.yaml").mkdir()
    with pytest.raises(GptfitError, match="is a directory"):
        load_gpu("rtx4070")


def test_where_the_folder_is(tmp_path: Path) -> None:
    assert overlay_folder({"GPTFIT_PROFILES": "/a", "XDG_CONFIG_HOME": "/b"}) == Path("/a")
    assert overlay_folder({"XDG_CONFIG_HOME": "/b"}) == Path("/b/gptfit/profiles")
    at_home = Path.home() / ".config" / "gptfit" / "profiles"
    assert overlay_folder({}) == overlay_folder({"GPTFIT_PROFILES": "", "XDG_CONFIG_HOME": "not/absolute"}) == at_home


def test_every_overlaid_figure_has_its_source() -> None:
    overlay = Overlay(**FIGURES)
    profile = overlaid(shipped_gpu("rtx4070"), overlay, "file")
    for key in ("total_bytes", "driver_bytes", "context_bytes", "context_low_bytes", "context_high_bytes"):
        assert getattr(profile, key) == FIGURES[key]
        assert profile.sources[key].startswith("measured on this machine on 2026-03-01, 6 runs")
    assert "283.00 MiB" in profile.sources["context_bytes"]
    assert profile.box_bytes == FIGURES["total_bytes"] + FIGURES["driver_bytes"]
    assert profile.total_bytes < 12 * GiB
    untouched = {"sm_count", "flops", "display_bytes"}
    assert all(profile.sources[key] == shipped_gpu("rtx4070").sources[key] for key in untouched)


def test_gpus_shows_the_measured_figures(folder: Path, gptfit: Any) -> None:
    write(folder)
    shown = gptfit("gpus", "rtx4070").out
    assert "300.00 MiB" in shown and "speed_factor" in shown and "2026-03-01" in shown
    assert max(map(len, shown.splitlines())) <= 80
    marked = [line.split()[0] for line in gptfit("gpus", "-v").out.splitlines() if line.endswith(", measured here")]
    assert marked == ["rtx4070"]


def test_a_shipped_gate_does_not_see_this_machine(folder: Path) -> None:
    from gptfit.accuracy import predict

    row = {"program": "gptfit", "gpu": "rtx4070", "config": {"batch_size": 1}}
    before = predict(row).process_bytes
    write(folder)
    assert predict(row).process_bytes == before
