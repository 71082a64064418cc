"""The answer of a run in a few figures: for the head of its page, for the terminal, for scripts."""

import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gptfit.report.run_facts import RunFacts, number, size
from gptfit.units import format_bytes, format_count

if TYPE_CHECKING:
    from rich.console import RenderableType

NO_GPU = "not measured: no GPU"
UNMEASURED = "not measured"


@dataclass(frozen=True, slots=True)
class Held:
    """A figure of memory: predicted, and the most that any step measured. None: not known."""

    name: str
    predicted_bytes: int | None
    measured_bytes: int | None

    @property
    def off(self) -> str:
        """Predicted less measured, in per cent of the measured; empty where one is missing."""
        if not self.predicted_bytes or not self.measured_bytes:
            return ""
        return f"{100 * (self.predicted_bytes - self.measured_bytes) / self.measured_bytes:+.2f} %"


def held(facts: RunFacts) -> list[Held]:
    """Allocated and reserved. Predicted for the run as it went on, should it have been planned anew on the way."""
    measured = facts.newest("measured")
    known = measured.get("predicted") or facts.predicted
    found = []
    for name in ("allocated", "reserved"):
        key = f"{name}_bytes"
        predicted = known.get(key) if isinstance(known, dict) else None
        if predicted is None and facts.estimated is not None:
            predicted = getattr(facts.estimated, key)
        peaks = facts.series.finite(f"peak_{key}")
        most = round(max(peaks)) if peaks else measured.get(key)
        found.append(Held(name, size(predicted), size(most)))
    return found


def unmeasured(facts: RunFacts) -> str:
    return NO_GPU if str(facts.newest("started").get("device", "")).startswith("cpu") else UNMEASURED


def loss_text(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"


def mfu(facts: RunFacts) -> float | None:
    """Of the median step; known where a speed was predicted, as both are in proportion."""
    predicted, share = predicted_speed(facts)
    rate = facts.tokens_per_second
    return share * rate / predicted if predicted and share and rate else None


def predicted_speed(facts: RunFacts) -> tuple[float | None, float | None]:
    """Tokens a second, and MFU."""
    speed = facts.predicted.get("speed")
    known = [number(speed.get(key)) for key in ("tokens_per_second", "mfu")] if isinstance(speed, dict) else []
    return (known[0], known[1]) if known and all(0 < value < 1e12 for value in known) else (None, None)


def figures(facts: RunFacts) -> Iterator[tuple[str, str]]:
    """Name and value, in the order of interest."""
    series = facts.series
    of = facts.max_iters if facts.step <= (facts.max_iters or 0) else None
    yield "steps", f"{facts.step:,}" + (f" of {of:,}" if of else "")
    if facts.tokens is not None:
        yield "tokens", f"{facts.tokens:,}" if facts.tokens < 10**9 else format_count(facts.tokens)
    for name, column in (("train loss, last step", "loss"), ("validation loss, last", "val_loss")):
        if (value := series.last(column)) is not None:
            yield name, loss_text(value)
    if (value := series.last("val_bpb")) is not None:
        yield "bits per byte, last", f"{value:.3f}"
    if facts.tokens_per_second:
        yield "tokens/s, median step", f"{facts.tokens_per_second:,.0f}"
    if (share := mfu(facts)) is not None:
        yield "MFU, median step", f"{share:.1%}"
    for one in held(facts):
        if one.predicted_bytes:
            yield f"{one.name}, predicted", format_bytes(one.predicted_bytes)
        if one.measured_bytes:
            yield f"{one.name}, measured", format_bytes(one.measured_bytes) + (f" ({one.off})" if one.off else "")
    if not any(one.measured_bytes for one in held(facts)):
        yield "peak memory, measured", unmeasured(facts)


def summary_view(facts: RunFacts, path: Path) -> Iterator["RenderableType"]:
    from rich.text import Text

    yield Text(facts.state[1])
    for name, text in figures(facts):
        yield Text(f"  {name:<24}{text}")
    yield Text(f"report {shlex.quote(str(path))}")


def summary_json(facts: RunFacts, path: Path) -> dict[str, object]:
    series = facts.series
    return {
        "schema": "gptfit.report/1",
        "state": facts.state[0],
        "summary": facts.state[1],
        "step": facts.step,
        "max_iters": facts.max_iters,
        "tokens": facts.tokens,
        "step_seconds": math.fsum(series.finite("seconds")),
        "loss": series.last("loss"),
        "val_loss": series.last("val_loss"),
        "val_bpb": series.last("val_bpb"),
        "tokens_per_second": facts.tokens_per_second,
        "mfu": mfu(facts),
        "memory": {
            one.name: {"predicted_bytes": one.predicted_bytes, "measured_bytes": one.measured_bytes}
            for one in held(facts)
        },
        "report": str(path),
    }
