"""What a run needs: four figures at the worst instant, and what they consist of."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TensorRow:
    """One row of the live set at the peak: `count` buffers of this shape, `n_bytes` together."""

    name: str
    category: str
    shape: tuple[int, ...]
    dtype: str
    count: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Budget:
    """What a card offers to one process. usable = total - reserve, the CUDA context still to come out of it."""

    name: str
    total_bytes: int
    reserve_bytes: int

    @property
    def usable_bytes(self) -> int:
        return self.total_bytes - self.reserve_bytes


@dataclass(frozen=True, slots=True)
class Speed:
    """Predicted, with the interval that its measured error gives."""

    tokens_per_second: float
    seconds_per_step: float
    mfu: float
    low: float
    high: float
    source: str


@dataclass(frozen=True, slots=True)
class Estimate:
    """The answer for one run under one program. Totals are derived from `tensors`, never stored beside them."""

    program: str
    config: Mapping[str, object]
    budget: Budget | None
    n_params: int
    flops_per_token: int
    tokens_per_step: int
    live_bytes: int
    reserved_bytes: int
    process_bytes: int
    phase: str
    op: str
    tensors: tuple[TensorRow, ...]
    saved_for_backward_bytes: int
    phases: tuple[tuple[str, int], ...]
    eval_allocated_bytes: int
    speed: Speed | None
    assumptions: tuple[str, ...]

    @property
    def allocated_bytes(self) -> int:
        return sum(row.n_bytes for row in self.tensors)

    @property
    def margin_bytes(self) -> int | None:
        """What is left of the usable memory; negative is what is missing."""
        return None if self.budget is None else self.budget.usable_bytes - self.process_bytes

    @property
    def verdict(self) -> str | None:
        margin = self.margin_bytes
        return None if margin is None else "fits" if margin >= 0 else "does_not_fit"

    def breakdown(self) -> list[tuple[str, int]]:
        """Bytes by category at the peak, largest first; sums to `allocated_bytes`."""
        totals: dict[str, int] = {}
        for row in self.tensors:
            totals[row.category] = totals.get(row.category, 0) + row.n_bytes
        return sorted(totals.items(), key=lambda item: -item[1])

    def to_json(self) -> dict[str, object]:
        """The object that `gptfit estimate --json` prints."""
        budget, speed = self.budget, self.speed
        return {
            "schema": "gptfit.estimate/1",
            "program": self.program,
            "verdict": self.verdict,
            "margin_bytes": self.margin_bytes,
            "gpu": None
            if budget is None
            else {
                "name": budget.name,
                "total_bytes": budget.total_bytes,
                "reserve_bytes": budget.reserve_bytes,
                "usable_bytes": budget.usable_bytes,
            },
            "config": dict(self.config),
            "n_params": self.n_params,
            "flops_per_token": self.flops_per_token,
            "tokens_per_step": self.tokens_per_step,
            "peak": {
                "live_bytes": self.live_bytes,
                "allocated_bytes": self.allocated_bytes,
                "reserved_bytes": self.reserved_bytes,
                "process_bytes": self.process_bytes,
                "instant": {"phase": self.phase, "op": self.op},
            },
            "breakdown": [{"category": name, "bytes": n_bytes} for name, n_bytes in self.breakdown()],
            "tensors": [
                {
                    "name": row.name,
                    "category": row.category,
                    "shape": list(row.shape),
                    "dtype": row.dtype,
                    "count": row.count,
                    "bytes": row.n_bytes,
                }
                for row in self.tensors
            ],
            "saved_for_backward_bytes": self.saved_for_backward_bytes,
            "phases": [{"name": name, "peak_live_bytes": n_bytes} for name, n_bytes in self.phases],
            "eval": {"allocated_bytes": self.eval_allocated_bytes},
            "speed": None if speed is None else speed_json(speed),
            "assumptions": list(self.assumptions),
        }


def speed_json(speed: Speed) -> dict[str, object]:
    return {
        "tokens_per_second": speed.tokens_per_second,
        "seconds_per_step": speed.seconds_per_step,
        "mfu": speed.mfu,
        "low": speed.low,
        "high": speed.high,
        "source": speed.source,
    }
