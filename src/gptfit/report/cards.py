"""Cards: the profiles, one of them with its sources, and what the driver sees."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.columns import Columns
from rich.console import RenderableType
from rich.text import Text

from gptfit.gpus import GpuProfile
from gptfit.report.terminal import QUIET, commands, table, title
from gptfit.units import GiB, format_bytes

if TYPE_CHECKING:
    from gptfit.driver import DriverGpu


def gpus_view(profiles: Sequence[GpuProfile], verbose: bool = False) -> Iterator[RenderableType]:
    """Cards with the memory that PyTorch sees on them, in columns as wide as the terminal; or one a line, in full."""
    yield Text(f"{len(profiles)} cards, with the GiB that PyTorch sees on each; -v says more", style="bold")
    if any(card.measured for card in profiles):
        yield Text("* measured on this machine", style=QUIET)
    if verbose:
        yield full_table(profiles)
    else:
        widest = max(len(card.name) for card in profiles)
        entries = [
            f"{card.name}{'*' if card.measured else ''}".ljust(widest) + f"{card.total_bytes / GiB:.1f}".rjust(6)
            for card in profiles
        ]
        yield Columns(entries, column_first=True, padding=(0, 2))
    yield from commands(("gptfit gpus rtx4070", "gptfit plan --gpu rtx4070"))


def full_table(profiles: Sequence[GpuProfile]) -> RenderableType:
    rows = [
        (
            card.name,
            format_bytes(card.total_bytes),
            card.compute_capability,
            f"{card.title}, measured here" if card.measured else card.title,
        )
        for card in profiles
    ]
    return table(("name", "memory", "cc", "card"), rows, right=("memory", "cc"))


def gpu_view(profile: GpuProfile) -> Iterator[RenderableType]:
    """One card's figures, each with its source."""
    yield Text(f"{profile.title} ({profile.name}), compute capability {profile.compute_capability}", style="bold")
    rows = []
    for key, source in profile.sources.items():
        value = getattr(profile, key)
        rows.append((key, figure_text(key, value), source))
    yield table(("", " ", "source"), rows)
    yield from commands((f"gptfit plan --gpu {profile.name}",))


def figure_text(key: str, value: object) -> str:
    """A figure of a profile with its unit."""
    if isinstance(value, int) and key.endswith("_bytes"):
        return format_bytes(value)
    if isinstance(value, float):
        if key.endswith("_per_second"):
            return f"{value / 1e9:,.0f} GB/s"
        return f"{value:.4g} W" if key.endswith("_watts") else f"{value:.4g}"
    if isinstance(value, int):
        return f"{value}"
    rates = dict(value) if isinstance(value, Iterable) else {}
    return "\n".join(f"{name} {rate / 1e12:,.4g} TFLOP/s" for name, rate in rates.items() if rate is not None)


def gpus_json(profiles: Iterable[GpuProfile]) -> dict[str, Any]:
    """The object that `gptfit gpus --json` prints: a source has its figure's name without `_bytes`, as it is text."""
    return {
        "schema": "gptfit.gpus/1",
        "gpus": [
            profile.model_dump(mode="json")
            | {"sources": {key.removesuffix("_bytes"): source for key, source in profile.sources.items()}}
            for profile in profiles
        ],
    }


def seen_view(seen: "Sequence[DriverGpu]") -> Iterator[RenderableType]:
    """This machine's cards, what is free on each, and who holds the rest."""
    if not seen:
        yield Text("No NVIDIA driver answers on this machine.")
        yield from commands(("gptfit plan --gpu rtx4070",))
        return
    rows = [
        (f"{gpu.index}", gpu.name, format_bytes(gpu.free_bytes), format_bytes(gpu.total_bytes), gpu.driver_version)
        for gpu in seen
    ]
    yield table(("", "card", "free", "total", "driver"), rows, right=("free", "total"))
    for gpu in seen:
        if gpu.processes:
            yield title(f"On {gpu.index}, {gpu.name}")
            held = [
                (f"{process.pid}", "" if process.used_bytes is None else format_bytes(process.used_bytes), process.name)
                for process in gpu.processes
            ]
            yield table(("pid", "memory", "process"), held, right=("pid", "memory"))
    for note in dict.fromkeys(note for gpu in seen for note in gpu.notes):
        yield Text(f"note: {note}", style=QUIET)
    yield from commands(("gptfit plan", "gptfit measure"))


def seen_json(seen: "Sequence[DriverGpu]") -> dict[str, object]:
    """The object that `gptfit gpus --detect --json` prints."""
    return {"schema": "gptfit.detected/1", "gpus": [asdict(gpu) for gpu in seen]}
