"""Pieces that are written once and used twice, against the same pieces written for each use."""

from collections import Counter
from collections.abc import Iterator

import pytest

from gptfit.config import RunConfig, make_run
from gptfit.memory.autograd import THREADS
from gptfit.memory.step import bare, later_step_items, pieces, representative, start_items, steady_peak, steady_step
from gptfit.memory.tape import Event, Item, Loop, Mark

SMALL = {"n_layer": 4, "n_head": 4, "n_embd": 256, "block_size": 128, "batch_size": 6, "vocab_size": 50304}
RUNS: list[dict[str, object]] = [
    {},
    {"loss": "full"},
    {"loss": "full", "dtype": "float32", "dropout": 0.1},
    {"loss": "full", "tie_embeddings": False, "param_dtype": "bfloat16"},
    {"activation_memory_budget": 0.9},
    {"activation_memory_budget": 0.9, "loss": "full", "position": "rope", "norm": "rmsnorm", "mlp": "swiglu"},
    {"activation_checkpointing": "block"},
    {"activation_checkpointing": "block", "checkpoint_every": 3, "compile": False},
    {"compile": False, "dtype": "float32"},
    {"compile": False, "loss": "full", "attention": "math", "n_kv_head": 2},
    {"compile": False, "activation_offload": True, "optimizer": "adamw8bit"},
    {"compile": False, "gradient_accumulation_steps": 1, "grad_clip": 0.0, "optimizer_in_backward": True},
    {"n_gpus": 4, "strategy": "ddp", "gradient_accumulation_steps": 12},
    {"n_gpus": 4, "strategy": "fsdp", "gradient_accumulation_steps": 12},
    {"n_gpus": 4, "strategy": "fsdp", "gradient_accumulation_steps": 4, "activation_checkpointing": "block"},
]


def made(keys: dict[str, object]) -> RunConfig:
    return make_run(SMALL | {"gradient_accumulation_steps": 5} | keys)


def flat(items: list[Item]) -> Iterator[Event | Mark]:
    """All rounds of all loops, which need not close."""
    for item in items:
        if isinstance(item, Loop):
            for _ in range(item.n):
                yield from flat(item.body)
        else:
            yield item


@pytest.mark.parametrize("program", ["gptfit", "nanogpt"])
@pytest.mark.parametrize("keys", RUNS, ids=str)
def test_a_search_asks_for_the_peak_of_the_whole_step(keys: dict[str, object], program: str) -> None:
    run = made(keys)
    if program == "nanogpt" and (run.loss != "full" or set(keys) & {"position", "param_dtype", "attention"}):
        pytest.skip("its code has no such run")
    assert steady_peak(run, program) == (
        steady_step(run, whole := pieces(run, program)).peak().live_bytes,
        whole.flops_per_token,
    )


@pytest.mark.parametrize("keys", RUNS, ids=str)
def test_what_kernels_take_can_be_left_out_afterwards(keys: dict[str, object]) -> None:
    run = made(keys)
    without, with_kernels = pieces(run, "gptfit"), pieces(run, "gptfit", kernels=True)
    left = bare(with_kernels)
    for items in (start_items, later_step_items):
        assert list(flat(items(run, left))) == list(flat(items(run, without)))
    assert list(flat(left.evaluation)) == list(flat(without.evaluation))
    if not run.compile:  # some compiled twins leave out what kernels take
        assert list(flat(start_items(run, left))) != list(flat(start_items(run, with_kernels)))


@pytest.mark.parametrize("keys", RUNS, ids=str)
def test_the_first_micro_step_finds_nothing_held_and_no_workspace(keys: dict[str, object]) -> None:
    """What a later one frees and the first does not is what the loop held; workspaces are made in the first alone."""
    run = made(keys)
    parts = pieces(run, "gptfit", kernels=True)
    first, fresh = (counted(micro) for micro in (parts.first_micro, parts.fresh_micro))
    held = Counter((-1, event.buffer.name) for event in flat(parts.kept) if isinstance(event, Event))
    places = {(1, f"cuBLAS workspace of the {thread} thread") for thread in THREADS}
    assert fresh - first == held
    made_once = set(first - fresh)
    if run.optimizer_in_backward:
        assert made_once > places  # and the states
    else:
        assert made_once == places if not run.compile else made_once <= places


@pytest.mark.parametrize("keys", RUNS, ids=str)
@pytest.mark.parametrize("sizes", [(1, 4, 100, 4), (2, 12, 8192, 2), (7, 8, 300, 1), (3, 20, 2000, 16)])
def test_a_run_is_represented_by_one_with_the_same_pieces(
    keys: dict[str, object], sizes: tuple[int, int, int, int]
) -> None:
    batch_size, steps, chunk, eval_batch_size = sizes
    steps = 1 if "optimizer_in_backward" in keys else steps
    own = {"batch_size": batch_size, "loss_chunk_size": chunk, "eval_batch_size": eval_batch_size}
    run = made(keys | own | {"gradient_accumulation_steps": steps})
    alike = representative(run)
    assert representative(alike) == alike and alike.micro_steps <= 3
    for items in (start_items, later_step_items):
        assert list(flat(items(run, whole := pieces(run, "gptfit")))) == list(
            flat(items(alike, other := pieces(alike, "gptfit")))
        )
    assert list(flat(whole.evaluation)) == list(flat(other.evaluation))
    assert steady_step(run, whole).peak() == steady_step(alike, other).peak()
    assert (whole.flops_per_token, whole.saved_bytes) == (other.flops_per_token, other.saved_bytes)


def counted(items: list[Item]) -> Counter[tuple[int, str]]:
    return Counter((event.sign, event.buffer.name) for event in flat(items) if isinstance(event, Event))
