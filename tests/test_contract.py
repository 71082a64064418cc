"""What an estimate's object promises of itself, over runs of all kinds: it adds up, and its figures are in order."""

import pickle
import random
from collections.abc import Iterator
from typing import Any, get_args

import pytest

from gptfit.config import RunConfig, make_run
from gptfit.errors import GptfitError
from gptfit.estimate import estimate
from gptfit.gpus import load_gpu
from gptfit.memory.plainpickle import load_plain
from gptfit.memory.step import PROGRAMS
from gptfit.plan import worth_trying

CARDS = ("gtx1060-3gb", "rtx4070", "h100-sxm", "mi300x", None)
CHOICES = {key: get_args(field.annotation) for key, field in RunConfig.model_fields.items()}
CHOICES |= {key: (True, False) for key, field in RunConfig.model_fields.items() if field.annotation is bool}
CHOICES |= {
    "n_layer": (1, 2, 3, 12),
    "n_embd": (64, 192, 768, 1536),
    "vocab_size": (65, 5000, 50304, 128256),
    "block_size": (1, 33, 256, 1024, 4096),
    "batch_size": range(1, 40),
    "eval_batch_size": range(1, 40),
    "loss_chunk_size": (7, 512, 10**6),
    "checkpoint_every": (1, 2, 3),
    "activation_memory_budget": (1.0, 0.5, 0.01),
    "dropout": (0.0, 0.1),
    "logit_softcap": (0.0, 15.0),
    "grad_clip": (0.0, 1.0),
    "eval_interval": (0, 2000),
}


def drawn(dice: random.Random) -> dict[str, Any]:
    """Keys at random, most of them left alone: half of such runs are possible ones."""
    n_head, n_gpus = dice.choice((1, 2, 4, 8)), dice.choice((1, 1, 1, 2, 8))
    sizes = {"n_head": n_head, "n_kv_head": dice.choice([n for n in (1, 2, 4, 8) if n <= n_head]), "n_gpus": n_gpus}
    sizes |= {"gradient_accumulation_steps": n_gpus * dice.choice((1, 2, 5)), "compile": dice.random() < 0.4}
    others = {key: dice.choice(values) for key, values in CHOICES.items() if values and dice.random() < 0.3}
    return {"n_layer": 2, "n_embd": 192, **others, **sizes}


def estimates(seed: int, count: int) -> Iterator[tuple[dict[str, Any], int]]:
    """The objects of `count` possible runs, each with what others hold on its card."""
    dice = random.Random(seed)
    while count:
        program, card, reserve_bytes = dice.choice(tuple(PROGRAMS)), dice.choice(CARDS), dice.choice((0, 2**30))
        keys = drawn(dice)
        try:
            answer = estimate(make_run(keys), program, load_gpu(card) if card else None, reserve_bytes)
        except GptfitError:
            continue  # what this program's code, or such a run, has not
        count -= 1
        print(program, card, keys)  # shown where an assertion fails
        yield answer.to_json(), reserve_bytes


def not_whole(value: Any, key: str = "") -> Iterator[str]:
    """The keys of bytes in an object that are no integers."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from not_whole(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from not_whole(inner)
    elif key.endswith("bytes") and type(value) is not int and value is not None:
        yield key


@pytest.mark.parametrize("seed", range(4))
def test_an_estimate_adds_up_and_its_figures_are_in_order(seed: int) -> None:
    for answer, reserve_bytes in estimates(seed, 40):
        peak, rows, gpu = answer["peak"], answer["tensors"], answer["gpu"]
        live, allocated = peak["live_bytes"], peak["allocated_bytes"]
        assert live < allocated <= peak["reserved_bytes"] < peak["process_bytes"]
        assert sum(part["bytes"] for part in answer["breakdown"]) == allocated
        assert sum(row["bytes"] for row in rows) == allocated
        assert sum(row["bytes"] for row in rows if row["category"] not in ("workspace", "slack")) == live
        assert sorted((row["bytes"] for row in rows), reverse=True) == [row["bytes"] for row in rows]
        assert max(phase["peak_live_bytes"] for phase in answer["phases"]) == live
        assert 0 <= answer["saved_for_backward_bytes"] < live
        assert list(not_whole(answer)) == []
        if gpu is None:
            assert (answer["verdict"], answer["margin_bytes"]) == (None, None)
            continue
        assert gpu["usable_bytes"] == gpu["total_bytes"] - gpu["reserve_bytes"]
        assert gpu["reserve_bytes"] == reserve_bytes
        assert answer["margin_bytes"] == gpu["usable_bytes"] - peak["process_bytes"]
        assert answer["verdict"] == ("fits" if answer["margin_bytes"] >= 0 else "does_not_fit")


def test_a_recording_that_was_cut_off_is_said_to_be() -> None:
    """Wherever it is cut: a copy that broke off is no attack."""
    raw = pickle.dumps({"device_traces": [[{"action": "alloc", "addr": 1 << 40, "size": 2.5, "name": "x" * 300}]]})
    for length in range(1, len(raw)):
        with pytest.raises(GptfitError, match=r"ends in the middle|is a damaged pickle"):
            load_plain(raw[:length], "cut.pickle")


@pytest.mark.parametrize(("first", "last", "sequences"), [(1, 480, 480), (1, 5000, 100_000), (3, 1_000_000, 1_000_000)])
def test_of_a_million_micro_batches_those_that_keep_the_tokens_are_tried(first: int, last: int, sequences: int) -> None:
    tried = list(worth_trying(first, last, sequences))
    assert tried == sorted(set(tried))
    assert (tried[0], tried[-1]) == (first, last)
    assert len(tried) < 2500
    # A divisor is exact, and a loss to nobody: each that is in reach is there.
    assert {m for m in range(first, last + 1) if sequences % m == 0} <= set(tried)
