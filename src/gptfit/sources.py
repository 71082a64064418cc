"""Documents out of files: plain text, JSON lines, parquet, folders of them, and stdin. Nothing is ever held whole
but one line of JSON, or some rows of parquet.

Text is UTF-8; what is not is refused by name and offset, and passed over in a folder.
"""

import codecs
import gzip
import importlib.util
import json
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from gptfit.errors import GptfitError, nearest
from gptfit.plaintext import check_form, check_text

BLOCK_BYTES = 1 << 20
PARQUET_ROWS = 256

JSON_LINES = (".jsonl", ".ndjson")
PARQUET = (".parquet",)

DEFAULT_FIELD = "text"

Source = str | Path


class Unreadable(GptfitError):
    """The system could not read a file now; what it holds is not to blame."""


@dataclass(frozen=True, slots=True)
class Place:
    """How far the files were read: all before `file`, and of it `offset` (bytes of what is unpacked, rows of parquet)
    and `line` lines. `blank` counts the lines and rows without text of all that was read."""

    file: int = 0
    offset: int = 0
    line: int = 0
    blank: int = 0


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text. `opens` is true where a document begins; all that follows until the next such is the same one's.

    From `after` on the rest can be read again, the same to the byte. A piece without text only moves it on.
    """

    text: bytes
    opens: bool
    after: Place = Place()


@dataclass(frozen=True, slots=True)
class Listed:
    """Files in order (None stands for stdin), and those of folders that are not text and were passed over."""

    files: tuple[Path | None, ...]
    skipped: tuple[Path, ...]

    def has_documents(self, field: str) -> bool:
        """Whether some file holds many documents: then they, not the text's last part, are split."""
        return any(kind(path, field) != "text" for path in self.files)


def list_files(sources: Iterable[Source], out_dir: Path) -> Listed:
    """The files of `sources`, a folder's sorted by path; each text in a folder is read through to tell whether it is.

    Hidden files, and what lies in `out_dir`, are no text of a folder's. Raises GptfitError for a missing one.
    """
    files: list[Path | None] = []
    skipped: list[Path] = []
    own = out_dir.resolve()
    for source in sources:
        path = Path(source)
        if str(source) == "-":
            files.append(None)
        elif path.is_dir():
            for file in sorted(path.rglob("*")):
                hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
                if hidden or not file.is_file() or file.resolve().is_relative_to(own):
                    continue
                (files if is_text(file) else skipped).append(file)
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


def documents(files: Sequence[Path | None], field: str = "") -> Iterator[Piece]:
    """The text of the files: each plain one is a document, and each line of JSON and row of parquet, whose text is
    under the key `field` ("text" where it is empty). Raises as `pieces`."""
    return (piece for piece in pieces(files, field) if piece.text)


def pieces(files: Sequence[Path | None], field: str = "", start: Place | None = None) -> Iterator[Piece]:
    """As `documents`, from `start` on; each file ends with a piece without text, which leads on to the next.

    Raises GptfitError for what is no text, naming the line or the offset, and Unreadable where a file cannot be read.
    """
    start = start or Place()
    blank = start.blank
    for index in range(start.file, len(files)):
        path = files[index]
        place = start if index == start.file else Place(index, blank=blank)
        try:
            for piece in _of_file(path, field, place):
                blank = piece.after.blank
                yield piece
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise GptfitError(f'cannot read "{path}": {str(error).lower()}', "leave it out, or mend it") from None
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise Unreadable(f'cannot read "{path}": {reason}', "leave it out, or mend it") from None
        yield Piece(b"", opens=False, after=Place(index + 1, blank=blank))


def blocks(file: BinaryIO, size: int = BLOCK_BYTES) -> Iterator[bytes]:
    """The file in pieces of about `size` bytes that end where a tokenizer would cut anyway: after a line,
    else after a space, else between two characters. Read on from the end of any, the rest are the same."""
    rest = b""
    while piece := file.read(max(1, size - len(rest))):
        rest += piece
        if len(rest) < size:  # the file's end, or a character longer than that
            continue
        cut = rest.rfind(b"\n") + 1 or rest.rfind(b" ") + 1 or _character_boundary(rest)
        if cut:
            yield rest[:cut]
        rest = rest[cut:]
    if rest:
        yield rest


def is_text(path: Path) -> bool:
    """Whether a file of a folder is read: text to its end, or by its name one of the packed forms."""
    form = kind(path, "")
    if form == "parquet":
        return True
    try:
        with _opened(path) as file:
            if form == "jsonl":
                return b"\0" not in file.read(8192)
            for _ in _plain(file, str(path), Place()):
                pass
    except (OSError, EOFError, zlib.error, GptfitError):
        return False
    return True


