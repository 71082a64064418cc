"""Documents out of files: plain text, JSON lines, parquet, folders of them, and stdin. Nothing is ever held whole
but one line of JSON, or some rows of parquet.
"""

import gzip
import importlib.util
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from gptfit.errors import GptfitError, nearest

BLOCK_BYTES = 1 << 20
PARQUET_ROWS = 1024

JSON_LINES = (".jsonl", ".ndjson")
PARQUET = (".parquet",)

DEFAULT_FIELD = "text"

Source = str | Path


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text. `opens` is true where a document begins; all that follows until the next such is the same one's."""

    text: bytes
    opens: bool


@dataclass(frozen=True, slots=True)
class Listed:
    """Files in order (None stands for stdin), and the binary ones that were passed over."""

    files: tuple[Path | None, ...]
    skipped: tuple[Path, ...]

    def has_documents(self, field: str) -> bool:
        """Whether some file holds many documents: then they, not the text's last part, are split."""
        return any(kind(path, field) != "text" for path in self.files)


def list_files(sources: Iterable[Source], out_dir: Path) -> Listed:
    """The files of `sources`, a folder's sorted by path.

    Hidden files, and what lies in `out_dir`, are no text of a folder's. Raises GptfitError for a missing one.
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
    return Listed(tuple(files), tuple(skipped))


def kind(path: Path | None, field: str) -> str:
    """text, jsonl or parquet, by the name; stdin holds JSON lines where a field was asked for."""
    if path is None:
        return "jsonl" if field else "text"
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    return "jsonl" if suffix in JSON_LINES else "parquet" if suffix in PARQUET else "text"


def documents(files: Iterable[Path | None], field: str = "") -> Iterator[Piece]:
    """The text of the files: each plain one is a document, and each line of JSON and row of parquet, whose text is
    under the key `field` ("text" where it is empty).

    Raises GptfitError for what cannot be read, naming the line.
    """
    for path in files:
        try:
            if kind(path, field) == "parquet":
                yield from _parquet(cast(Path, path), field or DEFAULT_FIELD)
            elif path is None:
                yield from _of_stream(sys.stdin.buffer, "stdin", kind(path, field), field)
            else:
                with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
                    yield from _of_stream(cast(BinaryIO, file), str(path), kind(path, field), field)
        except (OSError, EOFError) as error:
            reason = (getattr(error, "strerror", None) or str(error)).lower()
            raise GptfitError(f'cannot read "{path}": {reason}', "leave it out, or mend it") from None


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


def _of_stream(file: BinaryIO, name: str, form: str, field: str) -> Iterator[Piece]:
    if form == "jsonl":
        yield from _json_lines(file, name, field or DEFAULT_FIELD)
        return
    for index, block in enumerate(blocks(file)):
        yield Piece(block, opens=index == 0)


def _json_lines(file: BinaryIO, name: str, field: str) -> Iterator[Piece]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise GptfitError(f"{name}:{number}: not JSON: {str(error)[:80]}", "expected one object a line") from None
        if not isinstance(entry, dict):
            raise GptfitError(f"{name}:{number}: expected an object", f'as {{"{field}": "…"}}')
        yield from _row(entry, f"{name}:{number}", field)


def _row(entry: dict[str, Any], where: str, field: str) -> Iterator[Piece]:
    text = entry.get(field)
    if not isinstance(text, str):
        if field in entry:
            raise GptfitError(f'{where}: "{field}" is no text', "--field NAME names the key that holds the text")
        keys = ", ".join(sorted(entry)[:8]) or "none"
        raise GptfitError(f'{where} has no key "{field}"{nearest(field, entry, 1)}', f"--field NAME; its keys: {keys}")
    if text:
        yield Piece(text.encode("utf-8", errors="replace"), opens=True)


def _parquet(path: Path, field: str) -> Iterator[Piece]:
    if importlib.util.find_spec("pyarrow") is None:
        raise GptfitError(
            f'reading "{path}" needs the package pyarrow, which is not installed',
            "pip install pyarrow, or give JSON lines",
        )
    from pyarrow import ArrowException  # pyright: ignore[reportMissingImports]
    from pyarrow.parquet import ParquetFile  # pyright: ignore[reportMissingImports]

    try:
        with ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns = [field] if field in names else names
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=columns):
                for row in batch.to_pylist():
                    if row.get(field, "") is not None:  # a row without text
                        yield from _row(row, str(path), field)
    except ArrowException as error:
        raise GptfitError(f'cannot read "{path}": {str(error)[:120]}', "leave it out, or mend it") from None


def _character_boundary(data: bytes) -> int:
    """Where the last UTF-8 character of `data` begins: what follows may be cut off in its middle."""
    at = len(data) - 1
    while at > max(0, len(data) - 4) and data[at] & 0xC0 == 0x80:
        at -= 1
    return at


def _is_binary(path: Path) -> bool:
    """Whether it is no text, and none of the packed forms that are read either."""
    if kind(path, "") == "parquet":
        return False
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
            return b"\0" in file.read(8192)
    except (OSError, EOFError):
        return True
