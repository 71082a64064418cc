"""Several cards for one run at the terminal: how many fit and which is best, then a row for each."""

from collections.abc import Iterator, Mapping, Sequence

from rich.console import RenderableType
from rich.text import Text

from gptfit.asked import Asked
from gptfit.config import RunConfig
from gptfit.plan import LAST_RESORT
from gptfit.report.target import DAY, has_price, money, target_line
from gptfit.report.terminal import QUIET, ByWidth, Narrowing, commands, headline, title
from gptfit.shortlist import CardPlan, Shortlist
from gptfit.units import counted, format_bytes, significant

# Rows of each table: what fits on a screen, so that the first line stays in sight.
MAX_CARDS = 15

# How the keys that a search changes are called in a narrow column.
WORDS = {
    ("compile", True): "compiled",
    ("compile", False): "eager",
    ("loss", "full"): "full loss",
    ("loss", "chunked"): "chunked loss",
    ("activation_checkpointing", "block"): "checkpointed",
    ("activation_checkpointing", "none"): "no checkpoints",
    ("activation_memory_budget", 0.9): "budget 0.9",
    ("activation_memory_budget", 1.0): "budget 1",
    ("optimizer_impl", "fused"): "fused",
    ("param_dtype", "bfloat16"): "bf16 params",
}


def shortlist_view(answer: Shortlist, run: RunConfig, verbose: bool = False) -> Iterator[RenderableType]:
    """`run` is the one as given: levers are the keys in which a choice differs from it."""
    fitting = answer.fitting
    failing = answer.cards[len(fitting) :]
    yield headline(answer.verdict, headline_text(answer))
    if fitting:
        best, least = fitting[0], smallest_of(fitting)
        n_changed = sum(plan.changes_numerics for plan in fitting)
        if n_changed:
            yield Text(f"Only if the numbers of training change (*): {n_changed} of them.")
        if least is not best:
            unchanged = " as it is" if n_changed and not least.changes_numerics else ""
            yield Text(f"The smallest that fits{unchanged}: {least.name}, {usable_text(least)}.")
        if best.target is not None:
            yield Text(target_line(best.target, best.name))
        yield Text("")
        yield from rows_view(fitting, run, verbose)
    if failing:
        yield title("Too small, with the least that one sequence at a time needs")
        shown = failing if verbose else failing[:MAX_CARDS]
        rows = [
            (
                plan.name,
                usable_text(plan),
                format_bytes(plan.estimate.process_bytes),
                format_bytes(plan.missing_bytes),
            )
            for plan in shown
        ]
        sizes = ("usable", "needed", "missing")
        yield Narrowing(("card", *sizes), rows, spare=("usable", "needed"), right=sizes)
        yield from left_out(len(failing) - len(shown))
    yield from card_notes(answer.cards)


def card_notes(cards: Sequence[CardPlan]) -> Iterator[RenderableType]:
    """What is known of each card, that of the usual desktop once for all."""
    usual = [plan for plan in cards if 0 < plan.card.reserve_bytes == plan.card.profile.display_bytes]
    notes = [note for plan in cards if plan not in usual for note in plan.card.notes]
    if usual:
        have = counted(len(usual), "card has", "cards have")
        notes.append(f"{have} room left for a desktop; --reserve 0 where there is none")
    yield from (Text(f"note: {note}", style=QUIET) for note in notes)


def smallest_of(fitting: Sequence[CardPlan]) -> CardPlan:
    """The one with least usable memory, of those that keep the numbers of training if there are any."""
    exact = [plan for plan in fitting if not plan.changes_numerics]
    return min(exact or fitting, key=lambda plan: plan.usable_bytes)


def headline_text(answer: Shortlist) -> str:
    cards, fitting = counted(len(answer.cards), "card"), answer.fitting
    if not fitting:
        nearest = min(answer.cards, key=lambda plan: plan.missing_bytes)
        return f"none of {cards}; the nearest is {nearest.name}, short by {format_bytes(nearest.missing_bytes)}"
    best = fitting[0]
    return f"{len(fitting)} of {cards}; fastest: {best.name}, {best.tokens_per_second:,.0f} tokens/s"


def rows_view(fitting: Sequence[CardPlan], run: RunConfig, verbose: bool) -> Iterator[RenderableType]:
    shown = fitting if verbose else fitting[:MAX_CARDS]
    columns = ["card", "batch", "changed", "tokens/s", "from – to"]
    if (target := shown[0].target) is not None:
        columns += ["days", "cost"] if has_price(target.goal) else ["days"]
    rows = [row(plan, run) for plan in shown]
    numbers = ("batch", "tokens/s", "from – to", "days", "cost")
    yield Narrowing(columns, rows, spare=("from – to", "batch", "changed"), right=numbers)
    yield from left_out(len(fitting) - len(shown))
    legend = Text("  batch is micro-batch × accumulation; where from – to overlap, it is a draw", style=QUIET)
    yield ByWidth(legend, Text("", end=""))  # where it is narrow, these columns give way
    if any(plan.changes_numerics for plan in shown):
        yield Text("  * changes the numbers of training, not only its memory", style=QUIET)
    if any(plan.estimate.certain is False for plan in shown):
        yield Text("  ? fits, but within the error of the estimate", style=QUIET)


def row(plan: CardPlan, run: RunConfig) -> tuple[str, ...]:
    speed = plan.estimate.speed
    batch = f"{plan.choice['batch_size']} × {plan.choice['gradient_accumulation_steps']}"
    doubt = " ?" if plan.estimate.certain is False else ""
    cells = [plan.name + doubt, batch, levers_text(plan.choice, run), f"{plan.tokens_per_second:,.0f}"]
    cells.append(f"{short(speed.low)} – {short(speed.high)}" if speed else "")
    if (target := plan.target) is not None:
        cells.append(significant(target.seconds / DAY))
        if has_price(target.goal):
            cells.append("–" if target.cost is None else money(target.cost))
    return tuple(cells)


def levers_text(choice: Mapping[str, object], run: RunConfig) -> str:
    """What differs from the run as given, but for the micro-batch, in few words."""
    split = ("batch_size", "gradient_accumulation_steps")
    changed = {key: value for key, value in choice.items() if key not in split and getattr(run, key) != value}
    words = [
        WORDS.get((key, value), f"{value}") + ("*" if key in LAST_RESORT else "") for key, value in changed.items()
    ]
    return ", ".join(words) or "–"


def usable_text(plan: CardPlan) -> str:
    return format_bytes(max(0, plan.usable_bytes))


def short(rate: float) -> str:
    """Two to three digits and k or M: the ends of an interval are no more exact."""
    power, unit = (1e6, "M") if rate >= 1e6 else (1e3, "k") if rate >= 1e3 else (1, "")
    return f"{rate / power:.{1 if unit and rate < 10 * power else 0}f}{unit}"


def left_out(n_cards: int) -> Iterator[RenderableType]:
    if n_cards > 0:
        yield Text(f"  {n_cards} more; -v lists them", style=QUIET)


def after_shortlist(answer: Shortlist, asked: Asked, options: Sequence[str]) -> Iterator[RenderableType]:
    """The whole plan of the best card, with the same options."""
    if answer.fitting:
        yield from commands((asked.gptfit("plan", {}, "--gpu", answer.fitting[0].name, *options),))
