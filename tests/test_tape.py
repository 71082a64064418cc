"""The tape: closed forms against expansion, on random tapes and on tapes of real programs."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptfit.config import RunConfig, make_run
from gptfit.memory.step import PROGRAMS, first_steps, pieces, steady_step
from gptfit.memory.tape import Event, Item, Loop, Mark, Tape, make_buffer

BUFFERS = [make_buffer(name, "activation", (size,), "uint8") for name, size in (("a", 512), ("b", 3000), ("c", 70_000))]


def balanced(draw: st.DrawFn, depth: int) -> list[Item]:
    """Allocations that are all freed again in this stretch or kept, and loops of such stretches."""
    items: list[Item] = [Mark("forward", f"op {depth}")]
    alive: list[int] = []
    for _ in range(draw(st.integers(0, 6))):
        kind = draw(st.sampled_from(("alloc", "free", "loop")))
        if kind == "alloc":
            index = draw(st.integers(0, len(BUFFERS) - 1))
            alive.append(index)
            items.append(Event(1, BUFFERS[index]))
        elif kind == "free" and alive:
            items.append(Event(-1, BUFFERS[alive.pop(draw(st.integers(0, len(alive) - 1)))]))
        elif kind == "loop" and depth < 3:
            items.append(Loop(draw(st.integers(0, 4)), balanced(draw, depth + 1), numbered=draw(st.booleans())))
    return items


@st.composite
def tapes(draw: st.DrawFn) -> Tape:
    return Tape(balanced(draw, 0))


@given(tapes())
def test_closed_form_peak_is_the_peak_of_the_expanded_events(tape: Tape) -> None:
    assert tape.peak().live_bytes == tape.expanded_peak_bytes()


@given(tapes())
def test_live_set_adds_up_to_the_peak(tape: Tape) -> None:
    assert sum(buffer.n_bytes * count for buffer, count in tape.live_at_peak().items()) == tape.peak().live_bytes


@given(tapes())
def test_phase_peaks_hold_the_peak(tape: Tape) -> None:
    assert max(tape.phases().values(), default=0) == tape.peak().live_bytes


def test_a_loop_that_grows_peaks_in_its_last_round() -> None:
    a, b, _ = BUFFERS
    tape = Tape([Loop(5, [Event(1, a), Event(1, b), Event(-1, b)])])
    assert tape.peak().live_bytes == 5 * 512 + 3072
    assert tape.live_at_peak() == Counter({a: 5, b: 1})


def test_a_free_of_what_is_not_alive_is_an_error_of_the_writer() -> None:
    with pytest.raises(ValueError, match="not alive"):
        Tape([Event(-1, BUFFERS[0])]).expanded_peak_bytes()


@st.composite
def runs(draw: st.DrawFn) -> RunConfig:
    head_size = draw(st.sampled_from((8, 16, 24)))
    n_kv_head = draw(st.integers(1, 3))
    n_head = n_kv_head * draw(st.integers(1, 2))
    return make_run(
        {
            "n_layer": draw(st.integers(1, 7)),
            "n_head": n_head,
            "n_kv_head": n_kv_head,
            "n_embd": n_head * head_size,
            "vocab_size": draw(st.integers(2, 3000)),
            "block_size": draw(st.integers(1, 80)),
            "batch_size": draw(st.integers(1, 5)),
            "gradient_accumulation_steps": draw(st.integers(1, 5)),
            "dtype": draw(st.sampled_from(("float32", "bfloat16"))),
            "bias": draw(st.booleans()),
            "dropout": draw(st.sampled_from((0.0, 0.1))),
            "norm": draw(st.sampled_from(("layernorm", "rmsnorm"))),
            "mlp": draw(st.sampled_from(("gelu", "swiglu", "relu2"))),
            "position": draw(st.sampled_from(("learned", "rope"))),
            "tie_embeddings": draw(st.booleans()),
            "loss": draw(st.sampled_from(("full", "chunked"))),
            "activation_checkpointing": draw(st.sampled_from(("none", "block"))),
            "checkpoint_every": draw(st.integers(1, 4)),
            "optimizer": draw(
                st.sampled_from(("adamw", "adamw16bit", "adamw8bit", "adafactor", "lion", "muon", "sgd"))
            ),
            "optimizer_impl": draw(st.sampled_from(("fused", "foreach", "for-loop"))),
            "grad_clip": draw(st.sampled_from((0.0, 1.0))),
            "compile": draw(st.booleans()),
        }
    )


def plain(run: RunConfig) -> RunConfig:
    """The same sizes as nanoGPT's code can run them."""
    keys = ("n_layer", "n_head", "n_embd", "vocab_size", "block_size", "batch_size", "gradient_accumulation_steps")
    keys += ("dtype", "bias", "dropout", "optimizer_impl", "grad_clip", "compile")
    return make_run({key: getattr(run, key) for key in keys} | {"loss": "full"})


@settings(max_examples=60, deadline=None)
@given(run=runs(), program=st.sampled_from(sorted(PROGRAMS)))
def test_programs_close_and_agree_with_their_expansion(run: RunConfig, program: str) -> None:
    run = plain(run) if program == "nanogpt" else run
    parts = pieces(run, program)
    tape = steady_step(run, parts)
    peak = tape.peak().live_bytes
    assert tape.expanded_peak_bytes() == peak
    assert sum(buffer.n_bytes * count for buffer, count in tape.live_at_peak().items()) == peak

    # What is left after the steps is what was there before: parameters, states, the batch, what the loop holds.
    alive: Counter[str] = Counter()
    for sign, _, buffer in first_steps(run, parts).expand():
        alive[buffer.category] += sign * buffer.n_bytes
    kept = Tape([*parts.parameter_items, *parts.states, *parts.batch, *parts.kept])
    expected: Counter[str] = Counter()
    for _, _, buffer in kept.expand():
        expected[buffer.category] += buffer.n_bytes
    assert +alive == +expected
