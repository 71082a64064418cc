"""The largest batch_size that fits a card, for a factory that takes one: by tracing at a few sizes.

At each instant what is alive grows in proportion to the batch, so the peak is the largest of some lines. Between
traced sizes it is taken for straight, which is all that guides the search: the answer is a size that was
traced and fits, and the next one was traced and does not.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gptfit.errors import GptfitError
from gptfit.factory import load_factory
from gptfit.gpus import GpuProfile
from gptfit.tracefile import TraceReport, trace_factory

# Three to six are enough where the line leads there. Reserved memory goes up in stairs, which for small models are
# wide, so that after some tries what is left is halved.
MAX_TRACES = 20
MAX_BY_LINE = 6
# Beyond this a card is not what limits a batch.
MAX_BATCH_SIZE = 1 << 16
# How far beyond the largest traced size a guess may go.
MAX_STRIDE = 64


@dataclass(frozen=True, slots=True)
class Point:
    """One traced size."""

    batch_size: int
    live_bytes: int
    process_bytes: int
    fits: bool

    def to_json(self) -> dict[str, object]:
        return {
            "batch_size": self.batch_size,
            "live_bytes": self.live_bytes,
            "process_bytes": self.process_bytes,
            "fits": self.fits,
        }


@dataclass(frozen=True, slots=True)
class BatchFit:
    """The largest `batch_size` that fits, or None; `report` is the trace at it, or at the smallest size traced.

    `is_largest` says that the next size was traced, too, and does not fit.
    """

    batch_size: int | None
    report: TraceReport
    points: tuple[Point, ...]

    @property
    def is_largest(self) -> bool:
        after = (self.batch_size or 0) + 1
        return any(point.batch_size == after and not point.fits for point in self.points)

    def to_json(self) -> dict[str, object]:
        """The object that `gptfit trace --fit --json` prints: the trace at the size chosen, and `fit` in it."""
        return {
            **self.report.to_json(),
            "fit": {
                "batch_size": self.batch_size,
                "is_largest": self.is_largest,
                "traced": [point.to_json() for point in self.points],
            },
        }


def fit_batch(spec: str, profile: GpuProfile, reserve_bytes: int = 0, /, **keys: Any) -> BatchFit:
    """The largest batch_size at which the step that `FILE.py:NAME` makes fits `profile`. `keys` as for trace_file;
    a batch_size among them, or else the function's default, is where the search begins.

    Raises GptfitError where the function takes no batch_size, and as trace_file does.
    """
    factory = load_factory(spec)
    if "batch_size" not in factory.parameters:
        raise GptfitError(
            f"{factory.name}() in {factory.path.name} takes no batch_size, so there is none to be found",
            f"def {factory.name}(batch_size=8): … and build the batch with it",
        )
    start = keys.get("batch_size", factory.defaults.get("batch_size"))
    start = start if isinstance(start, int) and 0 < start <= MAX_BATCH_SIZE else 1

    def trace(batch_size: int) -> TraceReport:
        return trace_factory(factory, spec, profile, reserve_bytes, **{**keys, "batch_size": batch_size})

    return search(trace, start, profile.total_bytes - reserve_bytes)


def search(trace: Callable[[int], TraceReport], start: int, usable_bytes: int) -> BatchFit:
    """Traces from `start` on until a size fits and the next one does not."""
    reports: dict[int, TraceReport] = {}
    fitting, failing = 0, MAX_BATCH_SIZE + 1
    guess = start
    while failing - fitting > 1 and len(reports) < MAX_TRACES:
        report = reports[guess] = trace(guess)
        if report.process_bytes <= usable_bytes:
            fitting = guess
        else:
            failing = guess
        sizes = {size: report.process_bytes for size, report in reports.items()}
        guess = next_guess(sizes, fitting, failing, usable_bytes)
    points = tuple(
        Point(size, report.live_bytes, report.process_bytes, report.process_bytes <= usable_bytes)
        for size, report in sorted(reports.items())
    )
    return BatchFit(fitting or None, reports[fitting or min(reports)], points)


def next_guess(sizes: Mapping[int, int], fitting: int, failing: int, usable_bytes: int) -> int:
    """The size to trace next: the largest between `fitting` and `failing`, both traced or a limit, of which the line
    through the two traced sizes next to it says that it fits."""
    if len(sizes) == 1:
        guess = 2 * fitting if fitting else failing // 2
        return min(max(guess, fitting + 1), failing - 1)
    known = sorted(sizes)
    if failing in sizes:
        high = failing
        low = fitting if fitting else min(size for size in known if size > failing)
    else:
        low, high = known[-2:]
    slope = (sizes[high] - sizes[low]) / (high - low)
    guess = low + int((usable_bytes - sizes[low]) / slope) if slope > 0 else MAX_BATCH_SIZE
    if len(sizes) >= MAX_BY_LINE and failing in sizes:
        guess = (fitting + failing) // 2
    return min(max(guess, fitting + 1), failing - 1, max(known) * MAX_STRIDE)
