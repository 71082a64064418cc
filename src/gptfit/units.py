"""Bytes in, text out, and back. The only place where MiB and GiB are made or read."""

import re

from gptfit.errors import GptfitError

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30
TiB = 1 << 40

_UNITS = {"b": 1, "byte": 1, "bytes": 1, "kib": KiB, "mib": MiB, "gib": GiB, "tib": TiB}
_SIZE = re.compile(r"^(-?[0-9]{1,20}(?:\.[0-9]{0,12})?)\s*([A-Za-z]*)$")


def format_bytes(n_bytes: int) -> str:
    """Two decimals and the unit a person would choose: `1.54 GiB`, `980.25 MiB`, `512 bytes`."""
    size = abs(n_bytes)
    for unit, name in ((TiB, "TiB"), (GiB, "GiB"), (MiB, "MiB"), (KiB, "KiB")):
        if size >= unit:
            return f"{n_bytes / unit:.2f} {name}"
    return f"{n_bytes} bytes"


def format_mib(n_bytes: int) -> str:
    """MiB with one decimal and thousands separated, without the unit: for columns."""
    return f"{n_bytes / MiB:,.1f}"


def parse_size(text: str | int) -> int:
    """Bytes of `1.5GiB`, `900 MiB` or `1073741824`.

    Raises GptfitError for anything else. GB and MB are refused, not guessed: the 7 % between GB and
    GiB is larger than many margins.
    """
    match = _SIZE.match(str(text).strip())
    if match is None:
        raise GptfitError(f'cannot read the size "{text}"', "write it as 1.5GiB, 900MiB or a number of bytes")
    number, unit = match.groups()
    if unit and unit.lower() not in _UNITS:
        raise GptfitError(f'unknown unit "{unit}" in the size "{text}"', "use KiB, MiB, GiB or TiB (powers of 1024)")
    if number.startswith("-"):
        raise GptfitError(f'the size "{text}" is negative', "memory is counted from 0 upwards")
    return round(float(number) * _UNITS[unit.lower()]) if unit or "." in number else int(number)
