"""Memory given back to the driver: empty_cache, the retry after a failed cudaMalloc, and two gentler ways."""

from bisect import bisect_left

from gptfit.memory.allocator import Block, CachingAllocator, Pool
from gptfit.memory.expandable import unmap, whole_pages


def release_free(allocator: CachingAllocator) -> None:
    """torch.cuda.empty_cache(): waits for deferred frees, then gives back every segment and page that is wholly free.

    Large pools first, expandable pages last, as torch does.
    """
    for block in tuple(allocator.pending):
        allocator.complete(block)
    pools = sorted(allocator.pools.values(), key=lambda pool: pool.small)
    for pool in pools:
        for _, _, block in tuple(pool.free):
            if is_whole_segment(block):
                release_segment(allocator, block)
    for pool in pools:
        for _, _, block in tuple(pool.free):
            if block.expandable:
                start, end = whole_pages(block)
                if start < end:
                    unmap(allocator, block, start, end)


def is_whole_segment(block: Block) -> bool:
    """Whether a free block is all of a segment that can be given back at once."""
    return block.prev is None and block.next is None and not block.expandable


def release_segment(allocator: CachingAllocator, block: Block) -> None:
    """cudaFree of a segment that is one free block."""
    free = block.pool.free
    free.pop(bisect_left(free, (block.size, block.address)))
    del allocator.heads[block.address]
    allocator.reserved_bytes -= block.size
    allocator.note("R", block.address, block.size)


def release_oversize(allocator: CachingAllocator, pool: Pool, need: int) -> bool:
    """With max_split_size: gives free oversize segments of `pool` back until one request has room. Whether it has."""
    wanted = max(need, allocator.max_split)
    index = bisect_left(pool.free, (wanted,))
    while index < len(pool.free) and not is_whole_segment(pool.free[index][2]):
        index += 1
    if index < len(pool.free):
        release_segment(allocator, pool.free[index][2])
        return True
    released_bytes = 0
    for size, _, block in reversed(tuple(pool.free)):
        if size < allocator.max_split or released_bytes >= wanted:
            break
        if is_whole_segment(block):
            released_bytes += size
            release_segment(allocator, block)
    return released_bytes >= wanted


def collect_garbage(allocator: CachingAllocator) -> None:
    """garbage_collection_threshold: frees old whole segments of large pools until reserved memory is below it."""
    limit_bytes = allocator.options.limit_bytes
    if limit_bytes is None:
        return
    threshold_bytes = int(allocator.options.garbage_collection_threshold * limit_bytes)
    goal_bytes = allocator.reserved_bytes - threshold_bytes
    freed_any = True
    while goal_bytes > 0 and freed_any:
        blocks = [
            block
            for pool in allocator.pools.values()
            if not pool.small
            for _, _, block in pool.free
            if is_whole_segment(block)
        ]
        ages = [block.pool.searches - block.stamp for block in blocks]
        freed_any = False
        for block, age in zip(blocks, ages, strict=True):
            if goal_bytes > 0 and age * len(ages) >= sum(ages):
                goal_bytes -= block.size
                release_segment(allocator, block)
                freed_any = True
