"""The CUDA caching allocator: rounding, two pools, best fit, splitting, merging, segments."""

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Any

MiB = 1 << 20
SMALL_LIMIT, SMALL_SEGMENT, LARGE_SEGMENT, MIN_LARGE, LARGE_ROUNDING = MiB, 2 * MiB, 20 * MiB, 10 * MiB, 2 * MiB


@dataclass(frozen=True, slots=True)
class AllocatorOptions:
    """PYTORCH_CUDA_ALLOC_CONF, the parts that change sizes."""

    expandable_segments: bool = False


class Block:
    """A piece of a segment, in address order with its neighbours."""

    __slots__ = ("free", "next", "offset", "pool", "prev", "segment", "size")

    def __init__(self, pool: list[Any], segment: int, offset: int, size: int) -> None:
        self.pool = pool
        self.segment = segment
        self.offset = offset
        self.size = size
        self.free = False
        self.prev: Block | None = None
        self.next: Block | None = None


class CachingAllocator:
    """One device, one stream. Sizes only: addresses are segment numbers and offsets."""

    def __init__(self, options: AllocatorOptions | None = None) -> None:
        self.expandable = bool(options and options.expandable_segments)
        self.small: list[tuple[int, int, int, Block]] = []
        self.large: list[tuple[int, int, int, Block]] = []
        self.tails: dict[int, Block] = {}
        self.n_segments = 0
        self.allocated_bytes = self.reserved_bytes = 0
        self.peak_allocated_bytes = self.peak_reserved_bytes = 0

    def malloc(self, n_bytes: int) -> Block:
        need = max(512, -(-n_bytes // 512) * 512)
        is_small = need <= SMALL_LIMIT
        pool = self.small if is_small else self.large
        index = bisect_left(pool, (need,))
        block = pool.pop(index)[3] if index < len(pool) else self._grow(pool, need, is_small)
        rest = block.size - need
        if rest >= 512 and (is_small or self.expandable or rest > MiB):
            self._split(block, need, pool)
        block.free = False
        self.allocated_bytes += block.size
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        return block

    def free(self, block: Block) -> None:
        self.allocated_bytes -= block.size
        pool = block.pool
        for neighbour in (block.prev, block.next):
            if neighbour is not None and neighbour.free:
                pool.pop(bisect_left(pool, (neighbour.size, neighbour.segment, neighbour.offset)))
                first, second = (neighbour, block) if neighbour is block.prev else (block, neighbour)
                first.size += second.size
                first.next = second.next
                if second.next is not None:
                    second.next.prev = first
                elif self.tails.get(id(pool)) is second:
                    self.tails[id(pool)] = first
                block = first
        block.free = True
        insort(pool, (block.size, block.segment, block.offset, block))

    def _split(self, block: Block, need: int, pool: list[Any]) -> None:
        rest = Block(pool, block.segment, block.offset + need, block.size - need)
        rest.prev, rest.next, rest.free = block, block.next, True
        if block.next is not None:
            block.next.prev = rest
        elif self.tails.get(id(pool)) is block:
            self.tails[id(pool)] = rest
        block.next = rest
        block.size = need
        insort(pool, (rest.size, rest.segment, rest.offset, rest))

    def _grow(self, pool: list[Any], need: int, is_small: bool) -> Block:
        if self.expandable:
            return self._extend(pool, need, SMALL_SEGMENT if is_small else LARGE_SEGMENT)
        if is_small:
            size = SMALL_SEGMENT
        else:
            size = LARGE_SEGMENT if need < MIN_LARGE else -(-need // LARGE_ROUNDING) * LARGE_ROUNDING
        self._reserve(size)
        self.n_segments += 1
        return Block(pool, self.n_segments, 0, size)

    def _extend(self, pool: list[Any], need: int, page: int) -> Block:
        """Maps pages at the end of the pool's one range, from the free part up."""
        tail = self.tails.get(id(pool))
        start = 0 if tail is None else tail.offset + (0 if tail.free else tail.size)
        mapped = 0 if tail is None else tail.offset + tail.size
        grown = -(-(start + need - mapped) // page) * page
        self._reserve(grown)
        if tail is not None and tail.free:
            pool.pop(bisect_left(pool, (tail.size, tail.segment, tail.offset)))
            tail.size += grown
            return tail
        block = Block(pool, 0, mapped, grown)
        block.prev = tail
        if tail is not None:
            tail.next = block
        self.tails[id(pool)] = block
        return block

    def _reserve(self, n_bytes: int) -> None:
        self.reserved_bytes += n_bytes
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
