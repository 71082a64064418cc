"""The search looks into few of all micro-batches: against every one of them, looked at one by one."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptfit.combination import Combination
from gptfit.config import RunConfig, derive, make_run
from gptfit.errors import GptfitError
from gptfit.estimate import Budget
from gptfit.gpus import load_gpu
from gptfit.memory.step import steady_peak
from gptfit.plan import INEXACT, Search, options
from gptfit.speed import predict

SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 128, "block_size": 64, "vocab_size": 50304}


class Curve(Combination):
    """A combination with made-up peaks, which counts how many are asked for."""

    def __init__(self, peaks: dict[int, int]) -> None:
        super().__init__(make_run({}), {}, 1)
        self.made_up = peaks
        self.asked: list[int] = []

    def live_bytes(self, micro_batch: int) -> int:
        if micro_batch not in self.peaks:
            self.asked.append(micro_batch)
        if micro_batch not in self.made_up:
            raise GptfitError("cannot be estimated", "")
        self.peaks[micro_batch] = self.made_up[micro_batch]
        return self.peaks[micro_batch]


@settings(max_examples=200, deadline=None)
@given(
    steps=st.lists(st.integers(1, 1000), min_size=1, max_size=300),
    rooms=st.lists(st.integers(-10, 60_000), min_size=1, max_size=20),
)
def test_the_largest_that_fits_whatever_was_asked_before(steps: list[int], rooms: list[int]) -> None:
    peaks = {number: sum(steps[:number]) for number in range(1, len(steps) + 1)}
    curve = Curve(peaks)
    for room in rooms:
        assert curve.largest(1, len(peaks), room) == max((m for m in peaks if peaks[m] <= room), default=0)


@settings(max_examples=200, deadline=None)
@given(
    steps=st.lists(st.integers(1, 1000), min_size=1, max_size=300),
    questions=st.lists(st.tuples(st.integers(1, 300), st.integers(-10, 60_000)), min_size=1, max_size=20),
    of_kin=st.lists(st.integers(1, 1000), max_size=300),
)
def test_whether_it_fits_whatever_was_asked_before(
    steps: list[int], questions: list[tuple[int, int]], of_kin: list[int]
) -> None:
    """The kin's peaks, which may be quite others, do not change an answer; no answer takes more than three peaks."""
    peaks, others = ({n: sum(some[:n]) for n in range(1, len(some) + 1)} for some in (steps, of_kin))
    curve, kin = Curve(peaks), Curve(others)
    curve.kin.append(kin)
    for micro_batch, room in questions:
        if micro_batch in others:
            kin.live_bytes(micro_batch)
        if micro_batch in peaks:
            asked = len(curve.asked)
            assert curve.fits(micro_batch, room) == (peaks[micro_batch] <= room)
            assert len(curve.asked) - asked <= 3


def test_what_cannot_be_estimated_does_not_fit() -> None:
    curve = Curve({m: 1000 * m for m in range(1, 11)})
    assert curve.fits(8, 9_500) and not curve.fits(50, 9_500) and curve.fits(9, 9_500)
    assert not curve.fits(10, 9_500) and not curve.fits(60, 100_000)


def test_a_straight_line_is_found_by_few_questions() -> None:
    curve = Curve({m: 10_000 + 977 * m for m in range(1, 4097)})
    assert curve.largest(1, 4096, 2_000_000) == 2036
    first = len(curve.asked)
    for room in range(1_000_000, 2_000_000, 100_000):
        curve.largest(1, 4096, room)
    assert len(curve.asked) - first <= 2 * 10


@pytest.mark.parametrize("gpu", ["gtx1650", "t4", "rtx4070", "h100-sxm"])
@pytest.mark.parametrize("changes", [{}, {"loss": "full", "dropout": 0.1}, {"n_gpus": 4, "strategy": "ddp"}])
def test_the_order_is_that_of_all_predictions(gpu: str, changes: dict[str, object]) -> None:
    """Every micro-batch of every combination: fits or not, then sorted by predicted speed."""
    base = derive(make_run(SMALL), gradient_accumulation_steps=40, batch_size=5, **changes)
    profile, tokens = load_gpu(gpu), 64 * 96
    # Room for some of the micro-batches alone.
    usable_bytes = profile.context_bytes + 700 * (1 << 20)
    search = Search(base, profile, Budget(gpu, usable_bytes, 0), tokens)
    every = options(base, profile, {*changes, "activation_memory_budget"}, ())
    choices = [keys for keys in every if keys.get("loss_chunk_size", 4096) == 4096]
    expected: list[tuple[float, int, int]] = []
    n_searched = 0
    for number, keys in enumerate(choices):
        for micro_batch in range(1, 96 // base.n_gpus + 1):
            n_searched += 1
            run = of(base, keys, micro_batch, tokens)
            live_bytes, flops = steady_peak(run, "gptfit")
            if live_bytes + search.overhead_bytes <= usable_bytes:
                away = abs(run.tokens_per_step - tokens) / tokens
                speed = predict(run, profile, flops).tokens_per_second
                expected.append((-speed * (1 - INEXACT - away if away else 1), number, micro_batch))
    found = list(search.ranked([search.combinations.of(keys) for keys in choices]))
    assert 0 < len(expected) < n_searched == search.n_searched
    assert [(dict(c.keys), m) for c, m in found] == [(choices[number], m) for _, number, m in sorted(expected)]


def of(base: RunConfig, keys: dict[str, object], micro_batch: int, tokens: int) -> RunConfig:
    steps = max(1, round(tokens / (micro_batch * base.block_size * base.n_gpus)))
    return derive(base, **keys, batch_size=micro_batch, gradient_accumulation_steps=steps * base.n_gpus)
