"""Text to ids, many documents at a time, in this process or in others, with the same outcome in the same order."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np

from gptfit.sources import BLOCK_BYTES, Piece, Place
from gptfit.tokenizer import ByteTokenizer, Tokenizer, get_tokenizer

# Processes are started once this many batches were encoded without: a small text is done before they are up.
BATCHES_ALONE = 16
MAX_WORKERS = 32

# What a document counts in a batch beside its bytes.
DOCUMENT_BYTES = 64

Text = tuple[bytes, bool, bool]  # text, whether a document begins, whether it is for validation


@dataclass(frozen=True, slots=True)
class Batch:
    """Texts together until they are worth a message to another process; where their sources go on, and the lot of a
    document that is not at its end there."""

    texts: list[Text]
    after: Place
    lot: bool


@dataclass(frozen=True, slots=True)
class Ids:
    """The ids of a batch by part. Every document that begins has `n_end` ids before it: the end of the one before."""

    train: np.ndarray
    val: np.ndarray
    n_end: int
    n_documents: int


def batches(marked: Iterable[tuple[Piece, bool]]) -> Iterator[Batch]:
    texts: list[Text] = []
    size, after, lot = 0, Place(), False
    for piece, lot in marked:
        after = piece.after
        if piece.text:
            texts.append((piece.text, piece.opens, lot))
        size += len(piece.text) + DOCUMENT_BYTES
        if size >= BLOCK_BYTES:
            yield Batch(texts, after, lot)
            texts, size = [], 0
    if size:
        yield Batch(texts, after, lot)


def encode(texts: list[Text], coder: Tokenizer) -> Ids:
    dtype = np.uint16 if coder.n_vocab < 65536 else np.uint32
    end = np.array([] if coder.end_of_text is None else [coder.end_of_text], dtype)
    parts: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for text, opens, lot in texts:
        if opens:
            parts[lot].append(end)
        parts[lot].append(coder.encode(text))
    train, val = (np.concatenate(part or [end[:0]]).astype(dtype, copy=False) for part in parts)
    return Ids(train, val, len(end), sum(opens for _, opens, _ in texts))


def encoded(source: Iterator[Batch], coder: Tokenizer, workers: int | None) -> Iterator[tuple[Batch, Ids]]:
    """The batches with their ids, in their order; by other processes once there is enough to do for them."""
    alone = isinstance(coder, ByteTokenizer) and workers is None  # nothing to compute
    n = min(workers if workers is not None else os.cpu_count() or 1, MAX_WORKERS)
    if alone or n <= 1:
        yield from ((batch, encode(batch.texts, coder)) for batch in source)
        return
    if workers is None:
        yield from ((batch, encode(batch.texts, coder)) for batch in islice(source, BATCHES_ALONE))
    first = next(source, None)
    if first is None:
        return
    # Not forked: the caller may have threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(n, context, _start_worker, (coder.name,)) as pool:
        waiting: deque[tuple[Batch, Future[Ids]]] = deque([(first, pool.submit(_work, first.texts))])
        try:
            for batch in source:
                waiting.append((batch, pool.submit(_work, batch.texts)))
                if len(waiting) > 2 * n:  # what is read ahead is bounded
                    batch, future = waiting.popleft()
                    yield batch, future.result()
            while waiting:
                batch, future = waiting.popleft()
                yield batch, future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_coder: list[Tokenizer] = []


def _start_worker(tokenizer: str) -> None:
    """Ctrl-C is the first process's to act on; where that is killed, nobody is left to end this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _coder.append(get_tokenizer(tokenizer))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(texts: list[Text]) -> Ids:
    return encode(texts, _coder[0])
