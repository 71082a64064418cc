"""What a GPU did, as recorded, whatever the file was (recorded_file.py)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from gptfit.memory.allocator_options import N_INTERVALS, AllocatorOptions, parse_options

MAX_NUMBER = 1 << 63  # above every size, address and stream
HOW_TO_RECORD = "record one with torch.cuda.memory._record_memory_history() and _dump_snapshot(FILE)"

GROWN, RELEASED = frozenset("SM"), frozenset("RU")


class Event(NamedTuple):
    """One line of a recording.

    `kind`: A allocated, F given back, Q given back while another stream uses it, C that use is over, S and R segment
    obtained and released, M and U pages mapped and unmapped, O out of memory (`n_bytes` is the rounded request,
    `address` what the device had free), N snapshot taken. For A, F, Q and C `n_bytes` is what was asked for.
    """

    kind: str
    address: int
    n_bytes: int
    stream: int = 0
    tag: int = -1


class Span(NamedTuple):
    """A segment, or a mapped part of a virtual range, held before the first event."""

    address: int
    n_bytes: int
    stream: int
    small: bool
    expandable: bool


class Live(NamedTuple):
    """A block that was handed out before the first event. `block_bytes` is None where only the request is known."""

    address: int
    requested_bytes: int
    block_bytes: int | None


@dataclass(frozen=True, slots=True)
class Recording:
    """Events of one device, what was there before them, and what the recording itself says of the outcome.

    `n_recorded` counts the events as the file has them: there, a free may be two. `peak_reserved_bytes` is None
    where the recording does not tell. `notes` are things that a reader of the replay should know.
    """

    events: Sequence[Event]
    spans: Sequence[Span]
    blocks: Sequence[Live]
    options: AllocatorOptions
    tags: Sequence[str]
    device: int
    n_recorded: int
    peak_reserved_bytes: int | None
    notes: tuple[str, ...] = ()


def whole(value: Any, least: int = 0) -> int:
    """An int from `least` to 2^63 as it is. Raises TypeError or ValueError; bool and float are refused."""
    if type(value) is not int:
        raise TypeError("not a whole number")
    if not least <= value < MAX_NUMBER:
        raise ValueError("out of range")
    return value


def options_from(settings: dict[str, Any], divisions: Any) -> AllocatorOptions:
    """Options as a recording states them: a PYTORCH_CUDA_ALLOC_CONF line, or single values. Defaults for the rest."""
    conf = settings.get("PYTORCH_CUDA_ALLOC_CONF") or settings.get("PYTORCH_ALLOC_CONF") or ""
    options = parse_options(conf) if isinstance(conf, str) else AllocatorOptions()
    stated: dict[str, Any] = {}
    if "expandable_segments" in settings:
        stated["expandable_segments"] = settings["expandable_segments"] is True
    if type(split := settings.get("max_split_size")) is int:
        stated["max_split_bytes"] = split if split > 0 else None
    if isinstance(threshold := settings.get("garbage_collection_threshold"), float) and 0 <= threshold < 1:
        stated["garbage_collection_threshold"] = threshold
    if isinstance(divisions, dict) and len(divisions) == N_INTERVALS:
        intervals = sorted((int(key), whole(number)) for key, number in divisions.items())
        stated["roundup_power2_divisions"] = tuple(n for _, n in intervals) if any(n for _, n in intervals) else ()
    return replace(options, **stated)


def recorded_peak(spans: Iterable[Span], events: Iterable[Event]) -> int | None:
    """The most that was reserved, counted from the segment events; None where nothing says."""
    reserved = peak = sum(span.n_bytes for span in spans)
    seen = False
    for event in events:
        if event.kind in GROWN:
            seen, reserved = True, reserved + event.n_bytes
            peak = max(peak, reserved)
        elif event.kind in RELEASED:
            seen, reserved = True, reserved - event.n_bytes
    return peak if seen else None
