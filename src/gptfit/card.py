"""The card that a command is asked about: a profile by name, or the one that the driver sees, with what is free."""

from dataclasses import dataclass

from gptfit.errors import GptfitError
from gptfit.gpus import GpuProfile, load_gpu
from gptfit.units import parse_size


@dataclass(frozen=True, slots=True)
class Card:
    """A card, and what others hold on it."""

    profile: GpuProfile
    reserve_bytes: int


def find_card(gpu: str | None, reserve: str | None = None) -> Card | None:
    """The card called `gpu`, or where that is None or `auto`, the driver's; None where there is neither.

    `reserve` is a size as typed. A named card that usually drives a desktop is planned for with one on it, a detected
    one with what its driver says. Raises GptfitError for an unknown name or size, and for `auto` without a driver.
    """
    if gpu is not None and gpu != "auto":
        profile = load_gpu(gpu)
        return Card(profile, parse_size(reserve) if reserve else profile.display_bytes)
    from gptfit.driver import detect

    detected = detect()
    if detected is None:
        if gpu == "auto":
            raise GptfitError("there is no GPU driver to ask", "name a card: --gpu rtx4070 (see: gptfit gpus)")
        return None
    return Card(detected.profile, parse_size(reserve) if reserve else detected.used_bytes)


def need_card(gpu: str | None, reserve: str | None, command: str) -> Card:
    """As `find_card`. Raises GptfitError where there is no card to be found."""
    card = find_card(gpu, reserve)
    if card is None:
        raise GptfitError(
            f"there is no GPU driver here, so {command} has to be told the card",
            f"gptfit {command} --gpu rtx4070 (gptfit gpus lists them)",
        )
    return card
