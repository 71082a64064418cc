"""From text to token files, streaming: no file is ever held whole."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gptfit.errors import GptfitError
from gptfit.replacing import replacing
from gptfit.tokenizer import Tokenizer, get_tokenizer

META = "meta.json"

BLOCK_BYTES = 1 << 20
COPY_TOKENS = 1 << 20

Source = str | Path


@dataclass(frozen=True, slots=True)
class Prepared:
    """What `prepare` wrote. `skipped` are files of a folder that are not text."""

    folder: Path
    tokenizer: str
    vocab_size: int
    n_train: int
    n_val: int
    n_files: int
    skipped: tuple[Path, ...]


def prepare(
    sources: Iterable[Source],
    tokenizer: str,
    out_dir: Path,
    val_fraction: float = 0.05,
    on_progress: Callable[[int], None] | None = None,
) -> Prepared:
    """Writes train.bin, val.bin and meta.json into `out_dir` from text files, folders of them, or stdin (`-`).

    Files follow one another in the order given, a folder's sorted by path, with the tokenizer's end-of-text
    between them; the last `val_fraction` of all tokens is for validation. `on_progress` is told the tokens so
    far. Raises GptfitError for a missing source, no text at all, or a full disk; then nothing is replaced.
    """
    if not 0.0 < val_fraction < 1.0:
        raise GptfitError(f"val_fraction={val_fraction} is not between 0 and 1", "0.05 keeps every 20th token")
    coder, folder = get_tokenizer(tokenizer), Path(out_dir)
    files, skipped = list_files(sources, folder)
    dtype = np.dtype("<u2" if coder.n_vocab < 65536 else "<u4")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise GptfitError(f'cannot make the folder "{folder}": {reason}', "give another --out") from None
    with replacing(folder / "val.bin") as val, replacing(folder / "train.bin") as train:
        n = 0
        for ids in encode(files, coder):
            train.write(ids.astype(dtype).tobytes())
            n += len(ids)
            if on_progress is not None:
                on_progress(n)
        if n < 2:
            raise GptfitError("there is no text in what was given", "give text files, folders of them, or - for stdin")
        n_val = max(1, int(n * val_fraction))
        train.flush()
        _copy_tail(Path(train.name), n - n_val, dtype, val)
        train.truncate((n - n_val) * dtype.itemsize)
    prepared = Prepared(folder, coder.name, coder.n_vocab, n - n_val, n_val, len(files), skipped)
    meta = {
        "schema": "gptfit.data/1",
        "tokenizer": coder.name,
        "vocab_size": coder.n_vocab,
        "dtype": "uint16" if dtype.itemsize == 2 else "uint32",
        "n_train": prepared.n_train,
        "n_val": n_val,
    }
    with replacing(folder / META) as file:
        file.write((json.dumps(meta, indent=2) + "\n").encode())
    return prepared


def list_files(sources: Iterable[Source], out_dir: Path) -> tuple[list[Path | None], tuple[Path, ...]]:
    """Text files of `sources` in order (None stands for stdin), and the binary ones that were passed over.

    Hidden files, and what lies in `out_dir`, are no text of a folder's.
    """
    files: list[Path | None] = []
    skipped: list[Path] = []
    for source in sources:
        path = Path(source)
        if str(source) == "-":
            files.append(None)
        elif path.is_dir():
            for file in sorted(path.rglob("*")):
                hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
                if hidden or not file.is_file() or file.resolve().is_relative_to(out_dir.resolve()):
                    continue
                (skipped if _is_binary(file) else files).append(file)
        elif path.exists():
            files.append(path)
        else:
            raise GptfitError(f'there is no file or folder "{source}"', "give text files, folders, or - for stdin")
    return files, tuple(skipped)


def encode(files: Iterable[Path | None], coder: Tokenizer) -> Iterator[np.ndarray]:
    """Ids of the files, a block of text at a time, end-of-text between files."""
    for index, path in enumerate(files):
        if index and coder.end_of_text is not None:
            yield np.array([coder.end_of_text])
        if path is None:
            yield from map(coder.encode, blocks(sys.stdin.buffer))
            continue
        try:
            with path.open("rb") as file:
                yield from map(coder.encode, blocks(file))
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise GptfitError(f'cannot read "{path}": {reason}', "leave it out, or mend its permissions") from None


def blocks(file: BinaryIO, size: int = BLOCK_BYTES) -> Iterator[bytes]:
    """The file in pieces of about `size` bytes that end where a tokenizer would cut anyway: after a line,
    else after a space, else between two characters."""
    rest = b""
    while piece := file.read(size):
        rest += piece
        cut = max(rest.rfind(b"\n") + 1, 0) or rest.rfind(b" ") + 1 or _character_boundary(rest)
        if cut:
            yield rest[:cut]
        rest = rest[cut:]
    if rest:
        yield rest


def _character_boundary(data: bytes) -> int:
    """Where the last UTF-8 character of `data` begins: what follows may be cut off in its middle."""
    at = len(data) - 1
    while at > max(0, len(data) - 4) and data[at] & 0xC0 == 0x80:
        at -= 1
    return at


def _is_binary(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return b"\0" in file.read(8192)
    except OSError:
        return True


def _copy_tail(path: Path, start: int, dtype: np.dtype, out: BinaryIO) -> None:
    with path.open("rb") as file:
        file.seek(start * dtype.itemsize)
        while piece := file.read(COPY_TOKENS * dtype.itemsize):
            out.write(piece)
