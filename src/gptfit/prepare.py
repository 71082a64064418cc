"""From text to token files, streaming and in parallel: no file is ever held whole.

What is made lies in DIR/.preparing until all of it is there. Every few seconds what was written is put on record
(`unfinished`), so that the same command goes on from there after any end, with the same bytes as in one go.
"""

import hashlib
import json
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from gptfit.batches import batches, encoded
from gptfit.errors import GptfitError, nearest
from gptfit.replacing import FULL, replacing, sync_folder
from gptfit.shards import ShardWriter, shard_path
from gptfit.sources import Listed, Piece, Place, Source, Unreadable, blocks, kind, list_files, pieces
from gptfit.tokenizer import Tokenizer, get_tokenizer
from gptfit.unfinished import ONCE, WORK, Progress, as_typed, asked, begin, forget, locked, read, reads_once, save

__all__ = ["META", "Prepared", "blocks", "prepare"]

META = "meta.json"

# At most so much work is lost to a kill. Each time the disk is waited for.
SAVE_SECONDS = 5.0

# From so many plain files on each is a document to split by; fewer are split by where they end.
MANY_FILES = 100
SPLITS = ("documents", "tail")

# Told the tokens so far, and the share of the sources' bytes that was read for them.
OnProgress = Callable[[int, float], None]
# Told what it begins with, where that is not nothing.
OnBegin = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Prepared:
    """What `prepare` wrote. `skipped` are files of a folder that are not text, `n_empty` files without a byte,
    `n_blank` lines and rows without text; `split` says what is for validation."""

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
    n_empty: int = 0
    n_blank: int = 0


def prepare(
    sources: Iterable[Source],
    tokenizer: str,
    out_dir: Path,
    val_fraction: float = 0.05,
    on_progress: OnProgress | None = None,
    *,
    field: str = "",
    split: str = "",
    shard_bytes: int = 0,
    workers: int | None = None,
    restart: bool = False,
    on_begin: OnBegin | None = None,
) -> Prepared:
    """Writes train.bin, val.bin and meta.json into `out_dir` from text files, JSON lines, parquet, folders, or stdin.

    Documents follow one another in the order given, with the tokenizer's end-of-text between them. `split` says
    what is for validation: `documents` those whose hash falls into `val_fraction`, the same ones however many
    others there are; `tail` the last `val_fraction` of all tokens; without a word documents where there are many.
    A part above `shard_bytes` goes on in a further file. `workers` processes encode (None: one a core), with the
    same outcome. Cut short, the same call goes on, unless with `restart`; from stdin it begins anew.

    Raises GptfitError for a missing source, what is no text, no text at all, and then nothing is replaced; for a
    full disk; and for a preparation of something else that was cut short in `out_dir`.
    """
    if not 0.0 < val_fraction < 1.0:
        raise GptfitError(f"val_fraction={val_fraction} is not between 0 and 1", "0.05 keeps every 20th token")
    if split and split not in SPLITS:
        raise GptfitError(f'unknown split "{split}"{nearest(split, SPLITS, 1)}', "documents or tail")
    coder, folder, sources = get_tokenizer(tokenizer), Path(out_dir), list(sources)
    listed = list_files(sources, folder)
    make_folder(folder)
    options = {
        "tokenizer": coder.name,
        "val_fraction": val_fraction,
        "split": split or _usual_split(listed, field),
        "field": field,
        "shard_bytes": shard_bytes,
        "ranks": _ranks(coder),
    }
    command = _command(sources, tokenizer, folder, val_fraction, field, split, shard_bytes)
    with locked(folder):
        question = asked(listed.files, options, command)
        progress = begin(folder, question, restart)
        job = _Job(folder, listed, coder, question, workers, on_progress)
        if on_begin is not None:
            for line in _first_lines(progress, question, listed.files, folder):
                on_begin(line)
        with job.unharmed():
            progress = progress if progress.meta else job.make(progress)
            return job.place(progress)


