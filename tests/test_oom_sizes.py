"""Sizes that a paste tells by their product alone."""

import pytest

from gptfit.config import make_run
from gptfit.estimate import estimate
from gptfit.oom.diagnose import explain_text
from gptfit.oom.sizes import gpt2_of, n_params_of

MESSAGE = """Traceback (most recent call last):
  File "/home/me/nanoGPT/train.py", line 301, in <module>
    scaler.scale(loss).backward()
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.54 GiB. GPU 0 has a total capacity of 11.58 GiB of \
which 700.00 MiB is free. Including non-PyTorch memory, this process has 10.90 GiB memory in use. Of the allocated \
memory 10.40 GiB is allocated by PyTorch, and 100.00 MiB is reserved by PyTorch but unallocated.
"""


@pytest.mark.parametrize("bias", [False, True])
def test_the_count_is_that_of_the_twin(bias: bool) -> None:
    run = make_run({"n_layer": 3, "n_head": 2, "n_embd": 128, "vocab_size": 1000, "block_size": 64, "bias": bias})
    twin = estimate(run, "nanogpt").n_params
    assert n_params_of(3, 128, 1000, bias, 64) == twin
    assert n_params_of(3, 128, 1000, bias) == twin - 64 * 128


@pytest.mark.parametrize(
    ("n_params", "n_layer", "vocab_size"),
    [
        (124_439_808, 12, 50257),  # OpenAI's gpt2, as transformers prints it
        (123_590_000, 12, 50304),  # nanoGPT trained from scratch: 50304 tokens, no biases
        (353_770_000, 24, 50257),  # gpt2-medium in nanoGPT, without its positions
    ],
)
def test_well_known_numbers_of_parameters(n_params: int, n_layer: int, vocab_size: int) -> None:
    found = gpt2_of(n_params)
    assert (found["n_layer"], found["vocab_size"]) == (n_layer, vocab_size)


@pytest.mark.parametrize("n_params", [124_439_809, 10_650_000, 123_500_000, 1])
def test_other_numbers_are_no_gpt2s(n_params: int) -> None:
    assert gpt2_of(n_params) == {}


def test_nanogpts_log_settles_model_and_batch() -> None:
    text = "Overriding: batch_size = 16\ntokens per iteration will be: 655,360\nnumber of parameters: 123.59M\n"
    answer = explain_text(text + "compiling the model... (takes a ~minute)\n" + MESSAGE)
    assert answer.instant is not None and answer.instant.adds_up
    assert not answer.missing
    assert any("n_layer=12" in warning and "block_size=1024" in warning for warning in answer.warnings)
    assert any(remedy.enough for remedy in answer.remedies)


def test_a_number_that_is_no_gpt2s_settles_nothing() -> None:
    text = "Overriding: batch_size = 16\ntokens per iteration will be: 655,361\nnumber of parameters: 10.65M\n"
    answer = explain_text(text + MESSAGE)
    assert answer.instant is None
    assert {"n_layer", "n_embd", "block_size"} <= answer.missing
