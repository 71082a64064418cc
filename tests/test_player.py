"""A tape played without being expanded does to the allocator what its flat events do, one by one."""

import pytest

from gptfit.config import make_run
from gptfit.memory.allocator import AllocatorOptions, CachingAllocator, OutOfMemory
from gptfit.memory.blocks import Block
from gptfit.memory.player import Player
from gptfit.memory.reserve import with_workspaces
from gptfit.memory.step import pieces
from gptfit.memory.tape import Event, Tape, make_buffer
from gptfit.memory.whole_run import short_run

MiB = 1 << 20


def one_by_one(tape: Tape, allocator: CachingAllocator) -> None:
    blocks: list[Block | None] = []
    for sign, serial, buffer in tape.expand():
        if sign > 0:
            blocks.append(allocator.malloc(buffer.n_bytes) if buffer.n_bytes else None)
        elif (block := blocks[serial]) is not None:
            allocator.free(block)


def figures(allocator: CachingAllocator) -> tuple[int, ...]:
    return (
        allocator.peak_allocated_bytes,
        allocator.peak_reserved_bytes,
        allocator.allocated_bytes,
        allocator.reserved_bytes,
        allocator.num_alloc_retries,
    )


@pytest.mark.parametrize("expandable", [False, True])
@pytest.mark.parametrize("capacity_bytes", [None, 560 * MiB, 440 * MiB])
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"loss": "chunked", "compile": False, "activation_checkpointing": "block"},
        {"gradient_accumulation_steps": 1, "optimizer_impl": "foreach"},
        {"n_gpus": 2, "strategy": "fsdp"},
    ],
    ids=str,
)
def test_a_run_is_the_same_played_and_expanded(
    keys: dict[str, object], capacity_bytes: int | None, expandable: bool
) -> None:
    run = make_run(
        {"n_layer": 5, "n_head": 4, "n_embd": 256, "batch_size": 4, "block_size": 128, "gradient_accumulation_steps": 8}
        | keys
    )
    tape = with_workspaces(short_run(run, pieces(run, "gptfit", kernels=True)), 8 * MiB)
    ends: list[object] = []
    for play in (lambda a: Player(a).play(tape.items), lambda a: one_by_one(tape, a)):
        allocator = CachingAllocator(capacity_bytes, AllocatorOptions(expandable_segments=expandable))
        try:
            play(allocator)
            ends.append(figures(allocator))
        except OutOfMemory as error:
            ends.append(str(error))
    assert ends[0] == ends[1]


def test_a_free_of_what_is_not_alive_is_an_error_of_the_writer() -> None:
    with pytest.raises(ValueError, match="not alive"):
        Player(CachingAllocator()).play([Event(-1, make_buffer("x", "temporary", (1,), "uint8"))])
