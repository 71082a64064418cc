"""The log that a person points at: a file, a pipe, or text pasted at the terminal. Of a long one, what matters."""

import codecs
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from gptfit.config import shown
from gptfit.errors import GptfitError
from gptfit.units import format_bytes

# Weeks of a chatty run. Of a longer file the end is read, where the error is; a pipe may be longer for a while.
MAX_LOG_BYTES = 64 << 20
MOST_PIPED = 16

# Read whole up to here; of a longer text its head, its end, and what stands around these words.
WHOLE = 300_000
CHUNK = 1 << 20
BEFORE, AFTER, HEAD, TAIL = 16_000, 6_000, 24_000, 48_000
LOUD = tuple(
    word.encode()
    for word in (
        "out of memory",
        "outofmemory",
        "tried to allocate",
        "exceed allowed memory",
        "alloc_failed",
        "allocate memory",
        "unable to allocate",
        "memoryerror",
        "oom-kill",
        "oom_kill",
        "killed",
        "sigkill",
        "bus error",
        "shared memory",
        "out of resource",
        "bad_alloc",
        "cuda error",
        "cuda calloc",
    )
)
# Where trainers print a run's keys; it may be long before the error.
KEYS = tuple(
    word.encode() for word in ("overriding", "tokens per iteration", "batch size per", "batch_size=", "batch_size:")
)

_BEYOND_ASCII = bytes(range(128, 256))
_CONTROLS = re.compile(r"[\x01-\x07\x0e-\x1a\x1c-\x1f\x7f]")
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
            text = _text(_chunks(sys.stdin.buffer, MOST_PIPED * MAX_LOG_BYTES))
        else:
            text = _of_file(Path(str(file)))
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise GptfitError(f"cannot read {name}: {reason}", _HINT) from None
    if _is_binary(text):
        raise GptfitError(f"{name} is binary, expected the text of a log", _HINT)
    if not text.strip("\0 \t\r\n\f\v"):
        raise GptfitError(f"{name} is empty, expected the text of an error", _HINT)
    return text


def _of_file(path: Path) -> str:
    """The text of the last MAX_LOG_BYTES of a file."""
    with path.open("rb") as file:
        if not path.is_file():  # a device or a named pipe has no end to go to
            return _text(_chunks(file, MOST_PIPED * MAX_LOG_BYTES))
        size = file.seek(0, 2)
        file.seek(max(0, size - MAX_LOG_BYTES))
        return _text(_chunks(file, size))


def _chunks(stream: BinaryIO, most_bytes: int) -> Iterator[bytes]:
    """What comes, in pieces. Raises GptfitError where far too much comes."""
    total = 0
    while chunk := stream.read(CHUNK):
        total += len(chunk)
        if total > most_bytes:
            raise GptfitError(f"more than {format_bytes(total)} of text came in", "give its end, as tail -n 5000 does")
        yield chunk


def _text(chunks: Iterator[bytes]) -> str:
    """UTF-8 with stray bytes replaced; UTF-16 where a mark or its zeros say so (PowerShell's `>` writes that); GB18030
    where most of what is beyond ASCII is no UTF-8 (a Chinese Windows)."""
    first = next(chunks, b"")
    begin = first[:400]
    if begin[:2] in (b"\xff\xfe", b"\xfe\xff"):
        encoding = "utf-16"
    else:
        odd, even = begin[1::2].count(0), begin[::2].count(0)
        encoding = "utf-16-le" if odd > len(begin) // 3 and even < odd // 4 else ""
    every = _before(first, chunks)
    raw = excerpt(_as_utf8(every, encoding) if encoding else every)
    text = raw.decode("utf-8-sig", "replace")
    beyond = len(raw) - len(raw.translate(None, _BEYOND_ASCII))
    return raw.decode("gb18030", "replace") if 2 * text.count("\ufffd") > beyond > 0 else text


def _before(first: bytes, others: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from others


def _as_utf8(chunks: Iterable[bytes], encoding: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(encoding)("replace")
    for chunk in chunks:
        yield decoder.decode(chunk).encode("utf-8", "replace")


def _is_binary(text: str) -> bool:
    """Whether one character in twenty is a control code that no program prints. Zeros alone are what a crash leaves."""
    sample = text[:100_000].replace("\0", "")
    return bool(text) and len(_CONTROLS.findall(sample)) > len(sample) // 20


def excerpt(chunks: Iterable[bytes]) -> bytes:
    """A text of any length as its head, its end, the first and the last place of each loud word, and the last place
    of each word of a run's keys, in order; a short one whole. Holds a few chunks at a time."""
    spans: dict[tuple[bytes, str], tuple[int, bytes]] = {}
    held, begins, searched = b"", 0, 0  # what is held of the text, where that begins, how far it is searched
    head, tail = b"", b""
    for chunk in chunks:
        held += chunk
        head += chunk[: WHOLE + 1 - len(head)]
        tail = (tail + chunk)[-TAIL:]
        end = begins + len(held) - AFTER
        if end > searched + CHUNK // 2:
            _hits(held, begins, searched, end, spans)
            searched = end
            drop = max(0, searched - BEFORE - begins)
            held, begins = held[drop:], begins + drop
    total = begins + len(held)
    if total <= WHOLE:
        return head
    _hits(held, begins, searched, total, spans)
    spans[b"", "head"], spans[b"", "tail"] = (0, head[:HEAD]), (total - len(tail), tail)
    return _merged(sorted(spans.values()))


def _hits(held: bytes, begins: int, start: int, end: int, spans: dict[tuple[bytes, str], tuple[int, bytes]]) -> None:
    """Notes what stands around each word whose first letter is in [start, end) of the text."""
    low = held.lower()
    for word in (*LOUD, *KEYS):
        first = low.find(word, start - begins, end - begins + len(word) - 1)
        if first < 0:
            continue
        last = low.rfind(word, start - begins, end - begins + len(word) - 1)
        for which, at in (("first", first), ("last", last)):
            if which == "last" or ((word, which) not in spans and word in LOUD):
                from_here = max(0, at - BEFORE)
                spans[word, which] = (begins + from_here, held[from_here : at + AFTER])


def _merged(spans: list[tuple[int, bytes]]) -> bytes:
    """Spans in their order, what two of them share once, and a mark, which no figure spans, for what is left out."""
    parts: list[bytes] = []
    end = 0
    for start, part in spans:
        if start > end:
            parts += (b"\n[...]\n", part)
        else:
            parts.append(part[end - start :])
        end = max(end, start + len(part))
    return b"".join(parts)
