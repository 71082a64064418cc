"""From a tape to what the caching allocator holds: a short run, replayed event for event."""

from dataclasses import dataclass

from gptfit.config import RunConfig
from gptfit.memory.allocator import AllocatorOptions, CachingAllocator
from gptfit.memory.autograd import THREADS, workspace_of
from gptfit.memory.overhead import CUBLAS_HANDLES
from gptfit.memory.player import Player
from gptfit.memory.step import Pieces, later_step_items, start_items
from gptfit.memory.tape import Event, Item, Loop, Mark, Tape

# A step may cut its blocks out of what the first one left, and the next one not: of nanoGPT's ladder on an RTX 3060
# (measured/peaks.jsonl) one of ten runs settles in its fifth step, the others in the third.
MOST_STEPS = 6


@dataclass(frozen=True, slots=True)
class Reserved:
    """Peaks of the replay: block sizes handed out in its last step, when blocks are cut as they will be from then on,
    and segments held at any time. `retries` counts how often the allocator had to give back what it cached before it
    got more."""

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
    """Replays a run's start, step by step until one needs what the one before did, and an evaluation. `parts` must
    have been written with kernels.

    Raises OutOfMemory where `capacity_bytes` are not enough, whatever is given back.
    """
    expandable = run.expandable_segments if expandable_segments is None else expandable_segments
    allocator = CachingAllocator(capacity_bytes, AllocatorOptions(expandable_segments=expandable))
    player = Player(allocator)
    player.play(with_workspaces(Tape(start_items(run, parts)), workspace_bytes).items)
    later = later_step_items(run, parts)
    for _ in range(MOST_STEPS - 1):
        before = allocator.peak_allocated_bytes, allocator.peak_reserved_bytes
        allocator.peak_allocated_bytes = allocator.allocated_bytes
        player.play(later)
        if (allocator.peak_allocated_bytes, allocator.peak_reserved_bytes) == before:
            break
    allocated_bytes = allocator.peak_allocated_bytes
    player.play(parts.evaluation if run.eval_interval else [])
    return Reserved(allocated_bytes, allocator.peak_reserved_bytes, allocator.num_alloc_retries)


def replay_tape(tape: Tape, expandable_segments: bool) -> Reserved:
    """A whole tape through an empty allocator."""
    allocator = CachingAllocator(options=AllocatorOptions(expandable_segments=expandable_segments))
    Player(allocator).play(tape.items)
    return Reserved(allocator.peak_allocated_bytes, allocator.peak_reserved_bytes)


def with_workspaces(tape: Tape, workspace_bytes: int) -> Tape:
    """cuBLAS's workspaces, one of each thread: at its first matrix product, where the tape says which that is, else
    at the beginning of its phase."""
    items = tape.items
    for thread, phase in zip(THREADS[:CUBLAS_HANDLES], ("forward", "loss backward"), strict=False):
        sized = Event(1, workspace_of(thread, workspace_bytes))
        items = put_first(items, Event(1, workspace_of(thread)), sized) or put_after(items, phase, sized)
    return Tape(items)


def put_first(items: list[Item], place: Event, event: Event) -> list[Item] | None:
    """`event` instead of the first `place`; in a loop that is one of the first round, which comes apart then."""
    for index, item in enumerate(items):
        if item == place:
            return [*items[:index], event, *items[index + 1 :]]
        if isinstance(item, Loop) and item.n and (body := put_first(item.body, place, event)) is not None:
            first = item.start + (item.n - 1) * item.stride if item.reverse else item.start
            second = item.start if item.reverse else item.start + item.stride
            rounds = [item._replace(n=1, body=body, start=first), item._replace(n=item.n - 1, start=second)]
            return [*items[:index], *rounds, *items[index + 1 :]]
    return None


def put_after(items: list[Item], phase: str, event: Event) -> list[Item]:
    """`event` after the first mark of `phase`; nothing where there is none."""
    marks = (index for index, item in enumerate(items) if isinstance(item, Mark) and item.phase == phase)
    at = next(marks, None)
    return items if at is None else [*items[: at + 1], event, *items[at + 1 :]]
