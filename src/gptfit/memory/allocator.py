"""The CUDA caching allocator: rounding, pools, best fit, splitting, merging, segments, retries, out of memory.

Written from PyTorch's c10/cuda/CUDACachingAllocator.cpp (2.1 to 2.12). Private pools (CUDA graphs) are left out.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

from gptfit.errors import GptfitError

MiB = 1 << 20
MIN_BLOCK, SMALL_LIMIT, SMALL_SEGMENT, LARGE_SEGMENT = 512, MiB, 2 * MiB, 20 * MiB
MIN_LARGE, LARGE_ROUNDING = 10 * MiB, 2 * MiB
N_INTERVALS = 16  # of roundup_power2_divisions: 1 MiB, 2 MiB, ... 64 GiB and above

# What a block is. Pending: given back, but a kernel on another stream may still read it.
ALLOCATED, FREE, PENDING, UNMAPPED = range(4)

# Addresses that are not known are made up. cudaMalloc mostly hands out falling ones, and ties between equal blocks
# are broken by address.
TOP_ADDRESS = 1 << 47
UNLIMITED_RANGE = 1 << 42


@dataclass(frozen=True, slots=True)
class AllocatorOptions:
    """PYTORCH_CUDA_ALLOC_CONF, the parts that change sizes.

    `roundup_power2_divisions` is 0, one number for all sizes, or one for each of 16 intervals from 1 MiB up.
    `limit_bytes` is the memory fraction times the card's memory, None for a fraction of 1.
    """

    expandable_segments: bool = False
    max_split_bytes: int | None = None
    max_non_split_rounding_bytes: int = LARGE_SEGMENT
    roundup_power2_divisions: int | tuple[int, ...] = 0
    garbage_collection_threshold: float = 0.0
    large_segment_bytes: int = LARGE_SEGMENT
    limit_bytes: int | None = None


class OutOfMemory(GptfitError):
    """No segment could be had, not even after everything free was given back. Figures as in torch's message."""

    def __init__(self, request_bytes: int, tried_bytes: int, allocated_bytes: int, reserved_bytes: int) -> None:
        super().__init__(
            f"out of memory: tried to allocate {tried_bytes} bytes with {reserved_bytes} bytes reserved",
            "give the allocator more capacity, or ask for less",
        )
        self.request_bytes = request_bytes
        self.tried_bytes = tried_bytes
        self.allocated_bytes = allocated_bytes
        self.reserved_bytes = reserved_bytes


class Pool:
    """The blocks of one size class on one stream: free ones by size then address, unmapped ones by address."""

    __slots__ = ("free", "page", "searches", "small", "stream", "unmapped")

    def __init__(self, stream: int, small: bool, page: int) -> None:
        self.stream = stream
        self.small = small
        self.page = page  # bytes mapped at once, where segments are expandable
        self.free: list[tuple[int, int, Block]] = []
        self.unmapped: list[tuple[int, Block]] = []
        self.searches = 0


class Block:
    """A piece of a segment, linked in address order with its neighbours. `stamp`: when it was freed, in searches."""

    __slots__ = ("address", "expandable", "next", "pool", "prev", "size", "stamp", "state")

    def __init__(self, pool: Pool, address: int, size: int, state: int, expandable: bool = False) -> None:
        self.pool = pool
        self.address = address
        self.size = size
        self.state = state
        self.expandable = expandable
        self.prev: Block | None = None
        self.next: Block | None = None
        self.stamp = 0


