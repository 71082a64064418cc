"""Token files and the batches that come out of them.

A data set is a folder with train.bin and val.bin, ids one after another as uint16 (uint32 from a
vocabulary of 65,536 on), as nanoGPT writes and reads them; ours say in meta.json which tokenizer made them.

Shapes: B sequences, T block_size.
"""

import hashlib
import io
import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptfit.config import RunConfig
from gptfit.errors import GptfitError
from gptfit.prepare import META, prepare
from gptfit.shards import Shards, open_shards, shard_path, windows
from gptfit.stdlib import default_folder
from gptfit.tokenizer import nearer
from gptfit.unfinished import refuse_unfinished

__all__ = ["TRAIN", "VAL", "Dataset", "Feed", "load_batch", "open_dataset", "prepare", "sequence_starts"]

# Streams of the counter-based generator: the sequences of training steps, and those of evaluation.
TRAIN = 0
VAL = 1

# What nanoGPT's folders hold where no meta says otherwise.
GPT2_VOCAB = 50257

MAX_PICKLE_BYTES = 16 * 1024 * 1024

# What is mapped into memory: one file, or several read as one.
Tokens = np.ndarray | Shards

PREPARE_HINT = "make one with: gptfit data prepare FILE-OR-FOLDER … --out DIR"


@dataclass(frozen=True, slots=True)
class Dataset:
    """Memory-mapped ids, and what is known of them. `fingerprint` tells other data from the same."""

    name: str
    train: Tokens
    val: Tokens
    vocab_size: int
    tokenizer: str
    fingerprint: str

    def tokens(self, stream: int) -> Tokens:
        return self.train if stream == TRAIN else self.val


def open_dataset(run: RunConfig) -> Dataset:
    """The data of `run`: `dataset` is a folder (or, as in nanoGPT, the name of one in data/); without one it
    is the Python standard library's sources, prepared once into a cache.

    Raises GptfitError where there is no such data set, where it is shorter than one sequence, or where it has
    more ids than the model.
    """
    folder = default_folder(run.tokenizer) if not run.dataset else _find(run.dataset)
    meta = _read_meta(folder)
    if "tokenizer" in meta:
        meta["tokenizer"] = nearer(meta["tokenizer"], folder)
    wanted = nearer(run.tokenizer, folder)
    if run.tokenizer and meta.get("tokenizer", wanted) != wanted:
        raise GptfitError(
            f'"{folder}" was made by the tokenizer {_short(meta["tokenizer"])}, not {_short(run.tokenizer)}',
            "leave tokenizer out, or prepare the data again with the other one",
        )
    dtype = np.dtype(meta.get("dtype", "uint16")).newbyteorder("<")
    train, val = (_map(folder, part, meta, dtype, run.block_size) for part in ("train", "val"))
    vocab_size = int(meta.get("vocab_size", GPT2_VOCAB))
    if vocab_size > run.vocab_size:
        raise GptfitError(
            f"vocab_size={run.vocab_size} is less than the {vocab_size} ids of the data in {folder}",
            f"vocab_size={-(-vocab_size // 64) * 64} (a multiple of 64 is fastest)",
        )
    tokenizer = wanted or meta.get("tokenizer", "gpt2")
    return Dataset(run.dataset or "python", train, val, vocab_size, tokenizer, _fingerprint(train, val))


def sequence_starts(n_tokens: int, block_size: int, n: int, seed: int, step: int, stream: int = TRAIN) -> np.ndarray:
    """Where the `n` sequences of step `step` begin, int64: a function of the arguments alone.

    So the order of the data survives a resume and any other split into micro-batches. Counter-based
    (Philox keyed by seed, stream and step), and taken modulo the number of starts, whose bias is below 2^-30.
    """
    key = np.array([seed % 2**64, stream * 2**60 + step], dtype=np.uint64)
    raw = np.random.Philox(key=key).random_raw(n)
    return (raw % np.uint64(n_tokens - block_size)).astype(np.int64)


