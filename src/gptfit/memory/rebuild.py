"""An allocator in the state that it had when a recording began."""

from bisect import bisect_right, insort
from collections.abc import Iterator, Sequence
from dataclasses import replace

from gptfit.errors import GptfitError
from gptfit.memory.allocator import CachingAllocator
from gptfit.memory.allocator_options import MiB
from gptfit.memory.blocks import ALLOCATED, FREE, PENDING, UNMAPPED, Block, Pool
from gptfit.memory.expandable import UNKNOWN_RANGE_BYTES
from gptfit.memory.recording import Event, Live, Recording, Span


def rebuild(
    recording: Recording, capacity_bytes: int | None = None, expandable: bool | None = None
) -> tuple[CachingAllocator, dict[int, Block]]:
    """The allocator before the first event, and its blocks in use by their recorded address.

    With `expandable` other than recorded, what was in use is allocated afresh: the setting is taken to have held
    from the beginning. Raises GptfitError where recorded blocks overlap or lie outside every segment, and
    OutOfMemory where allocating afresh exceeds the capacity.
    """
    options = recording.options
    if expandable is not None and expandable != options.expandable_segments:
        return _afresh(recording, CachingAllocator(capacity_bytes, replace(options, expandable_segments=expandable)))
    allocator = CachingAllocator(capacity_bytes, options)
    live = sorted(recording.blocks, key=lambda one: one.address)
    slack = _slack_seen(recording, live, allocator)
    used: dict[int, Block] = {}
    tails: dict[Pool, Block] = {}  # of the virtual range of each pool
    position = 0
    end = 0
    for span in sorted(recording.spans):
        if span.address < end or span.n_bytes == 0:
            raise GptfitError(f"the recorded segment at {span.address:#x} overlaps another", "record it again")
        end = span.address + span.n_bytes
        first = position
        while position < len(live) and live[position].address < end:
            position += 1
        pool = allocator.pool(span.stream, span.small)
        blocks = list(_blocks(pool, span, live[first:position], slack, allocator))
        used.update((block.address, block) for block in blocks if block.state == ALLOCATED)
        allocator.reserved_bytes += span.n_bytes
        if span.expandable:
            _append(allocator, tails, pool, blocks)
        else:
            _link(allocator, blocks, None)
    if len(used) != len(live):
        raise GptfitError("a block of the recording's start lies outside its segments", "record it again")
    _finish(allocator, tails, used, recording)
    return allocator, used