class CachingAllocator:
    """One device, without tensors: sizes in, segments out.

    `capacity_bytes` is what the device can give to this allocator (None: no end). `log` collects segment events
    (S obtained, R released, M mapped, U unmapped) as (kind, address, bytes).
    """

    def __init__(
        self,
        options: AllocatorOptions | None = None,
        capacity_bytes: int | None = None,
        log: list[tuple[str, int, int]] | None = None,
    ) -> None:
        self.options = options or AllocatorOptions()
        self.capacity_bytes = capacity_bytes
        self.log = log
        self.expandable = self.options.expandable_segments
        self.pools: dict[int, Pool] = {}
        self.heads: dict[int, Block] = {}  # first block of every segment and range, by address
        self.pending: list[Block] = []
        self.hint_address: int | None = None  # where the next segment lies, if known
        self.floor = TOP_ADDRESS
        self.allocated_bytes = self.reserved_bytes = self.pending_bytes = 0
        self.peak_allocated_bytes = self.peak_reserved_bytes = 0
        self.n_retries = 0
        divisions = self.options.roundup_power2_divisions
        self.divisions = (divisions,) * N_INTERVALS if isinstance(divisions, int) else divisions
        self.rounds = any(d > 1 for d in self.divisions)
        self.max_split = self.options.max_split_bytes or 1 << 62
        self.collects = self.options.garbage_collection_threshold > 0 and self.options.limit_bytes is not None
        self.plain = not (self.expandable or self.options.max_split_bytes or self.collects)

    def malloc(self, n_bytes: int, stream: int = 0) -> Block:
        """A block of at least `n_bytes` > 0 for `stream`. Raises OutOfMemory, once what is free has been given back."""
        need = self.rounded(n_bytes) if self.rounds else (-(-n_bytes // 512) * 512)
        small = need <= SMALL_LIMIT
        pool = self.pools.get(stream * 2 + small) or self.pool(stream, small)
        free = pool.free
        if self.plain:
            index = bisect_left(free, (need,))
            block = free.pop(index)[2] if index < len(free) else self._obtain(pool, need)
        else:
            block = self.take(pool, need) or self._obtain(pool, need)
        rest = block.size - need
        if rest >= MIN_BLOCK and (small or self.expandable or (rest > MiB and need < self.max_split)):
            self._split(block, need, free)
        block.state = ALLOCATED
        self.allocated_bytes += block.size
        if self.allocated_bytes > self.peak_allocated_bytes:
            self.peak_allocated_bytes = self.allocated_bytes
        return block

    def free(self, block: Block) -> None:
        """Gives a block back; it merges with its free neighbours. Nothing goes back to the driver."""
        self.allocated_bytes -= block.size
        self.put(block)

    def defer(self, block: Block) -> None:
        """Gives a block back that another stream may still use: counted no more, but not free before `complete`."""
        self.allocated_bytes -= block.size
        self.pending_bytes += block.size
        block.state = PENDING
        self.pending.append(block)

    def complete(self, block: Block) -> None:
        """The other stream is done with a deferred block. Nothing happens if a retry has waited for it already."""
        if block.state == PENDING and block in self.pending:
            self.pending.remove(block)
            self.pending_bytes -= block.size
            self.put(block)

    def put(self, block: Block) -> Block:
        """Makes a block free, merged with its free neighbours; the merged block."""
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
        block.stamp = block.pool.searches
        insort(free, (block.size, block.address, block))
        return block

    def take(self, pool: Pool, need: int) -> Block | None:
        """Takes the best fit out of `pool`, by all rules; None where there is none, or where it may not serve."""
        free, pool.searches = pool.free, pool.searches + self.collects
        index = bisect_left(free, (need,))
        if not self.expandable:
            while index < len(free) and free[index][2].expandable:
                index += 1
        if index == len(free):
            return None
        if self.expandable:
            # A block with unmapped room behind it counts with that room: it could grow.
            while (
                index + 1 < len(free) and free[index][2].expandable and room(free[index + 1][2]) < room(free[index][2])
            ):
                index += 1
        size = free[index][0]
        if need < self.max_split <= size:
            return None
        if need >= self.max_split and size >= need + self.options.max_non_split_rounding_bytes:
            return None
        return free.pop(index)[2]

    def pool(self, stream: int, small: bool) -> Pool:
        """The pool of a stream for small or large requests, made at first need."""
        key = stream * 2 + small
        if key not in self.pools:
            self.pools[key] = Pool(stream, small, SMALL_SEGMENT if small else self.options.large_segment_bytes)
        return self.pools[key]

    def rounded(self, n_bytes: int) -> int:
        """Block size asked of a pool: multiples of 512, or of a part of the power of two below."""
        interval = min(max(n_bytes.bit_length() - 1 - 20, 0), N_INTERVALS - 1)
        divisions = self.divisions[interval]
        if divisions > 1 and n_bytes > MIN_BLOCK * divisions:
            power = 1 << (n_bytes.bit_length() - 1)
            step = power // divisions or 2 * power
            return n_bytes if n_bytes == power else -(-n_bytes // step) * step
        return max(MIN_BLOCK, -(-n_bytes // MIN_BLOCK) * MIN_BLOCK)

    def segment_bytes(self, need: int) -> int:
        """What the driver is asked for on behalf of a rounded request; torch's message says "tried to allocate"."""
        if need <= SMALL_LIMIT:
            return SMALL_SEGMENT
        return self.options.large_segment_bytes if need < MIN_LARGE else -(-need // LARGE_ROUNDING) * LARGE_ROUNDING

    def _split(self, block: Block, need: int, free: list[tuple[int, int, Block]]) -> None:
        rest = Block(block.pool, block.address + need, block.size - need, FREE, block.expandable)
        rest.prev, rest.next = block, block.next
        if block.next is not None:
            block.next.prev = rest
        block.next = rest
        block.size = need
        rest.stamp = block.pool.searches
        insort(free, (rest.size, rest.address, rest))

    def _obtain(self, pool: Pool, need: int) -> Block:
        """A block of new memory. On failure: what is oversize is given back, then all that is free, then an error."""
        from gptfit.memory.release import collect_garbage, release_free, release_oversize

        if self.collects:
            collect_garbage(self)
        block = self._segment(pool, need)
        if block is None and self.options.max_split_bytes and release_oversize(self, pool, need):
            block = self._segment(pool, need)
        if block is None:
            release_free(self)
            self.n_retries += 1
            block = self._segment(pool, need)
        if block is None:
            raise OutOfMemory(need, self.segment_bytes(need), self.allocated_bytes, self.reserved_bytes)
        return block

    def _segment(self, pool: Pool, need: int) -> Block | None:
        size, limit = self.segment_bytes(need), self.options.limit_bytes
        if limit is not None and self.reserved_bytes + size > limit:
            return None
        if self.expandable:
            from gptfit.memory.expandable import extend

            return extend(self, pool, need)
        if not self.reserve(size):
            return None
        block = Block(pool, self.place(size), size, FREE)
        self.heads[block.address] = block
        self.note("S", block.address, size)
        return block

    def place(self, n_bytes: int) -> int:
        """The address of new memory: the known one, or the next lower that is free."""
        if self.hint_address is not None:
            address, self.hint_address = self.hint_address, None
            return address
        self.floor -= n_bytes
        return self.floor

    def reserve(self, n_bytes: int) -> bool:
        """Counts `n_bytes` more as reserved; False, and nothing counted, where the device has not that much left."""
        if self.capacity_bytes is not None and self.reserved_bytes + n_bytes > self.capacity_bytes:
            return False
        self.reserved_bytes += n_bytes
        if self.reserved_bytes > self.peak_reserved_bytes:
            self.peak_reserved_bytes = self.reserved_bytes
        return True

    def note(self, kind: str, address: int, n_bytes: int) -> None:
        """Keeps a segment event, if anybody asked for them."""
        if self.log is not None:
            self.log.append((kind, address, n_bytes))


def room(block: Block) -> int:
    """A block's bytes and the unmapped ones right behind it."""
    after = block.next
    return block.size + (after.size if after is not None and after.state == UNMAPPED else 0)
