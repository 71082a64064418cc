"""The lean backward against inductor's own plans of runs that were drawn at random, recorded with torch 2.13.0 by
trace.py. Runs that it misses by more than a hundredth are left out: most of those have attention written out, of which
compiled.assumptions warns."""

import pytest

from gptfit.config import RunConfig, make_run
from gptfit.memory.compiled_lean import Lean, fuse_alike
from gptfit.memory.compiled_plan import Kernel, Slot
from gptfit.memory.step import pieces, steady_step

KEYS = ("n_layer", "n_head", "n_embd", "vocab_size", "block_size", "batch_size")

# Values of KEYS, other keys, bytes kept for backward, bytes at the live peak; budget 0.9 unless said.
ROWS: list[tuple[tuple[int, ...], dict[str, object], int, int]] = [
    (
        (6, 12, 1536, 50304, 1024, 16),
        {"mlp": "swiglu", "position": "rope", "loss": "full", "dtype": "float32", "n_kv_head": 6},
        9947060736,
        14950820864,
    ),
    ((5, 2, 128, 50304, 256, 12), {"norm": "rmsnorm", "activation_memory_budget": 0.7}, 69666304, 318603264),
    (
        (6, 12, 768, 256, 512, 16),
        {
            "mlp": "relu2",
            "position": "rope",
            "param_dtype": "bfloat16",
            "dropout": 0.1,
            "activation_memory_budget": 0.7,
        },
        1016896000,
        1502782976,
    ),
    ((4, 8, 256, 256, 1024, 2), {"norm": "rmsnorm", "mlp": "relu2", "bias": True, "dropout": 0.1}, 56701440, 127736320),
    (
        (5, 4, 128, 8192, 256, 16),
        {"norm": "rmsnorm", "tie_embeddings": False, "loss": "full", "bias": True},
        126244352,
        183600128,
    ),
    (
        (5, 6, 384, 256, 512, 2),
        {"norm": "rmsnorm", "mlp": "swiglu", "position": "rope", "tie_embeddings": False, "loss": "full"},
        72599040,
        230251520,
    ),
    (
        (4, 6, 192, 256, 1024, 8),
        {"norm": "rmsnorm", "mlp": "swiglu", "dropout": 0.1, "activation_memory_budget": 0.7},
        171020800,
        258892288,
    ),
    ((4, 6, 384, 4096, 512, 16), {"loss": "full", "qk_norm": True}, 351670784, 559555072),
    (
        (3, 8, 1024, 50304, 512, 8),
        {"mlp": "relu2", "position": "rope", "tie_embeddings": False, "loss": "full"},
        910036480,
        3221404160,
    ),
    (
        (6, 4, 256, 32000, 1024, 16),
        {
            "norm": "rmsnorm",
            "mlp": "swiglu",
            "position": "rope",
            "dtype": "float32",
            "n_kv_head": 2,
            "dropout": 0.1,
            "activation_memory_budget": 0.7,
        },
        1280907776,
        1685276672,
    ),
    (
        (4, 6, 384, 50304, 256, 12),
        {"mlp": "relu2", "position": "rope", "tie_embeddings": False, "bias": True, "dtype": "float32"},
        313717248,
        1257916928,
    ),
    ((4, 12, 1536, 256, 512, 16), {"mlp": "relu2", "loss": "full", "n_kv_head": 6}, 1171132928, 3230837248),
    ((3, 12, 1536, 50304, 1024, 4), {"loss": "full"}, 1140002304, 3848706560),
    (
        (6, 12, 768, 32000, 1024, 12),
        {"norm": "rmsnorm", "mlp": "swiglu", "position": "rope", "dropout": 0.1},
        1876679168,
        3251924992,
    ),
    (
        (6, 2, 128, 32000, 512, 4),
        {"norm": "rmsnorm", "position": "rope", "tie_embeddings": False, "bias": True, "param_dtype": "bfloat16"},
        55392768,
        204856320,
    ),
    (
        (3, 8, 512, 256, 1024, 16),
        {"mlp": "swiglu", "tie_embeddings": False, "loss": "full", "bias": True, "dropout": 0.1},
        727977472,
        1188519424,
    ),
    (
        (7, 4, 256, 4096, 1024, 12),
        {"norm": "rmsnorm", "position": "rope", "bias": True, "dtype": "float32", "dropout": 0.1},
        1135631872,
        1353607168,
    ),
    ((3, 6, 192, 256, 1024, 12), {"mlp": "swiglu", "position": "rope"}, 207326720, 293892608),
    (
        (3, 4, 128, 32000, 512, 4),
        {
            "position": "rope",
            "tie_embeddings": False,
            "qk_norm": True,
            "dtype": "float32",
            "activation_memory_budget": 0.7,
        },
        62934528,
        336219136,
    ),
    ((3, 2, 256, 256, 64, 1), {"mlp": "swiglu", "bias": True, "dtype": "float32", "n_kv_head": 1}, 2961408, 49531904),
    (
        (3, 8, 512, 4096, 256, 12),
        {"tie_embeddings": False, "bias": True, "qk_norm": True, "dtype": "float32"},
        248524288,
        520532480,
    ),
    (
        (4, 4, 512, 256, 512, 16),
        {"mlp": "relu2", "tie_embeddings": False, "activation_memory_budget": 0.7},
        387518976,
        720661504,
    ),
    (
        (4, 8, 512, 50304, 256, 8),
        {"mlp": "swiglu", "position": "rope", "loss": "full", "dtype": "float32", "dropout": 0.1},
        661033472,
        1354309632,
    ),
    (
        (5, 8, 512, 4096, 512, 12),
        {"position": "rope", "bias": True, "qk_norm": True, "dropout": 0.1},
        474306048,
        854738432,
    ),
    (
        (5, 8, 1024, 32000, 512, 8),
        {"norm": "rmsnorm", "tie_embeddings": False, "bias": True, "qk_norm": True, "param_dtype": "bfloat16"},
        569431552,
        1741252096,
    ),
    ((5, 6, 192, 50304, 512, 4), {"norm": "rmsnorm", "bias": True, "dtype": "float32"}, 120763904, 520930304),
    ((6, 8, 256, 256, 1024, 4), {"norm": "rmsnorm", "mlp": "swiglu", "position": "rope"}, 193944064, 310167552),
    ((6, 2, 64, 256, 1024, 12), {"mlp": "swiglu", "position": "rope", "bias": True}, 158439936, 198352384),
    (
        (9, 4, 512, 8192, 256, 8),
        {
            "norm": "rmsnorm",
            "mlp": "relu2",
            "tie_embeddings": False,
            "bias": True,
            "qk_norm": True,
            "dtype": "float32",
            "activation_memory_budget": 0.7,
        },
        479200768,
        1109253632,
    ),
    (
        (9, 8, 512, 4096, 1024, 16),
        {"norm": "rmsnorm", "mlp": "relu2", "tie_embeddings": False, "loss": "full", "qk_norm": True},
        1754080768,
        2494300160,
    ),
    (
        (10, 4, 256, 256, 128, 2),
        {"position": "rope", "tie_embeddings": False, "loss": "full", "bias": True, "dtype": "float32", "n_kv_head": 2},
        25524736,
        150678528,
    ),
    (
        (10, 8, 512, 32000, 256, 2),
        {"position": "rope", "tie_embeddings": False, "bias": True, "dtype": "float32"},
        193722880,
        1290182656,
    ),
    (
        (10, 8, 512, 8192, 64, 1),
        {"norm": "rmsnorm", "mlp": "swiglu", "position": "rope", "loss": "full"},
        92186624,
        788531200,
    ),
    (
        (10, 6, 384, 8192, 64, 1),
        {"position": "rope", "bias": True, "qk_norm": True, "n_kv_head": 3},
        54769664,
        401848832,
    ),
    ((10, 6, 768, 256, 128, 1), {"mlp": "relu2", "tie_embeddings": False, "loss": "full"}, 178049024, 1430290944),
    (
        (11, 8, 1024, 256, 64, 1),
        {
            "norm": "rmsnorm",
            "mlp": "relu2",
            "tie_embeddings": False,
            "bias": True,
            "n_kv_head": 4,
            "activation_memory_budget": 0.7,
        },
        279753728,
        2555752960,
    ),
]


