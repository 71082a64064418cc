"""The estimate beside a trace of the real code: the same step, written twice, has to need the same memory."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from gptfit.config import RunConfig
from gptfit.errors import GptfitError
from gptfit.estimate import Estimate, estimate
from gptfit.trace import Traced, trace_program

# Of the traced live peak. In practice the two agree to some KiB: counters that live on the host in CUDA.
TOLERANCE = 0.005


@dataclass(frozen=True, slots=True)
class Difference:
    """Bytes of `name` in both; equal ones are no difference."""

    name: str
    estimate_bytes: int
    traced_bytes: int

    @property
    def delta_bytes(self) -> int:
        return self.estimate_bytes - self.traced_bytes


@dataclass(frozen=True, slots=True)
class Verification:
    """One run, estimated and traced; `unknown` says why there is no estimate, and is "" where there is one."""

    estimate: Estimate | None
    traced: Traced
    differences: tuple[Difference, ...]
    unknown: str = ""

    @property
    def passed(self) -> bool:
        """Whether the live peaks agree to within TOLERANCE, or nothing is claimed."""
        if self.estimate is None:
            return True
        traced_bytes = self.traced.live_bytes
        return abs(self.estimate.live_bytes - traced_bytes) <= TOLERANCE * traced_bytes

    def to_json(self) -> dict[str, object]:
        """The object that `gptfit verify --json` prints."""
        traced, peak = self.traced, self.traced.peak
        return {
            "schema": "gptfit.verify/1",
            "passed": self.passed,
            "estimate": self.estimate.to_json() if self.estimate else None,
            "unknown": self.unknown,
            "traced": {
                "live_bytes": traced.live_bytes,
                "saved_for_backward_bytes": traced.saved_for_backward_bytes,
                "n_params": traced.n_params,
                "instant": {"phase": peak.phase, "op": peak.op},
                "phases": [{"name": name, "peak_live_bytes": n_bytes} for name, n_bytes in traced.phases.items()],
            },
            "differences": [
                {
                    "name": row.name,
                    "estimate_bytes": row.estimate_bytes,
                    "traced_bytes": row.traced_bytes,
                    "delta_bytes": row.delta_bytes,
                }
                for row in self.differences
            ],
        }


def verify(run: RunConfig, program: str = "gptfit") -> Verification:
    """Estimates and traces one steady step of `run`. Of a memory budget that has no estimate the trace alone.

    Raises GptfitError for what the program cannot do.
    """
    try:
        estimated, unknown = estimate(run, program), ""
    except GptfitError as error:
        if run.activation_memory_budget == 1:
            raise
        estimated, unknown = None, error.message
    traced = trace_program(run, program)
    return Verification(estimated, traced, tuple(differences(estimated, traced)) if estimated else (), unknown)


def differences(estimated: Estimate, traced: Traced) -> Iterator[Difference]:
    """The totals and phases that differ, then what is alive at the peak in one and not in the other."""
    pairs = [
        ("live peak", estimated.live_bytes, traced.live_bytes),
        ("saved for backward", estimated.saved_for_backward_bytes, traced.saved_for_backward_bytes),
    ]
    phases = traced.phases
    pairs += [(f"peak of {name}", n_bytes, phases[name]) for name, n_bytes in estimated.phases if name in phases]
    tensors = [row for row in estimated.tensors if row.category not in ("workspace", "slack")]
    ours = _by_size((row.dtype, row.n_bytes // row.count, row.n_bytes, row.name) for row in tensors)
    theirs = _by_size((b.dtype, b.n_bytes, b.n_bytes * count, b.name) for b, count in traced.live_set().items())
    names = {**theirs.names, **ours.names}
    rows = [(f"alive: {names[key]} ({key[0]})", ours.sums[key], theirs.sums[key]) for key in names]
    rows.sort(key=lambda row: -abs(row[1] - row[2]))
    yield from (Difference(*pair) for pair in (*pairs, *rows) if pair[1] != pair[2])


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Bytes by dtype and size of one tensor (a view changes a shape, not its size), and a name for each."""

    sums: Counter[tuple[str, int]]
    names: dict[tuple[str, int], str]


def _by_size(rows: Iterable[tuple[str, int, int, str]]) -> _Sizes:
    sizes = _Sizes(Counter(), {})
    for dtype, each_bytes, n_bytes, name in rows:
        sizes.sums[dtype, each_bytes] += n_bytes
        sizes.names.setdefault((dtype, each_bytes), name)
    return sizes
