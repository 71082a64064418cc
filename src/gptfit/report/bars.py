"""A card's memory as one stacked line: each part is a run of its letter, on its colour where there is one."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from gptfit.estimate import Needs

BAR_WIDTH = 72


class Kind(NamedTuple):
    """How a part is told: its letter in the bar, its name, its colours, and the categories that are in it."""

    letter: str
    name: str
    style: str
    categories: tuple[str, ...] = ()


# From the bottom up: what is always there, what lives for a part of the step, what is not used. The sixteen colours
# are the terminal's own, so that they suit its background; the letters stand for those who see none.
CONTEXT = Kind("C", "context, libraries", "white on bright_black")
KINDS = (
    Kind("P", "parameters", "white on blue", ("parameter",)),
    Kind("O", "optimizer state", "black on cyan", ("optimizer state",)),
    Kind("G", "gradients", "black on green", ("gradient",)),
    Kind("A", "activations", "black on yellow", ("activation",)),
    Kind("L", "logits", "black on red", ("logits",)),
    Kind("T", "temporaries", "black on magenta", ("temporary",)),
    Kind("W", "workspaces, inputs", "black on white", ("workspace", "buffer")),
)
SLACK = Kind("S", "slack, unused", "dim", ("slack",))
FREE = Kind(".", "free", "dim")
OTHERS = Kind("#", "left to others", "dim")


class Part(NamedTuple):
    kind: Kind
    n_bytes: int


def parts(needs: Needs) -> list[Part]:
    """What the process holds at its peak, from the bottom up; adds up to `process_bytes`."""
    totals = dict(needs.breakdown())
    known = {category for kind in (*KINDS, SLACK) for category in kind.categories}
    other = Kind("?", "other", "", tuple(sorted(totals.keys() - known)))
    held = [Part(kind, sum(totals.get(name, 0) for name in kind.categories)) for kind in (*KINDS, other, SLACK)]
    slack = Part(SLACK, held.pop().n_bytes + needs.reserved_bytes - needs.allocated_bytes)
    context = Part(CONTEXT, needs.process_bytes - needs.reserved_bytes)
    return [part for part in (context, *held, slack) if part.n_bytes]


def card_parts(needs: Needs) -> list[Part]:
    """The parts of the process, then what is left of the card, if one is named and the process fits it."""
    budget, held = needs.budget, parts(needs)
    if budget is None:
        return held
    free_bytes = max(0, budget.usable_bytes - needs.process_bytes)
    beyond_bytes = max(0, needs.process_bytes - budget.usable_bytes)
    others_bytes = max(0, budget.reserve_bytes - beyond_bytes)
    return [part for part in (*held, Part(FREE, free_bytes), Part(OTHERS, others_bytes)) if part.n_bytes]


def cells(sizes: Sequence[int], width: int) -> list[int]:
    """Lengths that add up to `width`: each end is rounded by itself, so none is off by more than one."""
    total = sum(sizes)
    ends = [round(width * end / total) for end in accumulate(sizes, initial=0)] if total else [0] * (len(sizes) + 1)
    return [end - start for start, end in pairwise(ends)]


class StackedBar:
    """The card from left to right, and below it a mark at the end of what this process may use."""

    def __init__(self, needs: Needs) -> None:
        self.parts = card_parts(needs)
        self.budget = needs.budget

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(1, min(BAR_WIDTH, options.max_width - 4))
        sizes = [part.n_bytes for part in self.parts]
        coloured = console.color_system is not None and not console.no_color
        line = Text("  ", no_wrap=True)
        for part, length in zip(self.parts, cells(sizes, width), strict=True):
            letter, _, style, _ = part.kind
            # A colour fills the run by itself; without one, or for what is not used, the letter does.
            filled = not coloured or " on " not in style
            line.append(letter * length if filled else letter[:length].ljust(length), style=style)
        yield line
        if self.budget is not None:
            yield mark(round(width * self.budget.usable_bytes / sum(sizes)), width)


def mark(at: int, width: int) -> Text:
    """`usable ^` under the last of `at` cells; the word stands where there is room for it."""
    word = "usable"
    before = at > len(word)
    line = f"{word} ^".rjust(at) if before else f"{'^'.rjust(max(1, at))} {word}"
    return Text(f"  {line}"[: width + 2], style="dim", no_wrap=True)
