"""A preparation that was cut short: what it was asked for, how far it came, and whether the same is asked again.

While token files are made they lie in DIR/.preparing, beside asked.json (sources and options, written once) and
progress.json (written anew, whole or not at all, after the ids that it counts are on the disk).
"""

import dataclasses
import json
import os
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptfit.errors import GptfitError
from gptfit.replacing import replacing, sync_folder
from gptfit.sources import Place

WORK = ".preparing"
GONE = ".preparing.gone"
ASKED = "asked.json"
PROGRESS = "progress.json"

ONCE = "-"

# Characters of a command that is told again; a longer one is not worth a line.
MAX_COMMAND = 600

# The option that stands for a key of what was asked.
OPTIONS = {
    "tokenizer": "--tokenizer",
    "val_fraction": "--val-fraction",
    "split": "--split",
    "field": "--field",
    "shard_bytes": "--shard-size",
}


@dataclass(frozen=True, slots=True)
class Progress:
    """What is on the disk: the tokens of each part, and where the sources go on after them. `lot` is that of a document
    that is not yet at its end; `cut` says that the last part of the text was moved to validation; `meta` is what
    meta.json will say, once all is made and only to be put in its place."""

    place: Place = field(default_factory=Place)
    lot: bool = False
    n_train: int = 0
    n_val: int = 0
    n_documents: int = 0
    cut: bool = False
    meta: dict[str, Any] | None = None

    @property
    def n(self) -> int:
        return self.n_train + self.n_val


def asked(files: Sequence[Path | None], options: dict[str, Any], command: str) -> dict[str, Any]:
    """What a preparation is asked for, as it is compared and kept. Sources go by path, size and time of change."""
    return {
        "schema": "gptfit.preparing/1",
        "command": command,
        "cwd": os.getcwd(),
        "options": options,
        "sources": [_source(path) for path in files],
    }


def _source(path: Path | None) -> list[Any]:
    if path is None or not path.is_file():  # stdin, or a pipe: it can be read once
        return [ONCE, 0, 0]
    stat = path.stat()
    return [os.path.abspath(path), stat.st_size, stat.st_mtime_ns]


@contextmanager
def locked(folder: Path, doing: str = "prepares data into") -> Iterator[None]:
    """Within the block no other process is `doing` so to `folder`, where the system has such locks; one that is killed
    holds it no longer."""
    handle = None
    with suppress(OSError, ImportError):
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            hint = "wait for it, or give another --out"
            raise GptfitError(f'another process {doing} "{folder}" now', hint) from None
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def begin(folder: Path, question: dict[str, Any], restart: bool) -> Progress:
    """How far an earlier preparation of the same came, whose files are in `folder`/.preparing; else makes that folder.

    Raises GptfitError where another was begun there, unless it had made nothing yet or `restart` gives it up.
    """
    work = folder / WORK
    earlier, progress = read(folder)
    if progress.n and earlier and not restart:
        if difference := _difference(earlier, question):
            raise GptfitError(
                f'"{folder}" holds a preparation that was cut short at {progress.n:,} tokens, and {difference}',
                f"go on with it: {_command(earlier)}\nor give it up: the new command with --restart",
            )
        if not reads_once(question):
            return progress
    forget(folder)
    work.mkdir()
    try:
        with replacing(work / ASKED) as file:
            file.write(json.dumps(question).encode())
    except GptfitError:
        forget(folder)
        raise
    return Progress()


def reads_once(question: dict[str, Any]) -> bool:
    """Whether stdin or a pipe is among the sources: then nothing can be gone on with."""
    return any(path == ONCE for path, *_ in question["sources"])


def save(folder: Path, progress: Progress) -> None:
    with replacing(folder / WORK / PROGRESS) as file:
        file.write(json.dumps(dataclasses.asdict(progress)).encode())


def forget(folder: Path) -> None:
    """Removes what an unfinished preparation left: at once, so that a part of it is never gone on with."""
    with suppress(OSError):
        (folder / WORK).replace(folder / GONE)
        sync_folder(folder)
    shutil.rmtree(folder / WORK, ignore_errors=True)
    shutil.rmtree(folder / GONE, ignore_errors=True)


def read(folder: Path) -> tuple[dict[str, Any], Progress]:
    """What was asked and how far it came; nothing, where nothing (readable) was begun."""
    try:
        question = json.loads((folder / WORK / ASKED).read_text())
        known = json.loads((folder / WORK / PROGRESS).read_text())
        return question, Progress(**{**known, "place": Place(**known["place"])})
    except (OSError, ValueError, TypeError, KeyError):
        return {}, Progress()


def refuse_unfinished(folder: Path) -> None:
    """Raises GptfitError where `folder` is half prepared."""
    if not (folder / WORK).is_dir():
        return
    question, progress = read(folder)
    raise GptfitError(
        f'"{folder}" is half prepared: {progress.n:,} tokens so far',
        f"finish it: {_command(question)}",
    )


def _command(question: dict[str, Any]) -> str:
    command = question.get("command", "")
    if not command or len(command) > MAX_COMMAND:
        return "the same gptfit data prepare as before"
    where = question.get("cwd", "")
    return command if where == os.getcwd() else f"cd {shlex.quote(where)} && {command}"


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The first thing that differs, in words."""
    for key, option in OPTIONS.items():
        old, new = before["options"].get(key), now["options"].get(key)
        if old != new:
            old, new = (as_typed(n) if key == "shard_bytes" and n else n or "not given" for n in (old, new))
            return f"{option} was {old} then, {new} now"
    if before["options"] != now["options"]:
        return "the ranks of the tokenizer are others now"
    old, new = before["sources"], now["sources"]
    for (path, size, stamp), (path_now, size_now, stamp_now) in zip(old, new, strict=False):
        if path != path_now:
            gone = path not in {one for one, *_ in new}
            return f'"{path}" is no longer among the sources' if gone else f'"{path_now}" was not read there then'
        if size != size_now:
            return f'"{path}" had {size:,} bytes then, {size_now:,} now'
        if stamp != stamp_now:
            return f'"{path}" was changed since'
    if len(old) != len(new):
        more = new[len(old) :] or old[len(new) :]
        return f'"{more[0][0]}" is ' + ("new among the sources" if len(new) > len(old) else "no longer among them")
    return ""


def as_typed(n_bytes: int) -> str:
    """33554432 as 32MiB: the largest unit that it is a whole number of."""
    power = max(power for power in range(4) if n_bytes % 1024**power == 0)
    return f"{n_bytes // 1024**power}{('B', 'KiB', 'MiB', 'GiB')[power]}"
