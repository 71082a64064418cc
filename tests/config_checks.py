"""What the tests of configs share: the one line an error is, and parameters counted independently."""

import pytest

from gptfit.config import RunConfig
from gptfit.door import read_config
from gptfit.errors import GptfitError

# Parameters as published: nanoGPT's models by its own count (README: 124M, 350M, 774M, 1558M), the others by
# the totals of their safetensors, Qwen's less 24 · (896 + 128 + 128) biases.
PUBLISHED = {
    "tinyllama-1.1b": 1_100_048_384,
    "llama-3.2-1b": 1_235_814_400,
    "qwen2.5-0.5b": 494_032_768 - 24 * (896 + 128 + 128),
}


def n_params(run: RunConfig) -> int:
    kv_width = run.n_kv_head * run.head_size
    matrices = 2 * run.n_embd**2 + 2 * run.n_embd * kv_width
    matrices += (3 if run.mlp == "swiglu" else 2) * run.n_embd * run.n_hidden
    # q, k, v and output, the MLP, and the block's two norms.
    biases = (3 * run.n_embd + 2 * kv_width + run.n_hidden + 2 * run.n_embd) * run.bias
    tables = run.vocab_size * (1 if run.tie_embeddings else 2) + run.block_size * (run.position == "learned")
    return run.n_layer * (matrices + biases + 2 * run.n_embd) + run.n_embd * (1 + run.bias) + tables * run.n_embd


def error_of(config, *overrides) -> str:
    """The one line that reading `config` ends with."""
    with pytest.raises(GptfitError) as caught:
        read_config(None if config is None else str(config), overrides)
    assert len(caught.value.message.splitlines()) == 1 and len(caught.value.message) < 500
    return caught.value.message
