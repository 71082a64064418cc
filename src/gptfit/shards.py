"""Token files: one after another they are one sequence of ids.

The first is train.bin (val.bin), as nanoGPT has it; where a size was asked for, more follow as train-00001.bin …
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gptfit.errors import GptfitError

COPY_TOKENS = 1 << 20


def shard_path(folder: Path, part: str, index: int) -> Path:
    return folder / (f"{part}-{index:05d}.bin" if index else f"{part}.bin")


def sizes(n: int, room: int) -> list[int]:
    """How many of `n` ids each file holds, where `room` fit into one (0: all); there is always a first."""
    if not room:
        return [n]
    full, rest = divmod(n, room)
    return [room] * full + ([rest] if rest or not full else [])


class ShardWriter:
    """Writes the files of one part: `n` ids are there already, and what lies behind them is forgotten.

    Which id is in which file depends on its number alone. Raises OSError, and GptfitError where files are shorter
    than `n` says.
    """

    def __init__(self, folder: Path, part: str, dtype: np.dtype, shard_bytes: int, n: int = 0) -> None:
        self.folder, self.part, self.dtype = folder, part, dtype
        self.room = max(1, shard_bytes // dtype.itemsize) if shard_bytes else 0
        self.file: BinaryIO | None = None
        self.n = 0
        self.shorten(n)

    def write(self, ids: np.ndarray) -> None:
        data = memoryview(ids.astype(self.dtype, copy=False).tobytes())
        while data:
            held = self.n % self.room if self.room else 0
            if self.room and not held and self.n:
                self._open(self.n // self.room, 0)
            fits = min(len(data), (self.room - held) * self.dtype.itemsize) if self.room else len(data)
            assert self.file is not None
            self.file.write(data[:fits])
            self.n += fits // self.dtype.itemsize
            data = data[fits:]

    def tail(self, n: int) -> Iterator[np.ndarray]:
        """The last `n` ids in order, some at a time."""
        self.sync()
        before, start = 0, self.n - n
        for path, held in zip(self.paths(), sizes(self.n, self.room), strict=True):
            skipped = min(held, max(0, start - before))
            before += held
            with path.open("rb") as file:
                file.seek(skipped * self.dtype.itemsize)
                while piece := file.read(COPY_TOKENS * self.dtype.itemsize):
                    yield np.frombuffer(piece, self.dtype)

    def shorten(self, n: int) -> None:
        """Keeps the first `n` ids."""
        self.close()
        self.n = n
        held = sizes(n, self.room)
        for index, size in enumerate(held[:-1]):
            self._check(index, size)
        self._open(len(held) - 1, held[-1])
        for index in count(len(held)):
            path = shard_path(self.folder, self.part, index)
            if not path.exists():
                break
            path.unlink()

    def paths(self) -> list[Path]:
        return [shard_path(self.folder, self.part, index) for index in range(len(sizes(self.n, self.room)))]

    def sync(self) -> None:
        """What was written is on the disk, also after a power cut."""
        if self.file is not None:
            self.file.flush()
            os.fsync(self.file.fileno())

    def close(self) -> None:
        """Leaves the file open to no one; what a full disk did not take is lost, and was not counted on."""
        file, self.file = self.file, None
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()

    def _open(self, index: int, held: int) -> None:
        self.sync()
        self.close()
        if held:
            self._check(index, held, exactly=False)
        path = shard_path(self.folder, self.part, index)
        file = self.file = path.open("r+b" if held else "wb")
        file.truncate(held * self.dtype.itemsize)
        file.seek(0, os.SEEK_END)

    def _check(self, index: int, n: int, exactly: bool = True) -> None:
        path = shard_path(self.folder, self.part, index)
        there, expected = path.stat().st_size if path.exists() else 0, n * self.dtype.itemsize
        if there < expected or (exactly and there > expected):
            raise GptfitError(
                f'"{path}" holds {there:,} bytes, and {expected:,} were written: somebody changed it',
                "begin anew with --restart",
            )


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
