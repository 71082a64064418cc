"""Fits speed.py's constants to the calibration rows of measured/throughput.jsonl, and says how far off they are.

    python benchmarks/calibrate_speed.py

Each row predicted beside measured, with all rows fitted and with its card left out of the fit; then the constants to
copy into speed.py. Every card weighs the same, however many rows it has.
"""

import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import fmean, median, quantiles

from gptfit import speed
from gptfit.config import RunConfig, make_run
from gptfit.estimate import under_program
from gptfit.gpus import GpuProfile, load_gpu
from gptfit.memory.step import pieces
from gptfit.speed import CONSTANTS, Constants, step_time

ROWS = Path(speed.__file__).parent / "measured" / "throughput.jsonl"
# What a constant may be, by its meaning.
LIMITS = {
    "matmul_efficiency": (0.5, 1.0),
    "fp32_efficiency": (0.3, 1.0),
    "sm_seconds_per_flop": (0.0, 1e-12),
    "bandwidth_share": (0.4, 1.0),
}
# Where the search starts, and where it leaves what no row bears on: plain expectations, not fitted.
START = Constants(
    matmul_efficiency=0.8,
    fp32_efficiency=0.8,
    sm_seconds_per_flop=0.05e-12,
    bandwidth_share=0.8,
)


@dataclass(frozen=True, slots=True)
class Row:
    """A measured run as RunConfig and card, in tokens per second of all its cards."""

    id: str
    role: str
    program: str
    run: RunConfig
    profile: GpuProfile
    flops_per_token: int
    measured: float

    def predicted(self, constants: Constants) -> float:
        time = step_time(self.run, self.profile, self.flops_per_token, self.program, constants)
        return self.run.tokens_per_step / time.seconds

    def error(self, constants: Constants) -> float:
        """Predicted over measured, less one."""
        return self.predicted(constants) / self.measured - 1


def read_rows(path: Path = ROWS) -> list[Row]:
    """The rows that are not excluded."""
    rows: list[Row] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        raw = json.loads(line)
        if raw["role"] == "excluded":
            continue
        run = under_program(make_run(raw["run"]), raw["program"])
        rows.append(
            Row(
                id=raw["id"],
                role=raw["role"],
                program=raw["program"],
                run=run,
                profile=load_gpu(raw["gpu"].replace(" (DDP)", "")),
                flops_per_token=pieces(run, raw["program"], whole=False).flops_per_token,
                measured=tokens_per_second(run, raw["value"], raw["unit"]),
            )
        )
    return rows


def tokens_per_second(run: RunConfig, value: float, unit: str) -> float:
    """Tokens/s of a measurement in its own unit."""
    if unit == "tok/s":
        return value
    tokens = {"ms/iter": run.tokens_per_step, "ms/micro_batch": run.batch_size * run.block_size * run.n_gpus}[unit]
    return tokens / value * 1000


def misfit(rows: Sequence[Row], constants: Constants) -> float:
    """Mean over cards of |log(predicted / measured)|^1.5: between the median, and squares that one odd card rules."""
    n_rows = Counter(row.profile.name for row in rows)
    return sum(
        abs(math.log(row.predicted(constants) / row.measured)) ** 1.5 / n_rows[row.profile.name] for row in rows
    ) / len(n_rows)


def fit(rows: Sequence[Row], start: Constants = START) -> Constants:
    """Coordinate search from `start`: each constant up and down by a factor that shrinks from 1.3 to 1.002."""
    best, best_misfit, factor = start, misfit(rows, start), 1.3
    while factor > 1.002:
        improved = False
        for field in fields(Constants):
            low, high = LIMITS[field.name]
            for by in (factor, 1 / factor):
                value = min(high, max(low, getattr(best, field.name) * by))
                tried = replace(best, **{field.name: value})
                if (value_misfit := misfit(rows, tried)) < best_misfit - 1e-9:
                    best, best_misfit, improved = tried, value_misfit, True
        if not improved:
            factor = math.sqrt(factor)
    return best


def leave_one_card_out(rows: Sequence[Row], start: Constants = START) -> dict[str, float]:
    """By id of a row: its error under constants that were fitted to all other cards."""
    errors: dict[str, float] = {}
    for card in {row.profile.name for row in rows}:
        fitted = fit([row for row in rows if row.profile.name != card], start)
        errors.update({row.id: row.error(fitted) for row in rows if row.profile.name == card})
    return errors


def card_correlation(rows: Sequence[Row], constants: Constants) -> float:
    """Spearman's rank correlation of cards on compiled bf16 GPT-2 124M, on one card: mean predicted, mean measured."""
    same = [
        r for r in rows if r.run.compile and r.run.dtype == "bfloat16" and (r.run.n_layer, r.run.n_embd) == (12, 768)
    ]
    predicted, measured = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list)
    for row in same:
        if row.run.n_gpus == 1:
            predicted[row.profile.name].append(row.predicted(constants))
            measured[row.profile.name].append(row.measured)
    cards = list(measured)
    by_predicted = sorted(cards, key=lambda card: fmean(predicted[card]))
    by_measured = sorted(cards, key=lambda card: fmean(measured[card]))
    squares = sum((by_predicted.index(card) - by_measured.index(card)) ** 2 for card in cards)
    return 1 - 6 * squares / (len(cards) ** 3 - len(cards))


def report() -> str:
    """The whole calibration, as text."""
    rows = read_rows()
    used = [row for row in rows if row.role == "calibration"]
    fitted = fit(used)
    left_out = leave_one_card_out(used)
    lines = [f"{'row':42} {'card':16} {'measured':>10} {'predicted':>10} {'error':>7} {'left out':>8} {'speed.py':>8}"]
    for row in sorted(rows, key=lambda row: (row.role, row.profile.name, row.id)):
        other = f"{100 * left_out[row.id]:+8.1f}" if row.id in left_out else f"{row.role:>8}"
        lines.append(
            f"{row.id:42} {row.profile.name:16} {row.measured:10,.0f} {row.predicted(fitted):10,.0f}"
            f" {100 * row.error(fitted):+7.1f} {other} {100 * row.error(CONSTANTS):+8.1f}"
        )
    errors = [abs(row.error(fitted)) for row in used]
    outside = [abs(error) for error in left_out.values()]
    like = [abs(math.log1p(left_out[row.id])) for row in used if row.run.compile]
    held = [abs(row.error(fitted)) for row in rows if row.role == "holdout"]
    lines += [
        f"median absolute error: fitted {median(errors):.1%}, card left out {median(outside):.1%}"
        f" (nine in ten within {quantiles(outside, n=10)[-1]:.1%}, worst {max(outside):.1%}),"
        f" held out rows {median(held):.1%}",
        f"compiled rows: nine in ten within a factor of {math.exp(quantiles(like, n=10)[-1]):.3f}, card left out",
        f"rank correlation of cards: {card_correlation(rows, fitted):.3f}",
        *(f"    {field.name}={getattr(fitted, field.name):.3g}," for field in fields(fitted)),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(report() + "\n")
