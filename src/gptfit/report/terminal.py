"""What a person reads at the terminal: the answer in the first line, then why, then what to type next.

A view yields what rich prints, 80 columns wide or fewer; `report.output.show` prints it.
"""

from collections.abc import Iterable, Iterator, Sequence
from textwrap import wrap
from typing import TYPE_CHECKING, NamedTuple

from rich.cells import cell_len
from rich.columns import Columns
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gptfit.asked import Asked
from gptfit.estimate import Estimate, Needs, Speed, TensorRow
from gptfit.report.bars import FREE, OTHERS, Part, StackedBar, card_parts
from gptfit.units import counted, format_bytes, format_mib

if TYPE_CHECKING:
    from gptfit.card import Card
    from gptfit.door import ConfigSource

GOOD, BAD, UNSURE, QUIET = "bold green", "bold red", "bold yellow", "dim"

VERDICTS = {"fits": ("Fits: ", GOOD), "does_not_fit": ("Does not fit: ", BAD)}

# Rows of a live set: enough for what decides, few enough to be read.
MAX_ROWS = 10
NARROW = 64


def headline(verdict: str | None, text: str, certain: bool | None = True) -> Text:
    """The first line: `Fits: …`, `Does not fit: …`; without `certain`: `Fits, but within the error: …`."""
    word, style = VERDICTS.get(verdict or "", ("Needs ", "bold"))
    if certain is False:
        word, style = word.replace(":", ", but within the error:"), UNSURE
    return Text.assemble((word, style), text)


def table(
    columns: Sequence[str], rows: Iterable[Sequence[str | Text]], right: Sequence[str] = (), whole: Sequence[str] = ()
) -> RenderableType:
    """Indented columns without lines; those in `right` are aligned to the right, those in `whole` wrap last."""
    grid = Table(
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        header_style=QUIET,
        show_header=any(column.strip() for column in columns),
    )
    for column in columns:
        grid.add_column(
            column, justify="right" if column in right else "left", overflow="fold", no_wrap=column in whole
        )
    for row in rows:
        grid.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return Padding(grid, (0, 0, 0, 2), expand=False)


class ByWidth(NamedTuple):
    """One thing where there is room for it, another below NARROW columns."""

    wide: RenderableType
    narrow: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.wide if options.max_width >= NARROW else self.narrow


