"""To stdout: text that any terminal or pipe can take, rich tables, or one JSON object."""

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from gptfit.errors import GptfitError

if TYPE_CHECKING:
    from rich.console import RenderableType

# Beyond this a row is hard to follow with the eye.
MAX_WIDTH = 100

# For a terminal or pipe whose encoding has none of these.
PLAIN = str.maketrans(
    {"×": "x", "·": "-", "…": "...", "█": "#", "▌": "#", "░": ".", "─": "-", "–": "-", "→": "->", "≤": "<=", "−": "-"}
)


def respond(as_json: bool, record: Callable[[], Mapping[str, object]], *views: Iterable["RenderableType"]) -> None:
    """Prints one answer: its JSON object, or its views one after another."""
    if as_json:
        write_json(record())
    else:
        for view in views:
            show(view)


def show(view: Iterable["RenderableType"]) -> None:
    """Prints a view. Colours appear on a terminal alone, and not where NO_COLOR is set."""
    from rich.console import Console

    console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
    console.width = min(console.width, MAX_WIDTH)
    with console.capture() as captured:
        for part in view:
            console.print(part, soft_wrap=bool(getattr(part, "no_wrap", False)))
    write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))


def write_json(answer: Mapping[str, object]) -> None:
    """Prints one JSON object. Raises ValueError for a figure that JSON cannot hold (infinity, not a number)."""
    import json

    write(json.dumps(answer, indent=2, allow_nan=False) + "\n")


def write(text: str) -> None:
    """Text to stdout; what its encoding lacks is written in ASCII.

    Raises BrokenPipeError once nobody reads, GptfitError where it cannot be written for another reason.
    """
    encoding = sys.stdout.encoding or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = text.translate(PLAIN).encode(encoding, "replace").decode(encoding)
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        close_quietly()  # what is still to be written would fail again
        raise GptfitError(f"cannot write the answer: {(error.strerror or str(error)).lower()}", "") from None


def close_quietly() -> None:
    """Lets the interpreter end without a word about a pipe whose reader is gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
