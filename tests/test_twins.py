"""Every twin against a trace of the real code on fake tensors: live peak, saved bytes, parameters by name."""

import random

import pytest

from gptfit.config import RunConfig, make_run
from gptfit.memory.step import pieces, steady_step
from gptfit.trace import trace_program

BASE = {"n_layer": 2, "n_head": 4, "n_embd": 64, "vocab_size": 300, "block_size": 64, "batch_size": 4}
BASE |= {"gradient_accumulation_steps": 2, "compile": False}

# Enough for activation offload, which leaves what is small where it is.
LARGE = {"n_embd": 256, "block_size": 256, "batch_size": 8, "vocab_size": 3000}

# The optimizer in backward: nothing is accumulated or clipped, and with few tokens parameters decide.
AT_ONCE = {"gradient_accumulation_steps": 1, "grad_clip": 0.0, "n_embd": 256, "batch_size": 1}

# One change at a time, so that a failure names the op.
OURS = [
    {},
    {"loss": "full"},
    {"norm": "rmsnorm"},
    {"mlp": "swiglu"},
    {"mlp": "relu2", "dtype": "float32"},
    {"position": "rope"},
    {"qk_norm": True, "position": "rope"},
    {"n_kv_head": 2},
    {"attention": "math", "dropout": 0.1},
    {"attention": "math", "n_kv_head": 2, "dtype": "float32"},
    {"tie_embeddings": False, "bias": True},
    {"logit_softcap": 15.0},
    {"logit_softcap": 15.0, "loss": "full"},
    {"loss_chunk_size": 100},
    {"activation_checkpointing": "block"},
    {"activation_checkpointing": "block", "checkpoint_every": 2, "n_layer": 5},
    {"activation_checkpointing": "block", "attention": "math", "dropout": 0.1, "n_embd": 32, "block_size": 128},
    {"activation_checkpointing": "attention", "n_kv_head": 2, "qk_norm": True, "position": "rope"},
    {"activation_checkpointing": "attention", "checkpoint_every": 2, "n_layer": 5},
    {"activation_offload": True, **LARGE},
    {"activation_offload": True, "activation_checkpointing": "attention", **LARGE},
    {"activation_offload": True, "qk_norm": True, "position": "rope", "n_kv_head": 2, "mlp": "swiglu", **LARGE},
    {"activation_offload": True, "attention": "math", "loss": "full", "activation_checkpointing": "block", **LARGE},
    {"recompute_cheap": True},
    {"recompute_cheap": True, "bias": True, "dropout": 0.1, "attention": "math"},
    {"recompute_cheap": True, "mlp": "swiglu", "norm": "rmsnorm", "position": "rope", "qk_norm": True, "n_kv_head": 2},
    {"recompute_cheap": True, "mlp": "relu2", "dtype": "float32", "bias": True, "n_kv_head": 2},
    {"recompute_cheap": True, "mlp": "swiglu", "param_dtype": "bfloat16", "loss": "full"},
    {"recompute_cheap": True, "activation_checkpointing": "block", "mlp": "swiglu", "bias": True},
    {"recompute_cheap": True, "activation_checkpointing": "attention", "norm": "rmsnorm", "n_layer": 5},
    {"recompute_cheap": True, "activation_offload": True, "mlp": "swiglu", "position": "rope", **LARGE},
    {"recompute_cheap": True, "optimizer_in_backward": True, **AT_ONCE},
    {"optimizer_in_backward": True, **AT_ONCE},
    {"optimizer_in_backward": True, "optimizer_impl": "for-loop", "activation_checkpointing": "block", **AT_ONCE},
    {"optimizer_in_backward": True, "optimizer": "muon", "tie_embeddings": False, "loss": "full", **AT_ONCE},
    {"gradient_accumulation_steps": 1, "optimizer_impl": "foreach"},
    {"gradient_accumulation_steps": 1, "optimizer": "lion"},
    {"gradient_accumulation_steps": 1, "optimizer": "sgd"},
]
NANOGPT = [
    {},
    {"dtype": "float16", "vocab_size": 5000},
    {"dtype": "float32", "dropout": 0.1, "bias": True},
    {"gradient_accumulation_steps": 1, "optimizer_impl": "for-loop", "vocab_size": 65},
    {"gradient_accumulation_steps": 3, "optimizer_impl": "foreach", "grad_clip": 0.0},
]


def compare(run: RunConfig, program: str) -> None:
    traced = trace_program(run, program)
    parts = pieces(run, program, whole=False)
    live_bytes = steady_step(run, parts).peak().live_bytes
    assert parts.n_params == traced.n_params
    assert parts.saved_bytes == pytest.approx(traced.saved_for_backward_bytes, rel=0.001)
    # Half a percent, or a handful of the 512-byte blocks that scalars take.
    assert live_bytes == pytest.approx(traced.live_bytes, rel=0.005, abs=16 * 512)


def name_of(changes: dict[str, object]) -> str:
    return ",".join(f"{key}={value}" for key, value in changes.items()) or "plain"


@pytest.mark.parametrize("changes", OURS, ids=name_of)
def test_ours(changes: dict[str, object]) -> None:
    compare(make_run({**BASE, **changes}), "gptfit")


@pytest.mark.parametrize("changes", NANOGPT, ids=name_of)
def test_nanogpt(changes: dict[str, object]) -> None:
    compare(make_run({**BASE, "loss": "full", **changes}), "nanogpt")


@pytest.mark.parametrize("seed", range(8))
def test_levers_together(seed: int) -> None:
    pick = random.Random(seed).choice
    n_kv_head, groups, head_size = pick((1, 2, 3)), pick((1, 2)), pick((8, 16))
    keys = {
        "n_layer": pick((1, 3)),
        "n_kv_head": n_kv_head,
        "n_head": n_kv_head * groups,
        "n_embd": n_kv_head * groups * head_size,
        "vocab_size": pick((65, 1000)),
        "block_size": pick((16, 100)),
        "batch_size": pick((1, 5)),
        "dtype": pick(("float32", "bfloat16")),
        "bias": pick((True, False)),
        "norm": pick(("layernorm", "rmsnorm")),
        "mlp": pick(("gelu", "swiglu", "relu2")),
        "position": pick(("learned", "rope")),
        "qk_norm": pick((True, False)),
        "attention": pick(("flash", "math")),
        "loss": pick(("full", "chunked")),
        "activation_checkpointing": pick(("none", "block")),
        "recompute_cheap": pick((False, True)),
        "optimizer_impl": pick(("fused", "foreach", "for-loop")),
        "grad_clip": pick((0.0, 1.0)),
    }
    compare(make_run({**BASE, **keys}), "gptfit")
