"""The CUDA caching allocator: pools, best fit, splitting, merging, segments, retries, out of memory.

Written from PyTorch's c10/cuda/CUDACachingAllocator.cpp (2.1 to 2.12). Left out: private pools (CUDA graphs),
callbacks that free memory of other processes, and the cudaMallocAsync backend.
"""

from bisect import bisect_left, insort
from typing import NamedTuple

from gptfit.errors import GptfitError
from gptfit.memory.allocator_options import MIN_BLOCK, AllocatorOptions, MiB
from gptfit.memory.blocks import ALLOCATED, FREE, PENDING, UNMAPPED, Block, Pool
from gptfit.memory.expandable import extend
from gptfit.memory.release import collect_garbage, release_free, release_oversize
from gptfit.units import format_bytes

SMALL_LIMIT, SMALL_SEGMENT = MiB, 2 * MiB
MIN_LARGE, LARGE_ROUNDING = 10 * MiB, 2 * MiB

TOP_ADDRESS = 1 << 47
NO_LIMIT = 1 << 62


class OutOfMemory(GptfitError):
    """No segment could be had, not even after everything free was given back.

    The figures are those of torch's message: `tried_bytes` is the segment asked for, not the request; `free_bytes`
    is None where the capacity is endless and a memory fraction refused.
    """

    def __init__(self, need_bytes: int, tried_bytes: int, allocated_bytes: int, reserved_bytes: int, free: int | None):
        self.need_bytes = need_bytes
        self.tried_bytes = tried_bytes
        self.allocated_bytes = allocated_bytes
        self.reserved_bytes = reserved_bytes
        self.reserved_unallocated_bytes = reserved_bytes - allocated_bytes
        self.free_bytes = free
        super().__init__(
            f"CUDA out of memory. Tried to allocate {format_bytes(tried_bytes)}. "
            + (f"{format_bytes(free)} is free. " if free is not None else "")
            + f"{format_bytes(allocated_bytes)} is allocated by PyTorch, and "
            f"{format_bytes(reserved_bytes - allocated_bytes)} is reserved by PyTorch but unallocated",
            "give it more capacity, or ask for less",
        )


class SegmentEvent(NamedTuple):
    """`kind`: S obtained by cudaMalloc, R released, M pages mapped, U unmapped."""

    kind: str
    address: int
    n_bytes: int
    stream: int


