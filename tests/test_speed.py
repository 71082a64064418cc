"""Predicted speed: what must hold for any run, and the claims about measured ones, made again from the rows."""

import dataclasses
import importlib.util
import math
import sys
from pathlib import Path
from statistics import median
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptfit import speed
from gptfit.card_factors import card_factor, shipped_factors
from gptfit.config import RunConfig, derive, make_run
from gptfit.errors import GptfitError
from gptfit.gpus import GpuProfile, all_gpus, load_gpu
from gptfit.speed import CONSTANTS, dense_peak, predict, seconds_to_tokens, step_time, work_of
from gptfit.throughput import card_factors, factor_of, one_row_left_out, read_rows, speed_errors, surpasses

CARDS = ("rtx3060", "rtx4070", "l4", "a100-80gb", "h100-sxm", "b200", "rtxpro6000", "t4", "gtx1080ti")


def load_calibration() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "calibrate_speed.py"
    spec = importlib.util.spec_from_file_location("calibrate_speed", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


calibration = load_calibration()
ROWS = read_rows()
CALIBRATION = [row for row in ROWS if row.role == "calibration"]


@pytest.fixture(scope="module")
def left_out() -> dict[str, float]:
    return calibration.leave_one_card_out(CALIBRATION)


@st.composite
def runs(draw: st.DrawFn) -> RunConfig:
    n_head = draw(st.sampled_from((1, 4, 12)))
    values = {
        "n_layer": draw(st.integers(1, 48)),
        "n_head": n_head,
        "n_embd": n_head * draw(st.sampled_from((32, 64, 128))),
        "vocab_size": draw(st.sampled_from((65, 4096, 50304, 151936))),
        "block_size": draw(st.sampled_from((64, 1024, 8192))),
        "batch_size": draw(st.integers(1, 64)),
        "gradient_accumulation_steps": draw(st.sampled_from((1, 2, 40))),
        "dtype": draw(st.sampled_from(("float32", "bfloat16", "float16"))),
        "mlp": draw(st.sampled_from(("gelu", "swiglu", "relu2"))),
        "attention": draw(st.sampled_from(("flash", "math"))),
        "compile": draw(st.booleans()),
        "loss": draw(st.sampled_from(("full", "chunked"))),
        "optimizer": draw(st.sampled_from(("adamw", "adamw16bit", "adamw8bit", "adafactor", "lion", "muon", "sgd"))),
        "optimizer_impl": draw(st.sampled_from(("fused", "foreach", "for-loop"))),
        "dropout": draw(st.sampled_from((0.0, 0.1))),
    }
    return make_run(values)


profiles = st.sampled_from(CARDS).map(load_gpu)


def flops_of(run: RunConfig) -> int:
    """PaLM's count (arXiv 2204.02311, appendix B): 6 for each weight of a matmul, 12·L·T·C for attention."""
    mlp = (3 if run.mlp == "swiglu" else 2) * run.n_embd * run.n_hidden
    weights = run.n_layer * (4 * run.n_embd**2 + mlp) + run.n_embd * run.vocab_size
    return 6 * weights + 12 * run.n_layer * run.block_size * run.n_embd


def seconds(run: RunConfig, profile: GpuProfile, flops_per_token: int | None = None) -> float:
    return predict(run, profile, flops_per_token or flops_of(run)).seconds_per_step


@given(runs(), profiles)
def test_a_prediction_is_positive_and_consistent(run: RunConfig, profile: GpuProfile) -> None:
    found = predict(run, profile, flops_of(run))
    assert 0 < found.low < found.tokens_per_second < found.high < math.inf
    assert found.seconds_per_step * found.tokens_per_second == pytest.approx(run.tokens_per_step)
    assert 0 < found.mfu <= 1
    assert seconds_to_tokens(found, 7 * run.tokens_per_step) == pytest.approx(7 * found.seconds_per_step)


@given(runs(), profiles, st.floats(1.0, 10.0), st.floats(1.0, 10.0))
def test_a_faster_card_is_not_slower(run: RunConfig, profile: GpuProfile, compute: float, bandwidth: float) -> None:
    rates = {name: None if rate is None else rate * compute for name, rate in profile.flops.model_dump().items()}
    faster = profile.model_copy(
        update={
            "flops": profile.flops.model_copy(update=rates),
            "bandwidth_bytes_per_second": profile.bandwidth_bytes_per_second * bandwidth,
        }
    )
    assert seconds(run, faster) <= seconds(run, profile) * (1 + 1e-12)
    bigger = faster.model_copy(update={"sm_count": round(profile.sm_count * compute)})
    if compute * profile.sm_count == bigger.sm_count:
        assert seconds(run, bigger) <= seconds(run, profile) * (1 + 1e-12)


@given(runs(), profiles, st.floats(1.01, 10.0))
def test_more_flops_take_longer(run: RunConfig, profile: GpuProfile, factor: float) -> None:
    less, more = flops_of(run), round(flops_of(run) * factor)
    parts, longer = (step_time(run, profile, flops, "gptfit", CONSTANTS) for flops in (less, more))
    assert longer.compute > parts.compute
    assert longer.seconds >= parts.seconds


@given(runs(), profiles)
def test_checkpointing_is_slower_and_less_so_for_every_second_block(run: RunConfig, profile: GpuProfile) -> None:
    plain, second, every = (
        step_time(derive(run, **keys), profile, flops_of(run), "gptfit", CONSTANTS)
        for keys in (
            {},
            {"activation_checkpointing": "block", "checkpoint_every": 2},
            {"activation_checkpointing": "block"},
        )
    )
    assert plain.compute < second.compute < every.compute <= plain.compute * 4 / 3 * (1 + 1e-12)
    assert plain.seconds < second.seconds < every.seconds < plain.seconds * 4 / 3


@given(runs(), profiles)
def test_eager_is_not_faster_than_compiled(run: RunConfig, profile: GpuProfile) -> None:
    run = derive(run, loss="full")
    assert seconds(derive(run, compile=False), profile) >= seconds(derive(run, compile=True), profile)


@given(runs(), profiles, st.sampled_from(("ddp", "fsdp")))
def test_more_cards_are_faster_together_and_not_each(run: RunConfig, profile: GpuProfile, strategy: str) -> None:
    run = derive(run, gradient_accumulation_steps=8)
    one = predict(run, profile, flops_of(run))
    four = predict(derive(run, n_gpus=4, strategy=strategy), profile, flops_of(run))
    # A sharded update takes a quarter of the time, so a step of sharded cards can gain more than what each gives.
    if strategy == "ddp":
        assert four.tokens_per_second < 4 * one.tokens_per_second
        assert four.mfu < one.mfu
    assert 0 < four.tokens_per_second < math.inf


def test_a_tiny_eager_model_waits_for_launches_alone() -> None:
    run = make_run({"n_layer": 12, "n_embd": 96, "vocab_size": 65, "block_size": 64, "batch_size": 1, "compile": False})
    slow, fast = (seconds(run, load_gpu(name)) for name in ("a100-80gb", "b200"))
    kernels = 12 * 72 + 60 + 23
    for found, name in ((slow, "a100-80gb"), (fast, "b200")):
        assert found * shipped_factors()[name].factor == pytest.approx(40 * kernels * 5e-6, rel=0.01)


def test_peaks_are_those_of_the_dtype_and_bf16_before_ampere_is_emulated() -> None:
    a100, t4, p3060 = load_gpu("a100-80gb"), load_gpu("t4"), load_gpu("rtx3060")
    assert dense_peak("bfloat16", a100) == pytest.approx(312e12, rel=0.01)  # data sheet: 312 bf16, 156 TF32
    assert dense_peak("float32", a100) == pytest.approx(156e12, rel=0.01)
    assert dense_peak("bfloat16", t4) < dense_peak("float32", t4) < dense_peak("float16", t4)
    # The rows of that card had TF32 off, which makes no difference if this holds.
    assert dense_peak("float32", p3060) == pytest.approx(p3060.flops.fp32, rel=0.01)


def test_mfu_is_model_flops_over_the_peak() -> None:
    run = make_run({"n_gpus": 2})
    found = predict(run, load_gpu("a100-80gb"), 10**9)
    assert found.mfu == pytest.approx(found.tokens_per_second * 1e9 / (2 * 312e12), rel=0.01)


def test_negative_tokens_are_refused() -> None:
    found = predict(make_run({}), load_gpu("rtx4070"), 10**9)
    with pytest.raises(GptfitError, match="expected 0 or more"):
        seconds_to_tokens(found, -1)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_measured_rows_are_predicted_to_within_the_interval(row) -> None:
    found = predict(row.run, row.profile, row.flops_per_token, row.program)
    assert found.low <= row.measured <= found.high


def test_the_committed_constants_are_the_fit() -> None:
    fitted = calibration.fit(CALIBRATION)
    assert calibration.misfit(CALIBRATION, CONSTANTS) <= calibration.misfit(CALIBRATION, fitted) * 1.01


def test_claims_about_cards_left_out(left_out: dict[str, float]) -> None:
    assert len(CALIBRATION) == 37 and len({row.profile.name for row in CALIBRATION}) == 15
    assert median(map(abs, left_out.values())) < 0.095
    like = [abs(math.log1p(left_out[row.id])) for row in CALIBRATION if row.run.compile]
    assert sum(error <= math.log(speed.LIKE_ROWS_FACTOR) for error in like) >= 0.9 * len(like)


def test_rows_that_were_not_fitted_are_predicted_as_well() -> None:
    found = speed_errors()
    assert len(found.held_out) == 9
    assert median(map(abs, found.held_out)) < 0.06 < median(abs(r.error()) for r in ROWS if r.role == "holdout")


def test_the_committed_factors_are_those_of_the_rows() -> None:
    assert card_factors(CALIBRATION, all_gpus()) == shipped_factors()


def test_a_factor_is_drawn_towards_1_by_how_few_its_runs_are() -> None:
    row = CALIBRATION[0]
    twice = dataclasses.replace(row, measured=2 * row.predicted())  # 1 run: the mean with one that is as predicted
    assert [round(factor_of([twice] * n) ** (n + 1)) for n in range(4)] == [1, 2, 4, 8]


def test_claims_about_runs_left_out() -> None:
    errors = one_row_left_out(CALIBRATION)
    assert median(map(abs, errors.values())) < 0.035
    like = [abs(math.log1p(errors[row.id])) for row in CALIBRATION if row.run.compile]
    assert sum(error <= math.log(1.08) for error in like) >= 0.9 * len(like)
    held = [row for row in ROWS if row.role == "holdout" and card_factor(row.profile.name).n_runs and row.run.compile]
    assert max(abs(row.error(factor=card_factor(row.profile.name).factor)) for row in held) < 0.12


def test_cards_are_ranked_as_measured() -> None:
    assert calibration.card_correlation(CALIBRATION, CONSTANTS) > 0.95
    run = make_run({"batch_size": 8, "loss": "full"})
    # Measured: 56,098 and 40,338 tokens/s; by their data sheets alone the L4 is the faster one.
    assert seconds(run, load_gpu("rtx4070")) < seconds(run, load_gpu("l4"))


def test_a_card_that_surpasses_a_measured_one_is_not_slower() -> None:
    run = make_run({"batch_size": 16, "loss": "full"})
    measured = [load_gpu(name) for name, entry in shipped_factors().items() if entry.n_runs]
    pairs = [(card, other) for card in all_gpus() for other in measured if surpasses(card, other)]
    unmeasured = [pair for pair in pairs if not card_factor(pair[0].name).n_runs]
    assert {card.name for card, _ in unmeasured} >= {"rtx4070s", "rtx4070ti", "rtx4090"}
    for card, other in unmeasured:
        assert seconds(run, card) <= seconds(run, other) * 1.001


@pytest.mark.parametrize("batch_size", [8, 16])
@pytest.mark.parametrize("card", CARDS)
def test_a_large_chunk_of_a_compiled_loss_costs_next_to_nothing(card: str, batch_size: int) -> None:
    """GPT-2 124M: what is left is the head's gradient, added up once a chunk."""
    whole = derive(make_run({"batch_size": batch_size, "loss": "full"}), gradient_accumulation_steps=8)
    small, large = (derive(whole, loss="chunked", loss_chunk_size=size) for size in (1024, 4096))
    assert seconds(whole, load_gpu(card)) < seconds(large, load_gpu(card)) < seconds(small, load_gpu(card))
    assert seconds(large, load_gpu(card)) < 1.03 * seconds(whole, load_gpu(card))
    assert seconds(small, load_gpu(card)) < 1.10 * seconds(whole, load_gpu(card))


def test_logits_of_a_chunk_move_what_whole_ones_do_when_compiled() -> None:
    """By hand, bf16: written, read for the largest and for the sum, read and written for the gradient, read twice by
    matmuls; and V x C four times a chunk: the product written and read, its sum in fp32 read and written."""
    run = make_run({"loss": "chunked", "loss_chunk_size": 2048})
    whole, chunked = (work_of(derive(run, loss=loss), 10**9, "gptfit") for loss in ("full", "chunked"))
    assert chunked.token_bytes == whole.token_bytes
    assert chunked.chunk_bytes == 50304 * 768 * (2 + 2 + 4 + 4)
    eager = [
        work_of(derive(run, loss=loss, compile=False), 10**9, "gptfit").token_bytes for loss in ("full", "chunked")
    ]
    assert eager[0] - eager[1] == 50304 * ((8 + 36) - (6 + 26))
