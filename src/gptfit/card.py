"""The card that a command is asked about: a profile by name, or the one that the driver sees, with what is free."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptfit.errors import GptfitError
from gptfit.gpus import GpuProfile, load_gpu
from gptfit.units import format_bytes, parse_size

if TYPE_CHECKING:
    from gptfit.driver import DriverGpu

# Processes that a note names: enough to know what to close.
MAX_PROCESSES = 3
# What nvidia-smi prints behind a name and a comma: the size of that card.
SIZE = re.compile(r"\d[\d.]*\s*[MG]i?B", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Card:
    """A card, what others hold on it, and what to know of that."""

    profile: GpuProfile
    reserve_bytes: int
    notes: tuple[str, ...] = ()


def names_in(gpu: str) -> list[str]:
    """The cards in `rtx4070,l4`: a size belongs to the name before it, as in `RTX 4070, 12282 MiB`."""
    names: list[str] = []
    for part in filter(None, map(str.strip, gpu.split(","))):
        if names and SIZE.fullmatch(part):
            names[-1] += f", {part}"
        else:
            names.append(part)
    return names


def find_card(gpu: str | None, reserve: str | None = None) -> Card | None:
    """As `look_for_card`. Raises GptfitError, too, where a `reserve` leaves nothing of it."""
    card = look_for_card(gpu, reserve)
    if card is not None and reserve is not None:
        check_room([card], reserve)
    return card


def check_room(cards: "Sequence[Card]", reserve: str) -> None:
    """Raises GptfitError where others hold all of each card, or more than it has."""
    if cards and all(card.reserve_bytes >= card.profile.total_bytes for card in cards):
        largest = max(cards, key=lambda card: card.profile.total_bytes).profile
        raise GptfitError(
            f"--reserve {reserve[:60]}: others would hold more than {largest.name} has, "
            f"{format_bytes(largest.total_bytes)}",
            "give what others hold on the card, as --reserve 1.5GiB",
        )


def look_for_card(gpu: str | None, reserve: str | None = None) -> Card | None:
    """The card called `gpu`, or where that is None or `auto`, the driver's; None where there is neither.

    `reserve` is a size as typed. A named card that usually drives a desktop is planned for with one on it, a detected
    one with what its driver says is free. Of several it is the first that CUDA would take. Raises GptfitError for an
    unknown name or size, for several names, and for `auto`, or a `reserve`, without a driver.
    """
    reserve_bytes = parse_size(reserve) if reserve is not None else None
    if gpu is not None and gpu != "auto":
        if gpu.strip().lower() == "all" or len(names_in(gpu)) > 1:
            raise GptfitError(f'--gpu "{gpu[:60]}" names several cards, expected one', f"gptfit plan --gpu {gpu[:60]}")
        return _named(load_gpu(gpu), reserve_bytes)
    from gptfit.driver import detect

    seen = choose(detect(), os.environ)
    if seen is None and gpu == "auto":
        raise GptfitError("there is no GPU driver to ask", "name a card: --gpu rtx4070 (gptfit gpus lists them)")
    if seen is None and reserve is not None:
        raise GptfitError(
            f"--reserve {reserve[:60]} is what others hold on a card, and there is none here",
            "name the card: --gpu rtx4070 (gptfit gpus lists them)",
        )
    return None if seen is None else detected_card(seen, reserve_bytes)


def need_card(gpu: str | None, reserve: str | None, command: str) -> Card:
    """As `find_card`. Raises GptfitError where there is no card to be found."""
    card = find_card(gpu, reserve)
    if card is None:
        raise GptfitError(
            f"there is no GPU driver here, so {command} has to be told the card",
            f"gptfit {command} --gpu rtx4070 (gptfit gpus lists them)",
        )
    return card


def choose(seen: "Sequence[DriverGpu]", environment: Mapping[str, str]) -> "DriverGpu | None":
    """The first that CUDA_VISIBLE_DEVICES leaves, by number or the beginning of a UUID; None where it leaves none."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return seen[0] if seen else None
    first = visible.split(",")[0].strip()
    return next((gpu for gpu in seen if first and first in (str(gpu.index), gpu.uuid[: len(first)])), None)


def _named(profile: GpuProfile, reserve_bytes: int | None) -> Card:
    if reserve_bytes is not None or not profile.display_bytes:
        return Card(profile, reserve_bytes or 0)
    left = format_bytes(profile.display_bytes)
    note = f"{left} are left to a desktop; --reserve 0 where there is none"
    return Card(profile, profile.display_bytes, (note,))


def detected_card(gpu: "DriverGpu", reserve_bytes: int | None = None) -> Card:
    """A card that the driver sees; what is not free on it is others'. Raises GptfitError where it has no profile."""
    profile = load_gpu(gpu.name, gpu.total_bytes)
    held = [f"{process.name or process.pid}" for process in gpu.processes[:MAX_PROCESSES]]
    note = f"{gpu.name}: {format_bytes(gpu.free_bytes)} are free now" + (f", beside {', '.join(held)}" if held else "")
    if reserve_bytes is None:
        reserve_bytes = max(0, profile.total_bytes - gpu.free_bytes)
    return Card(profile, reserve_bytes, (note, *gpu.notes))
