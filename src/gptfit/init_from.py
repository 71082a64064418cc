"""The weights that a run starts with: its own random ones, or those of a model on disk.

`init_from` names it: a folder of Hugging Face's (config.json and model.safetensors), nanoGPT's ckpt.pt, one of our
checkpoints or the folder of a run, or GPT-2 by name, which is looked for in Hugging Face's cache on disk.
"""

import json
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptfit.checkpoint import FORMAT, latest_valid, load
from gptfit.config import ModelConfig, RunConfig, make_run
from gptfit.errors import GptfitError, nearest
from gptfit.huggingface_file import parse_huggingface
from gptfit.huggingface_weights import from_huggingface
from gptfit.layers import NORM_EPS
from gptfit.model import GPT
from gptfit.nanogpt_file import PRETRAINED
from gptfit.sharded_checkpoint import PLAIN

HINT = "init_from takes a Hugging Face folder, nanoGPT's ckpt.pt, a checkpoint, the folder of a run, or gpt2"

# What may differ between a run and the weights it starts with: these change no tensor, or are looked at on their own.
FREE = ("dropout", "attention", "block_size", "bias")


@dataclass(frozen=True, slots=True)
class Source:
    """A model on disk under our names. `says_bias` is false where biases show in the tensors alone."""

    name: str
    model: ModelConfig
    weights: dict[str, Tensor]
    says_bias: bool = True
    notes: tuple[str, ...] = ()


def start_weights(model: GPT, run: RunConfig) -> tuple[str, ...]:
    """Puts the weights that `run.init_from` names into `model`, and returns the lines that someone should read.

    Raises GptfitError where there is no such model, where it cannot be read, and naming the first key in which
    it differs from the run.
    """
    if run.init_from in ("", "scratch"):
        return ()
    source = _find(run.init_from)
    _compare(source, run)
    weights = dict(source.weights)
    if run.tie_embeddings:
        weights.setdefault("lm_head.weight", weights.get("transformer.wte.weight", torch.empty(0)))
    if "transformer.wpe.weight" in weights:
        weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][: run.block_size]
    if not run.bias:
        # An export of a model without biases has zeros for them.
        weights = {name: w for name, w in weights.items() if not (name.endswith(".bias") and not w.any())}
    _check_names(source, weights, model.state_dict(), run)
    model.load_state_dict(weights, strict=False)
    return (f"weights from {source.name}", *source.notes)


def _find(init_from: str) -> Source:
    path = Path(init_from).expanduser()
    if init_from in PRETRAINED and not path.exists():
        return _read_huggingface(_cached(init_from), init_from)
    if (path / "config.json").is_file():
        return _read_huggingface(path, str(path))
    if (path / PLAIN).is_file():
        checkpoint = load(path)
        return Source(str(path), checkpoint.run, dict(checkpoint.weights))
    if path.is_dir():
        if (found := latest_valid(path)) is not None:
            return Source(str(found.path), found.checkpoint.run, dict(found.checkpoint.weights))
        raise GptfitError(f'"{path}" holds neither config.json nor a checkpoint', HINT)
    if path.is_file():
        return _read_file(path)
    if init_from == "resume":
        raise GptfitError("init_from=resume: a run goes on by an option here", "gptfit train --resume --out DIR")
    raise GptfitError(f'there is no "{init_from}" to start from{nearest(init_from, ("scratch", *PRETRAINED), 1)}', HINT)


def _cached(name: str) -> Path:
    """The snapshot of `name` in Hugging Face's cache, laid out as huggingface_hub does it."""
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    for repository in (f"models--openai-community--{name}", f"models--{name}"):
        folder = cache / repository
        main = folder / "refs" / "main"
        revisions = [main.read_text().strip()] if main.is_file() else []
        revisions += sorted(path.name for path in folder.glob("snapshots/*"))
        for revision in revisions:
            snapshot = folder / "snapshots" / revision
            if (snapshot / "config.json").is_file() and (snapshot / "model.safetensors").is_file():
                return snapshot
    raise GptfitError(
        f"{name} is not in {cache}, and nothing is downloaded here",
        f"hf download openai-community/{name} config.json model.safetensors, or init_from=FOLDER with those two",
    )


