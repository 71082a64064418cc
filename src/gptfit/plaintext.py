"""What is no text, in words: where a file stops being UTF-8, or which known form it has instead."""

import codecs
import shlex

from gptfit.errors import GptfitError

# How the packed and binary forms begin that people have text in; each name is followed by what to do with it.
FORMS = {
    b"\x1f\x8b": ("packed with gzip", "give it a name that ends in .gz"),
    b"\x28\xb5\x2f\xfd": ("packed with zstd", "zstdcat FILE | gptfit data prepare -"),
    b"\xfd7zXZ": ("packed with xz", "xzcat FILE | gptfit data prepare -"),
    b"BZh": ("packed with bzip2", "bzcat FILE | gptfit data prepare -"),
    b"PK\x03\x04": ("a zip archive", "unpack it, and give the folder"),
    b"PAR1": ("parquet", "give it a name that ends in .parquet"),
    b"%PDF-": ("a PDF", "pdftotext FILE writes its text"),
    b"\x93NUMPY": ("a numpy array", "give the text that it was made of"),
}

# The longer marks first: UTF-32's little-endian one begins as UTF-16's.
MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}

SAMPLE_BYTES = 4096


def check_form(head: bytes, name: str) -> None:
    """Raises GptfitError where the first bytes of a file say that it is packed, binary, or UTF-16."""
    for mark, encoding in MARKS.items():
        if head.startswith(mark):
            raise _other_encoding(name, encoding, f"by its byte order mark {mark.hex(' ')}")
    for magic, (form, advice) in FORMS.items():
        if head.startswith(magic):
            raise GptfitError(f'"{name}" is {form}, not text', advice.replace("FILE", shlex.quote(name)))


def check_text(block: bytes, offset: int, name: str) -> None:
    """Raises GptfitError where `block`, which lies at `offset` bytes of a file, is no UTF-8 or holds a zero byte."""
    if offset == 0:
        check_form(block[:8], name)
    zero = block.find(b"\0")
    if zero >= 0:
        if offset == 0 and (encoding := _utf16(block[:SAMPLE_BYTES])):
            raise _other_encoding(name, encoding, "every other byte is zero")
        raise GptfitError(
            f'"{name}" is not text: a zero byte at offset {offset + zero:,}',
            "leave it out; in a folder such files are passed over",
        )
    try:
        block.decode()
    except UnicodeDecodeError as error:
        raise GptfitError(
            f'"{name}" is not UTF-8: byte 0x{block[error.start]:02x} at offset {offset + error.start:,}',
            f"if it is Latin-1: iconv -f LATIN1 -t UTF-8 {shlex.quote(name)} > utf8.txt",
        ) from None


def _utf16(head: bytes) -> str:
    """Its name where the zero bytes lie as those of mostly Latin text do."""
    even, odd = head[::2].count(0), head[1::2].count(0)
    few, many = sorted((even, odd))
    if few or 4 * many < len(head):
        return ""
    return "UTF-16LE" if odd else "UTF-16BE"


def _other_encoding(name: str, encoding: str, why: str) -> GptfitError:
    return GptfitError(
        f'"{name}" is {encoding} ({why}), and text is read as UTF-8',
        f"iconv -f {encoding} -t UTF-8 {shlex.quote(name)} > utf8.txt",
    )
