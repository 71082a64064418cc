"""Recorded allocations through the allocator model: `gptfit replay`."""

from collections import Counter
from pathlib import Path

from gptfit.memory.allocator import CachingAllocator, OutOfMemory
from gptfit.memory.blocks import Block
from gptfit.memory.rebuild import rebuild
from gptfit.memory.recorded_file import read_recording
from gptfit.memory.recording import GROWN, RELEASED, Event, Recording
from gptfit.memory.replayed import BEFORE, Failure, Recorded, ReplayResult, alive_at, fragmentation_of, tag_name

SEGMENT_KINDS = GROWN | RELEASED


def replay_file(
    path: Path, capacity_bytes: int | None = None, expandable_segments: bool | None = None, device: int | None = None
) -> ReplayResult:
    """Replays a recording; see `replay`, and `read_recording` for `device` and what is raised."""
    return replay(read_recording(Path(path), device), capacity_bytes, expandable_segments)


def replay(
    recording: Recording, capacity_bytes: int | None = None, expandable_segments: bool | None = None
) -> ReplayResult:
    """Replays requests and frees. Segments and totals in the recording are compared with, never used.

    Without a capacity, releases (an empty_cache, or the retry after a failed cudaMalloc) happen where they are
    recorded. With one, none does: retries come out of the model, and the replay ends at the first request that
    fails and did not fail when it was recorded. `expandable_segments` None is as recorded; the other setting is
    taken to have held from the beginning.

    Raises GptfitError where the start of the recording contradicts itself.
    """
    whole = Player(recording, capacity_bytes, expandable_segments)
    whole.play(len(recording.events))
    again = Player(recording, capacity_bytes, expandable_segments)
    at_peak = at_growth = None
    for index in sorted((whole.peak_index, whole.growth_index)):
        again.play(index + 1)
        if index == whole.peak_index:
            at_peak = (
                alive_at(recording, index, again.live, again.deferred),
                fragmentation_of(again.allocator, index),
            )
        if index == whole.growth_index:
            at_growth = fragmentation_of(again.allocator, index)
    assert at_peak is not None and at_growth is not None
    peak = recording.peak_reserved_bytes
    total = sum(event.kind in SEGMENT_KINDS for event in recording.events)
    allocator = whole.allocator
    return ReplayResult(
        events=recording.n_recorded,
        device=recording.device,
        expandable_segments=allocator.expandable,
        capacity_bytes=capacity_bytes,
        peak_allocated_bytes=allocator.peak_allocated_bytes,
        peak_reserved_bytes=allocator.peak_reserved_bytes,
        final_allocated_bytes=allocator.allocated_bytes,
        final_reserved_bytes=allocator.reserved_bytes,
        retries=whole.retries(),
        out_of_memory=whole.failure,
        recorded=None if peak is None else Recorded(peak, whole.n_matched, total, whole.n_compared),
        alive_at_peak=at_peak[0],
        at_allocated_peak=at_peak[1],
        fragmentation=at_growth,
        notes=(*recording.notes, *whole.notes()),
    )


