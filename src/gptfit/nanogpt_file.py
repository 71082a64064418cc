"""nanoGPT's side of the door: config files in Python, the defaults behind them, the keys that do not bear on a run.

Facts are of nanoGPT's train.py and model.py, https://github.com/karpathy/nanoGPT
"""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptfit.config import NANOGPT, ModelConfig, RunConfig, check_key, shown
from gptfit.errors import GptfitError, nearest
from gptfit.flatfile import parse_yaml, read_text
from gptfit.huggingface_file import parse_huggingface

# train.py's own values where a config says nothing (vocab_size: its fallback without a meta.pkl).
TRAIN_PY = {
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "vocab_size": 50304,
    "block_size": 1024,
    "bias": False,
    "dropout": 0.0,
    "batch_size": 12,
    "gradient_accumulation_steps": 40,
    "dtype": "bfloat16",
    "compile": True,
    "optimizer": "adamw",
    "optimizer_impl": "fused",
    "learning_rate": 6e-4,
    "min_lr": 6e-5,
    "weight_decay": 0.1,
    "beta1": 0.9,
    "beta2": 0.95,
    "grad_clip": 1.0,
    "decay_lr": True,
    "warmup_iters": 2000,
    "max_iters": 600000,
    "lr_decay_iters": 600000,
    "eval_interval": 2000,
    "eval_iters": 200,
    "log_interval": 1,
    **NANOGPT,
}

# Other names that train.py has set when it executes a config: readable there, as in out_dir + '-' + dataset.
OTHER_TRAIN_PY = {
    "out_dir": "out",
    "eval_only": False,
    "always_save_checkpoint": True,
    "init_from": "scratch",
    "wandb_log": False,
    "wandb_project": "owt",
    "wandb_run_name": "gpt2",
    "dataset": "openwebtext",
    "backend": "nccl",
    "device": "cuda",
}

# Accepted and without effect on memory and speed: train.py's, those of sample.py and bench.py, and what
# forks commonly add.
HARMLESS = frozenset(OTHER_TRAIN_PY) | {
    *("start", "num_samples", "max_new_tokens", "temperature", "top_k", "real_data", "profile", "seed", "tokenizer"),
    *("data_dir", "log_dir", "num_workers", "tensorboard_log", "log_interval", "save_interval", "verbose", "resume"),
    *("ckpt_path", "title", "source"),
}

# Character-level data sets, whose meta.pkl sets the vocabulary: nanoGPT's data/*/prepare.py prints it.
CHARACTER_VOCABULARIES = {"shakespeare_char": 65}

# model.py, from_pretrained: n_layer, n_head, n_embd; the vocabulary is 50257, the context 1024, bias True.
PRETRAINED = {
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}


@dataclass(frozen=True, slots=True)
class NanogptFile:
    """RunConfig keys that the file sets, the other keys it sets, and the text of keys without a bearing."""

    values: dict[str, Any]
    other: dict[str, Any]
    ignored: dict[str, str]


def is_harmless(key: str) -> bool:
    """Whether `key` is accepted but bears on neither memory nor speed."""
    return key in HARMLESS or key.startswith(("wandb_", "_"))


def read_nanogpt(path: Path, overridden: Collection[str] = ()) -> NanogptFile:
    """The keys of a nanoGPT config file. Raises GptfitError as `parse_nanogpt`, and for a file that cannot be read."""
    return parse_nanogpt(read_text(path), path.name, overridden)


