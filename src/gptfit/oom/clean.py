"""A paste as the program printed it: without quotes, prefixes, colours, markup and progress bars.

Every pattern is anchored or bounded, so that a line of a megabyte costs no more than reading it.
"""

import html
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from gptfit.logfile import CHUNK, WHOLE, excerpt
from gptfit.oom.pattern import lazy
from gptfit.oom.prefixes import common_prefixes, strip_prefixes

MAX_LINE = 4_000


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the program's own output. `rank` is empty where no prefix tells it; `full` says that it is as
    wide as the paste was wrapped to, so that the next line goes on with it."""

    text: str
    rank: str = ""
    full: bool = False


# What a terminal may take for a command. The escape character is sometimes lost or written out on the way.
_ANSI = lazy(
    r"(?:\x1b|␛|\^\[|\\x1b|\\u001b|\\033|\\e)\[[0-9;:?<>=]{0,24}[ -/]{0,3}[@-~]"
    r"|\x9b[0-9;:?]{0,24}[ -/]{0,3}[@-~]"
    r"|\x1b[\]P_^X][^\x07\x1b\n]{0,400}(?:\x07|\x1b\\)?"
    r"|\x1b[ -/]{0,3}[0-~]?"
    r"|\[\d{1,3}(?:;\d{1,3}){0,6}m|\[0?K(?=$|[A-Z ])"
)
_CONTROL = lazy(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\ufeff\u200b-\u200f\u202a-\u202e\u2060-\u2069\u00ad]")
# torch 2.3 printed the device's number as a character: NUL (where the message ends) for 0, \x01 for 1.
_DEVICE_AS_CHARACTER = lazy(r"(?<=GPU )(?:([\x01-\x08])|\^([A-H]))(?= has a total)")
_BREAK = lazy(r"<(?:br\s{0,3}/?|/p|/div|/tr|/li|/pre|/h\d)\s{0,3}>", re.I)
_CELL = lazy(r"</t[dh]>", re.I)
_TAG = lazy(
    r"</?(?:pre|code|div|span|p|br|td|th|tr|table|tbody|thead|b|i|u|font|body|html|li|ul|ol|a|em|strong|kbd|samp|"
    r"tt|blockquote|details|summary|h\d|hr|img|sub|sup|mark|small)(?:\s[^<>]{0,300})?/?>",
    re.I,
)
_ENTITY = lazy(r"&(?:lt|gt|quot|amp|apos|nbsp|#\d{2,5}|#x[0-9a-f]{2,4});", re.I)
# Quoted-printable, as mail is stored: `=` ends a wrapped line, =3D stands for itself.
_MAIL = lazy(r"=([0-9A-F]{2})")
_NO_MAIL = lazy(r"=(?![0-9A-F]{2}|\s*$)")
_FULLWIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
_PLAIN = {**_FULLWIDTH, **dict.fromkeys(map(ord, "“”„‟″«»"), '"'), **dict.fromkeys(map(ord, "‘’‚‛′"), "'")}
_PLAIN |= {**dict.fromkeys(map(ord, "\u00a0\u2007\u202f\u3000"), " "), ord("。"): ".", ord("、"): ",", ord("∶"): ":"}
# A progress bar, with its description where it begins the line; what follows it was printed by someone else.
_BAR = lazy(
    r"(?:^[\w /#().:,=\-\[\]]{0,60}?:?\s{0,8})?(?<![\d.])\d{1,3}%\|[^|]{0,240}\|\s{0,4}[\d.,?kKMGT]{1,12}/"
    r"[\d.,?kKMGT]{1,12}(?:\s{0,3}[A-Za-z]{1,8})?\s{0,3}\[[^\]]{0,160}\]"
    r"|^[\w /#().:,=\-]{0,60}?(?:\d{1,9}it|(?<![\d.])\d{1,3}% [\d.kMG]{1,9}/[\d.kMG]{1,9}) \[[^\]]{0,120}\]"
    r"|^[^\n]{0,60}?[━╸╺█▉▊▋▌▍▎▏▁▂▃▄▅▆▇░▒▓]{6,200}[^\n]{0,80}\d{1,9}/\d{1,9}[^\n]{0,60}$"
)
_FRAMED = ("│", "┃", "║", "|", "╮", "╯", "┐", "┘")  # in a box or a table all lines have one width
_QUOTE = lazy(r"(?:>\s?){1,12}")
_INLINE_RANK = lazy(r"\s(?=\[rank\d{1,5}\]:)")
_INLINE_FRAME = lazy(
    r'\s{1,8}(?=File "[^"\n]{1,300}", line \d|Traceback \(most recent|During handling of the above|'
    r"(?:torch\.)?(?:cuda\.)?(?:OutOfMemory|Runtime|Accelerator)Error: )"
)
_ESCAPED_BREAK = lazy(
    r"\\n(?=(?:\\t| ){0,12}(?:File |Traceback|During |The above|[\w.]{0,80}(?:Error|Exception)\b)|   |\\n)"
)
_ESCAPE = lazy(r"\\(u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|033|.)")
_NAMED = {"n": "\n", "r": "\n", "t": "    ", "e": "\x1b", "033": "\x1b"}
_JSON_SKIP = frozenset(
    ("time", "timestamp", "ts", "stream", "level", "levelname", "logger", "name", "host", "hostname")
)


def window(text: str) -> str:
    """The parts of a long text that matter: see `gptfit.logfile.excerpt`."""
    if len(text) <= WHOLE:
        return text
    pieces = (text[at : at + CHUNK].encode("utf-8", "replace") for at in range(0, len(text), CHUNK))
    return excerpt(pieces).decode("utf-8", "replace")


def uncoloured(text: str) -> str:
    """`text` without what a terminal takes for a command; its line breaks and carriage returns stay."""
    return _ANSI.sub("", text)


def clean_lines(text: str) -> list[Line]:
    """The lines of a paste as the program printed them, each with the rank that printed it."""
    raw = [line for line in _raw_lines(_without_markup(window(text))) if line.strip()]
    width = _wrapped_to(raw)
    common = common_prefixes(raw)
    lines: list[Line] = []
    for line in raw:
        if line.startswith("\0"):  # a further piece of an overlong line
            lines[-1:] = [Line(lines[-1].text, lines[-1].rank, full=True)] if lines else []
            lines.append(Line(line[1:], lines[-1].rank if lines else ""))
            continue
        stripped, rank = strip_prefixes(line, common)
        stripped = _BAR.sub("", stripped, count=4) if "%|" in line or "/s" in line or "━" in line else stripped
        if stripped.strip():
            lines.append(Line(stripped, rank, full=0 < width <= len(line.rstrip()) and not line.endswith(_FRAMED)))
    return _decoded_mail(lines) if any(line.text.endswith("=") for line in lines) else lines


def _decoded_mail(lines: list[Line]) -> list[Line]:
    """Quoted-printable decoded, if each `=` in the text is of that kind."""
    if any(_NO_MAIL.search(line.text) for line in lines):
        return lines
    return [
        Line(_MAIL.sub(_mail_character, line.text.removesuffix("=")), line.rank, line.full or line.text.endswith("="))
        for line in lines
    ]


def _mail_character(found: re.Match[str]) -> str:
    code = int(found.group(1), 16)
    return chr(code) if 32 <= code < 127 else ""


def _without_markup(text: str) -> str:
    """Entities, tags, typographic quotes and full-width forms made plain; no control character is left."""
    text = _DEVICE_AS_CHARACTER.sub(_device_number, text)
    if "<" in text:
        text = _TAG.sub("", _CELL.sub(" | ", _BREAK.sub("\n", text)))
    for _ in range(2):  # escaped twice, where a page shows another page's text
        if _ENTITY.search(text):
            text = html.unescape(text)
    if "<br" in text:
        text = _BREAK.sub("\n", text)
    return text if text.isascii() else text.translate(_PLAIN)


def _device_number(found: re.Match[str]) -> str:
    return str(ord(found.group(1))) if found.group(1) else str(ord(found.group(2)) - ord("@"))


def _raw_lines(text: str) -> Iterator[str]:
    """Lines of at most MAX_LINE; further pieces of a longer one begin with NUL."""
    for line in text.splitlines():
        for unescaped in _unescaped(line):
            plain = _CONTROL.sub("", _ANSI.sub("", unescaped))
            if plain.count("]:") > 1 and _INLINE_RANK.search(plain):
                plain = _INLINE_RANK.sub("\n", plain)
            if plain.count('File "') > 1 or (plain.count("Traceback (") and len(plain) > 60):
                plain = _INLINE_FRAME.sub("\n", plain)
            for part in plain.split("\n"):
                yield part[:MAX_LINE]
                for start in range(MAX_LINE, len(part), MAX_LINE):
                    yield "\0" + part[start : start + MAX_LINE]


def _unescaped(line: str) -> list[str]:
    """The lines in one line of a JSON log, or in one whose line breaks are written as backslash and n."""
    begins = line.find('{"', 0, 200)
    if begins >= 0 and line.rstrip().endswith("}"):
        try:
            texts = list(_strings(json.loads(line[begins:])))
        except (ValueError, RecursionError):
            texts = []
        if texts:
            return [part for text in texts for part in text.splitlines()]
    for _ in range(3):  # JSON in JSON
        if "\\n" not in line or not _ESCAPED_BREAK.search(line):
            break
        line = _ESCAPE.sub(_unescape, line)
    return line.split("\n")


def _unescape(found: re.Match[str]) -> str:
    code = found.group(1)
    if code in _NAMED:
        return _NAMED[code]
    if len(code) > 1:
        return chr(int(code[1:], 16))
    return code if code in "\"'\\/" else found.group()


def _strings(value: object, depth: int = 0) -> Iterator[str]:
    """The texts of a JSON log record, in order."""
    if isinstance(value, str):
        yield value
    elif depth < 4 and isinstance(value, dict):
        for key, inner in value.items():
            if key not in _JSON_SKIP:
                yield from _strings(inner, depth + 1)
    elif depth < 4 and isinstance(value, list):
        for inner in value:
            yield from _strings(inner, depth + 1)


def _wrapped_to(raw: list[str]) -> int:
    """The width at which a terminal cut the lines, or 0: the longest width, if several lines have exactly that."""
    widths = Counter(len(line.rstrip()) for line in raw if not line.endswith(_FRAMED))
    width = max(widths, default=0)
    if not 30 <= width <= 400 or widths[width] + widths[width - 1] < 2:
        return 0
    follows = [_QUOTE.sub("", after) for line, after in pairwise(raw) if len(line.rstrip()) == width]
    cut = [after for after in follows if not after.startswith(("    ", "  File", "File", "Traceback", "^", "~"))]
    return width - 1 if cut and len(cut) >= len(follows) // 2 else 0


def printable(text: str) -> str:
    """`text` without control characters, so that nothing of a paste reaches the terminal as a command."""
    plain = _CONTROL.sub("", _ANSI.sub("", text))
    return "".join(character for character in plain if character.isprintable() or character in "\n\t")