class CachingAllocator:
    """One device, without tensors: sizes in, segments out.

    `capacity_bytes` is what the device can give to this allocator (None: no end); `total_bytes`, the capacity unless
    given, is what a memory fraction is a fraction of. Of two equally good blocks the lower address is taken. The
    driver decides on addresses, so they are made up, unless `hint_address` is set before a request: new segments lie
    below all others, as cudaMalloc mostly has it, or with `by_age` above them, which is the rule of versions that
    prefer the older segment.
    """

    def __init__(
        self,
        capacity_bytes: int | None = None,
        options: AllocatorOptions | None = None,
        by_age: bool = False,
        total_bytes: int | None = None,
    ) -> None:
        self.options = options = options or AllocatorOptions()
        self.capacity_bytes = capacity_bytes
        self.by_age = by_age
        total = capacity_bytes if total_bytes is None else total_bytes
        fraction = options.per_process_memory_fraction
        self.limit_bytes = int(fraction * total) if total is not None and fraction < 1 else None
        self.preempt_bytes = int(fraction * total) if total is not None and options.throw_on_cudamalloc_oom else None
        self.pools: dict[int, Pool] = {}
        self.heads: dict[int, Block] = {}  # the first block of each segment and range, by address
        self.pending: dict[Block, None] = {}  # in the order in which they were given back
        self.segment_events: list[SegmentEvent] = []
        self.extents: list[tuple[int, int]] = []  # start and end of the same, in order
        self.hint_address: int | None = None  # where the next segment lies, if it is known
        self.allocated_bytes = self.reserved_bytes = self.requested_bytes = 0
        self.peak_allocated_bytes = self.peak_reserved_bytes = 0
        self.num_alloc_retries = 0
        self.searches = [0, 0]  # in large and in small pools, counted while garbage is collected
        self.expandable = options.expandable_segments
        self.rounds = any(options.roundup_power2_divisions)
        self.max_split = options.max_split_bytes or NO_LIMIT
        self.collects = options.garbage_collection_threshold > 0 and self.limit_bytes is not None
        # What malloc does itself, as it mostly is one of these: segments as they come, or expandable ones.
        self.plain = not (self.expandable or options.max_split_bytes or self.collects)
        self.grows = self.expandable and not (options.max_split_bytes or self.collects)

    def malloc(self, n_bytes: int, stream: int = 0) -> Block:
        """A block of at least `n_bytes` for `stream`. Raises OutOfMemory, once all that is free was given back."""
        need = self.options.rounded(n_bytes) if self.rounds else (n_bytes + 511) & -512 or 512
        small = need <= SMALL_LIMIT
        pool = self.pools.get(stream * 2 + small) or self.pool(stream, small)
        free = pool.free
        if self.plain:
            index = bisect_left(free, (need,))
            block = free.pop(index)[2] if index < len(free) else self._obtain(pool, need)
        elif self.grows:
            index = bisect_left(free, (need,))
            block = free[index][2] if index < len(free) else None
            if block is not None and (block.next is None or block.next.state != UNMAPPED):
                del free[index]  # no larger one could be better, as this one cannot grow
            else:
                block = (block and self._take(pool, need)) or self._obtain(pool, need)
        else:
            block = self._take(pool, need) or self._obtain(pool, need)
        rest = block.size - need
        if rest >= MIN_BLOCK and (small or self.expandable or (rest > MiB and need < self.max_split)):
            self._split(block, need, rest, free)
        block.state = ALLOCATED
        block.requested = n_bytes
        self.requested_bytes += n_bytes
        self.allocated_bytes += block.size
        if self.allocated_bytes > self.peak_allocated_bytes:
            self.peak_allocated_bytes = self.allocated_bytes
        return block

    def free(self, block: Block) -> None:
        """Gives a block back; it merges with its free neighbours. Nothing goes back to the driver."""
        self.allocated_bytes -= block.size
        self.requested_bytes -= block.requested
        self.put(block)

    def defer(self, block: Block) -> None:
        """Gives a block back that another stream may still use: counted no more, but not free before `complete`."""
        self.allocated_bytes -= block.size
        self.requested_bytes -= block.requested
        block.state = PENDING
        self.pending[block] = None

    def complete(self, block: Block) -> None:
        """The other stream is done with a deferred block. Nothing happens if a retry has waited for it already."""
        if block in self.pending:
            del self.pending[block]
            self.put(block)

    def empty_cache(self) -> None:
        """Waits for deferred frees, then gives every segment and page that is wholly free back to the driver."""
        release_free(self)

    def put(self, block: Block) -> Block:
        """Makes a block free, merged with its free neighbours; returns what it became."""
        free = block.pool.free
        second = block.next
        if second is not None and second.state == FREE:
            free.pop(bisect_left(free, (second.size, second.address)))
            block.size += second.size
            block.next = following = second.next
            if following is not None:
                following.prev = block
        first = block.prev
        if first is not None and first.state == FREE:
            free.pop(bisect_left(free, (first.size, first.address)))
            first.size += block.size
            first.next = following = block.next
            if following is not None:
                following.prev = first
            block = first
        block.state = FREE
        if self.collects:
            block.stamp = self.searches[block.pool.small]
        insort(free, (block.size, block.address, block))
        return block

    def pool(self, stream: int, small: bool) -> Pool:
        """The pool of a stream for small or large requests, made at first need."""
        key = stream * 2 + small
        if key not in self.pools:
            self.pools[key] = Pool(stream, small, SMALL_SEGMENT if small else self.options.large_segment_bytes)
        return self.pools[key]

    def segment_bytes(self, need: int) -> int:
        """What the driver is asked for on behalf of a rounded request; torch's message says "tried to allocate"."""
        if need <= SMALL_LIMIT:
            return SMALL_SEGMENT
        return self.options.large_segment_bytes if need < MIN_LARGE else -(-need // LARGE_ROUNDING) * LARGE_ROUNDING

    def reserve(self, n_bytes: int) -> bool:
        """Counts `n_bytes` more as reserved; False, and nothing counted, where the device has not that much left."""
        if self.capacity_bytes is not None and self.reserved_bytes + n_bytes > self.capacity_bytes:
            return False
        self.reserved_bytes += n_bytes
        if self.reserved_bytes > self.peak_reserved_bytes:
            self.peak_reserved_bytes = self.reserved_bytes
        return True

    def place(self, n_bytes: int) -> int:
        """The address of new memory: the one hinted at where that is free, else one beyond all others."""
        extents, address = self.extents, self.hint_address
        if address is not None:
            index = bisect_left(extents, (address,))
            above = extents[index][0] if index < len(extents) else NO_LIMIT
            below = extents[index - 1][1] if index > 0 else 0
            if not below <= address <= above - n_bytes:
                address = None
        if address is None:
            if self.by_age:
                address = extents[-1][1] if extents else TOP_ADDRESS
            else:
                address = (extents[0][0] if extents else TOP_ADDRESS) - n_bytes
        insort(extents, (address, address + n_bytes))
        return address

    def drop(self, head: Block) -> None:
        """Forgets a segment or range that is gone."""
        del self.heads[head.address]
        del self.extents[bisect_left(self.extents, (head.address,))]

    def note(self, kind: str, address: int, n_bytes: int, stream: int) -> None:
        self.segment_events.append(SegmentEvent(kind, address, n_bytes, stream))

    def _take(self, pool: Pool, need: int) -> Block | None:
        """Takes the best fit out of `pool`, by all rules; None where there is none, or where it may not serve."""
        free = pool.free
        if self.collects:
            self.searches[pool.small] += 1
        index = bisect_left(free, (need,))
        if not self.expandable:
            while index < len(free) and free[index][2].expandable:
                index += 1
        if index == len(free):
            return None
        if self.expandable:
            # A block with unmapped room behind it counts with that room: it could grow.
            end = len(free) - 1
            while index < end and free[index][2].expandable and room(free[index + 1][2]) < room(free[index][2]):
                index += 1
        size = free[index][0]
        if need < self.max_split <= size:
            return None
        if need >= self.max_split and size >= need + self.options.max_non_split_rounding_bytes:
            return None
        return free.pop(index)[2]

    def _split(self, block: Block, need: int, rest_bytes: int, free: list[tuple[int, int, Block]]) -> None:
        after, address = block.next, block.address + need
        rest = Block(block.pool, address, rest_bytes, FREE, block.expandable, block, after)
        if after is not None:
            after.prev = rest
        block.next = rest
        block.size = need
        if self.collects:
            rest.stamp = self.searches[block.pool.small]
        insort(free, (rest_bytes, address, rest))

    def _obtain(self, pool: Pool, need: int) -> Block:
        """A block of new memory. On failure: what is oversize is given back, then all that is free, then an error."""
        if self.collects:
            collect_garbage(self)
        tried = self.segment_bytes(need)
        preempted = self.preempt_bytes is not None and self.reserved_bytes + tried > self.preempt_bytes
        block = None if preempted else self._segment(pool, need, tried)
        if block is None and not preempted:
            if self.options.max_split_bytes and release_oversize(self, pool, need):
                block = self._segment(pool, need, tried)
            if block is None:
                release_free(self)
                self.num_alloc_retries += 1
                block = self._segment(pool, need, tried)
        if block is None:
            free = None if self.capacity_bytes is None else self.capacity_bytes - self.reserved_bytes
            raise OutOfMemory(need, tried, self.allocated_bytes, self.reserved_bytes, free)
        return block

    def _segment(self, pool: Pool, need: int, size: int) -> Block | None:
        if self.limit_bytes is not None and self.reserved_bytes + size > self.limit_bytes:
            return None
        if self.expandable:
            return extend(self, pool, need)
        if not self.reserve(size):
            return None
        block = Block(pool, self.place(size), size, FREE)
        self.heads[block.address] = block
        self.note("S", block.address, size, pool.stream)
        return block


def room(block: Block) -> int:
    """A block's bytes and the unmapped ones right behind it."""
    after = block.next
    return block.size + (after.size if after is not None and after.state == UNMAPPED else 0)
