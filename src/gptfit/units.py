"""Bytes in, text out, and back: the only place where MiB and GiB are made or read. Tokens, prices and time too."""

import re

from gptfit.errors import GptfitError

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30
TiB = 1 << 40

_UNITS = {"b": 1, "byte": 1, "bytes": 1, "kib": KiB, "mib": MiB, "gib": GiB, "tib": TiB}
_SIZE = re.compile(r"^(-?[0-9]{1,20}(?:\.[0-9]{0,12})?)\s*([A-Za-z]*)$")

_POWERS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_COUNT = re.compile(r"^([0-9]{1,20})(?:\.([0-9]{1,12}))?(?:[eE]\+?([0-9]{1,2}))?([kKmMbBtT]?)$")
MAX_COUNT = 10**18
_PRICE = re.compile(r"^[0-9]{1,9}(?:\.[0-9]{1,9})?$")


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


def counted(n: int, one: str, many: str = "") -> str:
    """`1 retry`, `1,024 retries`: a number and what it counts; `many` is `one` with an s where not given."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


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
    if not unit and "." in number:
        raise GptfitError(f'the size "{text}" has no unit', f"write it as {number}GiB, or a whole number of bytes")
    return round(float(number) * _UNITS[unit.lower()]) if unit else int(number)


def parse_count(text: str) -> int:
    """Tokens of `10B`, `10M`, `300e9`, `1_000_000` or `524288`: k, M, B and T are powers of 1000.

    Raises GptfitError for anything else, for 0, and for what is no whole number.
    """
    hint = "write it as 10B, 300e9 or 524288"
    match = _COUNT.match(text.strip().replace("_", ""))
    if match is None:
        raise GptfitError(f'cannot read "{_printable(text)}" as a number of tokens', hint)
    whole, fraction, exponent, unit = match.groups(default="")
    scaled = int(whole + fraction) * 10 ** int(exponent or 0) * _POWERS[unit.lower()]
    count, rest = divmod(scaled, 10 ** len(fraction))
    if rest or not 1 <= count <= MAX_COUNT:
        raise GptfitError(f'"{_printable(text)}": expected a whole number of tokens from 1 to {MAX_COUNT:.0e}', hint)
    return count


def parse_price(text: str) -> float:
    """`0.40`, in whatever money it is. Raises GptfitError for anything else."""
    if _PRICE.match(text.strip()) is None:
        raise GptfitError(f'cannot read the price "{_printable(text)}"', "write a number alone, as 0.40")
    return float(text)


def format_count(count: int) -> str:
    """`10B`, `1.5M`, and in full what is no round number of these: `491,520`."""
    for unit in ("T", "B", "M"):
        power = _POWERS[unit.lower()]
        if count >= power and count % (power // 1000) == 0:
            return f"{count / power:,.3f}".rstrip("0").rstrip(".") + unit
    return f"{count:,}"


def format_time(seconds: float, *ends: float) -> str:
    """A length of time, and its interval, in the unit that a person would plan it in: `31 hours (22 to 44)`."""
    units = ((86400, "days"), (3600, "hours"), (60, "minutes"))
    unit, name = next(((unit, name) for unit, name in units if seconds >= 2 * unit), (1, "seconds"))
    interval = f" ({' to '.join(significant(end / unit) for end in ends)})" if ends else ""
    return f"{significant(seconds / unit)} {name}{interval}"


def significant(number: float) -> str:
    """Two digits below 100, and no false precision above: `0.40`, `6.4`, `31`, `1,204`."""
    digits = 0 if number >= 10 else 1 if number >= 1 else 2
    return f"{number:,.{digits}f}"


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text[:60])
