"""What the caching allocator keeps lists of: blocks, and the pools that they belong to."""

# What a block is. Pending: given back, but a kernel on another stream may still read it.
FREE, ALLOCATED, PENDING, UNMAPPED = range(4)


class Pool:
    """The blocks of one size class on one stream: free ones by size then address, unmapped ones by address."""

    __slots__ = ("free", "page", "small", "stream", "unmapped")

    def __init__(self, stream: int, small: bool, page: int) -> None:
        self.stream = stream
        self.small = small
        self.page = page  # bytes mapped at once, where segments are expandable
        self.free: list[tuple[int, int, Block]] = []
        self.unmapped: list[tuple[int, Block]] = []


class Block:
    """A piece of a segment, linked in address order with its neighbours.

    `requested` is what was asked for, `stamp` when it was freed (counted in searches of its size class).
    """

    __slots__ = ("address", "expandable", "next", "pool", "prev", "requested", "size", "stamp", "state")

    def __init__(
        self,
        pool: Pool,
        address: int,
        size: int,
        state: int,
        expandable: bool = False,
        before: "Block | None" = None,
        after: "Block | None" = None,
    ) -> None:
        self.pool = pool
        self.address = address
        self.size = size
        self.state = state
        self.expandable = expandable
        self.prev = before
        self.next = after
        self.requested = self.stamp = 0
