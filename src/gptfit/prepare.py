"""From text to token files, streaming and in parallel: no file is ever held whole."""

import hashlib
import json
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

import numpy as np

from gptfit.errors import GptfitError, nearest
from gptfit.replacing import replacing
from gptfit.shards import ShardWriter, shard_path
from gptfit.sources import BLOCK_BYTES, Listed, Piece, Source, blocks, documents, list_files
from gptfit.tokenizer import ByteTokenizer, Tokenizer, get_tokenizer

__all__ = ["META", "Prepared", "blocks", "prepare"]

META = "meta.json"

# Processes are started once this many batches were encoded without: a small text is done before they are up.
BATCHES_ALONE = 16
MAX_WORKERS = 32

# From so many plain files on each is a document to split by; fewer are split by where they end.
MANY_FILES = 100
SPLITS = ("documents", "tail")

Batch = list[tuple[Piece, bool]]  # and whether it is for validation


@dataclass(frozen=True, slots=True)
class Prepared:
    """What `prepare` wrote. `skipped` are files of a folder that are not text; `split` says what is for validation."""

    folder: Path
    tokenizer: str
    vocab_size: int
    n_train: int
    n_val: int
    n_files: int
    skipped: tuple[Path, ...]
    n_documents: int = 0
    split: str = "tail"
    n_shards: int = 2


def prepare(
    sources: Iterable[Source],
    tokenizer: str,
    out_dir: Path,
    val_fraction: float = 0.05,
    on_progress: Callable[[int], None] | None = None,
    *,
    field: str = "",
    split: str = "",
    shard_bytes: int = 0,
    workers: int | None = None,
) -> Prepared:
    """Writes train.bin, val.bin and meta.json into `out_dir` from text files, JSON lines, parquet, folders, or stdin.

    Documents follow one another in the order given, with the tokenizer's end-of-text between them. `split` says
    what is for validation: `documents` those whose hash falls into `val_fraction`, the same ones however many
    others there are; `tail` the last `val_fraction` of all tokens; without a word documents where there are many.
    A part above `shard_bytes` goes on in a further file. `on_progress` is told the tokens so far. `workers`
    processes encode (None: one a core), with the same outcome. Raises GptfitError for a missing source, no text
    at all, or a full disk; then nothing is replaced.
    """
    if not 0.0 < val_fraction < 1.0:
        raise GptfitError(f"val_fraction={val_fraction} is not between 0 and 1", "0.05 keeps every 20th token")
    if split and split not in SPLITS:
        raise GptfitError(f'unknown split "{split}"{nearest(split, SPLITS, 1)}', "documents or tail")
    coder, folder = get_tokenizer(tokenizer), Path(out_dir)
    listed = list_files(sources, folder)
    split = split or _usual_split(listed, field)
    make_folder(folder)
    dtype = np.dtype("<u2" if coder.n_vocab < 65536 else "<u4")
    pieces = _marked(documents(listed.files, field), val_fraction if split == "documents" else 0.0)
    with ExitStack() as stack:
        train, val = (ShardWriter(stack, folder, part, dtype, shard_bytes) for part in ("train", "val"))
        n_documents = _write(_encoded(_batches(pieces), coder, workers), coder, train, val, on_progress)
        _check(train, val, split)
        if not val.n:  # of few documents none may have been drawn
            split = "tail"
            for ids in train.cut(max(1, int(train.n * val_fraction))):
                val.write(ids)
    meta = {
        "schema": "gptfit.data/1",
        "tokenizer": coder.name,
        "vocab_size": coder.n_vocab,
        "dtype": "uint16" if dtype.itemsize == 2 else "uint32",
        "n_train": train.n,
        "n_val": val.n,
        "n_documents": n_documents,
        "split": split,
        "train_shards": len(train.files),
        "val_shards": len(val.files),
    }
    with replacing(folder / META) as file:
        file.write((json.dumps(meta, indent=2) + "\n").encode())
    _remove_old(folder, train, val)
    n_files, n_shards = len(listed.files), len(train.files) + len(val.files)
    return Prepared(
        folder, coder.name, coder.n_vocab, train.n, val.n, n_files, listed.skipped, n_documents, split, n_shards
    )


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise GptfitError(f'cannot make the folder "{folder}": {reason}', "give another --out") from None


