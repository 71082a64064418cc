"""What a replay found: peaks, what was alive then, where the rest of the reserved memory was, and why it failed."""

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gptfit.memory.allocator import CachingAllocator, OutOfMemory
from gptfit.memory.blocks import Block
from gptfit.memory.recording import Recording
from gptfit.memory.release import is_whole_segment
from gptfit.units import format_bytes

BEFORE = "before the recording"


@dataclass(frozen=True, slots=True)
class Alive:
    """Blocks of one origin in use at the peak: what was asked for, and the blocks handed out for it."""

    tag: str
    count: int
    requested_bytes: int
    block_bytes: int
    largest_bytes: int


@dataclass(frozen=True, slots=True)
class Fragmentation:
    """Where reserved memory was after one event (-1: at the start).

    `allocated_bytes`, `pending_bytes` (waiting for another stream), `free_small_bytes` and `free_large_bytes` add up
    to `reserved_bytes`. Of the free ones `inactive_split_bytes` are pieces beside blocks in use, which no
    empty_cache gives back; expandable segments have none.
    """

    event: int
    reserved_bytes: int
    allocated_bytes: int
    requested_bytes: int
    pending_bytes: int
    free_small_bytes: int
    free_large_bytes: int
    inactive_split_bytes: int
    largest_free_bytes: int

    def to_json(self) -> dict[str, int]:
        """As a dictionary, with `slack_bytes` (allocated, not requested) and `reserved_unallocated_bytes`."""
        return asdict(self) | {
            "slack_bytes": self.allocated_bytes - self.requested_bytes,
            "reserved_unallocated_bytes": self.reserved_bytes - self.allocated_bytes,
        }


@dataclass(frozen=True, slots=True)
class Failure:
    """The first request that failed, with the figures of torch's message. None: the recording does not say.

    `request_bytes` is the rounded request and `tried_bytes` the segment asked for on its behalf; `recorded` says
    that the same request failed when the recording was made, `event` which it is (-1: the state at the start).
    """

    event: int
    tag: str
    request_bytes: int
    tried_bytes: int
    allocated_bytes: int
    reserved_bytes: int
    free_bytes: int | None
    recorded: bool

    @classmethod
    def of(cls, event: int, error: OutOfMemory, tag: str = "", recorded: bool = False) -> "Failure":
        return cls(
            event=event,
            tag=tag,
            request_bytes=error.need_bytes,
            tried_bytes=error.tried_bytes,
            allocated_bytes=error.allocated_bytes,
            reserved_bytes=error.reserved_bytes,
            free_bytes=error.free_bytes,
            recorded=recorded,
        )

    @property
    def reserved_unallocated_bytes(self) -> int:
        return self.reserved_bytes - self.allocated_bytes

    def __str__(self) -> str:
        """Why it failed, in one sentence."""
        if self.event < 0:
            return f"what was in use when the recording began needs {format_bytes(self.reserved_bytes)} already"
        tried = f"{format_bytes(self.tried_bytes)} could not be had for a request of {format_bytes(self.request_bytes)}"
        in_pieces = self.reserved_unallocated_bytes
        if self.free_bytes is None:
            return f"{tried}; {format_bytes(in_pieces)} of the reserved memory was free, in pieces"
        missing = self.request_bytes - self.free_bytes - in_pieces
        if missing > 0:
            return f"{tried}; {format_bytes(missing)} more would be needed even if no memory lay in pieces"
        return (
            f"{tried}: {format_bytes(in_pieces)} of the reserved memory and {format_bytes(self.free_bytes)} of the "
            "device were free, but not in one piece (fragmentation)"
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {
            "reserved_unallocated_bytes": self.reserved_unallocated_bytes,
            "explanation": str(self),
        }


@dataclass(frozen=True, slots=True)
class Recorded:
    """What the recording says itself, beside what the model made.

    Matched: a segment event of the model's at the same request, of the same kind, bytes and stream.
    """

    peak_reserved_bytes: int
    segment_events_matched: int
    segment_events_total: int
    segment_events_modelled: int


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """Peaks of a replay. `retries` and `out_of_memory` are the model's with a capacity, else as recorded.

    `retries` counts as torch's num_alloc_retries does: the one before an out of memory is in it. `events` counts
    those in the file. `alive_at_peak` sums to the allocated peak, largest first.
    """

    events: int
    device: int
    expandable_segments: bool
    capacity_bytes: int | None
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    final_allocated_bytes: int
    final_reserved_bytes: int
    retries: int
    out_of_memory: Failure | None
    recorded: Recorded | None
    alive_at_peak: tuple[Alive, ...]
    at_allocated_peak: Fragmentation
    fragmentation: Fragmentation  # at the first instant of the reserved peak
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The object that `gptfit replay --json` prints."""
        return {
            "schema": "gptfit.replay/1",
            "events": self.events,
            "peak_allocated_bytes": self.peak_allocated_bytes,
            "peak_reserved_bytes": self.peak_reserved_bytes,
            "final_reserved_bytes": self.final_reserved_bytes,
            "retries": self.retries,
            "out_of_memory": self.out_of_memory.to_json() if self.out_of_memory else None,
            "recorded": asdict(self.recorded) if self.recorded else None,
            "device": self.device,
            "expandable_segments": self.expandable_segments,
            "capacity_bytes": self.capacity_bytes,
            "final_allocated_bytes": self.final_allocated_bytes,
            "alive_at_peak": [asdict(one) for one in self.alive_at_peak],
            "at_allocated_peak": self.at_allocated_peak.to_json(),
            "fragmentation": self.fragmentation.to_json(),
            "notes": list(self.notes),
        }


def alive_at(
    recording: Recording, index: int, blocks: Mapping[int, Block], deferred: Collection[int]
) -> tuple[Alive, ...]:
    """Blocks in use after event `index`, summed by the tag of their allocation.

    `blocks` are by recorded address; those at the `deferred` ones have been given back already.
    """
    tags = {event.address: event.tag for event in recording.events[: index + 1] if event.kind == "A"}
    by_tag: defaultdict[str, list[Block]] = defaultdict(list)
    for address, block in blocks.items():
        if address not in deferred:
            by_tag[BEFORE if address not in tags else tag_name(recording, tags[address])].append(block)
    rows = [
        Alive(
            tag,
            len(group),
            sum(block.requested for block in group),
            sum(block.size for block in group),
            max(block.size for block in group),
        )
        for tag, group in by_tag.items()
    ]
    return tuple(sorted(rows, key=lambda row: (-row.block_bytes, row.tag)))


def tag_name(recording: Recording, tag: int) -> str:
    return recording.tags[tag] if 0 <= tag < len(recording.tags) else "no tag"


def fragmentation_of(allocator: CachingAllocator, index: int) -> Fragmentation:
    """Sums over the free blocks, as they are now, after event `index`."""
    free = [0, 0]  # in large pools, in small ones
    split = largest = 0
    for pool in allocator.pools.values():
        for size, _, block in pool.free:
            free[pool.small] += size
            largest = max(largest, size)
            if not (block.expandable or is_whole_segment(block)):
                split += size
    return Fragmentation(
        event=index,
        reserved_bytes=allocator.reserved_bytes,
        allocated_bytes=allocator.allocated_bytes,
        requested_bytes=allocator.requested_bytes,
        pending_bytes=sum(block.size for block in allocator.pending),
        free_small_bytes=free[True],
        free_large_bytes=free[False],
        inactive_split_bytes=split,
        largest_free_bytes=largest,
    )