def _opened(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb"))


def _of_file(path: Path | None, field: str, place: Place) -> Iterator[Piece]:
    form = kind(path, field)
    if path is None:
        yield from _of_stream(sys.stdin.buffer, "stdin", form, field, place)
    elif form == "parquet":
        yield from _parquet(path, field or DEFAULT_FIELD, place)
    else:
        with _opened(path) as file:
            yield from _of_stream(file, str(path), form, field, place)


def _of_stream(file: BinaryIO, name: str, form: str, field: str, place: Place) -> Iterator[Piece]:
    if place.offset:
        file.seek(place.offset)
    if form == "jsonl":
        yield from _json_lines(file, name, field or DEFAULT_FIELD, place)
    else:
        yield from _plain(file, name, place)


def _plain(file: BinaryIO, name: str, place: Place) -> Iterator[Piece]:
    """One document, without the byte order mark that some editors put before UTF-8."""
    offset = place.offset
    for block in blocks(file, BLOCK_BYTES):
        check_text(block, offset, name)
        opens = offset == 0
        offset += len(block)
        text = block.removeprefix(codecs.BOM_UTF8) if opens else block
        if text:
            yield Piece(text, opens, Place(place.file, offset, blank=place.blank))


def _json_lines(file: BinaryIO, name: str, field: str, place: Place) -> Iterator[Piece]:
    offset, blank = place.offset, place.blank
    for number, line in enumerate(file, place.line + 1):
        if not offset:
            check_form(line[:8], name)
        offset += len(line)
        text = b""
        if line.strip():
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError) as error:
                hint = "expected one object a line"
                raise GptfitError(f"{name}:{number}: not JSON: {str(error)[:80]}", hint) from None
            if not isinstance(entry, dict):
                raise GptfitError(f"{name}:{number}: expected an object", f'as {{"{field}": "…"}}')
            text = _text_of(entry, f"{name}:{number}", field)
        blank += not text
        yield Piece(text, bool(text), Place(place.file, offset, number, blank))


def _text_of(entry: dict[str, Any], where: str, field: str) -> bytes:
    if field not in entry:
        raise _no_field(entry, where, "key", field)
    return b"" if entry[field] is None else _as_bytes(entry[field], where, field)  # null: as in a row of parquet


def _no_field(names: Iterable[str], where: str, what: str, field: str) -> GptfitError:
    known = ", ".join(sorted(names)[:8]) or "none"
    return GptfitError(
        f'{where} has no {what} "{field}"{nearest(field, names, 1)}', f"--field NAME; its {what}s: {known}"
    )


def _as_bytes(text: Any, where: str, field: str) -> bytes:
    if not isinstance(text, str):
        raise GptfitError(f'{where}: "{field}" is no text', "--field NAME names the key that holds the text")
    return text.encode("utf-8", errors="replace")


def _parquet(path: Path, field: str, place: Place) -> Iterator[Piece]:
    if importlib.util.find_spec("pyarrow") is None:
        raise GptfitError(
            f'reading "{path}" needs the package pyarrow, which is not installed',
            "pip install pyarrow, or give JSON lines",
        )
    from pyarrow import ArrowException  # pyright: ignore[reportMissingImports]
    from pyarrow.parquet import ParquetFile  # pyright: ignore[reportMissingImports]

    row, blank = 0, place.blank
    try:
        with ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                raise _no_field(file.schema_arrow.names, f'"{path}"', "column", field)
            for group in range(file.num_row_groups):
                if row + file.metadata.row_group(group).num_rows <= place.offset:
                    row += file.metadata.row_group(group).num_rows
                    continue
                for batch in file.iter_batches(PARQUET_ROWS, row_groups=[group], columns=[field]):
                    for value in batch.column(0).to_pylist():
                        row += 1
                        if row <= place.offset:
                            continue
                        text = b"" if value is None else _as_bytes(value, f"{path}, row {row}", field)
                        blank += not text
                        yield Piece(text, bool(text), Place(place.file, row, blank=blank))
    except ArrowException as error:
        reason = str(error).splitlines()[0][:120]
        raise GptfitError(f'cannot read "{path}": {reason}', "leave it out, or mend it") from None


def _character_boundary(data: bytes) -> int:
    """Where the last UTF-8 character of `data` begins: what follows may be cut off in its middle."""
    at = len(data) - 1
    while at > max(0, len(data) - 4) and data[at] & 0xC0 == 0x80:
        at -= 1
    return at
