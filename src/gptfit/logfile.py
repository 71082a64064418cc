"""The log that a person points at: a file, a pipe, or text pasted at the terminal."""

import sys
from pathlib import Path
from typing import BinaryIO

from gptfit.config import shown
from gptfit.errors import GptfitError
from gptfit.units import format_bytes

# A day of a chatty run. Of a longer file the end is read, where the error is.
MAX_LOG_BYTES = 16 << 20

_HINT = "give a file, pipe a log in, or paste the error at the prompt: gptfit explain-oom train.log"


def read_log(file: str | None) -> str:
    """The text of `file`; `-`, or None with a pipe, is stdin; None at a terminal asks for it.

    Raises GptfitError for what cannot be read, is binary, or is empty.
    """
    name = "the pasted text" if file in (None, "-") else f'"{shown(file, 200)}"'
    try:
        if file in (None, "-"):
            if sys.stdin.isatty():
                print("Paste the error, then press Ctrl-D on a line of its own.", file=sys.stderr)
            raw = _end_of_stream(sys.stdin.buffer)
        else:
            raw = _end_of_file(Path(str(file)))
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise GptfitError(f"cannot read {name}: {reason}", _HINT) from None
    text = _decode(raw)
    if "\0" in text:
        raise GptfitError(f"{name} is binary, expected the text of a log", _HINT)
    if not text.strip():
        raise GptfitError(f"{name} is empty, expected the text of an error", _HINT)
    return text


def _end_of_file(path: Path) -> bytes:
    """The last MAX_LOG_BYTES of a file."""
    with path.open("rb") as file:
        if not path.is_file():  # a device or a named pipe has no end to go to
            return _end_of_stream(file)
        size = file.seek(0, 2)
        file.seek(max(0, size - MAX_LOG_BYTES))
        return file.read(MAX_LOG_BYTES)


def _end_of_stream(stream: BinaryIO) -> bytes:
    """The last MAX_LOG_BYTES of what comes. Raises GptfitError where far too much comes."""
    kept, total = bytearray(), 0
    while chunk := stream.read(1 << 20):
        kept += chunk
        total += len(chunk)
        del kept[:-MAX_LOG_BYTES]
        if total > 64 * MAX_LOG_BYTES:
            raise GptfitError(f"more than {format_bytes(total)} of text came in", "give its end, as tail -n 5000 does")
    return bytes(kept)


def _decode(raw: bytes) -> str:
    """UTF-8 with stray bytes replaced, or UTF-16 where a mark says so (PowerShell's `>` writes that)."""
    encoding = "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    return raw.decode(encoding, "replace")
