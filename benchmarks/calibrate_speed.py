"""Fits speed.py's constants and factors of cards to the calibration rows of measured/throughput.jsonl, and says how far
off they are.

    python benchmarks/calibrate_speed.py

Each row predicted beside measured: by the general form with all rows fitted, with its card left out of the fit, and
with the card's factor (that of its other rows, where a row is fitted). Then the constants and factors to copy into
speed.py and measured/card_factors.yaml. Every card weighs the same, however many rows it has.
"""

import math
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import fields, replace
from statistics import fmean, median, quantiles

from gptfit.card_factors import card_factor
from gptfit.gpus import all_gpus
from gptfit.speed import CONSTANTS, Constants
from gptfit.throughput import Row, card_factors, one_row_left_out, read_rows

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


def with_factor(row: Row) -> float:
    """The error of speed.py's prediction."""
    return row.error(CONSTANTS, card_factor(row.profile.name).factor)


def report() -> str:
    """The whole calibration, as text."""
    rows = read_rows()
    used = [row for row in rows if row.role == "calibration"]
    fitted = fit(used)
    left_out, row_out = leave_one_card_out(used), one_row_left_out(used)
    lines = [f"{'row':42} {'card':16} {'measured':>10} {'predicted':>10} {'error':>7} {'left out':>8} {'factor':>7}"]
    for row in sorted(rows, key=lambda row: (row.role, row.profile.name, row.id)):
        other = f"{100 * left_out[row.id]:+8.1f}" if row.id in left_out else f"{row.role:>8}"
        lines.append(
            f"{row.id:42} {row.profile.name:16} {row.measured:10,.0f} {row.predicted(fitted):10,.0f}"
            f" {100 * row.error(fitted):+7.1f} {other} {100 * row_out.get(row.id, with_factor(row)):+7.1f}"
        )
    errors = [abs(row.error(fitted)) for row in used]
    outside = [abs(error) for error in left_out.values()]
    like = [abs(math.log1p(left_out[row.id])) for row in used if row.run.compile]
    rest = [abs(error) for error in row_out.values()]
    held = [abs(with_factor(row)) for row in rows if row.role == "holdout"]
    lines += [
        f"median absolute error: fitted {median(errors):.1%}, card left out {median(outside):.1%}"
        f" (nine in ten within {quantiles(outside, n=10)[-1]:.1%}, worst {max(outside):.1%}),"
        f" with the factor of its other rows {median(rest):.1%} (nine in ten within {quantiles(rest, n=10)[-1]:.1%},"
        f" worst {max(rest):.1%}), held out rows {median(held):.1%}",
        f"compiled rows: nine in ten within a factor of {math.exp(quantiles(like, n=10)[-1]):.3f}, card left out",
        f"rank correlation of cards: {card_correlation(rows, fitted):.3f}",
        *(f"    {field.name}={getattr(fitted, field.name):.3g}," for field in fields(fitted)),
        *(
            f"{name}: {{factor: {entry.factor}, n_runs: {entry.n_runs}}}"
            for name, entry in card_factors(used, all_gpus()).items()
        ),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(report() + "\n")
