"""Hugging Face configs: published parameter counts, what is left out, and what is refused."""

import json

import pytest

from config_checks import PUBLISHED, error_of, n_params
from gptfit.door import read_config

GPT2 = {"model_type": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024, "vocab_size": 50257}
LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}


def write_json(tmp_path, *parts, **more):
    path = tmp_path / "config.json"
    data = {key: value for part in parts for key, value in part.items()} | more
    path.write_text(json.dumps({key: value for key, value in data.items() if value != "drop"}))
    return path


def test_hugging_face_shapes(tmp_path):
    run = read_config(str(write_json(tmp_path, GPT2, n_inner=None, architectures=["GPT2LMHeadModel"]))).run
    assert n_params(run) == 124_439_808
    source = read_config(str(write_json(tmp_path, LLAMA, hidden_act="silu", bos_token_id=1)), ["block_size=512"])
    assert n_params(source.run) == PUBLISHED["tinyllama-1.1b"]
    assert source.run.block_size == 512 and source.program == "gptfit" and "bos_token_id" in source.ignored
    assert {"n_layer", "n_kv_head", "block_size"} <= source.user_keys
    run = read_config(str(write_json(tmp_path, LLAMA, rope_parameters={"rope_theta": 5e5, "rope_type": "llama3"}))).run
    assert run.rope_theta == 5e5
    source = read_config(str(write_json(tmp_path, LLAMA, model_type="qwen2", tie_word_embeddings=True)))
    assert source.run.tie_embeddings and any(f"{22 * (2048 + 512):d}" in note for note in source.notes)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({**GPT2, "model_type": "gpt_neox"}, 'model_type "gpt_neox" is not known'),
        ({**GPT2, "model_type": ["x"]}, "is not known"),
        ({**GPT2, "model_type": "drop"}, "no model_type"),
        ({**GPT2, "n_layer": "drop"}, "has no n_layer"),
        ({**GPT2, "n_layer": "12"}, 'n_layer="12": expected an integer'),
        ({**GPT2, "n_layer": True}, "expected an integer"),
        ({**GPT2, "n_layer": 10**4000}, "expected at most"),
        ({**GPT2, "n_head": 0}, "n_head=0"),
        ({**GPT2, "activation_function": "relu"}, "activation_function"),
        ({**LLAMA, "head_dim": 128}, "head_dim 128"),
        ({**LLAMA, "num_attention_heads": 0, "attention_bias": True}, "n_head=0"),
        ({**LLAMA, "hidden_act": "gelu"}, "hidden_act"),
        ({**LLAMA, "rope_theta": "x"}, "rope_theta"),
        ({**LLAMA, "rope_parameters": {"rope_theta": {}}}, "rope_theta"),
        ({**LLAMA, "rope_parameters": []}, "expected an object"),
    ],
)
def test_hugging_face_configs_that_are_refused(tmp_path, parts, expected):
    assert expected in error_of(write_json(tmp_path, parts))


def test_json_that_is_no_config(tmp_path):
    path = tmp_path / "config.json"
    cases = ["[]", "3", "{", '{"a": 1, "a": 2}', "[" * 100000, '{"model_type": ' + "9" * 5000 + "}", "NaN"]
    for text in cases:
        path.write_text(text)
        assert "config.json" in error_of(path) or "duplicate" in error_of(path)
