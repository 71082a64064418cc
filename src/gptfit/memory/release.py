"""Memory given back to the driver: empty_cache, the retry after a failed cudaMalloc, and two gentler ways."""

from bisect import bisect_left
from typing import TYPE_CHECKING

from gptfit.memory.blocks import FREE, Block, Pool
from gptfit.memory.expandable import unmap_free

if TYPE_CHECKING:
    from gptfit.memory.allocator import CachingAllocator


def release_free(allocator: "CachingAllocator") -> None:
    """torch.cuda.empty_cache(): waits for deferred frees, then gives back every segment and page that is wholly free.

    Large pools first, pages last.
    """
    for block in tuple(allocator.pending):
        allocator.complete(block)
    for pool in sorted(allocator.pools.values(), key=lambda pool: (pool.small, pool.stream)):
        for block in whole_segments(pool):
            release_segment(allocator, block)
    for head in tuple(allocator.heads.values()):
        if head.expandable:
            unmap_free(allocator, head)


def is_whole_segment(block: Block) -> bool:
    """Whether a block is free and all of a segment, so that it can be given back at once."""
    return block.state == FREE and block.prev is None and block.next is None and not block.expandable


def whole_segments(pool: Pool) -> list[Block]:
    """Free blocks of `pool` that are segments, smallest first."""
    return [block for _, _, block in pool.free if is_whole_segment(block)]


def release_segment(allocator: "CachingAllocator", block: Block) -> None:
    """cudaFree of a segment that is one free block."""
    free = block.pool.free
    free.pop(bisect_left(free, (block.size, block.address)))
    allocator.drop(block)
    allocator.reserved_bytes -= block.size
    allocator.note("R", block.address, block.size, block.pool.stream)


def release_oversize(allocator: "CachingAllocator", pool: Pool, need: int) -> bool:
    """With max_split_size: gives free oversize segments of `pool` back until one request has room. Whether it has.

    The smallest that is enough alone, else the largest ones; what they fall short of stays released.
    """
    wanted = max(need, allocator.max_split)
    oversize = [block for block in whole_segments(pool) if block.size >= allocator.max_split]
    enough = [block for block in oversize if block.size >= wanted]
    if enough:
        release_segment(allocator, enough[0])
        return True
    released_bytes = 0
    while oversize and released_bytes < wanted:
        block = oversize.pop()
        released_bytes += block.size
        release_segment(allocator, block)
    return released_bytes >= wanted


def collect_garbage(allocator: "CachingAllocator") -> None:
    """garbage_collection_threshold: above that share of the limit, gives old segments of the large pools back.

    All that are at least as old as the mean of those left go, again and again, until enough has gone or none goes.
    """
    if allocator.limit_bytes is None:
        return
    threshold_bytes = int(allocator.options.garbage_collection_threshold * allocator.limit_bytes)
    goal_bytes = allocator.reserved_bytes - threshold_bytes
    freed_any = True
    while goal_bytes > 0 and freed_any:
        pools = [pool for pool in allocator.pools.values() if not pool.small]
        aged = [(allocator.searches[0] - block.stamp, block) for pool in pools for block in whole_segments(pool)]
        total_age = sum(age for age, _ in aged)
        old = [block for age, block in aged if age * len(aged) >= total_age]
        freed_any = bool(old)
        for block in old:
            goal_bytes -= block.size
            release_segment(allocator, block)
