"""Expandable segments: virtual ranges, one per pool as a rule, mapped and unmapped in whole pages."""

from bisect import bisect_left, insort
from typing import TYPE_CHECKING

from gptfit.memory.blocks import FREE, UNMAPPED, Block, Pool

if TYPE_CHECKING:
    from gptfit.memory.allocator import CachingAllocator

# A range is 9/8 of the device's memory; where that is not known, as good as endless.
UNKNOWN_RANGE_BYTES = 1 << 42


def extend(allocator: "CachingAllocator", pool: Pool, need: int) -> Block | None:
    """A free block of at least `need` bytes, taken out of the pool, by mapping pages; None where memory ran out.

    Pages mapped before the failure stay mapped and free, as in torch.
    """
    block: Block | None = _lowest_room(pool, need) or _new_range(allocator, pool, need)
    if block.state == UNMAPPED:
        block = _map(allocator, block, min(block.size, need))
    while block is not None and block.size < need:
        behind = block.next
        assert behind is not None and behind.state == UNMAPPED, "free neighbours are merged: this one is unmapped"
        block = _map(allocator, behind, min(behind.size, need - block.size))
    if block is not None:
        pool.free.pop(bisect_left(pool.free, (block.size, block.address)))
    return block


def unmap_free(allocator: "CachingAllocator", head: Block) -> None:
    """Gives back the whole pages inside every free block of the range that begins with `head`."""
    base, page = head.address, head.pool.page
    blocks: list[Block] = []
    block: Block | None = head
    while block is not None:
        if block.state == FREE:
            blocks.append(block)
        block = block.next
    for block in blocks:
        start = base - (base - block.address) // page * page
        end = base + (block.address + block.size - base) // page * page
        if start < end:
            unmap(allocator, block, start, end)


def unmap(allocator: "CachingAllocator", block: Block, start: int, end: int) -> None:
    """Gives the pages from address `start` to `end` of a free block back; its edges stay mapped and free.

    A range of which nothing is left is dropped.
    """
    pool = block.pool
    pool.free.pop(bisect_left(pool.free, (block.size, block.address)))
    if start > block.address:
        block, before = _cut(block, start), block
        insort(pool.free, (before.size, before.address, before))
    if end < block.address + block.size:
        after = _cut(block, end)
        insort(pool.free, (after.size, after.address, after))
    block.state = UNMAPPED
    allocator.reserved_bytes -= end - start
    allocator.note("U", start, end - start, pool.stream)
    behind, before = block.next, block.prev
    if behind is not None and behind.state == UNMAPPED:
        _forget(pool, behind)
        _join(block, behind)
    if before is not None and before.state == UNMAPPED:
        _forget(pool, before)
        _join(before, block)
        block = before
    if block.prev is None and block.next is None:
        allocator.drop(block)
    else:
        insort(pool.unmapped, (block.address, block))


def _lowest_room(pool: Pool, need: int) -> Block | None:
    """The first run of free and unmapped blocks that is long enough, by address of its unmapped part."""
    for _, block in pool.unmapped:
        start = block.prev if block.prev is not None and block.prev.state == FREE else block
        n_bytes, end = 0, start
        while n_bytes < need and end is not None and end.state in (FREE, UNMAPPED):
            n_bytes += end.size
            end = end.next
        if n_bytes >= need:
            return start
    return None


def _new_range(allocator: "CachingAllocator", pool: Pool, need: int) -> Block:
    """Address room for more than the device's memory, in whole pages, none of them mapped."""
    capacity = allocator.capacity_bytes
    room_bytes = UNKNOWN_RANGE_BYTES if capacity is None else capacity * 9 // 8
    size = -(-max(room_bytes, need) // pool.page) * pool.page
    block = Block(pool, allocator.place(size), size, UNMAPPED, expandable=True)
    allocator.heads[block.address] = block
    insort(pool.unmapped, (block.address, block))
    return block


def _map(allocator: "CachingAllocator", block: Block, need: int) -> Block | None:
    """Maps the first pages of an unmapped block; the free block that results, merged and in the pool."""
    pool = block.pool
    size = min(-(-need // pool.page) * pool.page, block.size)  # mapped parts end at pages, so this one starts at one
    if not allocator.reserve(size):
        return None
    _forget(pool, block)
    if size < block.size:
        rest = _cut(block, block.address + size)
        insort(pool.unmapped, (rest.address, rest))
    allocator.note("M", block.address, size, pool.stream)
    return allocator.put(block)


def _cut(block: Block, address: int) -> Block:
    """Ends `block` at `address`; the new block behind it, of the same state, not yet listed."""
    rest = Block(block.pool, address, block.address + block.size - address, block.state, block.expandable)
    rest.prev, rest.next, rest.stamp = block, block.next, block.stamp
    if block.next is not None:
        block.next.prev = rest
    block.next = rest
    block.size -= rest.size
    return rest


def _join(first: Block, second: Block) -> None:
    first.size += second.size
    first.next = second.next
    if second.next is not None:
        second.next.prev = first


def _forget(pool: Pool, block: Block) -> None:
    """Takes an unmapped block off its list."""
    del pool.unmapped[bisect_left(pool.unmapped, (block.address,))]
