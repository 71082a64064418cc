"""Expandable segments: one virtual range per pool, mapped and unmapped in whole pages."""

from bisect import bisect_left, insort

from gptfit.memory.allocator import FREE, UNLIMITED_RANGE, UNMAPPED, Block, CachingAllocator, Pool


def extend(allocator: CachingAllocator, pool: Pool, need: int) -> Block | None:
    """A free block of at least `need` bytes, taken out of the pool, by mapping pages; None where memory ran out.

    Pages mapped before the failure stay mapped and free, as in torch.
    """
    block = _lowest_room(pool, need) or _new_range(allocator, pool, need)
    if block.state == UNMAPPED:
        mapped = _map(allocator, block, min(block.size, need))
        if mapped is None:
            return None
        block = mapped
    while block.size < need:
        behind = block.next
        assert behind is not None and behind.state == UNMAPPED, (
            "free neighbours are merged, so what follows is unmapped"
        )
        mapped = _map(allocator, behind, min(behind.size, need - block.size))
        if mapped is None:
            return None
        block = mapped
    pool.free.pop(bisect_left(pool.free, (block.size, block.address)))
    return block


def unmap(allocator: CachingAllocator, block: Block, start: int, end: int) -> None:
    """Gives the pages `start` to `end` of a free block back; its edges stay mapped and free."""
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
    allocator.note("U", start, end - start)
    for first, second in ((block, block.next), (block.prev, block)):
        if first is not None and second is not None and first.state == second.state == UNMAPPED:
            for one in (first, second):
                _forget(pool, one)
            _join(first, second)
            block = first
    if block.prev is None and block.next is None:
        del allocator.heads[block.address]
    else:
        insort(pool.unmapped, (block.address, block))


def whole_pages(block: Block) -> tuple[int, int]:
    """Start and end of the pages that lie wholly inside a block of a range; start >= end where there is none."""
    head = block
    while head.prev is not None:
        head = head.prev
    base, page = head.address, block.pool.page
    start = base - (base - block.address) // page * page
    return start, base + (block.address + block.size - base) // page * page


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


def _new_range(allocator: CachingAllocator, pool: Pool, need: int) -> Block:
    """A virtual range: 9/8 of the device's memory, in whole pages."""
    pages = -(-max(UNLIMITED_RANGE, need) // pool.page)
    if allocator.capacity_bytes is not None:
        pages = -(-max(allocator.capacity_bytes * 9 // 8, need) // pool.page)
    block = Block(pool, allocator.place(pages * pool.page), pages * pool.page, UNMAPPED, expandable=True)
    allocator.heads[block.address] = block
    insort(pool.unmapped, (block.address, block))
    return block


def _map(allocator: CachingAllocator, block: Block, need: int) -> Block | None:
    """Maps the first pages of an unmapped block; the free block that results, merged and in the pool."""
    pool = block.pool
    size = min(-(-need // pool.page) * pool.page, block.size)  # mapped parts end at pages, so this one starts at one
    if not allocator.reserve(size):
        return None
    _forget(pool, block)
    if size < block.size:
        rest = _cut(block, block.address + size)
        insort(pool.unmapped, (rest.address, rest))
    allocator.note("M", block.address, size)
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
    """Takes an unmapped block off its list, if it is there."""
    index = bisect_left(pool.unmapped, (block.address,))
    if index < len(pool.unmapped) and pool.unmapped[index][1] is block:
        del pool.unmapped[index]
