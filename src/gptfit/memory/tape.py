"""The tape: a training step as a sequence of allocations and frees, with loops.

Everything gptfit knows about memory is a tape; everything it does reads one. The identical blocks of
a GPT, and the identical micro-steps of an accumulated step, are one loop each: peak, live set and
totals of a loop have closed forms, so a tape is read without being expanded. Expanding gives the
flat event list that the allocator replays.

Closed form: a body with net growth d and inner peak p, repeated n times, peaks at p + max(0, n-1)·d
if d > 0 (in its last round), else at p (in its first).
"""

import operator
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

DTYPE_BYTES = {
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float64": 8,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "uint16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}

ALIGNMENT_BYTES = 512


def rounded(n_bytes: int) -> int:
    """Bytes of the block that holds `n_bytes`: multiples of 512, at least one; zero stays zero."""
    return -(-n_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


class Buffer(NamedTuple):
    """One storage, or one for each round of a loop where the name has a `*`."""

    name: str
    category: str
    shape: tuple[int, ...]
    dtype: str
    n_bytes: int


def make_buffer(name: str, category: str, shape: tuple[int, ...], dtype: str) -> Buffer:
    n = DTYPE_BYTES[dtype]
    for size in shape:
        n *= size
    return Buffer(name, category, shape, dtype, -(-n // 512) * 512)


class Event(NamedTuple):
    """`sign` +1 allocates, -1 frees. In a loop the buffer belongs to round i + shift."""

    sign: int
    buffer: Buffer
    shift: int = 0


class Mark(NamedTuple):
    """What runs from here on."""

    phase: str
    op: str


class Loop(NamedTuple):
    """`body` repeated `n` times; rounds run downwards if `reverse`.

    Only a loop over blocks numbers its buffers, round i from `start` + i·`stride`; a loop over
    micro-steps reuses their names (`numbered` False), and a free releases the oldest of that name.
    """

    n: int
    body: "list[Item]"
    reverse: bool = False
    numbered: bool = True
    start: int = 0
    stride: int = 1


Item = Event | Mark | Loop


class Peak(NamedTuple):
    """The largest running sum of a tape, and where it is: the first instant that reaches it."""

    live_bytes: int
    phase: str
    op: str


class Reading(NamedTuple):
    """Net growth and inner peak of a stretch of tape, and the path of item indices to the peak."""

    net_bytes: int
    peak_bytes: int
    path: tuple[tuple[int, int], ...]  # (item index, round) from the outside in


def read(items: list[Item]) -> Reading:
    """Net growth, peak above the start, and the way to it. Costs one visit an item, no expansion."""
    running = best = 0
    path: tuple[tuple[int, int], ...] = ()
    for index, item in enumerate(items):
        if isinstance(item, Event):
            running += item.sign * item.buffer.n_bytes
            if running > best:
                best, path = running, ((index, 0),)
        elif isinstance(item, Loop) and item.n > 0:
            inner = read(item.body)
            growth = (item.n - 1) * inner.net_bytes if inner.net_bytes > 0 else 0
            if running + inner.peak_bytes + growth > best:
                at = item.n - 1 if growth else 0
                best, path = running + inner.peak_bytes + growth, ((index, at), *inner.path)
            running += item.n * inner.net_bytes
    return Reading(running, best, path)


def without(items: list[Item], unwanted: Callable[[Buffer], bool]) -> list[Item]:
    """Items but for the events of such buffers; `items` itself where it has none."""
    left: list[Item] = []
    for item in items:
        if isinstance(item, Event):
            if not unwanted(item.buffer):
                left.append(item)
        elif isinstance(item, Loop):
            body = without(item.body, unwanted)
            left.append(item if body is item.body else item._replace(body=body))
        else:
            left.append(item)
    same = len(left) == len(items) and all(map(operator.is_, left, items))
    return items if same else left


class Tape:
    """Items in the order they happen. Writers append; readers never change it."""

    def __init__(self, items: list[Item] | None = None) -> None:
        self.items: list[Item] = items if items is not None else []

    def peak(self) -> Peak:
        reading = read(self.items)
        phase, op = self._mark_at(reading.path)
        return Peak(reading.peak_bytes, phase, op)

    def phases(self) -> dict[str, int]:
        """Largest running sum within each phase, in the order of first appearance."""
        peaks: dict[str, int] = {}
        _phase_peaks(self.items, 0, [""], peaks)
        return peaks

    def live_at_peak(self) -> Counter[Buffer]:
        """Buffers alive at the peak, with how many of each: what the peak consists of."""
        live: Counter[Buffer] = Counter()
        _count_until(self.items, read(self.items).path, live)
        return Counter({buffer: count for buffer, count in live.items() if count})

    def _mark_at(self, path: tuple[tuple[int, int], ...]) -> tuple[str, str]:
        phase = op = ""
        items = self.items
        for index, _ in path:
            for item in items[:index]:
                if isinstance(item, Mark):
                    phase, op = item.phase, item.op
            target = items[index]
            if isinstance(target, Loop):
                items = target.body
        return phase, op

    def expand(self) -> Iterator[tuple[int, int, Buffer]]:
        """Flat events (sign, serial, buffer): a serial number for each allocation, named again by its free.

        Raises ValueError for a free of something that is not alive: an error of the writer.
        """
        alive: defaultdict[tuple[str, int], deque[int]] = defaultdict(deque)
        serial = 0
        for event, number in _flat(self.items, 0):
            buffer = event.buffer
            key = (buffer.name, number + event.shift if "*" in buffer.name else 0)
            if event.sign > 0:
                alive[key].append(serial)
                yield 1, serial, buffer
                serial += 1
            else:
                if not alive[key]:
                    raise ValueError(f"the tape frees {key}, which is not alive")
                yield -1, alive[key].popleft(), buffer

    def expanded_peak_bytes(self) -> int:
        """The peak by expansion: the independent check of the closed form."""
        running = best = 0
        for sign, _, buffer in self.expand():
            running += sign * buffer.n_bytes
            best = max(best, running)
        return best

    def marks(self) -> Iterator[tuple[int, Mark]]:
        """Marks of the expanded tape with the number of the event they precede."""
        count = 0
        for item in _flat_items(self.items):
            if isinstance(item, Mark):
                yield count, item
            else:
                count += 1


def _flat_items(items: list[Item]) -> Iterator[Item]:
    for item in items:
        if isinstance(item, Loop):
            for _ in range(item.n):
                yield from _flat_items(item.body)
        else:
            yield item


def _flat(items: list[Item], number: int) -> Iterator[tuple[Event, int]]:
    """Events with the block number that they belong to, but for their own shift."""
    for item in items:
        if isinstance(item, Event):
            yield item, number
        elif isinstance(item, Loop):
            rounds = range(item.n - 1, -1, -1) if item.reverse else range(item.n)
            for i in rounds:
                yield from _flat(item.body, item.start + i * item.stride if item.numbered else number)


def _count_until(items: list[Item], path: tuple[tuple[int, int], ...], live: Counter[Buffer]) -> None:
    """Adds what the items before the end of `path`, and the event there, leave alive."""
    if not path:
        return
    index, at = path[0]
    _count(items[:index], 1, live)
    target = items[index]
    if isinstance(target, Event):
        live[target.buffer] += target.sign
    elif isinstance(target, Loop):
        _count(target.body, at, live)
        _count_until(target.body, path[1:], live)


def _count(items: list[Item], times: int, live: Counter[Buffer]) -> None:
    for item in items:
        if isinstance(item, Event):
            live[item.buffer] += item.sign * times
        elif isinstance(item, Loop):
            _count(item.body, times * item.n, live)


def _phase_peaks(items: list[Item], running: int, phase: list[str], peaks: dict[str, int]) -> int:
    """Running sum after `items`; `phase` holds the current one, as marks inside loops change it."""
    for item in items:
        if isinstance(item, Mark):
            phase[0] = item.phase
        elif isinstance(item, Event):
            running += item.sign * item.buffer.n_bytes
        elif item.n > 0:
            net = read(item.body).net_bytes
            after_first = _phase_peaks(item.body, running, phase, peaks)
            if item.n > 1 and net > 0:
                _phase_peaks(item.body, running + (item.n - 1) * net, phase, peaks)
            running = after_first + (item.n - 1) * net
        peaks[phase[0]] = max(peaks.get(phase[0], 0), running)
    return running
