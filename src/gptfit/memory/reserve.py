"""From a tape to what the caching allocator holds: a short run, replayed event for event."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from gptfit.config import RunConfig
from gptfit.memory.allocator import AllocatorOptions, Block, CachingAllocator
from gptfit.memory.overhead import CUBLAS_HANDLES
from gptfit.memory.step import Pieces
from gptfit.memory.tape import Buffer, Event, Item, Loop, Mark, Tape
from gptfit.memory.whole_run import short_run


@dataclass(frozen=True, slots=True)
class Reserved:
    """Peaks of the replay: block sizes handed out during the steps, and segments held at any time. `retries` counts
    how often the allocator had to give back what it cached before it got more."""

    allocated_bytes: int
    reserved_bytes: int
    retries: int = 0


def replay_run(
    run: RunConfig,
    parts: Pieces,
    workspace_bytes: int,
    expandable_segments: bool | None = None,
    capacity_bytes: int | None = None,
) -> Reserved:
    """Replays a run's start, with an evaluation before and after. `parts` must have been written with kernels.

    Raises OutOfMemory where `capacity_bytes` are not enough, whatever is given back.
    """
    expandable = run.expandable_segments if expandable_segments is None else expandable_segments
    tape = with_workspaces(short_run(run, parts), workspace_bytes)
    evaluations = count(parts.evaluation) if run.eval_interval else 0
    before = count(parts.parameter_items) + count(parts.batch) + evaluations
    return replay_tape(tape, expandable, before, evaluations, capacity_bytes)


def replay_tape(
    tape: Tape, expandable_segments: bool, before: int = 0, after: int = 0, capacity_bytes: int | None = None
) -> Reserved:
    """A tape through an empty allocator; `before` and `after` events at its ends are no part of the steps."""
    allocator = CachingAllocator(capacity_bytes, AllocatorOptions(expandable_segments=expandable_segments))
    blocks: list[Block | None] = []
    malloc, free = allocator.malloc, allocator.free

    def replay(events: Iterable[tuple[int, int, Buffer]]) -> None:
        for sign, serial, buffer in events:
            if sign > 0:
                blocks.append(malloc(buffer.n_bytes) if buffer.n_bytes else None)  # serials count up from 0
            elif (block := blocks[serial]) is not None:
                free(block)

    events = iter(tape.expand())
    replay(islice(events, before))
    allocator.peak_allocated_bytes = allocator.allocated_bytes
    replay(islice(events, count(tape.items) - before - after))
    allocated_bytes = allocator.peak_allocated_bytes
    replay(events)
    return Reserved(allocated_bytes, allocator.peak_reserved_bytes, allocator.num_alloc_retries)


def count(items: Iterable[Item]) -> int:
    """Events when expanded."""
    total = 0
    for item in items:
        if isinstance(item, Loop):
            total += item.n * count(item.body)
        elif isinstance(item, Event):
            total += 1
    return total


def with_workspaces(tape: Tape, workspace_bytes: int) -> Tape:
    """cuBLAS's workspaces at the first matmul of each thread: in forward, and in backward."""
    items: list[Item] = []
    phases = iter(("forward", "loss backward")[:CUBLAS_HANDLES])
    phase = next(phases)
    for item in tape.items:
        items.append(item)
        if isinstance(item, Mark) and item.phase == phase:
            items.append(
                Event(1, Buffer(f"cuBLAS workspace {phase}", "workspace", (workspace_bytes,), "uint8", workspace_bytes))
            )
            phase = next(phases, "")
    return Tape(items)
