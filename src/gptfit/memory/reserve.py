"""From a tape to what the caching allocator holds: the first steps of a run, replayed event for event."""

from dataclasses import dataclass

from gptfit.config import RunConfig
from gptfit.memory.allocator import AllocatorOptions, Block, CachingAllocator
from gptfit.memory.overhead import CUBLAS_HANDLES
from gptfit.memory.step import Pieces, first_steps
from gptfit.memory.tape import Buffer, Event, Item, Mark, Tape


@dataclass(frozen=True, slots=True)
class Reserved:
    """Peaks of the replay: block sizes handed out, and segments held."""

    allocated_bytes: int
    reserved_bytes: int


def replay_run(
    run: RunConfig, parts: Pieces, workspace_bytes: int, expandable_segments: bool | None = None
) -> Reserved:
    """Replays evaluation, the first step and two steady ones. `parts` must have been written with kernels."""
    expandable = run.expandable_segments if expandable_segments is None else expandable_segments
    return replay_tape(with_workspaces(first_steps(run, parts), workspace_bytes), expandable)


def replay_tape(tape: Tape, expandable_segments: bool) -> Reserved:
    """A tape through an empty allocator."""
    allocator = CachingAllocator(options=AllocatorOptions(expandable_segments=expandable_segments))
    blocks: list[Block | None] = []
    malloc, free = allocator.malloc, allocator.free
    for sign, serial, buffer in tape.expand():
        if sign > 0:
            blocks.append(malloc(buffer.n_bytes) if buffer.n_bytes else None)  # serials count up from 0
        elif (block := blocks[serial]) is not None:
            free(block)
    return Reserved(allocator.peak_allocated_bytes, allocator.peak_reserved_bytes)


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
