"""What the folder of a run tells of it: metrics.jsonl, and where they are there events.jsonl and run.yaml.

Whatever is not as written by gptfit is left out and counted: a torn line, a text for a number, a step that goes back.
"""

import json
import math
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import Any

from gptfit import metrics
from gptfit.config import MAX_NUMBER, RunConfig, make_run
from gptfit.errors import GptfitError
from gptfit.estimate import Estimate, estimate
from gptfit.events import NAME as EVENTS

RUN_FILE = "run.yaml"
# Numbers of a step; all in float64, not a number where the line has none.
COLUMNS = (
    "loss", "lr", "tokens", "seconds", "tokens_per_second", "grad_norm", "peak_allocated_bytes",
    "peak_reserved_bytes", "val_loss", "val_bpb", "skipped",
)  # fmt: skip
# Beyond this it is a mistake, and sums of it would be infinite.
LARGEST = 1e30
# Of run.yaml; more is none.
MAX_CONFIG_BYTES = 1 << 20

SCALARS = (str, int, float, NoneType)

Entry = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Series:
    """The steps, ascending, and for each the columns of metrics.jsonl. `n_bad` lines could not be read."""

    steps: array
    columns: Mapping[str, array]
    n_bad: int

    def finite(self, name: str) -> list[float]:
        return [value for value in self.columns[name] if not math.isnan(value)]

    def last(self, name: str) -> float | None:
        return next((value for value in reversed(self.columns[name]) if not math.isnan(value)), None)


@dataclass(frozen=True)
class RunFacts:
    """A run as its folder has it. `events` are those of events.jsonl, oldest first."""

    folder: Path
    series: Series
    events: Sequence[Entry]
    config: Mapping[str, object]

    def of(self, *kinds: str) -> list[Entry]:
        return [entry for entry in self.events if entry["event"] in kinds]

    def newest(self, kind: str) -> Entry:
        return next((entry for entry in reversed(self.events) if entry["event"] == kind), {})

    @property
    def step(self) -> int:
        """The last step that was done."""
        return self.series.steps[-1] if self.series.steps else 0

    @property
    def max_iters(self) -> int | None:
        known = self.config.get("max_iters", self.newest("started").get("max_iters"))
        return known if isinstance(known, int) else None

    @property
    def state(self) -> tuple[str, str]:
        """How it ended: finished, stopped, failed or unknown; and that in words."""
        end = next((e for e in reversed(self.events) if e["event"] in ("started", "finished", "failed")), {})
        known = self.max_iters if self.step <= (self.max_iters or 0) else None  # run.yaml may have been changed since
        of = f" of {known:,}" if known else ""
        if end.get("event") == "failed":
            return "failed", f"failed after step {self.step:,}{of}"
        by = str(end.get("stopped_by") or "")[:60]
        if by == "patience":
            return "stopped", f"stopped early after step {self.step:,}{of}: no evaluation got better for long enough"
        if end.get("event") == "finished" and by:
            return "stopped", f"stopped by {by} after step {self.step:,}{of}"
        if end.get("event") == "finished" or (self.max_iters is not None and self.step >= self.max_iters):
            return "finished", f"finished: {self.step:,}{of} step{'' if (known or self.step) == 1 else 's'}"
        if not self.series.steps:
            return "unknown", "no step was done"
        return "unknown", f"no last word after step {self.step:,}{of}: killed, or still going"

    @property
    def tokens(self) -> int | None:
        last = self.series.last("tokens")
        return None if last is None else round(last)

    @property
    def seconds(self) -> float:
        """Of the steps alone: evaluations, checkpoints and pauses are not counted."""
        return math.fsum(self.series.finite("seconds"))

    @property
    def tokens_per_second(self) -> float | None:
        """Of the median step: the first ones of a process compile and warm up."""
        speeds = sorted(self.series.finite("tokens_per_second"))
        return speeds[len(speeds) // 2] if speeds else None

    @property
    def predicted(self) -> Mapping[str, Any]:
        """The figures that were predicted when it was launched: of an estimate's JSON."""
        known = self.newest("launched").get("predicted")
        return known if isinstance(known, Mapping) else {}

    @cached_property
    def estimated(self) -> Estimate | None:
        """Of run.yaml, now, for a card that is not known; where that was written by gptfit."""
        try:
            return estimate(self.run) if self.run else None
        except (GptfitError, ArithmeticError):
            return None

    @cached_property
    def run(self) -> RunConfig | None:
        try:
            return make_run(self.config) if self.config else None
        except GptfitError:
            return None


def read_run(folder: Path) -> RunFacts:
    """Raises GptfitError where the folder has no metrics.jsonl, or it cannot be read."""
    path = folder / metrics.NAME
    if not path.is_file():
        hint = "give the folder of a run: gptfit report out" if not folder.is_dir() else "it is written by gptfit train"
        raise GptfitError(f'there is no {metrics.NAME} in "{folder}"', hint)
    try:
        series = read_series(path)
        entries = list(objects(folder / EVENTS)) if (folder / EVENTS).is_file() else []
    except OSError as error:
        raise GptfitError(f'cannot read "{path}": {(error.strerror or str(error)).lower()}') from None
    events = [known for entry in entries if (known := as_event(entry))]
    return RunFacts(folder, series, events, read_config(folder / RUN_FILE))


def read_series(path: Path) -> Series:
    """Of a step that is there again, the last: a run that was killed and resumed does the later ones again."""
    steps = array("q")
    columns = {name: array("d") for name in COLUMNS}
    n_bad = 0
    for entry in objects(path):
        step = entry.get("step") if entry else None
        if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step <= MAX_NUMBER:
            n_bad += 1
            continue
        if steps and step <= steps[-1]:
            at = bisect_left(steps, step)
            for values in (steps, *columns.values()):
                del values[at:]
        steps.append(step)
        for name, values in columns.items():
            values.append(number(entry.get(name)))
    return Series(steps, columns, n_bad)


def objects(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines; an empty one for a line that is none."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                entry = json.loads(text) if text.strip() else None
            except (ValueError, RecursionError):
                entry = {}
            if entry is not None:
                yield entry if isinstance(entry, dict) else {}


def as_event(entry: dict[str, Any]) -> Entry | None:
    """An event with a kind, a step and a time, or None."""
    kind, step, at = entry.get("event"), entry.get("step"), number(entry.get("at"))
    if not isinstance(kind, str) or not isinstance(step, int) or not 0 <= step <= MAX_NUMBER:
        return None
    return {**entry, "at": at if 0 <= at < 1e11 else None}


def number(value: object) -> float:
    """`value` as a float; not a number where it is none, infinite or beyond all sense."""
    if isinstance(value, int | float) and abs(value) <= LARGEST:
        return float(value)
    return math.nan


def size(value: object) -> int | None:
    """`value` as bytes that a machine could have."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 60 else None


def read_config(path: Path) -> dict[str, object]:
    """The keys of run.yaml; none where it is not there, or no such file."""
    import yaml

    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            return {}
        known = yaml.safe_load(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, yaml.YAMLError, ValueError, RecursionError):
        return {}
    known = known if isinstance(known, dict) else {}
    # What refers to itself a million times over is short in a file, and endless as text.
    return {key: value for key, value in known.items() if isinstance(key, str) and isinstance(value, SCALARS)}