class Narrowing(NamedTuple):
    """A table without as many of the `spare` columns, the first of them first, as there is no room for: a number that
    is broken over lines is none. Columns in `right` (all, where not given) are whole; the others wrap between words."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    spare: Sequence[str]
    right: Sequence[str] | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        numbers = self.columns if self.right is None else self.right
        widths = {
            column: max(cell_len(part) for cell in cells for part in ([cell] if column in numbers else words(cell))) + 2
            for column, *others in zip(self.columns, *self.rows, strict=True)
            for cells in ((column, *others),)
        }
        left = list(self.columns)
        for column in self.spare:
            if sum(widths[name] for name in left) <= options.max_width:
                break
            left.remove(column)
        kept = [index for index, column in enumerate(self.columns) if column in left]
        right = [column for column in left if column in numbers]
        yield table(left, [[row[index] for index in kept] for row in self.rows], right=right, whole=right)


def words(cell: str) -> Sequence[str]:
    return cell.split() or [""]


def title(text: str) -> Text:
    return Text(f"\n{text}", style="bold")


def commands(lines: Iterable[str], heading: str = "Next") -> Iterator[RenderableType]:
    """What to type, one a line and never wrapped, so that it can be copied; comments are."""
    lines = tuple(lines)
    if lines:
        yield title(heading)
    for line in lines:
        yield Comment(line) if line.startswith("# ") else Text(f"  {line}", no_wrap=True, overflow="ignore")


class Comment(NamedTuple):
    """A line behind `#`; what does not fit goes on behind another."""

    text: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from (Text(f"  {line}") for line in wrap(self.text, options.max_width - 2, subsequent_indent="# "))


def hanging(text: str) -> RenderableType:
    """An indented line; what does not fit goes on below it, indented too."""
    return Padding(Text(text), (0, 0, 0, 2))


def margin_text(estimate: Needs, of_card: bool = True) -> str:
    """`10.44 GiB of 11.56 GiB on rtx4070, 1.12 GiB to spare`; without `of_card` not of what."""
    budget, margin = estimate.budget, estimate.margin_bytes
    needed = format_bytes(estimate.process_bytes)
    if budget is None or margin is None:
        return f"{needed} of GPU memory, no card named"
    left = f"{format_bytes(margin)} to spare" if margin >= 0 else f"short by {format_bytes(-margin)}"
    return (
        f"{needed} of {format_bytes(budget.usable_bytes)} on {budget.name}, {left}" if of_card else f"{needed}, {left}"
    )


def run_text(estimate: Estimate) -> str:
    """One line that says which run it is."""
    config = estimate.config
    shape = f"{config['batch_size']} × {config['block_size']} tokens × {config['gradient_accumulation_steps']}"
    words = [f"{config[key]}" for key in ("dtype", "optimizer")]
    words.append("compiled" if config["compile"] else "eager")
    words.append(f"{config['loss']} loss")
    if config["activation_checkpointing"] != "none":
        words.append("checkpointed")
    if config["activation_memory_budget"] != 1.0:
        words.append(f"memory budget {config['activation_memory_budget']}")
    return (
        f"{estimate.n_params / 1e6:,.1f} M parameters; micro-batch {shape} = {estimate.tokens_per_step:,} a step; "
        f"{', '.join(words)}; {estimate.program}'s code"
    )


def shares(estimate: Needs) -> list[tuple[str, int]]:
    """What the process holds at its peak, in parts that add up to `process_bytes`."""
    return [
        *estimate.breakdown(),
        ("slack, held free by the allocator", estimate.reserved_bytes - estimate.allocated_bytes),
        ("context, libraries", estimate.process_bytes - estimate.reserved_bytes),
    ]


def memory_rows(estimate: Needs) -> RenderableType:
    """The card as one bar, and its parts, two beside each other where there is room; they add up to the process."""
    budget, parts = estimate.budget, card_parts(estimate)
    rows = [part_row(part) for part in parts if part.kind not in (FREE, OTHERS) and format_mib(part.n_bytes) != "0.0"]
    rows.append((Text("="), "process", format_mib(estimate.process_bytes)))
    rows += [part_row(part) for part in parts if part.kind is FREE]
    if budget is not None:
        rows.append((Text("^"), "usable", format_mib(budget.usable_bytes)))
        if budget.reserve_bytes:
            rows.append((Text(OTHERS.letter), "others, --reserve", format_mib(budget.reserve_bytes)))
    half = -(-len(rows) // 2)
    columns = [table(("", " ", "  "), some, right=("  ",)) for some in (rows[:half], rows[half:])]
    low, high = format_mib(estimate.interval.low_bytes), format_mib(estimate.interval.high_bytes)
    return Group(StackedBar(estimate), Columns(columns), hanging(f"Likely range of the process: {low} to {high}."))


def part_row(part: Part) -> tuple[Text, str, str]:
    return Text(part.kind.letter, style=part.kind.style), part.kind.name, format_mib(part.n_bytes)


def peak_title(estimate: Needs, of: str = "") -> Text:
    return title(f"Memory at the peak{of}, in {estimate.phase} ({estimate.op}), MiB")


def tensor_rows(rows: Iterable[TensorRow]) -> list[tuple[str, ...]]:
    return [
        (row.name, "×".join(map(str, row.shape)), row.dtype, f"{row.count}", format_mib(row.n_bytes)) for row in rows
    ]


def peak_view(estimate: Needs, n: int = 3) -> Iterator[RenderableType]:
    """Where the peak is, and the `n` largest tensors that are alive then: why a run does not fit."""
    allocated = f"{format_mib(estimate.allocated_bytes)} MiB allocated"
    yield Text(f"Its peak, {allocated}, is in {estimate.phase} ({estimate.op}):")
    yield alive_table(tensor_rows(estimate.tensors[:n]))


def alive_table(rows: Sequence[tuple[str, ...]]) -> RenderableType:
    """Name, shape, dtype, count and MiB; on a narrow terminal the first and the last alone."""
    right = ("count", "MiB")
    wide = table(("alive then", "shape", "dtype", "count", "MiB"), rows, right)
    return ByWidth(wide, table(("alive then", "MiB"), [(row[0], row[-1]) for row in rows], right))


def live_rows(estimate: Needs, n: int = MAX_ROWS) -> RenderableType:
    """The `n` largest tensors alive at the peak; a count of 12 is one in each of 12 blocks."""
    rows, rest = tensor_rows(estimate.tensors[:n]), estimate.tensors[n:]
    if rest:
        n_bytes = sum(row.n_bytes for row in rest)
        rows.append((f"{len(rest)} more", "", "", f"{sum(row.count for row in rest)}", format_mib(n_bytes)))
    rows.append(("allocated", "", "", "", format_mib(estimate.allocated_bytes)))
    return alive_table(rows)


def speed_text(speed: Speed) -> str:
    return (
        f"{speed.tokens_per_second:,.0f} tokens/s predicted ({speed.low:,.0f} to {speed.high:,.0f}), "
        f"{speed.seconds_per_step:.2f} s a step, MFU {100 * speed.mfu:.0f} %"
    )


def estimate_view(
    estimate: Estimate,
    other: Estimate | None = None,
    verbose: bool = False,
    live: Iterable[RenderableType] | None = None,
) -> Iterator[RenderableType]:
    """One run's memory. `other` is the same run under another program's code; `live` replaces the largest tensors."""
    yield headline(estimate.verdict, margin_text(estimate), estimate.certain)
    yield Text(run_text(estimate))
    yield peak_title(estimate)
    yield memory_rows(estimate)
    yield from live if live is not None else (Text(""), live_rows(estimate))
    if estimate.eval_allocated_bytes > estimate.allocated_bytes:
        yield Text(f"\nEvaluation needs more than training: {format_bytes(estimate.eval_allocated_bytes)} allocated.")
    if estimate.speed is not None and estimate.verdict == "fits":
        yield Text(f"\n{speed_text(estimate.speed)}.")
    if other is not None:
        word = {"fits": "fits, ", "does_not_fit": "does not fit, "}.get(other.verdict or "", "")
        yield Text(f"\nUnder {other.program}'s code the same run {word or 'needs '}{margin_text(other)}.")
    if verbose:
        yield title("Assumed")
        yield from map(hanging, estimate.assumptions)


def after_estimate(estimate: Estimate, asked: Asked, options: Sequence[str] = ()) -> Iterator[RenderableType]:
    """Commands that use the estimate; `asked` and `options` are how its run was typed, the card aside."""
    yield from commands(next_lines(estimate, asked, options))


def next_lines(estimate: Estimate, asked: Asked, options: Sequence[str]) -> Iterator[str]:
    gpu = estimate.budget.name if estimate.budget else "rtx4070"
    yield asked.gptfit("plan", {}, "--gpu", gpu, *options)
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
        yield Text(
            f"{counted(len(source.ignored), 'key')} without effect on memory and speed; -v says which", style=QUIET
        )
