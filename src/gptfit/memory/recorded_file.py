"""Files of recordings: allocator traces in JSON, and torch's memory snapshots (snapshot.py)."""

import gzip
import json
import zlib
from operator import itemgetter
from pathlib import Path
from typing import Any

from gptfit.errors import GptfitError
from gptfit.memory.allocator import SMALL_SEGMENT
from gptfit.memory.recording import (
    HOW_TO_RECORD,
    MAX_NUMBER,
    Event,
    Live,
    Recording,
    Span,
    options_from,
    recorded_peak,
    whole,
)

TRACE_FORMAT = "cuda-caching-allocator-trace/1"
# Unpacked. Objects take up to twenty times the bytes of a file; 100,000 events with their stacks are 50 MiB or so.
MAX_FILE_BYTES, MAX_JSON_BYTES = 256 << 20, 64 << 20
KINDS = frozenset("AFQCSRMUON")


def read_recording(path: Path, device: int | None = None) -> Recording:
    """Reads a trace (JSON) or a torch snapshot (pickle), gzipped or not, told apart by their first bytes.

    `device` picks one of several in a snapshot; None takes the one with the most events. Nothing in the file is
    executed. Raises GptfitError for anything else, and for a damaged file.
    """
    raw = _read(path)
    name = _printable(path.name)
    try:
        if _is_json(raw):
            return _from_trace(_parse_json(raw, name), name, device)
        from gptfit.memory.plainpickle import load_plain
        from gptfit.memory.snapshot import from_snapshot

        return from_snapshot(load_plain(raw, name), name, device)
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as problem:
        raise GptfitError(
            f"{name} is damaged, or no recording of the CUDA allocator ({type(problem).__name__})", HOW_TO_RECORD
        ) from None
    except MemoryError:
        raise GptfitError(
            f"{name} is too large for this machine's memory", "record fewer events: max_entries"
        ) from None


def _is_json(raw: bytes) -> bool:
    return raw[:64].lstrip()[:1] in (b"{", b"[")


def _printable(name: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in name)[:120]


def _read(path: Path) -> bytes:
    name = _printable(str(path))
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            raw = (gzip.GzipFile(fileobj=file) if packed else file).read(MAX_FILE_BYTES + 1)
    except (OSError, EOFError, ValueError, zlib.error) as problem:
        reason = getattr(problem, "strerror", None) or f"{problem}"[:120]
        raise GptfitError(f"cannot read {name}: {reason}", "give the path of a recording") from None
    limit = MAX_JSON_BYTES if _is_json(raw) else MAX_FILE_BYTES
    if len(raw) > limit:
        raise GptfitError(f"{name} is larger than {limit >> 20} MiB", "record fewer events: max_entries")
    if not raw[:64].strip():
        raise GptfitError(f"{name} is empty", HOW_TO_RECORD)
    return raw


def _parse_json(raw: bytes, name: str) -> dict[str, Any]:
    try:
        document = json.loads(raw)
    except RecursionError:
        raise GptfitError(f"{name} is nested too deeply", HOW_TO_RECORD) from None
    except ValueError as problem:
        raise GptfitError(f"{name} is not complete JSON: {f'{problem}'[:120]}", "copy or record it again") from None
    if not isinstance(document, dict):
        raise GptfitError(f"{name} holds a list: not a recording", HOW_TO_RECORD)
    return document


# ── cuda-caching-allocator-trace/1 ────────────────────────────────────────────

FIELDS = ("kind", "address", "bytes", "stream", "time_us_from_start", "tag_index")
PHASES = {"F": "", "B": "backward", "O": "optimizer"}


def _from_trace(document: dict[str, Any], name: str, device: int | None) -> Recording:
    """Raises GptfitError, and what a wrong structure raises."""
    _check_format(document, name)
    own = document.get("device", 0)
    if device is not None and device != own:
        raise GptfitError(f"there is no device {device} in {name}", f"it holds device {own!s:.20}")
    events = _trace_events(document, name)
    initial = document.get("initial") or {}
    spans = [
        Span(whole(address), whole(n_bytes), whole(stream), n_bytes == SMALL_SEGMENT, False)
        for address, n_bytes, stream, *_ in initial.get("segments") or ()
    ]
    spans += [
        Span(whole(address), whole(n_bytes), whole(stream), bool(small), True)
        for address, n_bytes, stream, small, *_ in initial.get("mapped_ranges") or ()
    ]
    blocks = [
        Live(whole(address), whole(requested), None if held is None else whole(held))
        for address, requested, held, *_ in initial.get("blocks") or ()
    ]
    options = options_from(document.get("settings") or {}, document.get("roundup_power2_divisions"))
    peak = (document.get("totals") or {}).get("peak_reserved")
    return Recording(
        events=events,
        spans=spans,
        blocks=blocks,
        options=options,
        tags=[_label(tag) for tag in document.get("tags") or ()],
        device=whole(own),
        n_recorded=len(events),
        peak_reserved_bytes=recorded_peak(spans, events) if peak is None else whole(peak),
    )


def _check_format(document: dict[str, Any], name: str) -> None:
    given = document.get("format")
    if given == TRACE_FORMAT:
        return
    if given == "profiler-memory-events/1" or "traceEvents" in document:
        raise GptfitError(
            f"{name} is a profile: block sizes and totals, without the state at its start, so it cannot be replayed",
            HOW_TO_RECORD,
        )
    said = f'in the format "{_printable(given)[:60]}"' if isinstance(given, str) else "JSON of no known format"
    raise GptfitError(f"{name} is {said}", f"gptfit reads {TRACE_FORMAT} and torch's memory snapshots")


def _trace_events(document: dict[str, Any], name: str) -> list[Event]:
    fields = list(document.get("event_fields") or FIELDS)
    missing = [field for field in FIELDS[:3] if field not in fields]
    if missing:
        raise GptfitError(f"the events of {name} have no {missing[0]}", "copy or record it again")
    rows: list[Any] = document["events"]
    if fields != list(FIELDS):
        order = itemgetter(*(fields.index(field) for field in FIELDS if field in fields))
        rows = [order(row) for row in rows]
        if "stream" not in fields:
            rows = [(*row[:3], 0, *row[3:]) for row in rows]
    events: list[Event] = []
    for number, row in enumerate(rows):
        try:
            kind, address, n_bytes, *rest = row
            if kind not in KINDS:
                raise GptfitError(
                    f"event {number} of {name} is of an unknown kind", f"the kinds are {', '.join(sorted(KINDS))}"
                )
            stream = rest[0] if rest else 0
            tag = rest[2] if len(rest) > 2 and type(rest[2]) is int else -1
            if kind == "N":
                address = n_bytes = stream = 0
            elif kind == "O":  # the device's free bytes may be unknown
                address = address if type(address) is int else -1
            numbers = type(address) is int and type(n_bytes) is int and type(stream) is int
            if numbers and -1 <= address < MAX_NUMBER > n_bytes >= 0 <= stream < MAX_NUMBER:
                events.append(Event(kind, address, n_bytes, stream, tag))
                continue
        except (TypeError, ValueError):
            pass
        raise GptfitError(f"event {number} of {name} is damaged", f"the fields are {', '.join(FIELDS)}")
    return events


def _label(tag: Any) -> str:
    """`B|mm|MmBackward0|||` as a person reads it: `backward mm MmBackward0`."""
    phase, *parts = f"{tag}"[:300].split("|")
    return " ".join(word for word in (PHASES.get(phase, phase), *parts) if word) or "no tag"
