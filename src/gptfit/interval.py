"""How far off a figure may be: the measured error of its class, and what is not known of the context.

Errors add up in squares, as they have nothing to do with one another: that of what the allocator holds
(measured/errors.yaml), what another start would make of its segments, and that of the context and libraries beside it
(the profile's low and high). They are given so that nine of ten lie within; another `risk` scales them as a normal
distribution does.
"""

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from gptfit.errors import GptfitError
from gptfit.gpus import GpuProfile
from gptfit.memory.overhead import UNKNOWN_CARD_CONTEXT_BYTES

ERRORS = Path(__file__).parent / "measured" / "errors.yaml"

# The chance that a process needs more than the upper end: one of twenty where nine of ten lie within both ends.
USUAL_RISK = 0.05


@dataclass(frozen=True, slots=True)
class Interval:
    """What a process may hold, in bytes: less than `low_bytes` and more than `high_bytes` are as likely as `risk`."""

    low_bytes: int
    high_bytes: int
    risk: float

    def to_json(self) -> dict[str, object]:
        return {"low_bytes": self.low_bytes, "high_bytes": self.high_bytes, "risk": self.risk}


def check_risk(risk: float) -> float:
    """`risk` itself. Raises GptfitError unless it is above 0 and at most a half."""
    if not 0 < risk <= 0.5:
        raise GptfitError(f"risk {risk:g}: expected more than 0 and at most 0.5", "0.05 is usual, 0.5 takes no margin")
    return risk


def process_interval(
    compiled: bool,
    reserved_bytes: int,
    profile: GpuProfile | None,
    risk: float | None = None,
    other_reserved_bytes: int | None = None,
) -> Interval:
    """The interval of `reserved_bytes` and the context together. The risk is the usual one where it is None.

    Without expandable segments the order of a run's first allocations decides for good how its segments are cut up:
    `other_reserved_bytes` is what the same run holds after another start, and within the interval.
    Raises GptfitError for a risk that is none.
    """
    risk = check_risk(USUAL_RISK if risk is None else risk)
    share = errors()["compiled" if compiled else "eager"] * reserved_bytes
    moved = reserved_bytes - (reserved_bytes if other_reserved_bytes is None else other_reserved_bytes)
    middle = profile.context_bytes if profile else UNKNOWN_CARD_CONTEXT_BYTES
    low, high = (profile.context_low_bytes, profile.context_high_bytes) if profile else UNKNOWN_CARD_CONTEXTS
    scale = quantile(risk) / quantile(USUAL_RISK)
    process_bytes = reserved_bytes + middle
    return Interval(
        low_bytes=max(0, process_bytes - round(scale * math.hypot(share, middle - low, max(0, moved)))),
        high_bytes=process_bytes + round(scale * math.hypot(share, high - middle, max(0, -moved))),
        risk=risk,
    )


# The lightest and heaviest that messages of 6 to 24 GB cards show, as for UNKNOWN_CARD_CONTEXT_BYTES.
UNKNOWN_CARD_CONTEXTS = (120 << 20, 504 << 20)


@cache
def errors() -> dict[str, float]:
    """The error of each class, a share of what the allocator holds."""
    import yaml

    return {name: float(entry["value"]) for name, entry in yaml.safe_load(ERRORS.read_text("utf-8")).items()}


def quantile(risk: float) -> float:
    """Standard deviations above the mean that a normal distribution exceeds with probability `risk`, to 0.0005
    (Abramowitz and Stegun, Handbook of Mathematical Functions, 26.2.23)."""
    t = math.sqrt(-2 * math.log(risk))
    above = 2.515517 + 0.802853 * t + 0.010328 * t * t
    below = 1 + 1.432788 * t + 0.189269 * t * t + 0.001308 * t**3
    return max(0.0, t - above / below)
