"""Token files: one after another they are one sequence of ids.

The first is train.bin (val.bin), as nanoGPT has it; where a size was asked for, more follow as train-00001.bin …
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gptfit.replacing import replacing

COPY_TOKENS = 1 << 20


def shard_path(folder: Path, part: str, index: int) -> Path:
    return folder / (f"{part}-{index:05d}.bin" if index else f"{part}.bin")


class ShardWriter:
    """Writes the files of one part. They take their places when `stack` is left without an error."""

    def __init__(self, stack: contextlib.ExitStack, folder: Path, part: str, dtype: np.dtype, shard_bytes: int) -> None:
        self.stack, self.folder, self.part, self.dtype = stack, folder, part, dtype
        self.room = max(1, shard_bytes // dtype.itemsize) if shard_bytes else 0
        self.files: list[tuple[BinaryIO, int]] = []
        self.n = 0
        self._next()

    def write(self, ids: np.ndarray) -> None:
        while len(ids):
            file, n = self.files[-1]
            fits = min(len(ids), self.room - n) if self.room else len(ids)
            if not fits:
                self._next()
                continue
            file.write(ids[:fits].astype(self.dtype).tobytes())
            self.files[-1] = file, n + fits
            self.n += fits
            ids = ids[fits:]

    def cut(self, n_tail: int) -> Iterator[np.ndarray]:
        """Takes the last `n_tail` ids away again, and returns them in order, some at a time."""
        start = self.n - n_tail
        before = 0
        for index, (file, n) in enumerate(self.files):
            at = min(n, max(0, start - before))
            before += n
            if at == n:
                continue
            file.flush()
            with Path(file.name).open("rb") as again:
                again.seek(at * self.dtype.itemsize)
                while piece := again.read(COPY_TOKENS * self.dtype.itemsize):
                    yield np.frombuffer(piece, self.dtype)
            file.truncate(at * self.dtype.itemsize)
            file.seek(0, 2)
            self.files[index] = file, at
        self.n = start

    def _next(self) -> None:
        path = shard_path(self.folder, self.part, len(self.files))
        self.files.append((self.stack.enter_context(replacing(path)), 0))


class Shards:
    """Arrays of ids, read as the one sequence that they are: its length, slices and windows."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self.parts = tuple(parts)
        self.ends = np.cumsum([len(part) for part in self.parts])
        self.dtype = self.parts[0].dtype

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, key: slice) -> np.ndarray:
        start, stop, step = key.indices(len(self))
        found = []
        for part, end in zip(self.parts, self.ends, strict=True):
            begin = int(end) - len(part)
            if begin < stop and start < end:
                found.append(part[max(0, start - begin) : stop - begin])
        return np.concatenate(found or [self.parts[0][:0]])[::step]


def windows(tokens: "np.ndarray | Shards", starts: np.ndarray, length: int) -> np.ndarray:
    """`length` ids from each of `starts` on, [n, length] int64."""
    if isinstance(tokens, Shards):
        return np.stack([tokens[start : start + length] for start in starts.tolist()]).astype(np.int64)
    return np.lib.stride_tricks.sliding_window_view(tokens, length)[starts].astype(np.int64)


def open_shards(paths: Sequence[Path], dtype: np.dtype) -> Any:
    """The files as one sequence, mapped into memory: an array where there is one file, else `Shards`."""
    sizes = [path.stat().st_size // dtype.itemsize for path in paths]
    parts = [np.memmap(path, dtype, "r", shape=(n,)) for path, n in zip(paths, sizes, strict=True) if n]
    if not parts:
        return np.empty(0, dtype)
    return parts[0] if len(parts) == 1 else Shards(parts)
