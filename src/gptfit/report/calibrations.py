"""`gptfit measure`: what was predicted beside what was measured, and what later plans use."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from gptfit.report.terminal import QUIET, commands, hanging, table, title
from gptfit.units import format_bytes, format_mib

if TYPE_CHECKING:
    from gptfit.calibration import Calibration

FIGURES = {
    "allocated_bytes": "allocated, MiB",
    "reserved_bytes": "reserved, MiB",
    "process_bytes": "process, MiB",
    "seconds_per_step": "seconds a step",
}


def calibration_view(answer: "Calibration") -> Iterator[RenderableType]:
    """Each run's figures, then the card's, the shipped profile's first."""
    machine = answer.compared[0].reading.machine
    yield Text(f"{machine.device}, measured on {machine.measured_on}", style="bold")
    yield Text(f"torch {machine.torch}, driver {machine.driver}; predicted by the profile {answer.profile.name}")
    yield title("Runs")
    right = ("predicted", "measured", "off")
    yield table(("run", "", *right), _rows(answer), right=right)
    for name, reason in answer.left_out:
        yield hanging(f"{name} was left out: {reason}")
    overlay, profile = answer.overlay, answer.profile
    yield title("The card")
    rows = [
        ("total memory", format_bytes(profile.total_bytes), format_bytes(overlay.total_bytes)),
        ("context, libraries", format_bytes(profile.context_bytes), format_bytes(overlay.context_bytes)),
        ("speed factor", "1", f"{overlay.speed_factor:.2f}"),
    ]
    yield table(("", "profile", "measured"), rows, right=("profile", "measured"))


def _rows(answer: "Calibration") -> Iterator[tuple[str, ...]]:
    for compared in answer.compared:
        name = compared.reading.name
        for figure, (predicted, measured) in compared.figures().items():
            if measured is None:
                yield name, FIGURES[figure], _number(figure, predicted), "not told", ""
            else:
                off = f"{predicted / measured - 1:+.1%}".replace("%", " %")
                yield name, FIGURES[figure], _number(figure, predicted), _number(figure, measured), off
            name = ""


def _number(figure: str, value: float) -> str:
    return format_mib(round(value)) if figure.endswith("_bytes") else f"{value:.4f}"


def files_view(gpu: str, rows: Path, overlay: Path) -> Iterator[RenderableType]:
    """Where the figures are, and what to type next."""
    yield Text("\nPlans for this card on this machine use what was measured.")
    yield Text(f"  {overlay}", no_wrap=True, overflow="ignore")
    yield Text("Without that file the profile's figures count again. The rows:", style=QUIET)
    yield Text(f"  {rows}", no_wrap=True, overflow="ignore")
    yield from commands((f"gptfit gpus {gpu}", f"gptfit accuracy {rows}", f"gptfit plan --gpu {gpu}"))