def is_for_validation(first: bytes, fraction: float) -> bool:
    """A document's lot, drawn by the hash of its text (of its first piece, where it is long)."""
    digest = hashlib.blake2b(first, digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def _usual_split(listed: Listed, field: str) -> str:
    return "documents" if listed.has_documents(field) or len(listed.files) >= MANY_FILES else "tail"


def _marked(pieces: Iterable[Piece], fraction: float) -> Iterator[tuple[Piece, bool]]:
    lot = False
    for piece in pieces:
        if piece.opens:
            lot = is_for_validation(piece.text, fraction)
        yield piece, lot


def _batches(pieces: Iterable[tuple[Piece, bool]]) -> Iterator[Batch]:
    """Pieces together until they are worth a message to another process."""
    batch: Batch = []
    size = 0
    for item in pieces:
        batch.append(item)
        size += len(item[0].text)
        if size >= BLOCK_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


Encoded = list[tuple[np.ndarray, bool, bool]]  # ids, whether a document begins, whether it is for validation


def _encode(batch: Batch, coder: Tokenizer) -> Encoded:
    return [(coder.encode(piece.text), piece.opens, lot) for piece, lot in batch]


def _encoded(batches: Iterator[Batch], coder: Tokenizer, workers: int | None) -> Iterator[Encoded]:
    """The batches encoded, in their order; by other processes once there is enough to do for them."""
    alone = isinstance(coder, ByteTokenizer) and workers is None  # nothing to compute
    n = min(workers if workers is not None else os.cpu_count() or 1, MAX_WORKERS)
    if alone or n <= 1:
        yield from (_encode(batch, coder) for batch in batches)
        return
    if workers is None:
        yield from (_encode(batch, coder) for batch in islice(batches, BATCHES_ALONE))
    first = next(batches, None)
    if first is None:
        return
    # Not forked: the caller may have threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(n, context, _start_worker, (coder.name,)) as pool:
        waiting: deque[Future[Encoded]] = deque([pool.submit(_work, first)])
        try:
            for batch in batches:
                waiting.append(pool.submit(_work, batch))
                if len(waiting) > 2 * n:  # what is read ahead is bounded
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_coder: list[Tokenizer] = []


def _start_worker(tokenizer: str) -> None:
    _coder.append(get_tokenizer(tokenizer))


def _work(batch: Batch) -> Encoded:
    return _encode(batch, _coder[0])


def _write(
    encoded: Iterable[Encoded],
    coder: Tokenizer,
    train: ShardWriter,
    val: ShardWriter,
    on_progress: Callable[[int], None] | None,
) -> int:
    """Every document into its part, end-of-text between two of a part; returns how many there were."""
    end = np.array([] if coder.end_of_text is None else [coder.end_of_text])
    n_documents = 0
    for batch in encoded:
        for ids, opens, lot in batch:
            part = val if lot else train
            n_documents += opens
            if opens and part.n:
                part.write(end)
            part.write(ids)
        if on_progress is not None:
            on_progress(train.n + val.n)
    return n_documents


def _check(train: ShardWriter, val: ShardWriter, split: str) -> None:
    if train.n + val.n < 2:
        raise GptfitError("there is no text in what was given", "give text files, folders of them, or - for stdin")
    if not train.n:
        raise GptfitError(f"split={split} leaves no document to train on: there are too few", "--split tail")


def _remove_old(folder: Path, *parts: ShardWriter) -> None:
    """Further files of what was there before. Nobody reads them: meta.json says how many there are."""
    for part in parts:
        for index in count(len(part.files)):
            path = shard_path(folder, part.part, index)
            if not path.is_file():
                break
            path.unlink()
