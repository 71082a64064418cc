"""The interval of an estimate: it covers what was measured, and a plan stays below its upper end."""

from statistics import NormalDist, quantiles

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptfit.accuracy import accuracy
from gptfit.config import derive, make_run
from gptfit.door import read_config
from gptfit.errors import GptfitError
from gptfit.estimate import estimate
from gptfit.gpus import load_gpu
from gptfit.interval import USUAL_RISK, errors, process_interval, quantile
from gptfit.plan import plan

GIB = 1 << 30


def test_nine_of_ten_eager_measurements_are_within_the_stated_error() -> None:
    found = sorted(abs(row.error or 0) for row in accuracy().of_kind("allocated, eager"))
    assert len(found) >= 10
    assert quantiles(found, n=10, method="inclusive")[-1] <= errors()["eager"]
    assert errors()["eager"] <= 0.005, "stated larger than what random runs are off their traces (tests/test_twins.py)"


def test_measured_processes_lie_within_their_interval() -> None:
    """nvidia-smi's figures that no profile was taken from, and those that one was: nine of ten."""
    rows = [row for row in accuracy().of_kind("process") if row.measured_bytes]
    within = 0
    for row in rows:
        assert row.predicted_bytes is not None and row.measured_bytes is not None
        profile = load_gpu(row.gpu)
        interval = process_interval(True, row.predicted_bytes - profile.context_bytes, profile)
        within += interval.low_bytes <= row.measured_bytes <= interval.high_bytes
    assert len(rows) >= 20 and within >= 0.9 * len(rows)


@given(st.floats(1e-6, 0.5))
def test_quantiles_are_those_of_a_normal_distribution(risk: float) -> None:
    assert quantile(risk) == pytest.approx(NormalDist().inv_cdf(1 - risk), abs=5e-4)


@given(st.floats(1e-4, 0.5), st.floats(1e-4, 0.5), st.integers(GIB, 80 * GIB), st.booleans())
def test_less_risk_widens(one: float, other: float, reserved_bytes: int, compiled: bool) -> None:
    profile = load_gpu("rtx4070")
    low, high = sorted((one, other))
    narrow, wide = (process_interval(compiled, reserved_bytes, profile, risk) for risk in (high, low))
    process_bytes = reserved_bytes + profile.context_bytes
    assert wide.low_bytes <= narrow.low_bytes <= process_bytes <= narrow.high_bytes <= wide.high_bytes


@pytest.mark.parametrize("risk", [0, -1, 0.51, float("nan")])
def test_a_risk_that_is_none_is_refused(risk: float) -> None:
    with pytest.raises(GptfitError, match="risk"):
        process_interval(False, GIB, None, risk)


@pytest.mark.parametrize("gpu", ["rtx4070", "rtx3060", "l4"])
def test_a_plan_fits_to_the_upper_end(gpu: str) -> None:
    profile = load_gpu(gpu)
    for risk in (0.001, USUAL_RISK):
        chosen = plan(read_config("gpt2", ()), profile, profile.display_bytes, risk=risk).estimate
        assert chosen is not None and chosen.certain and chosen.interval.risk == risk
        assert chosen.interval.high_bytes <= profile.total_bytes - profile.display_bytes


def test_what_is_within_the_error_is_said() -> None:
    profile = load_gpu("rtx4070")
    run = make_run({"batch_size": 8})
    need = estimate(run, "gptfit", profile).process_bytes
    just = estimate(run, "gptfit", profile, profile.total_bytes - need)
    assert (just.verdict, just.certain) == ("fits", False)
    over = estimate(run, "gptfit", profile, profile.total_bytes - need + 1)
    assert (over.verdict, over.certain) == ("does_not_fit", False)
    clear = estimate(run, "gptfit", profile)
    assert (clear.verdict, clear.certain) == ("fits", True)


def test_what_does_not_fit_as_it_comes_fits_where_cached_memory_is_given_back() -> None:
    """With expandable segments free pages go back to the driver: less capacity is enough, down to what is allocated."""
    profile, run = load_gpu("rtx4070"), make_run({"compile": False, "loss": "full", "batch_size": 8})
    free = estimate(run, "gptfit")
    for room_bytes, fits in ((free.reserved_bytes - (400 << 20), True), (free.allocated_bytes - 1, False)):
        need = estimate(run, "gptfit", profile, profile.total_bytes - profile.context_bytes - room_bytes)
        assert (need.verdict == "fits") is fits
        if fits:
            assert need.retries > 0 and need.allocated_bytes <= need.reserved_bytes <= room_bytes
            assert any("gives back" in line for line in need.assumptions)


@pytest.mark.parametrize("batch_size", [4, 8, 12])
def test_without_expandable_segments_the_interval_covers_another_start(batch_size: int) -> None:
    run = make_run({"compile": False, "batch_size": batch_size, "expandable_segments": False})
    one, other = (estimate(each, "nanogpt") for each in (run, derive(run, eval_interval=0)))
    assert one.interval.low_bytes <= other.process_bytes <= one.interval.high_bytes
    assert abs(one.process_bytes - other.process_bytes) > 0.02 * one.process_bytes, "it is to matter here"