class Player:
    """The state of one replay. Recorded addresses are the names of blocks; the model has addresses of its own."""

    def __init__(self, recording: Recording, capacity_bytes: int | None, expandable: bool | None) -> None:
        self.recording = recording
        self.modelled = capacity_bytes is not None  # releases come out of the model, not out of the recording
        self.failure: Failure | None = None
        self.ended = False
        self.deferred: set[int] = set()  # addresses given back that wait for another stream
        self.allocator, self.live = self._start(capacity_bytes, expandable)
        # The first block of a segment lies at its start, so a request that needs one tells where the driver put it.
        self.hints = self.allocator.expandable == recording.options.expandable_segments
        self.position = 0
        self.growth_bytes = self.allocator.peak_reserved_bytes
        self.peak_index = self.growth_index = -1  # the events that brought allocated and reserved to their peaks
        self.release_end = -1  # the event behind a release
        self.reserved_before = 0  # that release
        self.retry_bytes: list[int] = []  # what would have been reserved but for each release that made room
        self.expected: Counter[tuple[str, int, int]] = Counter()
        self.n_compared = len(self.allocator.segment_events)
        self.n_matched = self.n_failed = 0
        self.n_lost = self.n_unknown = self.n_avoided = 0

    def _start(self, capacity_bytes: int | None, expandable: bool | None) -> tuple[CachingAllocator, dict[int, Block]]:
        try:
            allocator, live = rebuild(self.recording, capacity_bytes, expandable)
        except OutOfMemory as error:
            self.ended, self.failure = True, Failure.of(-1, error)
            return CachingAllocator(capacity_bytes, self.recording.options), {}
        self.deferred.update(address for address, block in live.items() if block in allocator.pending)
        if capacity_bytes is not None and allocator.reserved_bytes > capacity_bytes:
            allocator.empty_cache()
            allocator.segment_events.clear()
            allocator.peak_reserved_bytes = allocator.reserved_bytes
            if allocator.reserved_bytes > capacity_bytes:
                self.ended = True
                self.failure = Failure.of(
                    -1, OutOfMemory(0, 0, allocator.allocated_bytes, allocator.reserved_bytes, 0), BEFORE
                )
        return allocator, live

    def play(self, end: int) -> None:
        """Plays the events before index `end` that have not been played yet."""
        allocator, live, deferred = self.allocator, self.live, self.deferred
        malloc, free, events = allocator.malloc, allocator.free, self.recording.events
        hints = self.hints
        made, peak = allocator.segment_events, allocator.peak_allocated_bytes
        while self.position < end and not self.ended:
            index = self.position
            self.position = index + 1
            kind, address, n_bytes, stream, _ = event = events[index]
            if kind == "A":
                if address in live:
                    self._lose(address)
                if hints:
                    allocator.hint_address = address
                try:
                    live[address] = malloc(n_bytes, stream)
                except OutOfMemory as error:
                    self._stop(index, error)
                if allocator.allocated_bytes > peak:
                    peak, self.peak_index = allocator.allocated_bytes, index
                if self.expected or len(made) > self.n_compared:
                    self._compare(index)
            elif kind == "F" and address in live and address not in deferred:
                free(live.pop(address))
            elif kind in "FQC":
                self._give_back(event)
            elif kind == "O":
                self._fail(index, event)
            elif kind != "N":
                self._segment_event(index, event)

    def retries(self) -> int:
        """Releases after a failed cudaMalloc: counted by the model, or told from calls of empty_cache.

        Where the recording decides: cudaMalloc cannot have failed below what was reserved at another time.
        """
        if self.modelled:
            return self.allocator.num_alloc_retries
        return self.n_failed + sum(n > self.allocator.peak_reserved_bytes for n in self.retry_bytes)

    def notes(self) -> tuple[str, ...]:
        """What did not go as recorded, one line each."""
        lines = (
            (self.n_lost, "frees are missing from the recording: a second allocation lies at the same address"),
            (self.n_unknown, "frees are of blocks that the recording does not know"),
            (self.n_avoided, "requests that failed when this was recorded succeed with this capacity"),
        )
        return tuple(f"{count} {text}" for count, text in lines if count)

    def _stop(self, index: int, error: OutOfMemory) -> None:
        self.ended = True
        self._failed(Failure.of(index, error, tag_name(self.recording, self.recording.events[index].tag)))

    def _failed(self, failure: Failure) -> None:
        self.n_failed += 1
        self.failure = self.failure or failure

    def _lose(self, address: int) -> None:
        """Two allocations at one address: the free between them is missing."""
        self.n_lost += 1
        self._give_back(Event("F", address, 0))

    def _give_back(self, event: Event) -> None:
        """A free in one or two steps, of a block that may be pending, or unknown."""
        address, block = event.address, self.live.get(event.address)
        if block is None:
            self.n_unknown += event.kind != "C"
        elif event.kind == "Q" and address not in self.deferred:
            self.allocator.defer(block)
            self.deferred.add(address)
        elif event.kind != "Q":
            del self.live[address]
            if address in self.deferred:
                self.deferred.remove(address)
                self.allocator.complete(block)
            else:
                self.allocator.free(block)

    def _fail(self, index: int, event: Event) -> None:
        """A request that failed when it was recorded."""
        self.allocator.hint_address = None
        allocator, tried = self.allocator, self.allocator.segment_bytes(event.n_bytes)
        if not self.modelled:
            free = None if event.address < 0 else event.address
            figures = OutOfMemory(event.n_bytes, tried, allocator.allocated_bytes, allocator.reserved_bytes, free)
            self._failed(Failure.of(index, figures, recorded=True))
        else:
            try:
                peak_bytes = allocator.peak_allocated_bytes
                allocator.free(allocator.malloc(event.n_bytes, event.stream))
                allocator.peak_allocated_bytes = peak_bytes  # how long it would have lived is not known
                self.n_avoided += 1
            except OutOfMemory as error:
                self._failed(Failure.of(index, error, recorded=True))
        self._compare(index)

    def _segment_event(self, index: int, event: Event) -> None:
        self.expected[event.kind, event.n_bytes, event.stream] += 1
        if event.kind in RELEASED:
            if self.release_end != index and not self.modelled:
                self.reserved_before = self.allocator.reserved_bytes
                self.allocator.empty_cache()  # a run of releases is one call: it gives back all that is free
            self.release_end = index + 1
        elif self.release_end == index:
            self.release_end = index + 1

    def _compare(self, index: int) -> None:
        """Segment events recorded since the last request, with those that the model made for this one."""
        allocator = self.allocator
        fresh = allocator.segment_events[self.n_compared :]
        self.n_compared = len(allocator.segment_events)
        made = Counter((event.kind, event.n_bytes, event.stream) for event in fresh)
        self.n_matched += (made & self.expected).total()
        self.expected.clear()
        grown = [event.n_bytes for event in fresh if event.kind in GROWN]
        if grown:
            if self.release_end == index:
                self.retry_bytes.append(self.reserved_before + sum(grown))
            if allocator.reserved_bytes == allocator.peak_reserved_bytes > self.growth_bytes:
                self.growth_bytes, self.growth_index = allocator.reserved_bytes, index
