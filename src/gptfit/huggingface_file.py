"""A Hugging Face config.json as a model's shape: the gpt2 and llama families.

Key names and defaults are those of transformers' GPT2Config, LlamaConfig, MistralConfig, Qwen2Config and Qwen3Config.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gptfit.config import MAX_NUMBER, default_n_hidden, shown
from gptfit.errors import GptfitError, nearest

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
FAMILIES = ("gpt2", *LLAMA_LIKE)

_HINT = f"families read are {', '.join(FAMILIES)}; for others give the shape as n_layer=… n_head=… n_embd=…"

# Activations with the memory of an exact or tanh GELU.
_GELU = frozenset({"gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"})


@dataclass(frozen=True, slots=True)
class HuggingFaceModel:
    """ModelConfig keys, what is left out and by how much, and keys of the file without a bearing on it."""

    values: dict[str, Any]
    notes: tuple[str, ...]
    ignored: dict[str, str]


def parse_huggingface(text: str, name: str) -> HuggingFaceModel:
    """The model that a config.json describes; `name` is the file's, for errors.

    Raises GptfitError for text that is not a JSON object, families other than FAMILIES, missing or
    non-integer sizes, and shapes that gptfit's model does not have.
    """
    try:
        data = json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, name))
    except RecursionError:
        raise GptfitError(f"{name}: nested too deeply", _HINT) from None
    except json.JSONDecodeError as error:
        raise GptfitError(f"{name}:{error.lineno}: not JSON: {error.msg}", _HINT) from None
    except ValueError as error:  # an integer of thousands of digits
        raise GptfitError(f"{name}: not JSON: {shown(str(error), 120)}", _HINT) from None
    if not isinstance(data, dict) or "model_type" not in data:
        raise GptfitError(f"{name} has no model_type, so it is not a Hugging Face config.json", _HINT)
    family = data["model_type"]
    if family not in FAMILIES:
        given = shown(str(family))
        raise GptfitError(f'{name}: model_type "{given}" is not known{nearest(given, FAMILIES, 1)}', _HINT)
    reader = _Reader(name, data)
    values, notes = _gpt2(reader) if family == "gpt2" else _llama(reader, family)
    ignored = {
        key: f"{key}: {shown(json.dumps(value))}"
        for key, value in data.items()
        if key not in reader.read and isinstance(value, str | int | float | bool)
    }
    return HuggingFaceModel(values, tuple(notes), ignored)


def _unique(pairs: Iterable[tuple[str, Any]], name: str) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise GptfitError(f'{name}: duplicate key "{shown(key)}"', "keep one of the two lines")
        result[key] = value
    return result


class _Reader:
    """Typed access to the file's keys; remembers which were read."""

    def __init__(self, name: str, data: dict[str, Any]) -> None:
        self.name = name
        self.data = data
        self.read = {"model_type"}

    def get(self, kind: type, *keys: str, default: Any) -> Any:
        """The first of `keys` that is set and not null, else `default`. Raises GptfitError for another type."""
        self.read.update(keys)
        for key in keys:
            value = self.data.get(key)
            if value is None:
                continue
            if kind is float and isinstance(value, int) and not isinstance(value, bool):
                return value
            if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
                raise GptfitError(f"{self.name}: {key}={shown(json.dumps(value))}: expected {_KINDS[kind]}", _HINT)
            if kind is int and abs(value) > MAX_NUMBER:
                raise GptfitError(f"{self.name}: {key}={shown(value)}: expected at most {MAX_NUMBER:.0e}", _HINT)
            return value
        return default

    def size(self, *keys: str) -> int:
        """A size that has no default here. Raises GptfitError where it is missing."""
        value = self.get(int, *keys, default=None)
        if value is None:
            raise GptfitError(f"{self.name} has no {' or '.join(keys)}", _HINT)
        return value

    def refuse(self, what: str) -> GptfitError:
        return GptfitError(f"{self.name}: {what}", _HINT)


_KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "text", dict: "an object"}


def _gpt2(reader: _Reader) -> tuple[dict[str, Any], list[str]]:
    n_embd = reader.size("n_embd", "hidden_size")
    activation = reader.get(str, "activation_function", default="gelu_new")
    if activation not in _GELU:
        raise reader.refuse(f'activation_function "{shown(activation)}" is not known, expected gelu or gelu_new')
    dropout = max(reader.get(float, key, default=0.1) for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop"))
    notes = [f"the file's dropout of {dropout} is not taken; dropout={dropout} sets it"] if dropout else []
    values = {
        "n_layer": reader.size("n_layer", "num_hidden_layers"),
        "n_head": reader.size("n_head", "num_attention_heads"),
        "n_embd": n_embd,
        "vocab_size": reader.size("vocab_size"),
        "block_size": reader.size("n_positions", "n_ctx", "max_position_embeddings"),
        "n_hidden": reader.get(int, "n_inner", default=default_n_hidden(n_embd, "gelu")),
        "bias": True,
        "norm": "layernorm",
        "mlp": "gelu",
        "position": "learned",
        "tie_embeddings": reader.get(bool, "tie_word_embeddings", default=True),
    }
    return values, notes


def _llama(reader: _Reader, family: str) -> tuple[dict[str, Any], list[str]]:
    activation = reader.get(str, "hidden_act", default="silu")
    if activation not in ("silu", "swish"):
        raise reader.refuse(f'hidden_act "{shown(activation)}" is not known, expected silu')
    n_embd, n_head = reader.size("hidden_size"), reader.size("num_attention_heads")
    n_layer = reader.size("num_hidden_layers")
    n_kv_head = reader.get(int, "num_key_value_heads", default=n_head)
    head_size = reader.get(int, "head_dim", default=None)
    if head_size is not None and head_size * n_head != n_embd:
        raise reader.refuse(f"head_dim {head_size} is not hidden_size {n_embd} / num_attention_heads {n_head}")
    rope = reader.get(dict, "rope_parameters", default={})
    theta = rope.get("rope_theta", reader.get(float, "rope_theta", default=10000.0))
    # Qwen2 has biases on q, k and v whatever its config says.
    attention_bias = reader.get(bool, "attention_bias", default=False) or family == "qwen2"
    bias = attention_bias and reader.get(bool, "mlp_bias", default=False)
    notes = []
    if attention_bias and not bias and n_head > 0:
        width = n_embd + 2 * n_kv_head * (n_embd // n_head) + (0 if family == "qwen2" else n_embd)
        notes.append(f"the attention's biases, {n_layer * width} parameters, are left out: bias is all or nothing here")
    if reader.get(int, "sliding_window", default=None) and reader.get(bool, "use_sliding_window", default=True):
        notes.append("sliding_window is not modelled: attention is priced over the whole block")
    block_size = reader.size("max_position_embeddings")
    if block_size > 8192:
        notes.append(f"block_size is the model's longest context, {block_size}; block_size=2048 trains on less")
    values = {
        "n_layer": n_layer,
        "n_head": n_head,
        "n_embd": n_embd,
        "n_kv_head": n_kv_head,
        "vocab_size": reader.size("vocab_size"),
        "block_size": block_size,
        "n_hidden": reader.size("intermediate_size"),
        "bias": bias,
        "norm": "rmsnorm",
        "mlp": "swiglu",
        "position": "rope",
        "rope_theta": theta,
        "tie_embeddings": reader.get(bool, "tie_word_embeddings", default=False),
        "qk_norm": family == "qwen3",
    }
    return values, notes
