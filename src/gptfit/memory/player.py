"""A tape played into the caching allocator, without being expanded: a search plays many, of 100,000 events each."""

from collections import defaultdict, deque
from collections.abc import Sequence
from typing import NamedTuple

from gptfit.memory.allocator import CachingAllocator
from gptfit.memory.blocks import Block
from gptfit.memory.tape import Event, Item, Loop


class Move(NamedTuple):
    """An event, or with sign 0 a loop. `shift` is None for a buffer that belongs to no block."""

    sign: int
    n_bytes: int
    name: str
    shift: int | None
    loop: Loop | None


class Player:
    """One allocator, and which block each buffer that is alive has. Buffers of one name go in the order they came."""

    def __init__(self, allocator: CachingAllocator) -> None:
        self.allocator = allocator
        self.alive: defaultdict[str | tuple[str, int], deque[Block | None]] = defaultdict(deque)
        self.moves: dict[int, tuple[Sequence[Item], list[Move]]] = {}  # by the id of the items, which are kept

    def play(self, items: Sequence[Item], number: int = 0) -> None:
        """All events of `items`, in order. Raises ValueError for a free of something that is not alive (an error of
        the writer), OutOfMemory as the allocator does."""
        alive, malloc, free = self.alive, self.allocator.malloc, self.allocator.free
        for sign, n_bytes, name, shift, loop in self.moves_of(items):
            if loop is not None:
                for i in range(loop.n - 1, -1, -1) if loop.reverse else range(loop.n):
                    self.play(loop.body, loop.start + i * loop.stride if loop.numbered else number)
                continue
            key = name if shift is None else (name, number + shift)
            if sign > 0:
                alive[key].append(malloc(n_bytes) if n_bytes else None)
                continue
            blocks = alive[key]
            if not blocks:
                raise ValueError(f"the tape frees {key}, which is not alive")
            block = blocks.popleft()
            if block is not None:
                free(block)

    def moves_of(self, items: Sequence[Item]) -> list[Move]:
        if id(items) not in self.moves:
            made = [
                Move(0, 0, "", None, item)
                if isinstance(item, Loop)
                else Move(item.sign, item.buffer.n_bytes, item.buffer.name, shift_of(item), None)
                for item in items
                if isinstance(item, Loop | Event)
            ]
            self.moves[id(items)] = items, made
        return self.moves[id(items)][1]


def shift_of(event: Event) -> int | None:
    return event.shift if "*" in event.buffer.name else None
