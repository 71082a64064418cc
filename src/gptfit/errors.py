"""The one exception gptfit raises on purpose."""

import difflib
from collections.abc import Iterable


class GptfitError(Exception):
    """Input that gptfit cannot answer for.

    `message` is one line: what was given, what was expected. `hint` is one line that says what to
    type or change instead. The command line prints both and exits with 2.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


def nearest(given: str, choices: Iterable[str], n: int = 2) -> str:
    """`; did you mean a, b?` for the choices closest to `given`, or an empty string."""
    close = difflib.get_close_matches(given.lower(), sorted(choices), n=n, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else ""
