"""The twin of a compiled evaluation against inductor's own plans, recorded with torch 2.13.0, shapes drawn at random. A
plan is the trace of what inductor's lowering writes for a forward without gradients (trace.py)."""

from collections import Counter

import pytest

from gptfit.config import RunConfig, make_run
from gptfit.estimate import under_program
from gptfit.memory import compiled_evaluation
from gptfit.memory.compiled_order import reordered
from gptfit.memory.compiled_plan import OUTPUT, TEMPORARY, Kernel, Plan, Slot
from gptfit.memory.step import pieces
from gptfit.memory.tape import Tape

KEYS = ("n_layer", "n_head", "n_embd", "vocab_size", "block_size", "batch_size")

# Program, values of KEYS, other keys, bytes at the live peak of an evaluation: parameters, batch, what is made of it.
ROWS: list[tuple[str, tuple[int, ...], dict[str, object], int]] = [
    (
        "gptfit",
        (4, 6, 96, 65, 128, 1),
        {"n_kv_head": 3, "norm": "rmsnorm", "mlp": "relu2", "logit_softcap": 15.0},
        2022400,
    ),
    ("nanogpt", (7, 4, 256, 65, 512, 2), {"bias": True}, 29174784),
    ("gptfit", (3, 4, 128, 65, 512, 2), {"n_kv_head": 1, "mlp": "relu2", "logit_softcap": 15.0}, 5583872),
    ("nanogpt", (4, 2, 64, 65, 1000, 1), {}, 2571264),
    ("gptfit", (2, 1, 32, 65, 64, 32), {"mlp": "relu2"}, 1207296),
    ("nanogpt", (1, 8, 512, 65, 64, 32), {"dtype": "float32"}, 38051840),
    ("nanogpt", (2, 8, 256, 65, 1000, 32), {}, 139495424),
    (
        "gptfit",
        (6, 6, 384, 65, 128, 8),
        {
            "dtype": "float32",
            "n_kv_head": 3,
            "norm": "rmsnorm",
            "mlp": "swiglu",
            "position": "rope",
            "tie_embeddings": False,
        },
        55192064,
    ),
    ("gptfit", (3, 1, 32, 65, 512, 2), {"norm": "rmsnorm", "mlp": "swiglu", "param_dtype": "bfloat16"}, 1811456),
    (
        "gptfit",
        (5, 4, 128, 256, 128, 32),
        {"n_kv_head": 2, "mlp": "swiglu", "position": "rope", "tie_embeddings": False},
        21772800,
    ),
    (
        "gptfit",
        (4, 8, 512, 65, 512, 4),
        {
            "bias": True,
            "n_kv_head": 2,
            "norm": "rmsnorm",
            "mlp": "swiglu",
            "tie_embeddings": False,
            "param_dtype": "bfloat16",
        },
        51144704,
    ),
    ("nanogpt", (1, 3, 192, 65, 1000, 1), {"dtype": "float32"}, 7215104),
    ("gptfit", (3, 4, 64, 65, 256, 32), {"dtype": "float32", "position": "rope"}, 17601536),
    (
        "gptfit",
        (2, 2, 128, 65, 128, 2),
        {"loss": "full", "n_kv_head": 1, "mlp": "swiglu", "position": "rope", "attention": "math"},
        2995200,
    ),
    ("gptfit", (7, 16, 1024, 65, 512, 1), {"n_kv_head": 4, "position": "rope"}, 328871936),
    (
        "gptfit",
        (7, 2, 64, 32000, 128, 32),
        {"loss": "full", "n_kv_head": 1, "norm": "rmsnorm", "mlp": "swiglu"},
        276782592,
    ),
    ("gptfit", (2, 2, 64, 256, 128, 2), {"loss": "full", "norm": "rmsnorm"}, 794112),
    (
        "gptfit",
        (3, 4, 128, 65, 256, 32),
        {"bias": True, "loss": "full", "norm": "rmsnorm", "position": "rope"},
        21762048,
    ),
    ("gptfit", (7, 3, 48, 65, 64, 2), {"bias": True, "norm": "rmsnorm", "mlp": "relu2", "attention": "math"}, 1132544),
    (
        "gptfit",
        (3, 3, 96, 1000, 256, 1),
        {"bias": True, "norm": "rmsnorm", "mlp": "swiglu", "position": "rope", "attention": "math"},
        3688448,
    ),
    ("gptfit", (12, 2, 32, 256, 256, 64), {"mlp": "relu2", "qk_norm": True}, 14054912),
    ("gptfit", (7, 1, 32, 65, 64, 3), {"dtype": "float32", "loss": "full", "attention": "math"}, 599040),
    (
        "gptfit",
        (3, 2, 128, 1000, 256, 1),
        {"bias": True, "loss": "full", "position": "rope", "attention": "math", "param_dtype": "bfloat16"},
        2934784,
    ),
    (
        "gptfit",
        (4, 3, 192, 256, 256, 12),
        {
            "loss": "full",
            "norm": "rmsnorm",
            "mlp": "relu2",
            "attention": "math",
            "qk_norm": True,
            "tie_embeddings": False,
        },
        33104896,
    ),
    (
        "gptfit",
        (5, 3, 192, 1000, 512, 32),
        {"norm": "rmsnorm", "position": "rope", "qk_norm": True, "param_dtype": "bfloat16", "logit_softcap": 15.0},
        68711936,
    ),
]