def _first_lines(
    progress: Progress, question: dict[str, Any], files: Sequence[Path | None], folder: Path
) -> Iterator[str]:
    n_files = len(files)
    if progress.n:
        yield f"going on from {progress.n:,} tokens, file {min(progress.place.file + 1, n_files):,} of {n_files:,}"
    elif reads_once(question):
        once = next(path for path in files if path is None or not path.is_file())
        yield f"{once or 'stdin'} comes once: cut short, this begins anew; from a file it would go on"
    if not progress.n and (folder / META).is_file():
        yield f"{folder} holds data already; they are replaced once the new ones are whole"


class _Job:
    """One preparation, from what there is of it to the files in their places."""

    def __init__(
        self,
        folder: Path,
        listed: Listed,
        coder: Tokenizer,
        question: dict[str, Any],
        workers: int | None,
        on_progress: OnProgress | None,
    ) -> None:
        self.folder, self.listed, self.coder, self.workers = folder, listed, coder, workers
        self.question, self.options, self.on_progress = question, question["options"], on_progress
        self.dtype = np.dtype("<u2" if coder.n_vocab < 65536 else "<u4")
        self.ends = np.cumsum([0, *(size for _, size, _ in question["sources"])]).tolist()
        self.saved = time.monotonic()
        self.once = reads_once(question)

    def make(self, progress: Progress) -> Progress:
        """All tokens, in DIR/.preparing."""
        work, room = self.folder / WORK, self.options["shard_bytes"]
        with (
            closing(ShardWriter(work, "train", self.dtype, room, progress.n_train)) as train,
            closing(ShardWriter(work, "val", self.dtype, room, progress.n_val)) as val,
        ):
            progress = self.write(progress, train, val)
            _check(train, val, self.options["split"], self.listed)
            if not val.n:  # of few documents none may have been drawn
                n_tail = max(1, int(train.n * self.options["val_fraction"]))
                for ids in train.tail(n_tail):
                    val.write(ids)
                progress = replace(progress, n_train=train.n - n_tail, n_val=n_tail, cut=True)
                self.save(progress, train, val)  # on record before it is taken away
                train.shorten(progress.n_train)
            meta = {
                "schema": "gptfit.data/1",
                "tokenizer": self.coder.name,
                "vocab_size": self.coder.n_vocab,
                "dtype": "uint16" if self.dtype.itemsize == 2 else "uint32",
                "n_train": train.n,
                "n_val": val.n,
                "n_documents": progress.n_documents,
                "split": "tail" if progress.cut else "documents",
                "train_shards": len(train.paths()),
                "val_shards": len(val.paths()),
            }
            progress = replace(progress, meta=meta)
            self.save(progress, train, val)
        return progress

    def write(self, progress: Progress, train: ShardWriter, val: ShardWriter) -> Progress:
        """Every document into its part, end-of-text between two of a part."""
        fraction = self.options["val_fraction"] if self.options["split"] == "documents" else 0.0
        if self.on_progress is not None:
            self.on_progress(progress.n, self.share(progress.place))
        rest = pieces(self.listed.files, self.options["field"], progress.place)
        for batch, ids in encoded(batches(_marked(rest, fraction, progress.lot)), self.coder, self.workers):
            for part, made in ((train, ids.train), (val, ids.val)):
                part.write(made if part.n else made[ids.n_end :])  # no end of text before the first
            progress = Progress(batch.after, batch.lot, train.n, val.n, progress.n_documents + ids.n_documents)
            if self.on_progress is not None:
                self.on_progress(progress.n, self.share(progress.place))
            if not self.once and time.monotonic() - self.saved >= SAVE_SECONDS:
                self.save(progress, train, val)
        return progress

    def share(self, place: Place) -> float:
        """Of the sources' bytes; a packed or parquet file counts when it is through."""
        before, total = self.ends[min(place.file, len(self.ends) - 1)], self.ends[-1]
        path = self.listed.files[place.file] if place.file < len(self.listed.files) else None
        plain = path is not None and kind(path, "") != "parquet" and not path.name.lower().endswith(".gz")
        return (before + place.offset * plain) / total if total else 0.0

    def save(self, progress: Progress, train: ShardWriter, val: ShardWriter) -> None:
        train.sync()
        val.sync()
        save(self.folder, progress)
        self.saved = time.monotonic()

    def place(self, progress: Progress) -> Prepared:
        """The files from DIR/.preparing into DIR, meta.json last."""
        work, meta = self.folder / WORK, progress.meta
        assert meta is not None
        shards = {part: meta[f"{part}_shards"] for part in ("train", "val")}
        for part, n in shards.items():
            for index in range(n):
                made = shard_path(work, part, index)
                if made.exists():  # else it was put there in an earlier go
                    made.replace(shard_path(self.folder, part, index))
            for index in count(n):  # of what was there before
                if not (old := shard_path(self.folder, part, index)).is_file():
                    break
                old.unlink()
        with replacing(self.folder / META) as file:
            file.write((json.dumps(meta, indent=2) + "\n").encode())
        sync_folder(self.folder)
        forget(self.folder)
        return Prepared(
            self.folder,
            self.coder.name,
            self.coder.n_vocab,
            meta["n_train"],
            meta["n_val"],
            len(self.listed.files),
            self.listed.skipped,
            meta["n_documents"],
            meta["split"],
            sum(shards.values()),
            sum(path != ONCE and not size for path, size, _ in self.question["sources"]),
            progress.place.blank,
        )

    @contextmanager
    def unharmed(self) -> Iterator[None]:
        """What ends a preparation from without leaves it to be gone on with; what is wrong with the text, nothing."""
        try:
            yield
        except (OSError, BrokenProcessPool, Unreadable, KeyboardInterrupt) as error:
            self._explain(error)
            raise
        except GptfitError as error:
            if isinstance(error.__cause__, OSError):  # a full disk that progress.json met
                self._explain(error.__cause__)
            forget(self.folder)
            raise

    def _explain(self, error: BaseException) -> None:
        """Raises the line for it, with how to go on."""
        _, kept = read(self.folder)
        if not kept.n:
            forget(self.folder)
        left = f"the same command goes on from {kept.n:,} tokens" if kept.n else "nothing is left of it"
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(f"cut short; {left}") from None
        if isinstance(error, Unreadable):
            raise GptfitError(error.message, f"mend that; {left}") from None
        if isinstance(error, BrokenProcessPool):
            message = "a process that encodes was ended from outside; the system may have run out of memory"
            raise GptfitError(message, f"give --workers 1; {left}") from None
        if isinstance(error, OSError):
            full = error.errno in FULL
            what = "no space left to write" if full else f"{(error.strerror or str(error)).lower()}: cannot write"
            raise GptfitError(f'{what} "{self.folder}"', f"{'free some' if full else 'mend that'}; {left}") from None