def load_batch(tokens: Tokens, starts: np.ndarray, run: RunConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and targets [B, T] int64 on `device`; the targets are the inputs one token on. Raises as read_batch."""
    return to_device(read_batch(tokens, starts, run, device), device)


class Feed:
    """Micro-batches of training. The next one is read from the disk while the GPU still works on this one; it waits in
    pinned memory, and not on the GPU, so that a step holds there what it always did."""

    def __init__(self, tokens: Tokens, run: RunConfig, device: torch.device) -> None:
        self.tokens, self.run, self.device = tokens, run, device
        self.ready: tuple[bytes, tuple[Tensor, Tensor]] | None = None

    def take(self, starts: np.ndarray) -> tuple[Tensor, Tensor]:
        """The micro-batch at `starts`, as load_batch gives it: read ahead, or, where another was expected, now."""
        ready, self.ready = self.ready, None
        if ready is None or ready[0] != starts.tobytes():
            return load_batch(self.tokens, starts, self.run, self.device)
        return to_device(ready[1], self.device)

    def read_ahead(self, starts: np.ndarray) -> None:
        self.ready = starts.tobytes(), read_batch(self.tokens, starts, self.run, self.device)


def to_device(pair: tuple[Tensor, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    inputs, targets = (part.to(device, non_blocking=True) for part in pair)
    return inputs, targets


def read_batch(tokens: Tokens, starts: np.ndarray, run: RunConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and targets on the CPU, in pinned memory if `device` is a GPU.

    Raises GptfitError for an id that the model has no row for: on a GPU that would end in an assert.
    """
    ids = windows(tokens, starts, run.block_size + 1)
    if ids.max() >= run.vocab_size:
        raise GptfitError(
            f"the data hold the id {ids.max()}, but vocab_size is {run.vocab_size}",
            "set vocab_size above the largest id, or give the folder that belongs to this model",
        )
    pair = torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(ids[:, 1:].copy())
    return (pair[0].pin_memory(), pair[1].pin_memory()) if device.type == "cuda" else pair


def _find(dataset: str) -> Path:
    for folder in (Path(dataset).expanduser(), Path("data") / dataset):
        refuse_unfinished(folder)
        if (folder / "train.bin").is_file():
            return folder
    path = Path(dataset).expanduser()
    if path.exists():
        raise GptfitError(f'"{dataset}" holds no train.bin', PREPARE_HINT)
    raise GptfitError(f'there is no data set "{dataset}"', PREPARE_HINT)


def _map(folder: Path, part: str, meta: dict[str, Any], dtype: np.dtype, block_size: int) -> Tokens:
    paths = [shard_path(folder, part, index) for index in range(meta.get(f"{part}_shards", 1))]
    path = paths[0]
    for one in paths:
        if not one.is_file():
            raise GptfitError(f'there is no "{one}"', PREPARE_HINT)
    tokens = open_shards(paths, dtype)
    n, said = len(tokens), meta.get(f"n_{part}")
    if said is not None and n != said:
        raise GptfitError(
            f'"{path}" and what follows it hold {n} tokens, but {META} says {said}: they are not of one go',
            "prepare the data again",
        )
    if n <= block_size:
        raise GptfitError(
            f'"{path}" holds {n} tokens, and one sequence needs block_size + 1 = {block_size + 1}',
            f"more text, or block_size={max(1, n - 1)}",
        )
    return tokens


def _fingerprint(train: Tokens, val: Tokens) -> str:
    """sha256 over lengths and both ends: enough to tell data sets apart without reading all of a large one."""
    digest = hashlib.sha256()
    for tokens in (train, val):
        digest.update(f"{len(tokens)} {tokens.dtype.str} ".encode())
        digest.update(tokens[: 1 << 19].tobytes())
        digest.update(tokens[-(1 << 19) :].tobytes())
    return digest.hexdigest()


def _short(name: str) -> str:
    return name if len(name) <= 40 else name[:40] + "…"


def _read_meta(folder: Path) -> dict[str, Any]:
    """What meta.json says, else nanoGPT's meta.pkl, else nothing."""
    if (folder / META).is_file():
        try:
            meta = json.loads((folder / META).read_text())
            if meta["dtype"] not in ("uint16", "uint32"):
                raise ValueError(f"unknown dtype {meta['dtype']}")
            plain = {"dtype": meta["dtype"], "vocab_size": int(meta["vocab_size"]), "tokenizer": str(meta["tokenizer"])}
            sizes = ("n_train", "n_val", "train_shards", "val_shards")
            return plain | {key: int(meta[key]) for key in sizes if key in meta}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise GptfitError(f'cannot read "{folder / META}": {error}', PREPARE_HINT) from None
    if (folder / "meta.pkl").is_file():
        return _read_nanogpt_meta(folder / "meta.pkl")
    return {}


class _PlainUnpickler(pickle.Unpickler):
    """Numbers, text and containers; whatever would name a class or a function is refused before it is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _read_nanogpt_meta(path: Path) -> dict[str, Any]:
    """vocab_size and the alphabet, where `itos` is one, of nanoGPT's meta.pkl. Nothing in it is run."""
    try:
        data = path.read_bytes()
        if len(data) > MAX_PICKLE_BYTES:
            raise pickle.UnpicklingError(f"it is larger than {MAX_PICKLE_BYTES} bytes")
        meta = _PlainUnpickler(io.BytesIO(data)).load()
        found: dict[str, Any] = {"vocab_size": int(meta["vocab_size"])}
        itos = meta.get("itos")
        if isinstance(itos, dict) and sorted(itos) == list(range(found["vocab_size"])):
            letters = [itos[i] for i in range(len(itos))]
            if all(isinstance(letter, str) and len(letter) == 1 for letter in letters):
                found["tokenizer"] = "char:" + "".join(letters)
    except Exception as error:  # a damaged pickle raises almost anything
        raise GptfitError(
            f'"{path}" is not a plain meta.pkl: {error}',
            "expected a dictionary with vocab_size; delete the file to read the folder as GPT-2 tokens",
        ) from None
    return found