def parse_nanogpt(text: str, name: str, overridden: Collection[str] = ()) -> NanogptFile:
    """The keys of a nanoGPT config, read as data; `name` is the file's, for errors.

    A key in `overridden` has its value elsewhere, so its expression need not be computable. Raises
    GptfitError with file and line for a key that bears on the run and would need execution, and for an
    unknown key, unless the file itself reads that name (then it is a helper of its author's), and for
    a file without any key.
    """
    from gptfit.pyconst import parse_constants

    source = parse_constants(text, name, {**TRAIN_PY, **OTHER_TRAIN_PY})
    values: dict[str, Any] = {}
    other: dict[str, Any] = {}
    ignored: dict[str, str] = {}
    for key, binding in source.bindings.items():
        where = f"{name}:{binding.line}: "
        if is_harmless(key):
            if not binding.computed and key in RunConfig.model_fields:
                values[key] = binding.value
            elif not key.startswith("_") and key not in source.local:
                ignored[key] = binding.text
                other[key] = binding.value
        elif key in RunConfig.model_fields:
            if not binding.computed:
                values[key] = binding.value
            elif key not in overridden:
                raise GptfitError(
                    f'{where}"{shown(binding.text, 80)}" would have to be executed to know {key}',
                    f"write its value there, or give it on the command line: {key}=…",
                )
        elif key not in source.used and key not in source.local:
            check_key(key, where)
    if not ignored and not any(key in RunConfig.model_fields for key in source.bindings):
        raise GptfitError(f"{name} sets no key of a run", "a nanoGPT config holds lines such as batch_size = 8")
    return NanogptFile(values, other, ignored)


def run_folder(start: str) -> str:
    """Where the run.yaml of weights is that gptfit trained: in the run's folder, or beside the checkpoint."""
    folder, name = os.path.split(os.path.normpath(start))
    return folder if name.startswith("checkpoint-") and os.path.exists(start) else start


def implied(
    other: Mapping[str, Any], values: Mapping[str, Any], program: str, files: bool = True
) -> tuple[dict[str, Any], list[str]]:
    """What `init_from` (GPT-2, a Hugging Face folder, a run of gptfit) and a character-level `dataset` imply, for keys
    absent from `values`, and notes that say so.

    The data set's vocabulary is implied in nanoGPT alone: elsewhere the tokenizer says what it is.

    Raises GptfitError for an init_from of GPT-2 in a size that does not exist, and without `files` for a path.
    """
    start = values.get("init_from", other.get("init_from", "scratch"))
    notes: list[str] = []
    if other.get("eval_only") is True:
        notes.append("eval_only is set; the answer is for a training step of the same run")
    if start is None:
        notes.append("init_from would have to be executed to know; the model is taken to start from scratch")
    if start == "resume":
        notes.append("init_from is resume: the model's shape is taken from the config, not from the checkpoint")
    if not files and start not in (None, "scratch", "resume", *PRETRAINED):
        raise GptfitError(
            f'init_from "{shown(start)}" is not read here', f"expected scratch, resume, or {', '.join(PRETRAINED)}"
        )
    if files and isinstance(start, str) and os.path.isfile(file := os.path.join(start, "config.json")):
        shape = parse_huggingface(read_text(Path(file)), file).values
        notes.append(f"init_from {start}: its shape")
        return {key: value for key, value in shape.items() if key not in values}, notes
    if files and isinstance(start, str) and os.path.isfile(file := os.path.join(run_folder(start), "run.yaml")):
        known = parse_yaml(read_text(Path(file)), file)
        shape = {key: known[key].value for key in ModelConfig.model_fields if key in known and key != "dropout"}
        notes.append(f"init_from {start}: its shape")
        return {key: value for key, value in shape.items() if key not in values}, notes
    if isinstance(start, str) and start.startswith("gpt2") and not (files and os.path.exists(start)):
        if start not in PRETRAINED:
            raise GptfitError(
                f'unknown init_from "{shown(start)}"{nearest(start, PRETRAINED)}',
                f"GPT-2 comes as {', '.join(PRETRAINED)}",
            )
        n_layer, n_head, n_embd = PRETRAINED[start]
        shape = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "block_size": 1024}
        shape |= {"bias": True, "vocab_size": 50257}
        # A smaller block_size crops the pretrained model in nanoGPT too.
        kept = [key for key in shape if key in values and values[key] != shape[key] and key != "block_size"]
        notes.append(f"init_from {start}: its shape, biases and vocabulary of 50257")
        notes += [f"{key}={values[key]} is kept, where nanoGPT would take {start}'s {shape[key]}" for key in kept]
        return {key: value for key, value in shape.items() if key not in values}, notes
    vocabulary = CHARACTER_VOCABULARIES.get(str(values.get("dataset", "")))
    if program == "nanogpt" and vocabulary is not None and "vocab_size" not in values:
        notes.append(f"vocab_size is {vocabulary}, from the characters of {values['dataset']} (its meta.pkl)")
        return {"vocab_size": vocabulary}, notes
    return {}, notes
