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
    rows = [("time", time_text(target)), ("energy", energy_text(target))]
    if has_price(target.goal):
        rows.append(("cost", cost_text(target)))
    yield table(("", " "), rows)


def time_text(target: Target) -> str:
    return format_time(target.seconds, target.low_seconds, target.high_seconds)


def energy_text(target: Target) -> str:
    if target.energy_kwh is None or target.power_watts is None:
        return "not known: this card's profile has no power limit"
    cards = f"{target.n_gpus} cards, each" if target.n_gpus > 1 else "the card"
    return (
        f"{significant(target.energy_kwh)} kWh: {cards} at the power limit of {target.power_watts:,.0f} W all the time"
    )


def cost_text(target: Target) -> str:
    goal = target.goal
    if target.cost is None or target.cost_range is None:
        return "not known, as the energy is not; --price takes the money of an hour"
    low, high = target.cost_range
    per = f"{goal.price:g} an hour and card" if goal.price is not None else f"{goal.price_per_kwh:g} a kWh"
    return f"{money(target.cost)} ({money(low)} to {money(high)}) at {per}"


def target_line(target: Target, name: str) -> str:
    """The same in one sentence, for the best of several cards."""
    text = f"{format_count(target.goal.n_tokens)} tokens on {name}: {time_text(target)}"
    if target.energy_kwh is not None:
        text += f", {significant(target.energy_kwh)} kWh at the power limit"
    if target.cost is not None:
        text += f", cost {money(target.cost)}"
    return f"{text}."


def has_price(goal: Goal) -> bool:
    return goal.price is not None or goal.price_per_kwh is not None


def money(amount: float) -> str:
    """Hundredths below 100, whole numbers above."""
    return f"{amount:,.2f}" if amount < 100 else f"{amount:,.0f}"
