"""How long until so many tokens, and what it costs, in words."""

from collections.abc import Iterator

from rich.console import RenderableType

from gptfit.report.terminal import table, title
from gptfit.target import Goal, Target
from gptfit.units import format_count, format_time, significant

DAY = 86400


def target_view(target: Target | None) -> Iterator[RenderableType]:
    """Time, energy and cost, with what they rest on."""
    if target is None:
        return
    yield title(f"To {format_count(target.goal.n_tokens)} tokens")
    seconds, low, high = format_time(target.seconds, target.low_seconds, target.high_seconds)
    rows = [("time", seconds, f"({low} to {high})"), ("energy", *energy_cells(target))]
    if has_price(target.goal):
        rows.append(("cost", *cost_cells(target)))
    yield table(("", " ", "  "), rows, right=(" ",))


def energy_cells(target: Target) -> tuple[str, str]:
    if target.energy_kwh is None:
        return "–", "the profile has no power limit for this card"
    cards = f"{target.n_gpus} cards" if target.n_gpus > 1 else "the card"
    limit = f"{target.power_watts:,.0f} W" + (" each" if target.n_gpus > 1 else "")
    return f"{significant(target.energy_kwh)} kWh", f"{cards} at the power limit, {limit}, the computer not counted"


def cost_cells(target: Target) -> tuple[str, str]:
    goal = target.goal
    if target.cost is None or target.cost_range is None:
        return "–", "no energy to price; --price takes that of an hour"
    low, high = target.cost_range
    per = f"{goal.price:g} an hour and card" if goal.price is not None else f"{goal.price_per_kwh:g} a kWh"
    return money(target.cost), f"({money(low)} to {money(high)}) at {per}"


def target_line(target: Target, name: str) -> str:
    """The same in one sentence, for the best of several cards."""
    seconds, low, high = format_time(target.seconds, target.low_seconds, target.high_seconds)
    text = f"{format_count(target.goal.n_tokens)} tokens take it {seconds} ({low} to {high})"
    if target.energy_kwh is not None:
        text += f", {significant(target.energy_kwh)} kWh at the power limit"
    if target.cost is not None:
        text += f", cost {money(target.cost)}"
    return f"{name}: {text}."


def has_price(goal: Goal) -> bool:
    return goal.price is not None or goal.price_per_kwh is not None


def money(amount: float) -> str:
    """Hundredths below 100, whole numbers above."""
    return f"{amount:,.2f}" if amount < 100 else f"{amount:,.0f}"
