"""What a person reads at the terminal: the answer in the first line, then why, then what to type next.

A view yields what rich prints, 80 columns wide or fewer; `report.output.show` prints it.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gptfit.asked import Asked
from gptfit.estimate import Estimate, Needs, Speed
from gptfit.units import format_bytes, format_mib

if TYPE_CHECKING:
    from gptfit.card import Card
    from gptfit.door import ConfigSource

GOOD, BAD, UNSURE, QUIET = "bold green", "bold red", "bold yellow", "dim"

VERDICTS = {"fits": ("Fits: ", GOOD), "does_not_fit": ("Does not fit: ", BAD)}

# Rows of a live set: enough for what decides, few enough to be read.
MAX_ROWS = 10
BAR_WIDTH = 24


def headline(verdict: str | None, text: str, certain: bool | None = True) -> Text:
    """The first line: `Fits: …`, `Does not fit: …`; without `certain`: `Fits, but within the error: …`."""
    word, style = VERDICTS.get(verdict or "", ("Needs ", "bold"))
    if certain is False:
        word, style = word.replace(":", ", but within the error:"), UNSURE
    return Text.assemble((word, style), text)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[str] = ()) -> RenderableType:
    """Indented columns without lines; those in `right` are aligned to the right, the last one wraps."""
    grid = Table(
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        header_style=QUIET,
        show_header=any(column.strip() for column in columns),
    )
    for column in columns:
        grid.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(Text(cell) for cell in row))
    return Padding(grid, (0, 0, 0, 2), expand=False)


def title(text: str) -> Text:
    return Text(f"\n{text}", style="bold")


def commands(lines: Iterable[str], heading: str = "Next") -> Iterator[RenderableType]:
    """What to type, one a line and never wrapped, so that it can be copied."""
    lines = tuple(lines)
    if lines:
        yield title(heading)
    for line in lines:
        yield Text(f"  {line}", no_wrap=True, overflow="ignore")


def hanging(text: str) -> RenderableType:
    """An indented line; what does not fit goes on below it, indented too."""
    return Padding(Text(text), (0, 0, 0, 2))


def margin_text(estimate: Needs) -> str:
    """`10.44 GiB of 11.56 GiB on rtx4070, 1.12 GiB to spare`."""
    budget, margin = estimate.budget, estimate.margin_bytes
    if budget is None or margin is None:
        return f"{format_bytes(estimate.process_bytes)} of GPU memory, no card named"
    left = f"{format_bytes(margin)} to spare" if margin >= 0 else f"short by {format_bytes(-margin)}"
    return f"{format_bytes(estimate.process_bytes)} of {format_bytes(budget.usable_bytes)} on {budget.name}, {left}"


def run_text(estimate: Estimate) -> str:
    """One line that says which run it is."""
    config = estimate.config
    shape = f"{config['batch_size']} × {config['block_size']} × {config['gradient_accumulation_steps']}"
    words = [f"{config[key]}" for key in ("dtype", "optimizer")]
    words.append("compiled" if config["compile"] else "eager")
    words.append(f"{config['loss']} loss")
    if config["activation_checkpointing"] != "none":
        words.append("checkpointed")
    return (
        f"{estimate.n_params / 1e6:,.1f} M parameters, {shape} = {estimate.tokens_per_step:,} tokens a step, "
        f"{', '.join(words)}; {estimate.program}'s code"
    )


def shares(estimate: Needs) -> list[tuple[str, int]]:
    """What the process holds at its peak, in parts that add up to `process_bytes`."""
    return [
        *estimate.breakdown(),
        ("held free by the allocator", estimate.reserved_bytes - estimate.allocated_bytes),
        ("CUDA context, libraries", estimate.process_bytes - estimate.reserved_bytes),
    ]


def bar(n_bytes: int, of_bytes: int) -> str:
    return "█" * round(BAR_WIDTH * n_bytes / of_bytes) if of_bytes > 0 else ""


def memory_rows(estimate: Needs) -> RenderableType:
    """The parts of the process with a bar each; a full bar is the usable memory, or the process without a card."""
    budget = estimate.budget
    full = max(estimate.process_bytes, budget.usable_bytes if budget else 0)
    rows = [(name, format_mib(n_bytes), bar(n_bytes, full)) for name, n_bytes in shares(estimate)]
    low, high = format_mib(estimate.interval.low_bytes), format_mib(estimate.interval.high_bytes)
    rows.append(("the process", format_mib(estimate.process_bytes), f"{low} to {high}"))
    if budget is not None:
        rows.append((f"usable on {budget.name}", format_mib(budget.usable_bytes), bar(budget.usable_bytes, full)))
        if budget.reserve_bytes:
            rows.append(("left to others, --reserve", format_mib(budget.reserve_bytes), ""))
    return table(("", "MiB", " "), rows, right=("MiB",))


def live_rows(estimate: Needs, n: int = MAX_ROWS) -> RenderableType:
    """The `n` largest tensors alive at the peak; a count of 12 is one in each of 12 blocks."""
    rows = [
        (row.name, " × ".join(map(str, row.shape)), row.dtype, f"{row.count}", format_mib(row.n_bytes))
        for row in estimate.tensors[:n]
    ]
    rest = estimate.tensors[n:]
    if rest:
        n_bytes = sum(row.n_bytes for row in rest)
        rows.append((f"{len(rest)} more", "", "", f"{sum(row.count for row in rest)}", format_mib(n_bytes)))
    rows.append(("allocated", "", "", "", format_mib(estimate.allocated_bytes)))
    return table(("alive then", "shape", "dtype", "count", "MiB"), rows, right=("count", "MiB"))


def speed_text(speed: Speed) -> str:
    return (
        f"{speed.tokens_per_second:,.0f} tokens/s predicted ({speed.low:,.0f} to {speed.high:,.0f}), "
        f"{speed.seconds_per_step:.2f} s a step, MFU {speed.mfu:.0%}"
    )


def estimate_view(estimate: Estimate, other: Estimate | None = None, verbose: bool = False) -> Iterator[RenderableType]:
    """One run's memory. `other` is the same run under another program's code."""
    yield headline(estimate.verdict, margin_text(estimate), estimate.certain)
    yield Text(run_text(estimate))
    yield title(f"Memory at the peak, in {estimate.phase} ({estimate.op})")
    yield memory_rows(estimate)
    yield Text("")
    yield live_rows(estimate)
    if estimate.eval_allocated_bytes > estimate.allocated_bytes:
        yield Text(f"\nEvaluation needs more than training: {format_bytes(estimate.eval_allocated_bytes)} allocated.")
    if estimate.speed is not None:
        yield Text(f"\n{speed_text(estimate.speed)}.")
    if other is not None:
        word = {"fits": "fits, ", "does_not_fit": "does not fit, "}.get(other.verdict or "", "")
        yield Text(f"\nUnder {other.program}'s code the same run {word or 'needs '}{margin_text(other)}.")
    if verbose:
        yield title("Assumed")
        yield from map(hanging, estimate.assumptions)


def after_estimate(estimate: Estimate, asked: Asked) -> Iterator[RenderableType]:
    """Commands that use the estimate; `asked` is how its run was typed."""
    yield from commands(next_lines(estimate, asked))


def next_lines(estimate: Estimate, asked: Asked) -> Iterator[str]:
    gpu = estimate.budget.name if estimate.budget else "rtx4070"
    yield asked.gptfit("plan", {}, "--gpu", gpu)
    if estimate.verdict == "fits" and estimate.program == "gptfit":
        yield asked.gptfit("train")


def notes_view(source: "ConfigSource", card: "Card | None", verbose: bool) -> Iterator[RenderableType]:
    """What the config implied and the card holds, and the keys that bear on neither memory nor speed."""
    for note in (*source.notes, *(card.notes if card else ())):
        yield Text(f"note: {note}", style=QUIET)
    if source.ignored and verbose:
        yield Text("without effect on memory and speed:", style=QUIET)
        yield from (Text(f"  {text}", style=QUIET) for text in source.ignored.values())
    elif source.ignored:
        yield Text(f"{len(source.ignored)} keys without effect on memory and speed; -v lists them", style=QUIET)
