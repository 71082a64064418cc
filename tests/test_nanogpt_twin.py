"""nanoGPT's twin against figures that were traced or measured elsewhere."""

import pytest

from gptfit.config import derive, make_run
from gptfit.memory.overhead import CUBLAS_HANDLES, CUBLAS_WORKSPACE_BYTES
from gptfit.memory.step import pieces, steady_step

MiB = 1 << 20

SMALL = {"n_layer": 4, "n_head": 4, "n_embd": 256, "vocab_size": 4096, "bias": True, "optimizer_impl": "foreach"}
SMALL |= {"gradient_accumulation_steps": 1, "grad_clip": 0.0}

# torch.cuda.max_memory_allocated printed on an RTX 3060 (torch 2.14): dtype, batch_size, block_size, MiB.
RTX_3060 = [
    ("float32", 8, 256, 325.4),
    ("float32", 16, 256, 585.73),
    ("float32", 32, 256, 1106.3),
    ("float32", 128, 256, 4229.7),
    ("float32", 8, 1024, 1108.5),
    ("float32", 8, 4096, 4240.9),
    ("bfloat16", 16, 256, 447.73),
]


def live_mib(**keys: object) -> float:
    run = make_run({"loss": "full", "compile": False, **keys})
    return steady_step(run, pieces(run, "nanogpt", whole=False)).peak().live_bytes / MiB


def test_gpt2_as_traced() -> None:
    assert live_mib() == pytest.approx(14_337.8, rel=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_popular_advice_as_traced(dtype: str) -> None:
    assert live_mib(n_embd=576, batch_size=12, dtype=dtype) == pytest.approx(12_545.6, rel=1e-4)


@pytest.mark.parametrize(("dtype", "batch_size", "block_size", "mib"), RTX_3060)
def test_a_real_card(dtype: str, batch_size: int, block_size: int, mib: float) -> None:
    live = live_mib(**SMALL, dtype=dtype, batch_size=batch_size, block_size=block_size)
    workspaces = CUBLAS_HANDLES * CUBLAS_WORKSPACE_BYTES / MiB
    assert live + workspaces == pytest.approx(mib, rel=0.005)


def test_accumulation_costs_one_set_of_gradients_and_no_more() -> None:
    once, twice, often = (live_mib(gradient_accumulation_steps=n) for n in (1, 2, 40))
    n_params = pieces(make_run({"loss": "full", "compile": False}), "nanogpt", whole=False).n_params
    assert twice == often
    assert twice - once == pytest.approx(4 * n_params / MiB, rel=0.001)


def test_parameters_are_gpt2s() -> None:
    run = make_run({"vocab_size": 50257, "bias": True, "compile": False})
    assert pieces(run, "nanogpt", whole=False).n_params == 124_439_808  # the published GPT-2, tied


def test_ours_needs_at_most_half() -> None:
    run = make_run({"compile": False})
    ours = steady_step(run, pieces(run, "gptfit", whole=False)).peak().live_bytes / MiB
    assert ours <= live_mib() / 2


def test_checkpointing_saves_and_more_often_saves_more() -> None:
    run = make_run({"compile": False})

    def peak(**changes: object) -> int:
        changed = derive(run, **changes)
        return steady_step(changed, pieces(changed, "gptfit", whole=False)).peak().live_bytes

    every, third = (peak(activation_checkpointing="block", checkpoint_every=k) for k in (1, 3))
    assert every < third < peak()
