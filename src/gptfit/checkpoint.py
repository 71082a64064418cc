"""Checkpoints: what a run needs to go on as if it had never stopped, whole on disk or not there at all.

A folder keeps the newest few, two if `keep_checkpoints` does not say otherwise. One is written beside them, synced
and renamed, so a crash or a full disk at any moment leaves the previous one; and should the newest be damaged later,
the one before it serves. (So there is one more for the moment between the rename and the removal of the oldest.)
"""

import pickle
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gptfit.config import RunConfig, make_run
from gptfit.errors import GptfitError
from gptfit.replacing import replacing

FORMAT = 1
PATTERN = "checkpoint-*.pt"


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

    @property
    def weights(self) -> Mapping[str, Any]:
        """What a model is evaluated with: the average where there is one."""
        return self.ema or self.model

    def as_plain(self) -> dict[str, Any]:
        """Tensors, numbers and text alone, so that reading it runs no code."""
        return {
            "format": FORMAT,
            "step": self.step,
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
    numbered = [(path.stem.removeprefix("checkpoint-"), path) for path in Path(folder).glob(PATTERN)]
    return [path for _, path in sorted(((int(n), p) for n, p in numbered if n.isdigit()), reverse=True)]


def checkpoint_path(folder: Path, step: int) -> Path:
    return Path(folder) / f"checkpoint-{step:08d}.pt"


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Writes a checkpoint and removes the oldest, so that as many stay as its run's `keep_checkpoints` says.

    Raises GptfitError where the disk is full or cannot be written; the previous checkpoint is untouched then, and
    what was written of the new one is gone.
    """
    path = checkpoint_path(folder, checkpoint.step)
    for leftover in Path(folder).glob(f".{PATTERN}.*.partial"):  # of a process that was killed while writing
        with suppress(OSError):
            leftover.unlink()
    with replacing(path) as file:
        torch.save(checkpoint.as_plain(), file)
    for old in [old for old in checkpoint_paths(folder) if old != path][checkpoint.run.keep_checkpoints - 1 :]:
        with suppress(OSError):
            old.unlink()
    return path


def load(path: Path) -> Checkpoint:
    """The checkpoint at `path`, on the CPU.

    Raises GptfitError where it is damaged, or made by a version that this one does not know.
    """
    try:
        # torch.load does not compare checksums: a changed byte would come back as a weight.
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"its part {damaged} has changed")
        plain = torch.load(path, map_location="cpu", weights_only=True)
        if plain["format"] != FORMAT:
            raise ValueError(f"it has format {plain['format']}, this version reads {FORMAT}")
        plain.setdefault("ema", {})  # older ones have none
        values = {key: plain[key] for key in Checkpoint.__dataclass_fields__}
        return Checkpoint(**{**values, "run": make_run(values["run"])})
    except (
        OSError,
        ValueError,
        RuntimeError,
        KeyError,
        TypeError,
        zipfile.BadZipFile,
        pickle.UnpicklingError,
    ) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise GptfitError(f'cannot read the checkpoint "{path}": {reason}', "use an older one, or start anew") from None


def latest_valid(folder: Path) -> Found | None:
    """The newest checkpoint of `folder` that can be read; None where there never was one.

    Raises GptfitError where there are some and none can be read.
    """
    paths = checkpoint_paths(folder)
    skipped: list[str] = []
    for path in paths:
        try:
            return Found(path, load(path), tuple(skipped))
        except GptfitError as error:
            skipped.append(f"{error.message}; passed over")
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
