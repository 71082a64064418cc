"""What two measured steps change: the plan, the overlay, the run that goes on. The card's memory is made up."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gptfit import metrics
from gptfit import train as module
from gptfit.autofit import AutoFit
from gptfit.card import detected_card
from gptfit.config import RunConfig, derive, make_run
from gptfit.device import HeldMemory
from gptfit.door import read_config
from gptfit.driver import DriverGpu, DriverProcess
from gptfit.estimate import estimate
from gptfit.events import Event, Note
from gptfit.overlay import overlay_path, read_overlay
from gptfit.plan import plan
from gptfit.pressure import Pressure
from gptfit.session import Correction
from gptfit.train import train
from gptfit.units import GiB, MiB
from tokens import few_tokens

torch.set_num_threads(1)

FREE = 9632 * MiB
BEFORE = DriverGpu(0, "GPU-12ab", "NVIDIA GeForce RTX 4070", 12282 * MiB, FREE, 1530 * MiB, "580.1")


@pytest.fixture
def fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AutoFit:
    """GPT-2 planned for an RTX 4070 of which 9,632 MiB are free."""
    monkeypatch.setenv("GPTFIT_PROFILES", str(tmp_path / "profiles"))
    source, card = read_config("gpt2"), detected_card(BEFORE)
    planned = plan(source, card.profile, card.reserve_bytes)
    assert planned.run is not None and planned.estimate is not None
    return AutoFit(source, card, BEFORE, planned.run, planned.estimate)


def measured(fit: AutoFit, reserved_bytes: int, context_bytes: int, listed: bool = True) -> tuple[AutoFit, HeldMemory]:
    """`fit` on a card whose driver says that this process holds so much, and the allocator's figures of that."""
    process = reserved_bytes + context_bytes
    mine = (DriverProcess(os.getpid(), "python", process),) if listed else ()
    now = replace(BEFORE, used_bytes=BEFORE.used_bytes + process, free_bytes=FREE - process, processes=mine)
    allocated = fit.estimate.allocated_bytes * reserved_bytes // fit.estimate.reserved_bytes
    used = fit.card.profile.total_bytes - now.free_bytes
    held = HeldMemory(allocated, reserved_bytes, used, now.free_bytes, reserved_bytes)
    return replace(fit, ask=lambda: [now]), held


def test_what_is_as_predicted_changes_nothing(fit: AutoFit) -> None:
    asked, held = measured(fit, fit.estimate.reserved_bytes, fit.card.profile.context_bytes)
    assert asked(held) is None
    assert not overlay_path("rtx4070").exists()


@pytest.mark.parametrize("listed", [True, False])
def test_a_heavier_context_is_kept_and_planned_with(fit: AutoFit, listed: bool) -> None:
    context = fit.card.profile.context_high_bytes + 300 * MiB
    asked, held = measured(fit, fit.estimate.reserved_bytes, context, listed)
    correction = asked(held)
    assert correction is not None
    overlay = read_overlay("rtx4070")
    assert overlay is not None and (overlay.context_bytes, overlay.n_runs) == (context, 1)
    assert (overlay.total_bytes, overlay.speed_factor) == (fit.card.profile.total_bytes, 1.0)
    # What the next step holds is less than what the card has for it.
    run = derive(correction.run, batch_size=correction.micro_batch)
    assert estimate(run, "gptfit").reserved_bytes + context <= FREE
    assert correction.run.tokens_per_step == fit.run.tokens_per_step
    assert correction.run != fit.run and "(was " in correction.note
    assert "\n" not in correction.note and "rtx4070.yaml" in correction.note