def _finish(
    allocator: CachingAllocator, tails: dict[Pool, Block], used: dict[int, Block], recording: Recording
) -> None:
    starts = sorted(allocator.heads)
    for pool, tail in tails.items():  # where a range ends is not recorded: it is taken to go on to what lies above
        end = tail.address + tail.size
        above = bisect_right(starts, tail.address)
        room_bytes = min(UNKNOWN_RANGE_BYTES, starts[above] - end if above < len(starts) else UNKNOWN_RANGE_BYTES)
        if room_bytes >= pool.page:
            _link(allocator, [Block(pool, end, room_bytes // pool.page * pool.page, UNMAPPED, True)], tail)
    allocator.plain = allocator.plain and not tails
    for address in starts:
        block = allocator.heads[address]
        while block.next is not None:
            block = block.next
        allocator.extents.append((address, block.address + block.size))
    for address in _given_back_before(recording.events):
        if address in used:
            used[address].state = PENDING
            allocator.pending[used[address]] = None
    counted = [block for block in used.values() if block.state == ALLOCATED]
    allocator.allocated_bytes = allocator.peak_allocated_bytes = sum(block.size for block in counted)
    allocator.requested_bytes = sum(block.requested for block in counted)
    allocator.peak_reserved_bytes = allocator.reserved_bytes


def _afresh(recording: Recording, allocator: CachingAllocator) -> tuple[CachingAllocator, dict[int, Block]]:
    spans = sorted(recording.spans)
    starts = [span.address for span in spans]
    used: dict[int, Block] = {}
    for one in sorted(recording.blocks, key=lambda one: one.address):
        index = bisect_right(starts, one.address) - 1
        used[one.address] = allocator.malloc(one.requested_bytes, spans[index].stream if index >= 0 else 0)
    allocator.segment_events.clear()
    for address in _given_back_before(recording.events):
        if address in used:
            allocator.defer(used[address])
    allocator.peak_allocated_bytes = allocator.allocated_bytes
    return allocator, used


def _given_back_before(events: Sequence[Event]) -> list[int]:
    """Addresses whose use ends in a recording that has not seen them given back."""
    found: list[int] = []
    seen: set[int] = set()
    if any(event.kind == "C" for event in events):
        for event in events:
            if event.kind == "C" and event.address not in seen:
                found.append(event.address)
            seen.add(event.address)
    return found


def _slack_seen(recording: Recording, live: list[Live], allocator: CachingAllocator) -> dict[int, int]:
    """Unused bytes at the end of blocks of unknown size, by address, where the recording shows them.

    The first allocation behind a block, made while that block is in use, lies where the block ends.
    """
    ends = {one.address: one.address + allocator.options.rounded(one.requested_bytes) for one in live if not one[2]}
    starts = sorted(ends)
    slack: dict[int, int] = {}
    if not starts:
        return slack
    for kind, address, _, _, _ in recording.events:
        if kind == "A":
            index = bisect_right(starts, address) - 1
            before = starts[index] if index >= 0 else -1
            if before in ends and ends[before] <= address <= ends[before] + MiB:
                slack[before] = address - ends.pop(before)
            else:
                ends.pop(before, None)
        elif kind in "FQC":
            ends.pop(address, None)
    return slack


def _blocks(
    pool: Pool, span: Span, live: list[Live], slack: dict[int, int], allocator: CachingAllocator
) -> Iterator[Block]:
    """The blocks that cover a span: those in use, and free ones between them."""
    at, end = span.address, span.address + span.n_bytes
    splits_fine = span.small or span.expandable
    for number, one in enumerate(live):
        limit = live[number + 1].address if number + 1 < len(live) else end
        size = one.block_bytes or allocator.options.rounded(one.requested_bytes)
        if one.block_bytes is None and not splits_fine:
            # A large pool has no free piece of 1 MiB or less: such a gap is the block's own.
            gap_bytes = limit - one.address - size
            size += gap_bytes if 0 < gap_bytes <= MiB else min(slack.get(one.address, 0), max(gap_bytes, 0))
        if one.address < at or one.address + size > limit:
            raise GptfitError(f"the recorded block at {one.address:#x} overlaps what follows it", "record it again")
        if one.address > at:
            yield Block(pool, at, one.address - at, FREE, span.expandable)
        block = Block(pool, one.address, size, ALLOCATED, span.expandable)
        block.requested = min(one.requested_bytes, size)
        yield block
        at = one.address + size
    if at < end:
        yield Block(pool, at, end - at, FREE, span.expandable)


def _link(allocator: CachingAllocator, blocks: list[Block], before: Block | None) -> None:
    """Chains blocks behind `before`, or as a segment of their own; free ones are listed in their pool."""
    if before is None:
        allocator.heads[blocks[0].address] = blocks[0]
    for block in blocks:
        block.prev = before
        if before is not None:
            before.next = block
        if block.state == FREE:
            insort(block.pool.free, (block.size, block.address, block))
        elif block.state == UNMAPPED:
            insort(block.pool.unmapped, (block.address, block))
        before = block


def _append(allocator: CachingAllocator, tails: dict[Pool, Block], pool: Pool, blocks: list[Block]) -> None:
    """Puts a mapped part behind the others of its pool's range, with the unmapped room between."""
    tail, last = tails.get(pool), blocks[-1]
    if tail is not None:
        gap_bytes = blocks[0].address - tail.address - tail.size
        if gap_bytes > 0:
            blocks.insert(0, Block(pool, tail.address + tail.size, gap_bytes, UNMAPPED, True))
        elif tail.state == blocks[0].state == FREE:  # two mapped parts that touch: one free block across the border
            pool.free.remove((tail.size, tail.address, tail))
            merged = blocks.pop(0)
            tail.size += merged.size
            insort(pool.free, (tail.size, tail.address, tail))
            last = blocks[-1] if blocks else tail
    _link(allocator, blocks, tail)
    tails[pool] = last
