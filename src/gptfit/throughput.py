"""Published speeds of training runs (measured/throughput.jsonl), and what those of one card say of it.

speed.py predicts from a card's data sheet. Where runs of a card are measured, how much faster they were is a figure of
the card: its factor, the mean of log(measured / predicted), drawn towards 1 as if one more run were exactly as
predicted. A card that nobody measured keeps the general form, but is not slower than a measured one of its architecture
that it surpasses in everything. `python benchmarks/calibrate_speed.py` prints the table that
measured/card_factors.yaml holds.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from gptfit.card_factors import CardFactor, card_factor
from gptfit.config import RunConfig, make_run
from gptfit.estimate import under_program
from gptfit.gpus import GpuProfile, shipped_gpu
from gptfit.memory.step import pieces
from gptfit.speed import CONSTANTS, Constants, step_time

ROWS = Path(__file__).parent / "measured" / "throughput.jsonl"
# Runs exactly as predicted that are counted in: of 0, 1/4, 1/2, 1 and 2 the fitted rows alone would choose 0, as they
# come in pairs of one machine; 1 is a guard against that.
PRIOR_RUNS = 1
# Cards that surpass another are compared on this: nanoGPT's GPT-2 124M, compiled.
REFERENCE = {"batch_size": 16, "loss": "full"}


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

    def predicted(self, constants: Constants = CONSTANTS) -> float:
        """By the general form, without a factor of the card."""
        time = step_time(self.run, self.profile, self.flops_per_token, self.program, constants)
        return self.run.tokens_per_step / time.seconds

    def error(self, constants: Constants = CONSTANTS, factor: float = 1.0) -> float:
        """Predicted over measured, less one."""
        return self.predicted(constants) * factor / self.measured - 1


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
                profile=shipped_gpu(raw["gpu"].replace(" (DDP)", "")),
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


def factor_of(rows: Sequence[Row], constants: Constants = CONSTANTS) -> float:
    """The factor of the card that all `rows` ran on; 1 of no rows."""
    logs = [math.log(row.measured / row.predicted(constants)) for row in rows]
    return math.exp(sum(logs) / (len(logs) + PRIOR_RUNS))


def by_card(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found = defaultdict[str, list[Row]](list)
    for row in rows:
        found[row.profile.name].append(row)
    return found


def one_row_left_out(rows: Sequence[Row], constants: Constants = CONSTANTS) -> dict[str, float]:
    """By id of a row: its error with the factor that the other rows of its card give."""
    return {
        row.id: row.error(constants, factor_of([other for other in of_card if other is not row], constants))
        for of_card in by_card(rows).values()
        for row in of_card
    }


@dataclass(frozen=True, slots=True)
class SpeedErrors:
    """How far off predicted speeds are, as fractions: of the fitted rows, each with the factor of its card's others,
    and of the rows that nothing was fitted to."""

    n_cards: int
    left_out: tuple[float, ...]
    held_out: tuple[float, ...]

    def to_json(self) -> dict[str, object]:
        return {"cards": self.n_cards, "left_out": _summary(self.left_out), "held_out": _summary(self.held_out)}


def _summary(errors: Sequence[float]) -> dict[str, object]:
    sizes = [abs(error) for error in errors]
    return {"rows": len(sizes), "median_error": median(sizes), "worst_error": max(sizes)}


def speed_errors() -> SpeedErrors:
    """Those of the rows that gptfit ships."""
    rows = read_rows()
    fitted = [row for row in rows if row.role == "calibration"]
    held = tuple(row.error(factor=card_factor(row.profile.name).factor) for row in rows if row.role == "holdout")
    return SpeedErrors(len(by_card(fitted)), tuple(one_row_left_out(fitted).values()), held)


def card_factors(rows: Sequence[Row], profiles: Iterable[GpuProfile]) -> dict[str, CardFactor]:
    """Factors of the cards in `rows`, and of those that would be slower than one of them that they surpass."""
    cards = by_card(rows)
    found = {name: CardFactor(factor_of(of_card), len(of_card)) for name, of_card in cards.items()}
    measured = [of_card[0].profile for of_card in cards.values()]
    for profile in profiles:
        if profile.name in cards:
            continue
        own = reference_speed(profile)
        below = [other for other in measured if surpasses(profile, other)]
        factor = max((found[other.name].factor * reference_speed(other) / own for other in below), default=1.0)
        if factor > 1:
            found[profile.name] = CardFactor(factor, 0)
    return {name: CardFactor(round(entry.factor, 3), entry.n_runs) for name, entry in sorted(found.items())}


def surpasses(card: GpuProfile, other: GpuProfile) -> bool:
    """Whether `card` has at least what `other` has, of the same architecture."""
    rates = [
        (card.sm_count, other.sm_count),
        (card.bandwidth_bytes_per_second, other.bandwidth_bytes_per_second),
        (card.flops.fp32, other.flops.fp32),
        (card.flops.bf16 or 0, other.flops.bf16 or 0),
        (card.power_limit_watts or 0, other.power_limit_watts or 0),
    ]
    return card.architecture == other.architecture and all(mine >= theirs for mine, theirs in rates)


def reference_speed(profile: GpuProfile) -> float:
    run = make_run(REFERENCE)
    flops_per_token = pieces(run, "nanogpt", whole=False).flops_per_token
    return run.tokens_per_step / step_time(run, profile, flops_per_token, "nanogpt", CONSTANTS).seconds
