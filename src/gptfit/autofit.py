"""What two steps on the card say of the plan: nothing where they are as predicted, else a plan made with them.

What is measured stays: the context goes into this machine's overlay, as `gptfit measure` writes one, and the next plan
begins with it.
"""

import datetime
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from gptfit.calibration import write_overlay
from gptfit.card import Card
from gptfit.config import RunConfig, derive
from gptfit.device import HeldMemory
from gptfit.door import ConfigSource
from gptfit.driver import DriverGpu, detect
from gptfit.errors import GptfitError
from gptfit.estimate import Estimate
from gptfit.gpus import GpuProfile, overlaid, shipped_gpu
from gptfit.measure import process_bytes
from gptfit.overlay import Overlay, make_overlay
from gptfit.plan import plan
from gptfit.session import Correction
from gptfit.units import format_bytes

# A context this many times the heaviest of such cards is none: another process came to the card meanwhile.
MOST_CONTEXT = 2
# Other shapes err otherwise: what the allocator held less than predicted is counted on only down to here.
LEAST_SHARE = 0.9
# What the weights and states in memory are made for.
KEPT = ("optimizer", "param_dtype", "dtype")
# What a changed micro-batch changes with it.
FOLLOWING = ("gradient_accumulation_steps", "eval_batch_size")


@dataclass(frozen=True, slots=True)
class AutoFit:
    """The plan that is being trained; called with the memory of its second step. `before` is the card as the driver
    saw it before this process came to it, `ask` what asks the driver again."""

    source: ConfigSource
    card: Card
    before: DriverGpu
    run: RunConfig
    estimate: Estimate
    ask: Callable[[], Sequence[DriverGpu]] = detect

    def __call__(self, held: HeldMemory) -> Correction | None:
        """None where the process holds what was predicted, to within the interval; else the new plan, for the room
        that there is now and in proportion to what the allocator held. Tokens a step, weights and states stay."""
        profile, predicted = self.card.profile, self.estimate
        context_bytes = self._context_bytes(held)
        process = held.reserved_bytes + context_bytes
        if predicted.interval.low_bytes <= process <= predicted.interval.high_bytes:
            return None
        kept = ""
        if context_bytes > MOST_CONTEXT * profile.context_high_bytes:
            context_bytes = profile.context_bytes  # the rest is another's, and no longer in the room
        else:
            kept = keep_context(profile, self.before, held, context_bytes)
        share = held.reserved_bytes / predicted.reserved_bytes
        usable_bytes = context_bytes + round(held.room_bytes / max(share, LEAST_SHARE))
        exact = dict.fromkeys(("context_bytes", "context_low_bytes", "context_high_bytes"), context_bytes)
        source = replace(self.source, run=self.run, program="gptfit")
        planned = plan(source, profile.model_copy(update={**exact}), profile.total_bytes - usable_bytes, keep=KEPT)
        best, estimated = planned.run or self.run, planned.estimate or predicted
        reserved_bytes = round(estimated.reserved_bytes * share)
        figures = {
            "allocated_bytes": round(estimated.allocated_bytes * held.allocated_bytes / predicted.allocated_bytes),
            "reserved_bytes": reserved_bytes,
            "process_bytes": reserved_bytes + context_bytes,
        }
        low, high = (format_bytes(n) for n in (predicted.interval.low_bytes, predicted.interval.high_bytes))
        note = (
            f"two steps held {format_bytes(process)}, predicted {low} to {high}; planned anew with what was measured: "
            f"{self._changes(best)}{kept}"
        )
        return Correction(self._same_steps(best), best.batch_size, figures, note)

    def _context_bytes(self, held: HeldMemory) -> int:
        """What the process holds beside its allocator; the profile's figure where nobody says."""
        process = process_bytes(os.getpid(), self.before.uuid, [self.before], self.ask())
        if process is None:
            process = self.before.free_bytes - held.free_bytes
        context_bytes = process - held.reserved_now_bytes
        return context_bytes if context_bytes > 0 else self.card.profile.context_bytes

    def _same_steps(self, best: RunConfig) -> RunConfig:
        """`best` with the sequences of a step as they were: its micro-batch need not divide them."""
        if best.tokens_per_step == self.run.tokens_per_step:
            return best
        steps = self.run.gradient_accumulation_steps
        return derive(best, batch_size=self.run.batch_size, gradient_accumulation_steps=steps)

    def _changes(self, best: RunConfig) -> str:
        before, after = self.run.model_dump(), best.model_dump()
        told = [key for key in after if key not in FOLLOWING and before[key] != after[key]]
        return ", ".join(f"{key}={after[key]} (was {before[key]})" for key in told) or "nothing better was found"


def keep_context(profile: GpuProfile, gpu: DriverGpu, held: HeldMemory, context_bytes: int) -> str:
    """Writes the measured context over the profile's; how that went, as the end of a line.

    The speed stays as it was: one step is no measure of it.
    """
    try:
        overlay = with_context(profile, gpu, held, context_bytes)
        return f"; kept in {write_overlay(overlay)}"
    except GptfitError as error:
        return f"; not kept: {error.message}"


def with_context(profile: GpuProfile, gpu: DriverGpu, held: HeldMemory, context_bytes: int) -> Overlay:
    """The overlay with one more measured run. Raises GptfitError for a total that such a card has not, as a slice of
    one."""
    known = profile.measured
    contexts = (context_bytes, *((known.context_low_bytes, known.context_high_bytes) if known else ()))
    figures: Mapping[str, object] = {
        "gpu": profile.name,
        "measured_on": datetime.date.today(),
        "torch": torch.__version__,
        "driver": gpu.driver_version,
        "n_runs": 1 + (known.n_runs if known else 0),
        "total_bytes": held.total_bytes,
        "driver_bytes": max(0, gpu.total_bytes - held.total_bytes),
        "context_bytes": context_bytes,
        "context_low_bytes": min(contexts),
        "context_high_bytes": max(contexts),
        "speed_factor": profile.speed_factor,
    }
    overlay = make_overlay(figures, gpu.name)
    overlaid(shipped_gpu(profile.name), overlay, gpu.name)
    return overlay
