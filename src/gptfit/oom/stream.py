"""The lines of a paste as one text without white space, in which no wrapping matters, and the way back to lines."""

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from gptfit.oom.clean import Line
from gptfit.oom.pattern import lazy

# White space between two digits stays: "GPU 1 11.56 GiB" is not 111.56. A line's end alone may be amid a figure.
_BETWEEN_DIGITS = lazy(r"(?<=\d)[ \t]+(?=\d)")
_ONE_SPACE = lazy(r" \d")
_DROPPED = lazy(r"[\s|*`\"'\\│┃║╎┆▐↩⏎↵]+")
_KEPT = "\0"


@dataclass(frozen=True, slots=True)
class Stream:
    """`text` is in lower case; `starts[i]` is where line `numbers[i]` of the paste begins in it."""

    text: str
    starts: tuple[int, ...]
    numbers: tuple[int, ...]

    def line_at(self, offset: int) -> int:
        """The number of the line that a place in `text` comes from."""
        return self.numbers[bisect.bisect_right(self.starts, offset) - 1] if self.numbers else 0


def squashed(text: str) -> str:
    """`text` in lower case without white space, quotes, emphasis and table bars."""
    kept = _BETWEEN_DIGITS.sub(_KEPT, text.lower())
    return _DROPPED.sub("", kept).replace(_KEPT, " ")


def stream_of(lines: Sequence[Line], parts: Sequence[str], rank: str | None = None) -> Stream:
    """All lines, or those of one rank and those whose rank nothing tells. `parts` are the lines squashed."""
    numbers = [number for number, line in enumerate(lines) if rank is None or line.rank in ("", rank)]
    chosen: list[str] = []
    before = ""
    for number in numbers:
        part, text = parts[number], lines[number].text
        amid = part[:1].isdigit() and bool(chosen) and chosen[-1][-1:].isdigit()
        apart = amid and (before[-1:].isspace() or _ONE_SPACE.match(text) is not None)
        chosen.append(" " + part if apart else part)
        before = text
    starts = itertools.accumulate((len(part) for part in chosen[:-1]), initial=0) if chosen else ()
    return Stream("".join(chosen), tuple(starts), tuple(numbers))


def logical_lines(lines: Sequence[Line]) -> list[tuple[int, str]]:
    """Lines as they were before a terminal cut them, each with the number of its first piece; rank by rank."""
    found: list[tuple[int, str]] = []
    open_at: dict[str, int] = {}
    for number, line in enumerate(lines):
        at = open_at.pop(line.rank, -1)
        if at < 0 and not line.rank and number and lines[number - 1].full:  # only the first piece has the prefix
            at = open_at.pop(lines[number - 1].rank, -1)
        if at >= 0 and len(found[at][1]) < 20_000:
            found[at] = (found[at][0], found[at][1] + line.text)
        else:
            at = len(found)
            found.append((number, line.text))
        if line.full:
            open_at[line.rank] = at
    return found
