"""A traced step at the terminal: whether it fits, what is alive at its peak, and the largest batch that fits."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from gptfit.asked import Asked
from gptfit.report.terminal import (
    QUIET,
    commands,
    hanging,
    headline,
    live_rows,
    margin_text,
    memory_rows,
    peak_title,
    table,
    title,
)
from gptfit.units import format_bytes, format_mib

if TYPE_CHECKING:
    from gptfit.card import Card
    from gptfit.tracefile import TraceReport
    from gptfit.tracefit import BatchFit


def trace_view(report: "TraceReport", verbose: bool = False) -> Iterator[RenderableType]:
    """One traced step's memory."""
    yield headline(report.verdict, margin_text(report), report.certain)
    yield Text(step_text(report))
    yield peak_title(report)
    yield memory_rows(report)
    yield Text("")
    yield live_rows(report)
    yield title("Peak of each phase")
    yield table(("", "MiB"), [(name, format_mib(n_bytes)) for name, n_bytes in report.phases], right=("MiB",))
    yield Text(f"\n{format_bytes(report.saved_for_backward_bytes)} are saved for backward by one micro-step.")
    if verbose:
        yield title("Assumed")
        yield from map(hanging, report.assumptions)


def step_text(report: "TraceReport") -> str:
    """One line that says which step it is."""
    given = " ".join(f"{key}={value}" for key, value in report.arguments.items() if value is not None)
    return f"{report.n_params / 1e6:,.1f} M parameters, {report.source}{f' with {given}' if given else ''}"


def fit_view(fit: "BatchFit", verbose: bool = False) -> Iterator[RenderableType]:
    """The largest batch that fits, the sizes that were traced, then the trace at the one chosen."""
    if fit.batch_size is None:
        smallest = fit.points[0].batch_size
        yield headline("does_not_fit", f"no batch_size, down to {smallest}")
    else:
        name = fit.report.budget.name if fit.report.budget else "the card"
        more = "" if fit.is_largest else ", and more may"
        yield headline("fits", f"batch_size={fit.batch_size} on {name}{more}")
    rows = [
        (
            f"{point.batch_size}",
            format_mib(point.live_bytes),
            format_mib(point.process_bytes),
            "fits" if point.fits else "does not fit",
        )
        for point in fit.points
    ]
    columns = ("batch_size", "live MiB", "process MiB")
    yield title("Traced")
    yield table((*columns, " "), rows, right=columns)
    yield Text("")
    yield from trace_view(fit.report, verbose)


def notes_view(report: "TraceReport", card: "Card | None") -> Iterator[RenderableType]:
    """What to know of the trace and of the card."""
    yield from (Text(f"note: {note}", style=QUIET) for note in (*report.notes, *(card.notes if card else ())))


def after_trace(report: "TraceReport", asked: Asked, fitted: bool) -> Iterator[RenderableType]:
    """The command that finds the largest batch, where there is one to be found."""
    if report.takes_batch_size and not fitted:
        name = report.budget.name if report.budget else "rtx4070"
        yield from commands((asked.gptfit("trace", {}, "--gpu", name, "--fit"),))
