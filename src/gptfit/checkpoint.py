"""Checkpoints: what a run needs to go on as if it had never stopped, whole on disk or not there at all.

A folder keeps the newest few, two if `keep_checkpoints` does not say otherwise. One is written beside them, synced
and renamed, so a crash or a full disk at any moment leaves the previous one; and should the newest be damaged later,
the one before it serves. (So there is one more for the moment between the rename and the removal of the oldest.)

It is a file checkpoint-XXXXXXXX.pt, or of a sharded run a folder of that name (sharded_checkpoint.py). Either goes on
in any number of processes.
"""

import re
import shutil
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gptfit.config import RunConfig, make_run
from gptfit.distributed import Ranks
from gptfit.errors import GptfitError
from gptfit.optim import Stepper
from gptfit.replacing import replacing
from gptfit.sharded_checkpoint import PLAIN, Lazy, Shards, check_files, readable, write_folder

FORMAT = 1
NAME = re.compile(r"checkpoint-(\d+\.pt|\d{8,})")  # a folder checkpoint-500 is another program's
PARTIAL = ".checkpoint-*.partial"
STATES = ("model", "optimizer", "ema")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`step` counts completed steps; they, the seed in `run` and the data say which sequences come next."""

    step: int
    run: RunConfig
    model: Mapping[str, Any]
    optimizer: Mapping[str, Any]
    scaler: Mapping[str, Any]
    rng: Mapping[str, Any]
    tokenizer: str
    data_fingerprint: str
    ema: Mapping[str, Any] = field(default_factory=dict[str, Any])  # the average of the weights, where one is kept
    tokens: int | None = None  # of the completed steps; older checkpoints do not say
    shards: Shards | None = None  # of a folder, whose weights and states are read when they are looked at

    @property
    def weights(self) -> Mapping[str, Any]:
        """What a model is evaluated with: the average where there is one."""
        return self.ema or self.model

    def as_plain(self) -> dict[str, Any]:
        """Tensors, numbers and text alone, so that reading it runs no code."""
        return {
            "format": FORMAT,
            "step": self.step,
            "tokens": self.tokens,
            "run": self.run.model_dump(),
            "model": dict(self.model),
            "optimizer": dict(self.optimizer),
            "scaler": dict(self.scaler),
            "rng": dict(self.rng),
            "tokenizer": self.tokenizer,
            "data_fingerprint": self.data_fingerprint,
            "ema": dict(self.ema),
        }


@dataclass(frozen=True, slots=True)
class Found:
    """The newest checkpoint that can be read, and a line about each newer one that cannot."""

    path: Path
    checkpoint: Checkpoint
    skipped: tuple[str, ...]


def checkpoint_paths(folder: Path) -> list[Path]:
    """The checkpoints of `folder`, newest first."""
    paths = [path for path in Path(folder).glob("checkpoint-*") if NAME.fullmatch(path.name)]
    return sorted(paths, key=lambda path: (_step(path), path.name), reverse=True)


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("checkpoint-"))


def checkpoint_path(folder: Path, step: int) -> Path:
    return Path(folder) / f"checkpoint-{step:08d}.pt"


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Writes a checkpoint and removes the oldest, so that as many stay as its run's `keep_checkpoints` says.

    Raises GptfitError where the disk is full or cannot be written; the previous checkpoint is untouched then, and
    what was written of the new one is gone.
    """
    path = checkpoint_path(folder, checkpoint.step)
    _remove_leftovers(folder)
    with replacing(path) as file:
        torch.save(checkpoint.as_plain(), file)
    _remove_old(path, checkpoint.run.keep_checkpoints)
    return path


def save_sharded(
    folder: Path, checkpoint: Checkpoint, model: nn.Module, optimizer: Stepper, ema: Mapping[str, Tensor], ranks: Ranks
) -> Path:
    """As `save`, on all ranks together: each writes the parts that it holds of the weights and states of `model`,
    `optimizer` and `ema`; those of `checkpoint` are empty."""
    path = checkpoint_path(folder, checkpoint.step).with_suffix("")
    if ranks.first:
        _remove_leftovers(folder)
    plain = {key: value for key, value in checkpoint.as_plain().items() if key not in STATES}
    write_folder(path, model, optimizer, ema, plain, ranks)
    if ranks.first:
        _remove_old(path, checkpoint.run.keep_checkpoints)
    return path