def run_of(shape: tuple[int, ...], **keys: object) -> RunConfig:
    own = {"gradient_accumulation_steps": 2, "activation_memory_budget": 0.9}
    return make_run({**own, **dict(zip(KEYS, shape, strict=True)), **keys})


@pytest.mark.parametrize(("shape", "keys", "saved_bytes", "live_bytes"), ROWS)
def test_recorded_plans(shape: tuple[int, ...], keys: dict[str, object], saved_bytes: int, live_bytes: int) -> None:
    run = run_of(shape, **keys)
    parts = pieces(run, "gptfit", whole=False)
    assert parts.saved_bytes == pytest.approx(saved_bytes, rel=0.005)
    assert steady_step(run, parts).peak().live_bytes == pytest.approx(live_bytes, rel=0.01)


def test_a_sum_that_would_read_five_tensors_is_written_down() -> None:
    """By hand: rows of the embedding and of positions, and two projections a block: the third is the fifth."""
    listing = Lean(run_of((4, 2, 64, 256, 64, 8)))
    blocks = [{part: f"{i} {part}" for part in ("attn.c_proj", "mlp.c_proj")} for i in range(4)]
    listing.sums(["embedding", "positions"], blocks)
    assert [kernel.writes for kernel in listing.kernels] == [("1+0/x at ln_2",), ("3+0/x at ln_2",)]
    assert listing.kernels[1].reads == (
        "1+0/x at ln_2",
        "1 mlp.c_proj",
        "2 attn.c_proj",
        "2 mlp.c_proj",
        "3 attn.c_proj",
    )
    assert listing.stream_reads[-1] == ["3+0/x at ln_2", "3 mlp.c_proj"]


@pytest.mark.parametrize(("n_between", "groups"), [(10, 1), (70, 2)])
def test_kernels_of_a_kind_are_one_unless_they_are_far_apart(n_between: int, groups: int) -> None:
    kinds = [Kernel((name,), ("x",), group=f"{name}/of norm") for name in "ab"]
    kernels = [kinds[0], *(Kernel((f"c{i}",), ("x",)) for i in range(n_between)), kinds[1]]
    fuse_alike(kernels, {"x": Slot(1024, "float32")}, "/of norm")
    assert len({kernel.group for kernel in kinds}) == groups