def run_of(program: str, shape: tuple[int, ...], **keys: object) -> RunConfig:
    run = make_run({**dict(zip(KEYS, shape, strict=True)), "eval_batch_size": shape[-1], **keys, "batch_size": 1})
    return under_program(run, program)


def tape_of(run: RunConfig, program: str) -> Tape:
    parts = pieces(run, program)
    return Tape([*parts.parameter_items, *parts.evaluation])


@pytest.mark.parametrize(("program", "shape", "keys", "live_bytes"), ROWS)
def test_recorded_plans(program: str, shape: tuple[int, ...], keys: dict[str, object], live_bytes: int) -> None:
    tape = tape_of(run_of(program, shape, **keys), program)
    assert tape.peak().live_bytes == pytest.approx(live_bytes, rel=0.0005)
    assert tape.peak().live_bytes == tape.expanded_peak_bytes()


@pytest.mark.parametrize("keys", [{}, {"attention": "math"}, {"norm": "rmsnorm", "mlp": "swiglu", "position": "rope"}])
@pytest.mark.parametrize("loss", ["full", "chunked"])
def test_it_gives_back_what_it_takes(keys: dict[str, object], loss: str) -> None:
    alive: Counter[str] = Counter()
    parts = pieces(run_of("gptfit", (5, 4, 64, 256, 32, 3), loss=loss, **keys), "gptfit")
    for sign, _, buffer in Tape(parts.evaluation).expand():
        alive[buffer.name] += sign
    assert not +alive


@pytest.mark.parametrize("n_layer", [12, 13])
@pytest.mark.parametrize("keys", [{}, {"qk_norm": True}, {"position": "rope", "dtype": "float32"}])
def test_many_blocks_are_as_some(n_layer: int, keys: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of("gptfit", (n_layer, 4, 64, 65, 128, 16), **keys)
    short = tape_of(run, "gptfit").peak()
    monkeypatch.setattr(compiled_evaluation, "LONG", n_layer)
    assert tape_of(run, "gptfit").peak() == short


def test_nothing_is_kept_for_a_backward() -> None:
    """Twice the blocks: more parameters, and nothing else."""
    few, many = (run_of("nanogpt", (n, 4, 128, 65, 256, 16)) for n in (10, 20))
    peaks = [Tape(pieces(run, "nanogpt").evaluation).peak().live_bytes for run in (few, many)]
    assert peaks[0] == peaks[1]


def calls(*kernels: tuple[str, int, tuple[str, ...]]) -> tuple[list[Kernel], dict[str, Slot]]:
    """Calls of a library: what each makes, of how many bytes, of what. The last one's is handed out."""
    slots = {name: Slot(n_bytes, "float32", TEMPORARY) for name, n_bytes, _ in kernels}
    slots[kernels[-1][0]] = slots[kernels[-1][0]]._replace(kind=OUTPUT)
    return [Kernel((name,), reads, extern=True) for name, _, reads in kernels], slots


def allocated(kernels: list[Kernel], slots: dict[str, Slot]) -> list[str]:
    return [step.name for step in Plan(kernels, slots).steps if step is not None and step.sign > 0]


def test_a_freed_place_is_taken_by_the_next_of_its_size() -> None:
    kernels, slots = calls(("a", 4096, ()), ("b", 8192, ("a",)), ("c", 4096, ("b",)), ("d", 512, ("c",)))
    assert allocated(kernels, slots) == ["a", "b", "d"]


def test_no_place_waits_where_that_would_raise_the_peak() -> None:
    kernels, slots = calls(
        ("a", 4096, ()), ("b", 2048, ("a",)), ("c", 16384, ("b",)), ("d", 4096, ("c",)), ("e", 512, ("d",))
    )
    assert allocated(kernels, slots) == ["a", "b", "c", "d", "e"]


def test_an_order_with_a_lower_peak_is_taken() -> None:
    """Two large tensors, each summed to a small one: as written both are there at once."""
    kernels, slots = calls(
        ("a", 4096, ()), ("b", 4096, ()), ("sum a", 4, ("a",)), ("sum b", 4, ("b",)), ("total", 4, ("sum a", "sum b"))
    )
    order = [kernel.writes[0] for kernel in reordered(kernels, slots, {}, 0, 0)]
    assert order.index("sum a") < order.index("b") or order.index("sum b") < order.index("a")


def test_what_dies_before_a_call_waits_through_it() -> None:
    """A kernel's input is let go of before the call that follows: its place is idle while the call runs, which is the
    peak, and so cannot be kept for later."""
    kernels, slots = calls(
        ("a", 512, ()), ("b", 4096, ("a",)), ("c", 8192, ("b",)), ("d", 512, ("c",)), ("e", 4, ("d",))
    )
    kernels[1].extern = False
    assert allocated(kernels, slots) == ["a", "b", "c", "d", "e"]
