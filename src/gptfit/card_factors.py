"""How many times faster cards are than their data sheets make speed.py say, where published runs show it."""

from typing import NamedTuple


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
# The rules are throughput.card_factors; benchmarks/calibrate_speed.py prints this table.
CARD_FACTORS: dict[str, CardFactor] = {
    "a100-80gb": CardFactor(1.018, 2),
    "a40": CardFactor(0.993, 2),
    "a800-80gb": CardFactor(1.018, 0),
    "b200": CardFactor(0.967, 2),
    "h100-pcie": CardFactor(0.968, 2),
    "h100-sxm": CardFactor(1.052, 2),
    "h200": CardFactor(1.011, 3),
    "l4": CardFactor(0.879, 2),
    "l40": CardFactor(0.93, 2),
    "rtx3060": CardFactor(0.973, 6),
    "rtx4000ada": CardFactor(1.038, 2),
    "rtx4070": CardFactor(1.28, 4),
    "rtx4070s": CardFactor(1.122, 0),
    "rtx4070ti": CardFactor(1.041, 0),
    "rtxa4000": CardFactor(1.032, 2),
    "rtxa5000": CardFactor(0.993, 2),
    "rtxa6000": CardFactor(0.984, 2),
    "rtxpro6000": CardFactor(1.08, 2),
}


def card_factor(name: str) -> CardFactor:
    """That of the card whose profile has this name."""
    return CARD_FACTORS.get(name, GENERAL_FORM)
