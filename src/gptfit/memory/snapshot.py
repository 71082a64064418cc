"""torch.cuda.memory._dump_snapshot: a recording with its last state, undone event for event to the first."""

from collections.abc import Iterable, Iterator
from typing import Any

from gptfit.errors import GptfitError
from gptfit.memory.allocator import SMALL_SEGMENT
from gptfit.memory.allocator_options import LARGE_SEGMENT
from gptfit.memory.recording import HOW_TO_RECORD, Event, Live, Recording, Span, options_from, recorded_peak, whole

ACTIONS = {
    "alloc": "A",
    "free_requested": "Q",
    "free_completed": "C",
    "segment_alloc": "S",
    "segment_free": "R",
    "segment_map": "M",
    "segment_unmap": "U",
    "oom": "O",
    "snapshot": "N",
}
UNLABELLED = "without a stack"


def from_snapshot(document: Any, name: str, device: int | None) -> Recording:
    """The recording of one device. Raises GptfitError, and what a wrong structure raises."""
    if isinstance(document, list) or "device_traces" not in document:
        raise GptfitError(f"{name} holds no history of allocations, only a state", HOW_TO_RECORD)
    traces: list[list[dict[str, Any]]] = document["device_traces"]
    trace = traces[device := _device(traces, name, device)]
    tags: dict[str, int] = {}
    events = list(_folded(_events(trace, tags, name)))
    segments = [segment for segment in document.get("segments") or () if segment.get("device", device) == device]
    settings = document.get("allocator_settings") or {}
    options = options_from(settings, settings.get("roundup_power2_divisions"))
    spans, blocks = _rewound(segments, events)
    private = sum(tuple(segment.get("segment_pool_id") or (0, 0)) != (0, 0) for segment in segments)
    notes = (f"{private} segments of private pools (CUDA graphs) are replayed as if in the default ones",)
    peak = recorded_peak(spans, events)
    return Recording(
        events=events,
        spans=spans,
        blocks=blocks,
        options=options,
        tags=list(tags),
        device=device,
        n_recorded=len(trace),
        peak_reserved_bytes=sum(span.n_bytes for span in spans) if peak is None else peak,
        notes=notes if private else (),
    )


def _device(traces: list[list[Any]], name: str, device: int | None) -> int:
    lengths = [len(trace) for trace in traces]
    busy = [number for number, length in enumerate(lengths) if length]
    if not busy:
        raise GptfitError(f"{name} holds no history of allocations, only a state", HOW_TO_RECORD)
    if device is not None and device not in busy:
        raise GptfitError(
            f"there is no history of device {device} in {name}", f"it has {', '.join(map(str, busy[:16]))}"
        )
    return max(busy, key=lengths.__getitem__) if device is None else device


def _events(trace: list[dict[str, Any]], tags: dict[str, int], name: str) -> Iterator[Event]:
    """The entries as events, a label on each allocation."""
    labels: dict[int, str] = {}
    for number, entry in enumerate(trace):
        kind = ACTIONS.get(entry["action"])
        if kind is None:
            raise GptfitError(
                f"event {number} of {name} is of an unknown kind", f"gptfit knows {', '.join(sorted(ACTIONS))}"
            )
        if kind == "N":
            yield Event("N", 0, 0)
            continue
        address = entry.get("device_free", -1) if kind == "O" else whole(entry["addr"])
        tag = tags.setdefault(_label(entry.get("frames") or (), labels), len(tags)) if kind == "A" else -1
        yield Event(kind, whole(address, -1), whole(entry["size"]), whole(entry.get("stream", 0)), tag)


def _folded(events: Iterable[Event]) -> Iterator[Event]:
    """The same with a free that was completed at once made one event, F."""
    waiting: Event | None = None
    for event in events:
        if waiting is not None:
            if event.kind == "C" and event.address == waiting.address:
                yield event._replace(kind="F")
                waiting = None
                continue
            yield waiting
        waiting = event if event.kind == "Q" else None
        if waiting is None:
            yield event
    if waiting is not None:
        yield waiting


def _label(frames: Iterable[dict[str, Any]], labels: dict[int, str]) -> str:
    """The innermost Python function outside torch that asked for the memory: `train.py:31 step`.

    `labels` holds those of frames seen before, by identity: a snapshot has each frame once.
    """
    inside = ""
    for frame in frames:
        label = labels.get(id(frame))
        if label is None:
            label = labels[id(frame)] = _frame_label(frame)
        if label and not label.startswith("torch "):
            return label
        inside = inside or label
    return inside or UNLABELLED


def _frame_label(frame: dict[str, Any]) -> str:
    """Empty for a frame of C++ code; a buffer's name for one that a prediction wrote, under its category."""
    filename = f"{frame.get('filename', '')}".replace("\\", "/")
    if filename.isascii() and filename.replace(" ", "").isalpha():
        return f"{filename}: {frame.get('name', '')!s:.80}"
    if not filename.endswith(".py"):
        return ""
    text = f"{filename.rpartition('/')[2]}:{whole(frame.get('line', 0), -1)} {frame.get('name', '')!s:.80}"
    return f"torch {text}" if "/torch/" in filename else text


def _rewound(segments: list[dict[str, Any]], events: list[Event]) -> tuple[list[Span], list[Live]]:
    """The state before the first event: the last state, with the events undone from the last to the first."""
    spans: dict[int, Span] = {}
    ranges: list[Span] = []
    live: dict[int, Live] = {}
    for segment in segments:
        span = Span(
            whole(segment["address"]),
            whole(segment["total_size"]),
            whole(segment["stream"]),
            segment.get("segment_type") == "small",
            segment.get("is_expandable") is True,
        )
        if span.expandable:
            ranges.append(span)
        else:
            spans[span.address] = span
        live.update((block.address, block) for block in _in_use(segment))
    for kind, address, n_bytes, stream, _ in reversed(events):
        if kind == "A":
            live.pop(address, None)
        elif kind in "FCQ":
            live[address] = Live(address, n_bytes, None)
        elif kind == "S":
            spans.pop(address, None)
        elif kind == "R":
            spans[address] = Span(address, n_bytes, stream, n_bytes == SMALL_SEGMENT, False)
        elif kind == "M":
            ranges = _without(ranges, address, address + n_bytes)
        elif kind == "U":
            ranges.append(Span(address, n_bytes, stream, _is_small(ranges, address, n_bytes), True))
    return sorted([*spans.values(), *ranges]), sorted(live.values(), key=lambda block: block.address)


def _in_use(segment: dict[str, Any]) -> Iterator[Live]:
    address = segment["address"]
    for block in segment["blocks"]:
        address = whole(block.get("address", address))  # versions before 2.1 leave it out
        size = whole(block["size"])
        if block["state"] != "inactive":
            yield Live(address, whole(block.get("requested_size", size)), size)
        address += size


def _without(ranges: list[Span], start: int, end: int) -> list[Span]:
    """Ranges with the pages of a map event taken out."""
    kept: list[Span] = []
    for span in ranges:
        span_end = span.address + span.n_bytes
        if end <= span.address or start >= span_end:
            kept.append(span)
            continue
        for low, high in ((span.address, start), (end, span_end)):
            if low < high:
                kept.append(span._replace(address=low, n_bytes=high - low))
    return kept


def _is_small(ranges: list[Span], address: int, n_bytes: int) -> bool:
    """Which pool unmapped pages were of: that of the mapped parts beside them, else by their size."""
    for span in ranges:
        if span.address + span.n_bytes == address or span.address == address + n_bytes:
            return span.small
    return n_bytes % LARGE_SEGMENT != 0