def _ranks(coder: Tokenizer) -> str:
    """A digest of what a name alone does not tell: the contents of a rank file."""
    path = Path(coder.name)
    return "" if coder.name in ("byte", "gpt2") or not _is_file(path) else hashlib.sha256(path.read_bytes()).hexdigest()


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # char: and an alphabet is no path, and may be too long for one
        return False


def _command(
    sources: list[Source], tokenizer: str, folder: Path, val_fraction: float, field: str, split: str, shard_bytes: int
) -> str:
    words = ["gptfit", "data", "prepare", *map(str, sources), "--out", str(folder)]
    given = {"--tokenizer": tokenizer, "--field": field, "--split": split}
    words += [word for option, value in given.items() if value and value != "byte" for word in (option, value)]
    words += ["--val-fraction", str(val_fraction)] if val_fraction != 0.05 else []
    words += ["--shard-size", as_typed(shard_bytes)] if shard_bytes else []
    return shlex.join(words)


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


def _marked(pieces: Iterable[Piece], fraction: float, lot: bool) -> Iterator[tuple[Piece, bool]]:
    """With whether each is for validation; `lot` is that of the document that they begin in the middle of."""
    for piece in pieces:
        if piece.opens:
            lot = is_for_validation(piece.text, fraction)
        yield piece, lot


def _check(train: ShardWriter, val: ShardWriter, split: str, listed: Listed) -> None:
    if train.n + val.n < 2:
        what = f'"{listed.files[0] or "stdin"}"' if len(listed.files) == 1 else "what was given"
        raise GptfitError(f"there is no text in {what}", "give text files, folders of them, or - for stdin")
    if not train.n:
        raise GptfitError(f"split={split} leaves no document to train on: there are too few", "--split tail")
