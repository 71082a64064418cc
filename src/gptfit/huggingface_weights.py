"""Weights between our names and those of transformers: GPT2LMHeadModel and LlamaForCausalLM.

The families compute what our model computes, with another spelling: GPT-2's Conv1D keeps its matrices transposed,
Llama keeps q, k and v apart. What neither can say (relu2, qk_norm, a soft cap …) is refused, never approximated.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gptfit.config import ModelConfig
from gptfit.forms import GPT2, LLAMA, check_form
from gptfit.layers import NORM_EPS

Weights = dict[str, Tensor]

# The Conv1D layers of transformers' modeling_gpt2.py.
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")

# Ours and modeling_llama.py's, inside a block.
LLAMA_BLOCK = {
    "ln_1": "input_layernorm",
    "attn.c_proj": "self_attn.o_proj",
    "ln_2": "post_attention_layernorm",
    "mlp.c_gate": "mlp.gate_proj",
    "mlp.c_fc": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
}
LLAMA_TOP = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.ln_f.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
QKV = ("q_proj", "k_proj", "v_proj")


def to_huggingface(run: ModelConfig, weights: Mapping[str, Tensor]) -> tuple[dict[str, Any], Weights]:
    """config.json and the tensors of model.safetensors, for our model's state dict.

    Raises GptfitError naming the key that transformers has no word for.
    """
    check_form(run, "hf")
    family = GPT2 if run.norm == "layernorm" else LLAMA
    dtype = next(iter(weights.values())).dtype
    common = {
        "vocab_size": run.vocab_size,
        "tie_word_embeddings": run.tie_embeddings,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if family is GPT2:
        return {**_gpt2_config(run), **common}, _to_gpt2(run, weights)
    return {**_llama_config(run), **common}, _to_llama(run, weights)


def from_huggingface(family: str, tensors: Mapping[str, Tensor]) -> Weights:
    """Tensors of a model.safetensors of `family` under our names; those without one of ours keep theirs."""
    return _from_gpt2(tensors) if family == "gpt2" else _from_llama(tensors)


def _gpt2_config(run: ModelConfig) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_layer": run.n_layer,
        "n_head": run.n_head,
        "n_embd": run.n_embd,
        "n_positions": run.block_size,
        "n_inner": run.n_hidden,
        "activation_function": "gelu",
        "layer_norm_epsilon": NORM_EPS,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), run.dropout),
    }


def _llama_config(run: ModelConfig) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": run.n_layer,
        "num_attention_heads": run.n_head,
        "num_key_value_heads": run.n_kv_head,
        "head_dim": run.head_size,
        "hidden_size": run.n_embd,
        "intermediate_size": run.n_hidden,
        "max_position_embeddings": run.block_size,
        "hidden_act": "silu",
        "rms_norm_eps": NORM_EPS,
        # The first is read by transformers before version 5, the second since.
        "rope_theta": run.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": run.rope_theta},
        "attention_bias": run.bias,
        "mlp_bias": run.bias,
        "attention_dropout": run.dropout,
    }


def _to_gpt2(run: ModelConfig, weights: Mapping[str, Tensor]) -> Weights:
    tensors: Weights = {}
    for name, tensor in weights.items():
        if name == "lm_head.weight" and run.tie_embeddings:
            continue
        module, _, kind = name.rpartition(".")
        conv = name.endswith(CONV1D)
        tensors[name] = tensor.t().contiguous() if conv else tensor.contiguous()
        if kind == "weight" and (conv or tensor.dim() == 1) and not run.bias:
            tensors[f"{module}.bias"] = torch.zeros(tensor.shape[0], dtype=tensor.dtype)
    return tensors


def _from_gpt2(tensors: Mapping[str, Tensor]) -> Weights:
    weights: Weights = {}
    for name, tensor in tensors.items():
        # The files on the hub were saved without the head, and some with the causal masks of every layer.
        own = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
        if not own.endswith((".attn.bias", ".attn.masked_bias")):
            weights[own] = tensor.t() if own.endswith(CONV1D) else tensor
    return weights


def _to_llama(run: ModelConfig, weights: Mapping[str, Tensor]) -> Weights:
    kv_width = run.n_kv_head * run.head_size
    tensors: Weights = {}
    for name, tensor in weights.items():
        if name == "lm_head.weight" and run.tie_embeddings:
            continue
        if name in LLAMA_TOP:
            tensors[LLAMA_TOP[name]] = tensor.contiguous()
            continue
        index, _, rest = name.removeprefix("transformer.h.").partition(".")
        module, _, kind = rest.rpartition(".")
        layer = f"model.layers.{index}"
        if module == "attn.c_attn":
            for part, piece in zip(QKV, tensor.split((run.n_embd, kv_width, kv_width)), strict=True):
                tensors[f"{layer}.self_attn.{part}.{kind}"] = piece.contiguous()
        else:
            tensors[f"{layer}.{LLAMA_BLOCK[module]}.{kind}"] = tensor.contiguous()
    return tensors


def _from_llama(tensors: Mapping[str, Tensor]) -> Weights:
    top = {theirs: ours for ours, theirs in LLAMA_TOP.items()}
    block = {theirs: ours for ours, theirs in LLAMA_BLOCK.items()}
    weights: Weights = {}
    for name, tensor in tensors.items():
        index, _, rest = name.removeprefix("model.layers.").partition(".")
        module, _, kind = rest.rpartition(".")
        if name in top:
            weights[top[name]] = tensor
        elif module in block:
            weights[f"transformer.h.{index}.{block[module]}.{kind}"] = tensor
        elif module == "self_attn.q_proj":
            parts = [tensors.get(f"model.layers.{index}.self_attn.{part}.{kind}") for part in QKV]
            weights[f"transformer.h.{index}.attn.c_attn.{kind}"] = torch.cat(
                [part for part in parts if part is not None]
            )
        elif module not in ("self_attn.k_proj", "self_attn.v_proj"):
            weights[name] = tensor
    return weights
