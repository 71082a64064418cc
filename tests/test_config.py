"""RunConfig, make_run and derive: what is accepted, what follows from what, and what errors say."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptfit.config import KEYS, MAX_NUMBER, RunConfig, default_n_hidden, derive, make_run
from gptfit.errors import GptfitError

HEADS = st.sampled_from([1, 2, 3, 4, 6, 8, 12])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"batchsize": 8}, 'unknown key "batchsize"; did you mean batch_size?'),
        ({"loss": "chunk"}, "loss=chunk: expected full or chunked; did you mean chunked?"),
        ({"optimizer": "adam"}, "did you mean adamw?"),
        ({"dtype": "bf16"}, "expected float32, bfloat16 or float16"),
        ({"batch_size": 0}, "batch_size=0: expected greater than or equal to 1"),
        ({"batch_size": "many"}, "batch_size=many: expected a valid integer"),
        ({"batch_size": True}, "batch_size=True: expected a number"),
        ({"learning_rate": False}, "learning_rate=False: expected a number"),
        ({"learning_rate": float("inf")}, "learning_rate=inf: expected a finite number"),
        ({"n_embd": 100, "n_head": 12}, "n_embd 100 is not divisible by n_head 12"),
        ({"n_head": 12, "n_kv_head": 5}, "n_head 12 is not divisible by n_kv_head 5"),
        ({"n_gpus": 7}, "not divisible by n_gpus 7"),
        ({"n_gpus": 2, "strategy": "single"}, "strategy single is for one GPU"),
        ({"block_size": 10**13}, "expected at most 1e+12"),
        ({"block_size": 10**6000}, "block_size=a number of 19932 bits"),
        ({"activation_memory_budget": 0}, "activation_memory_budget=0: expected greater than 0"),
        ({"activation_memory_budget": 0.9, "compile": False}, "activation_memory_budget=0.9 is for compile=True"),
        (
            {"activation_memory_budget": 0.9, "activation_checkpointing": "block"},
            "goes with activation_checkpointing=none, not block",
        ),
        ({"dataset": "a\nb", "loss": "x\ny"}, "loss=x\\ny: expected"),
    ],
)
def test_an_error_is_one_line_with_what_was_given_and_expected(values, expected):
    with pytest.raises(GptfitError) as caught:
        make_run(values)
    assert expected in caught.value.message
    assert len(caught.value.message.splitlines()) == 1
    assert caught.value.hint


@given(st.sampled_from(KEYS), st.one_of(st.none(), st.integers(), st.floats(), st.text(), st.lists(st.integers())))
def test_any_value_of_any_key_is_a_run_or_one_line(key, value):
    try:
        run = make_run({key: value})
    except GptfitError as error:
        assert len(error.message.splitlines()) == 1 and len(error.message) < 300
    else:
        assert not isinstance(getattr(run, key), int | float) or abs(getattr(run, key)) <= MAX_NUMBER


@given(HEADS, HEADS)
def test_a_value_never_set_follows_and_a_value_set_stays(before, after):
    free = derive(make_run({"n_head": before, "batch_size": before}), n_head=after, batch_size=after)
    assert (free.n_kv_head, free.eval_batch_size) == (after, after)
    held = derive(make_run({"eval_batch_size": before, "n_kv_head": 1}), n_head=after, batch_size=after)
    assert (held.n_kv_head, held.eval_batch_size) == (1, before)


@given(st.integers(1, 8), st.integers(1, 64), st.integers(1, 100), st.integers(1, 4096))
def test_tokens_per_step_count_all_gpus(n_gpus, micro_steps, batch_size, block_size):
    accumulation = n_gpus * micro_steps
    run = make_run(
        {
            "n_gpus": n_gpus,
            "gradient_accumulation_steps": accumulation,
            "batch_size": batch_size,
            "block_size": block_size,
        }
    )
    assert run.micro_steps == micro_steps
    assert run.tokens_per_step == n_gpus * (micro_steps * batch_size * block_size)
    assert run.strategy == ("single" if n_gpus == 1 else "ddp")


@given(st.integers(1, 20000))
def test_swiglu_width_is_the_next_multiple_of_256(n_embd):
    width = default_n_hidden(n_embd, "swiglu")
    assert width % 256 == 0 and 0 <= width - 8 * n_embd / 3 < 256
    assert default_n_hidden(n_embd, "gelu") == 4 * n_embd


def test_llama_7b_width():
    assert default_n_hidden(4096, "swiglu") == 11008  # https://arxiv.org/abs/2302.13971, 7B


def test_a_run_is_frozen_and_its_change_validated():
    run = RunConfig()
    with pytest.raises(ValueError, match="frozen"):
        run.batch_size = 3  # type: ignore[misc]
    with pytest.raises(GptfitError, match="batch_size=-1"):
        derive(run, batch_size=-1)