def _remove_leftovers(folder: Path) -> None:
    """Of processes that were killed while writing or removing."""
    for leftover in Path(folder).glob(PARTIAL):
        _remove(leftover)


def _remove_old(new: Path, keep: int) -> None:
    """All beyond the newest `keep`, and those of the same step as `new` in the other form."""
    others = [path for path in checkpoint_paths(new.parent) if path != new]
    for old in [path for path in others if _step(path) == _step(new)]:
        others.remove(old)
        _remove(old)
    for old in others[keep - 1 :]:
        _remove(old)


def _remove(path: Path) -> None:
    with suppress(OSError):
        if path.is_dir():
            if not path.name.endswith(".partial"):  # half removed it would be a damaged one
                path = path.rename(path.with_name(f".{path.name}.removed.partial"))
            shutil.rmtree(path)
        else:
            path.unlink()


def load(path: Path, ranks: Ranks | None = None) -> Checkpoint:
    """The checkpoint at `path`, on the CPU; among several `ranks` each compares its share of the checksums.

    A file's tensors are mapped into memory, a folder's are read when they are looked at. Raises GptfitError where it
    is damaged, or made by a version that this one does not know.
    """
    ranks = ranks or Ranks()
    plain_path = path / PLAIN if path.is_dir() else path
    with readable(path):
        # torch.load does not compare checksums: a changed byte would come back as a weight.
        if ranks.first or path.is_dir():
            with zipfile.ZipFile(plain_path) as archive:
                if (damaged := archive.testzip()) is not None:
                    raise ValueError(f"its part {damaged} has changed")
        plain = torch.load(plain_path, map_location="cpu", weights_only=True, mmap=True)
        if plain["format"] != FORMAT:
            raise ValueError(f"it has format {plain['format']}, this version reads {FORMAT}")
        plain.setdefault("ema", {})  # older ones have none
        if path.is_dir():
            check_files(path, plain["files"], ranks)
            plain |= _of_shards(Shards(path, plain))
        values = {key: plain[key] for key in Checkpoint.__dataclass_fields__ if key in plain}
        return Checkpoint(**{**values, "run": make_run(values["run"])})


def _of_shards(shards: Shards) -> dict[str, Any]:
    return {
        "model": Lazy(lambda: shards.weights("model")),
        "optimizer": Lazy(shards.states),
        "ema": Lazy(lambda: shards.weights("ema")) if shards.has("ema") else {},
        "shards": shards,
    }


def latest_valid(folder: Path, ranks: Ranks | None = None) -> Found | None:
    """The newest checkpoint of `folder` that can be read, by all `ranks`, who ask together; None where there never
    was one.

    Raises GptfitError where there are some and none can be read, and where the ranks do not find the same.
    """
    ranks = ranks or Ranks()
    paths = checkpoint_paths(folder)
    if len(set(ranks.words(" ".join(path.name for path in paths)))) > 1:
        raise GptfitError(
            f'not all processes find the same checkpoint in "{folder}"',
            "--out must be a folder that all machines share",
        )
    skipped: list[str] = []
    for path in paths:
        checkpoint, trouble = None, ""
        try:
            checkpoint = load(path, ranks)
        except GptfitError as error:
            trouble = error.message
        troubles = [text for text in ranks.words(trouble) if text]
        if checkpoint is not None and not troubles:
            return Found(path, checkpoint, tuple(skipped))
        skipped.append(f"{troubles[0]}; passed over")
    if paths:
        raise GptfitError(f'none of the {len(paths)} checkpoints in "{folder}" can be read', skipped[0])
    return None


def rng_state() -> dict[str, Any]:
    """State of every generator that training draws from, as tensors."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_rng(state: Mapping[str, Any]) -> None:
    """Undoes what was drawn since `rng_state`; a GPU's part only where there was one and is one."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])
