"""How long a run takes to see so many tokens, the energy of its cards, and what that costs."""

from dataclasses import dataclass

from gptfit.errors import GptfitError
from gptfit.gpus import GpuProfile
from gptfit.speed import Speed, seconds_to_tokens
from gptfit.units import parse_count, parse_price

JOULES_PER_KWH = 3.6e6


@dataclass(frozen=True, slots=True)
class Goal:
    """Tokens to see, and one of two prices: of a card for an hour, or of a kWh. No currency is assumed."""

    n_tokens: int
    price: float | None = None
    price_per_kwh: float | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """A goal on a card: seconds with their interval, and `n_gpus` cards that draw `power_watts` each (None: unknown).

    Energy is that of the cards at their power limit for all of the time: the most they can draw, and nothing of the
    computer around them.
    """

    goal: Goal
    seconds: float
    low_seconds: float
    high_seconds: float
    n_gpus: int
    power_watts: float | None

    @property
    def energy_kwh(self) -> float | None:
        return self._energy_kwh(self.seconds)

    @property
    def cost(self) -> float | None:
        """In the money of the price; None without a price, or where it is one of energy and the power is unknown."""
        return self._cost(self.seconds)

    @property
    def cost_range(self) -> tuple[float, float] | None:
        low, high = self._cost(self.low_seconds), self._cost(self.high_seconds)
        return None if low is None or high is None else (low, high)

    def _energy_kwh(self, seconds: float) -> float | None:
        return None if self.power_watts is None else self.n_gpus * self.power_watts * seconds / JOULES_PER_KWH

    def _cost(self, seconds: float) -> float | None:
        if self.goal.price is not None:
            return self.goal.price * self.n_gpus * seconds / 3600
        energy_kwh = self._energy_kwh(seconds)
        if self.goal.price_per_kwh is None or energy_kwh is None:
            return None
        return self.goal.price_per_kwh * energy_kwh

    def to_json(self) -> dict[str, object]:
        return {
            "tokens": self.goal.n_tokens,
            "seconds": self.seconds,
            "low_seconds": self.low_seconds,
            "high_seconds": self.high_seconds,
            "energy_kwh": self.energy_kwh,
            "cost": self.cost,
        }


def read_goal(tokens: str | None, price: str | None, price_per_kwh: str | None) -> Goal | None:
    """The goal as typed; None without tokens. Raises GptfitError for a price without tokens, or for two prices."""
    if price is not None and price_per_kwh is not None:
        raise GptfitError(
            "--price and --price-per-kwh were both given", "one is of a rented card, the other of your own: give one"
        )
    if tokens is None:
        if price is not None or price_per_kwh is not None:
            raise GptfitError("a price was given, but no --tokens", "say how many tokens to train for: --tokens 10B")
        return None
    return Goal(
        parse_count(tokens),
        None if price is None else parse_price(price),
        None if price_per_kwh is None else parse_price(price_per_kwh),
    )


def reach(goal: Goal, speed: Speed, profile: GpuProfile, n_gpus: int = 1) -> Target:
    """`goal` at that speed, which is that of all `n_gpus` cards together."""
    seconds = seconds_to_tokens(speed, goal.n_tokens)
    return Target(
        goal=goal,
        seconds=seconds,
        low_seconds=seconds * speed.tokens_per_second / speed.high,
        high_seconds=seconds * speed.tokens_per_second / speed.low,
        n_gpus=n_gpus,
        power_watts=profile.power_limit_watts,
    )
