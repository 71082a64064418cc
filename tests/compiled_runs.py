"""Runs that are compiled, for the tests of their twins: how they are written down, and what holds of each."""

from collections import Counter

from gptfit.config import RunConfig, make_run
from gptfit.memory.step import Pieces, first_steps, pieces, steady_step
from gptfit.memory.tape import Tape

KEYS = ("n_layer", "n_head", "n_embd", "vocab_size", "block_size", "batch_size")

# What our model can be made of. Of each some values, to be drawn by itself.
LEVERS: dict[str, list[object]] = {
    "loss": ["full", "chunked"],
    "norm": ["layernorm", "rmsnorm"],
    "mlp": ["gelu", "swiglu", "relu2"],
    "position": ["learned", "rope"],
    "attention": ["flash", "math"],
    "tie_embeddings": [True, False],
    "qk_norm": [True, False],
    "bias": [True, False],
    "dropout": [0.0, 0.1],
}


def run_of(shape: tuple[int, ...], **keys: object) -> RunConfig:
    """A run of two micro-steps of values of KEYS, in that order, and other keys."""
    return make_run({"gradient_accumulation_steps": 2, **dict(zip(KEYS, shape, strict=True)), **keys})


def measured(run: RunConfig, program: str = "gptfit") -> tuple[int, int]:
    """Bytes kept for backward and at the live peak."""
    parts = pieces(run, program, whole=False)
    return parts.saved_bytes, steady_step(run, parts).peak().live_bytes


def alive_after(tape: Tape) -> Counter[str]:
    alive: Counter[str] = Counter()
    for sign, _, buffer in tape.expand():
        alive[buffer.name] += sign
    return alive


def check_steps(run: RunConfig, parts: Pieces) -> None:
    """A step gives back what it takes, and the closed form of its peak is that of all its events."""
    start: Counter[str] = Counter()
    for item in (*parts.parameter_items, *parts.states, *parts.batch, *parts.kept):
        start.update(alive_after(Tape([item])))
    for tape in (steady_step(run, parts), first_steps(run, parts)):
        assert tape.peak().live_bytes == tape.expanded_peak_bytes()
        assert +alive_after(tape) == +start