def _read_huggingface(folder: Path, name: str) -> Source:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        text = (folder / "config.json").read_text(encoding="utf-8")
        model = make_run(parse_huggingface(text, f"{name}/config.json").values)
        index = folder / "model.safetensors.index.json"
        files = {"model.safetensors"}
        if index.is_file():
            files = set(json.loads(index.read_text())["weight_map"].values())
        tensors: dict[str, Tensor] = {}
        for file in sorted(files):
            if Path(file).name != file:
                raise ValueError(f"it names the file {file[:100]}")
            tensors |= load_file(folder / file)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise GptfitError(f'cannot read the model in "{folder}": {str(error)[:200]}', HINT) from None
    plain = json.loads(text)
    weights = from_huggingface(plain["model_type"], tensors)
    return Source(name, model, weights, says_bias=False, notes=_differences(plain, name))


def _differences(plain: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """Where the file's model computes something else with the same weights.

    Raises GptfitError for positions that are stretched: every logit would differ.
    """
    rope = plain.get("rope_scaling") or plain.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise GptfitError(f"{name} has rope of type {str(kind)[:40]}, which gptfit's model has not", HINT)
    notes = []
    if plain["model_type"] == "gpt2" and plain.get("activation_function", "gelu_new") != "gelu":
        notes.append("it was trained with GELU's tanh form and goes on with the exact one, as in nanoGPT")
    epsilon = plain.get("layer_norm_epsilon", plain.get("rms_norm_eps", NORM_EPS))
    if epsilon != NORM_EPS:
        notes.append(f"its norms add {epsilon}, ours {NORM_EPS}")
    return tuple(notes)


def _read_file(path: Path) -> Source:
    """nanoGPT's ckpt.pt or one of our checkpoints. No code in it is run."""
    try:
        plain = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if plain.get("format") == FORMAT and "run" in plain:
            checkpoint = load(path)
            return Source(str(path), checkpoint.run, dict(checkpoint.weights))
        # The first checkpoints of nanoGPT had biases and no key that says so.
        arguments = {"bias": True, **plain["model_args"]}
        known = {
            key: value for key, value in arguments.items() if key in ModelConfig.model_fields and value is not None
        }
        weights = {name.removeprefix("_orig_mod."): tensor for name, tensor in plain["model"].items()}
        # Its attention without the flash kernel keeps a mask of this name in every layer.
        masks = [name for name in weights if name.endswith(".attn.bias")]
        return Source(str(path), make_run(known), {name: w for name, w in weights.items() if name not in masks})
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise GptfitError(f'"{path}" is neither a nanoGPT ckpt.pt nor a checkpoint: {reason}', HINT) from None


def _compare(source: Source, run: RunConfig) -> None:
    """Raises GptfitError naming the first key in which the run differs from the model that it starts with."""
    for key in ModelConfig.model_fields:
        was, now = getattr(source.model, key), getattr(run, key)
        if key == "rope_theta" and run.position != "rope":
            continue
        if was != now and (key not in FREE or (key == "bias" and source.says_bias)):
            raise GptfitError(f"{key}={now}, but {source.name} has {key}={was}", f"{key}={was}")
    longest = source.model.block_size
    if run.position == "learned" and run.block_size > longest:
        raise GptfitError(
            f"block_size={run.block_size}, but {source.name} has positions for {longest}",
            f"block_size={longest} or less",
        )


def _check_names(source: Source, weights: Mapping[str, Tensor], own: Mapping[str, Tensor], run: RunConfig) -> None:
    """Raises GptfitError for a tensor without a place, a place without a tensor, and one of another shape.

    A bias that a Hugging Face model has not may stay at zero, which computes the same.
    """
    extra = sorted(set(weights) - set(own))
    missing = sorted(set(own) - set(weights))
    if not source.says_bias:
        missing = [name for name in missing if not name.endswith(".bias")]
    if extra and extra[0].endswith(".bias") and not run.bias:
        raise GptfitError(f"bias=False, but {source.name} has biases, as {extra[0]}", "bias=True")
    if extra or missing:
        what = f"has {extra[0]}, which the run has not" if extra else f"lacks {missing[0]}"
        raise GptfitError(f"{source.name} {what}", HINT)
    for name, tensor in weights.items():
        if tensor.shape != own[name].shape:
            shapes = f"{list(tensor.shape)}, in the run {list(own[name].shape)}"
            raise GptfitError(f"{name} has the shape {shapes}", f"{source.name} does not hold what its config says")
