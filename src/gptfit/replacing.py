"""Files that are there whole or not at all: written beside, then renamed into place."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from gptfit.errors import GptfitError

FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` when the block is left without an error.

    On an error what was written is removed, and what was at `path` before is untouched. A link stays one, and the
    file that it leads to is replaced; a device or a pipe (/dev/null, /dev/stdout, a shell's >(command)) is written
    to as it is. Raises GptfitError where `path` names no file, and where the file system is full or cannot be
    written to.
    """
    if not path.name:
        raise GptfitError(f'cannot write "{path}": it names no file', "give the name of a file")
    if _is_stream(path):
        try:
            with path.open("ab") as file:  # what a shell sent to a file already stays there
                yield file
        except OSError as error:
            raise not_written(path, error) from error
        return
    target = Path(os.path.realpath(path))
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
        sync_folder(target.parent)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        cause = os_error(error)
        if cause is None:
            raise
        raise not_written(path, cause) from error


def _is_stream(path: Path) -> bool:
    """Whether a file beside `path` could not stand in for it: renamed over a device, it would be the end of that."""
    if str(path).startswith(("/dev/std", "/dev/fd/", "/proc/self/fd/")):
        return True
    try:
        kind = path.stat().st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(kind) or stat.S_ISDIR(kind))


def not_written(path: Path, cause: OSError) -> GptfitError:
    """The line for a file that could not be written."""
    if cause.errno in FULL:
        return GptfitError(
            f'no space left to write "{path}"; nothing that was there before is lost',
            "free some space there, or write to another folder",
        )
    reason = (cause.strerror or str(cause)).lower()
    return GptfitError(f'cannot write "{path}": {reason}', "write to another folder")


def os_error(error: BaseException) -> OSError | None:
    """The OSError that `error` is or was caused by: torch.save hides it in a RuntimeError of its own."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, OSError):
        seen = seen.__cause__ or seen.__context__
    return seen


def sync_folder(folder: Path) -> None:
    """Makes a rename in `folder` durable, where the system lets a folder be opened (not on Windows)."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
