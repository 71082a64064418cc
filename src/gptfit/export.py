"""Checkpoints for other programs: Hugging Face's transformers, and nanoGPT."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gptfit.checkpoint import Checkpoint, latest_valid
from gptfit.errors import GptfitError
from gptfit.forms import check_form
from gptfit.huggingface_weights import to_huggingface
from gptfit.named import check_format, no_checkpoint
from gptfit.nanogpt_file import OTHER_TRAIN_PY, TRAIN_PY
from gptfit.replacing import replacing
from gptfit.tokenizer import get_tokenizer, nearer

MODEL_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written, and from which step."""

    files: tuple[Path, ...]
    step: int
    model: str


def export(out_dir: Path | str, to: Path | str | None = None, format: str = "hf", raw: bool = False) -> Exported:
    """Writes the newest checkpoint of a run's folder into the folder `to` (else `out_dir`/`format`).

    hf: config.json and model.safetensors, which transformers loads; nanogpt: ckpt.pt, which nanoGPT's sample.py
    and train.py take. Of a run with ema_decay the average of the weights, or with `raw` the weights themselves.
    Raises GptfitError where there is no checkpoint, for a model that the form cannot express, for an unknown form,
    and where nothing can be written.
    """
    check_format(format)
    found = latest_valid(Path(out_dir))
    if found is None:
        raise no_checkpoint(out_dir)
    folder = Path(to) if to is not None else Path(out_dir) / format
    writer = _write_huggingface if format == "hf" else _write_nanogpt
    checkpoint = replace(found.checkpoint, tokenizer=nearer(found.checkpoint.tokenizer, found.path.parent))
    files, model = writer(replace(checkpoint, ema={}) if raw else checkpoint, folder)
    return Exported(files, found.checkpoint.step, model)


def _write_huggingface(checkpoint: Checkpoint, folder: Path) -> tuple[tuple[Path, ...], str]:
    import safetensors
    from safetensors.torch import save_file

    config, tensors = to_huggingface(checkpoint.run, checkpoint.weights)
    config["eos_token_id"] = config["bos_token_id"] = _end_of_text(checkpoint)
    _make(folder)
    weights, description = folder / "model.safetensors", folder / "config.json"
    with replacing(weights) as file:
        try:
            # Without this word transformers refuses the file.
            save_file(tensors, file.name, metadata={"format": "pt"})
        except safetensors.SafetensorError as error:  # pyright: ignore[reportAttributeAccessIssue]
            raise GptfitError(f'cannot write "{weights}": {error}', "free some space, or give another --to") from None
    with replacing(description) as file:
        file.write((json.dumps(config, indent=2) + "\n").encode())
    return (weights, description), config["architectures"][0]


def _write_nanogpt(checkpoint: Checkpoint, folder: Path) -> tuple[tuple[Path, ...], str]:
    run = checkpoint.run
    check_form(run, "nanogpt")
    known = {key: getattr(run, key) for key in (*TRAIN_PY, *OTHER_TRAIN_PY) if hasattr(run, key)}
    plain: dict[str, Any] = {
        "model_args": {key: getattr(run, key) for key in MODEL_ARGS},
        "model": dict(checkpoint.weights),
        "iter_num": checkpoint.step,
        "best_val_loss": torch.tensor(1e9),  # nanoGPT's own start: not known here
        "config": {**OTHER_TRAIN_PY, **known},
    }
    if run.optimizer == "adamw" and not checkpoint.ema:  # the states are those of the weights, not of their average
        # Both group matrices and vectors, in the order of the model: its train.py goes on with these states.
        plain["optimizer"] = dict(checkpoint.optimizer)
    _make(folder)
    path = folder / "ckpt.pt"
    with replacing(path) as file:
        torch.save(plain, file)
    return (path,), "nanoGPT"


def _end_of_text(checkpoint: Checkpoint) -> int | None:
    """The tokenizer's, where it is here and the model has a row for it."""
    try:
        token = get_tokenizer(checkpoint.tokenizer).end_of_text
    except GptfitError:
        return None
    return token if token is not None and token < checkpoint.run.vocab_size else None


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise GptfitError(f'cannot make the folder "{folder}": {reason}', "give another --to") from None
