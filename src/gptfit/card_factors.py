"""How many times faster cards are than their data sheets make speed.py say, where published runs show it."""

from functools import cache
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).parent / "measured" / "card_factors.yaml"


class CardFactor(NamedTuple):
    """`n_runs` says from how many measured runs it is: of 0 the card would be slower than a measured one of its
    architecture that it surpasses in everything, and is taken to be as fast (throughput.py)."""

    factor: float
    n_runs: int

    @property
    def clause(self) -> str:
        """What a speed's source says of it, after what it says of the general form."""
        if self.n_runs:
            runs = f"{self.n_runs} published runs on this card"
            return f", times {self.factor:.2f} by {runs}: median error 3 % on a run left out"
        if self.factor != 1:
            return f"; times {self.factor:.2f}, or a measured card that this one surpasses would be faster"
        return ""


GENERAL_FORM = CardFactor(1.0, 0)


@cache
def shipped_factors() -> dict[str, CardFactor]:
    """Those of measured/card_factors.yaml, by the names of profiles."""
    import yaml

    return {name: CardFactor(**entry) for name, entry in yaml.safe_load(TABLE.read_text(encoding="utf-8")).items()}


def card_factor(name: str) -> CardFactor:
    """That of the card whose profile has this name."""
    return shipped_factors().get(name, GENERAL_FORM)