def test_an_allocator_that_holds_more_or_less_is_planned_in_proportion(fit: AutoFit) -> None:
    context, predicted = fit.card.profile.context_bytes, fit.estimate.reserved_bytes
    asked, held = measured(fit, predicted * 107 // 100, context)
    more = asked(held)
    assert more is not None and more.run != fit.run
    run = derive(more.run, batch_size=more.micro_batch)
    assert 1.07 * estimate(run, "gptfit").reserved_bytes + context <= FREE
    asked, held = measured(fit, predicted * 80 // 100, context)
    less = asked(held)
    assert less is not None and estimate(less.run, "gptfit").reserved_bytes >= predicted, "room is no reason for less"
    assert less.predicted["reserved_bytes"] < estimate(less.run, "gptfit").reserved_bytes


def test_another_process_is_no_context(fit: AutoFit) -> None:
    """It came between the plan and the second step: less room, nothing to remember."""
    asked, held = measured(fit, fit.estimate.reserved_bytes, 2 * GiB, listed=False)
    correction = asked(held)
    assert correction is not None and correction.micro_batch < fit.run.batch_size
    run = derive(correction.run, batch_size=correction.micro_batch)
    assert estimate(run, "gptfit").reserved_bytes <= FREE - 2 * GiB
    assert not overlay_path("rtx4070").exists()


def test_where_it_cannot_be_kept_the_plan_is_made_all_the_same(fit: AutoFit, tmp_path: Path) -> None:
    (tmp_path / "profiles").write_text("a file where the folder should be")
    asked, held = measured(fit, fit.estimate.reserved_bytes, fit.card.profile.context_high_bytes + 300 * MiB)
    correction = asked(held)
    assert correction is not None and "not kept: cannot make the folder" in correction.note


# ---------------------------------------------------------------------------------------------- the run


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    few_tokens(folder, 9_000, seed=1)
    return folder


def small(dataset: Path, **changes: Any) -> RunConfig:
    return make_run(
        {
            "n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 257, "block_size": 16, "dataset": str(dataset),
            "batch_size": 6, "gradient_accumulation_steps": 4, "dtype": "float32", "compile": False,
            "learning_rate": 1e-2, "max_iters": 6, "warmup_iters": 1, "eval_interval": 4, "eval_iters": 2,
            "eval_batch_size": 6, "checkpoint_interval": 0, **changes,
        }
    )  # fmt: skip


def held_in_turn(monkeypatch: pytest.MonkeyPatch, held: Callable[[int], HeldMemory]) -> None:
    """Makes `held` of the step's number what the card says after it."""
    calls = iter(range(1, 999))
    monkeypatch.setattr(module, "held_memory", lambda device: held(next(calls)))


def steady(step: int) -> HeldMemory:
    return HeldMemory(4 * GiB, 5 * GiB, 7 * GiB, 5 * GiB, 5 * GiB)


@pytest.mark.parametrize(
    "changes",
    [{"batch_size": 3, "gradient_accumulation_steps": 8}, {"loss": "full"}, {"activation_checkpointing": "block"}],
    ids=["micro-batch", "loss", "checkpointing"],
)
def test_a_corrected_run_goes_on_with_the_steps_already_done(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    run = small(dataset)
    train(run, tmp_path / "undisturbed")
    held_in_turn(monkeypatch, steady)
    asked: list[HeldMemory] = []
    events: list[Event] = []

    def refit(held: HeldMemory) -> Correction:
        asked.append(held)
        return Correction(derive(run, **changes), 2, {"allocated_bytes": 4 * GiB}, "planned anew")

    finished = train(run, tmp_path / "corrected", on_event=events.append, refit=refit)
    assert asked == [steady(2)] and finished.step == 6
    assert [event.text for event in events if isinstance(event, Note)] == ["planned anew"]
    got, wanted = (metrics.read(tmp_path / name) for name in ("corrected", "undisturbed"))
    assert [entry["step"] for entry in got] == [1, 2, 3, 4, 5, 6]
    for key in ("loss", "tokens", "grad_norm"):
        assert [entry[key] for entry in got] == pytest.approx([entry[key] for entry in wanted], rel=2e-5)
    # What is resumed is the corrected run.
    kept = read_config(str(tmp_path / "corrected" / "run.yaml")).run
    assert all(getattr(kept, key) == value for key, value in changes.items())


def test_another_process_makes_micro_batches_smaller_once(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = small(dataset, max_iters=12)
    train(run, tmp_path / "undisturbed")

    def squeezed(step: int) -> HeldMemory:
        """From step 5 on others hold 5 GiB more, and nothing is free."""
        return steady(step) if step < 5 else replace(steady(step), card_used_bytes=12 * GiB, free_bytes=0)

    held_in_turn(monkeypatch, squeezed)
    sizes: list[int] = []
    real = module.split
    monkeypatch.setattr(module, "split", lambda starts, size, share: sizes.append(size) or real(starts, size, share))
    events: list[Event] = []
    train(run, tmp_path / "squeezed", on_event=events.append)
    notes = [event.text for event in events if isinstance(event, Note)]
    assert len(notes) == 1 and notes[0].startswith("memory on the card is taken beside this run")
    assert sizes[:4] == [6, 6, 6, 6] and len(set(sizes) - {6}) == 1 and max(set(sizes) - {6}) < 6
    got, wanted = (metrics.read(tmp_path / name) for name in ("squeezed", "undisturbed"))
    assert [entry["loss"] for entry in got] == pytest.approx([entry["loss"] for entry in wanted], rel=2e-5)


def felt(*changes: dict[str, int]) -> list[bool]:
    pressure = Pressure()
    return [pressure.felt(replace(steady(0), **change)) for change in changes]


def test_what_is_felt_and_what_is_not() -> None:
    nothing: dict[str, int] = {}
    low = {"free_bytes": 20 * MiB, "card_used_bytes": 12 * GiB - 20 * MiB}
    own = {**low, "reserved_now_bytes": 10 * GiB - 20 * MiB}
    roomy = {"free_bytes": 3 * GiB, "card_used_bytes": 9 * GiB}
    assert felt(nothing, low) == [False, True]
    assert felt(nothing, own) == [False, False], "what this process took itself"
    assert felt(nothing, roomy) == [False, False], "there is enough left"
    assert felt(nothing, {**roomy, "retries": 1}) == [False, True], "others took it, and the allocator asked twice"
    assert felt({"retries": 4}, {"retries": 4}) == [False, False], "those of the first steps"
    once_each = [{"retries": n} for n in (0, 1, 1, 2, 2, 3)]
    assert not any(felt(*once_each))
    assert felt(*[{"retries": n} for n in (0, 1, 2, 3)]) == [False, False, False, True]
