"""cuBLAS's workspaces: where they are taken, and what that does to the blocks around them."""

import pytest

from gptfit.config import make_run
from gptfit.memory.reserve import with_workspaces
from gptfit.memory.step import pieces
from gptfit.memory.tape import Tape
from gptfit.memory.whole_run import short_run

WORKSPACE_BYTES = 8_519_680
SHAPE = {"n_layer": 3, "n_head": 4, "n_embd": 128, "vocab_size": 512, "block_size": 64, "batch_size": 2}


def flat(tape: Tape) -> list[tuple[int, str, int]]:
    return [(sign, buffer.name, buffer.n_bytes) for sign, _, buffer in tape.expand()]


@pytest.mark.parametrize("program", ["nanogpt", "gptfit"])
@pytest.mark.parametrize("keys", [{}, {"activation_checkpointing": "block"}, {"eval_interval": 0}], ids=str)
def test_each_thread_takes_its_own_once_behind_its_first_product(program: str, keys: dict[str, object]) -> None:
    """As recorded on GPUs: an einsum's or a linear's output, then the workspace (and the same in backward)."""
    if program == "nanogpt" and keys.get("activation_checkpointing"):
        pytest.skip("nanoGPT has none")
    run = make_run({**SHAPE, "loss": "full", "compile": False, **keys})
    parts = pieces(run, program, kernels=True)
    events = flat(with_workspaces(short_run(run, parts), WORKSPACE_BYTES))
    at = [index for index, (_, name, n_bytes) in enumerate(events) if "cuBLAS" in name and n_bytes]
    assert [events[index] for index in at] == [
        (1, "cuBLAS workspace of the main thread", WORKSPACE_BYTES),
        (1, "cuBLAS workspace of the autograd thread", WORKSPACE_BYTES),
    ]
    assert [events[index - 1][1] for index in at] == ["h.*.attn.c_attn", "lm_head input gradient"]


def test_a_loop_that_comes_apart_is_the_same_loop() -> None:
    """The workspace lies in the first round over the blocks alone; all else stays, in its order."""
    run = make_run({**SHAPE, "loss": "full", "compile": False, "eval_interval": 0})
    tape = short_run(run, pieces(run, "nanogpt", kernels=True))
    numbered = [(sign, serial, buffer) for sign, serial, buffer in tape.expand() if "cuBLAS" not in buffer.name]
    sized = [
        (sign, serial, buffer)
        for sign, serial, buffer in with_workspaces(tape, WORKSPACE_BYTES).expand()
        if "cuBLAS" not in buffer.name
    ]
    assert [(sign, buffer) for sign, _, buffer in sized] == [(sign, buffer) for sign, _, buffer in numbered]
