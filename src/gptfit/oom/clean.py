"""A paste as it was printed: without quotes, prefixes, colours, markup and progress bars.

Every pattern is anchored or bounded, so that a line of a megabyte costs no more than reading it.
"""

import html
import re

# What is looked at around the words that name an out-of-memory error; the rest of a long log is passed over.
WINDOW = 60_000
MAX_LINE = 20_000
LOUD = (
    "out of memory",
    "outofmemory",
    "tried to allocate",
    "alloc_failed",
    "killed",
    "memoryerror",
    "unable to allocate",
)

_ANSI = re.compile(r"\x1b\[[0-9;?]{0,20}[ -/]{0,3}[@-~]|\x1b[\]P][^\x07\x1b]{0,200}(?:\x07|\x1b\\)?|\x1b.?")
_TAG = re.compile(
    r"</?(?:pre|code|div|span|p|br|td|tr|table|b|i|font|body|html|li|ul|ol|a|em|strong)\b[^<>]{0,200}>", re.I
)
_PREFIXES = tuple(
    re.compile(pattern)
    for pattern in (
        r"(?:>\s?){1,8}",
        r"[│┃║╎┆]\s?",
        r"\[?(?:default|rank|RANK|Rank|worker|local_rank|node)[ _:-]?\d{1,5}(?:[:\]]|\]:)\s?:?\s?",
        r"\[\d{1,4}\]:\s",
        r"\d{1,4}:\s(?=\S|\s{2})",
        r"\[?\d{4}-\d\d-\d\d[T ,]\d\d:\d\d:\d\d(?:[.,]\d{1,9})?(?:Z|[+-]\d\d:?\d\d)?\]?\s?",
        r"\[?\d\d:\d\d:\d\d(?:[.,]\d{1,6})?\]?\s",
        r"[A-Z][a-z]{2}\s{1,2}\d{1,2}\s\d\d:\d\d:\d\d\s\S{1,60}\s\S{1,60}:\s",
        r"[|:-]?\s?(?:ERROR|CRITICAL|WARNING|INFO|DEBUG|STDERR|stderr|stdout)\b\s?[:|-]?\s?",
        r"(?:E|W|I)\d{4}\s\d\d:\d\d:\d\d\.\d{1,9}\s{1,6}\d{1,9}\s\S{1,80}\]\s",
        r"\S{1,40}\s{1,3}\|\s",
    )
)
_RANK = re.compile(r"^\[?(?:default|rank|RANK|Rank)[ _:-]?(\d{1,5})[:\]]")
_BOX = str.maketrans(dict.fromkeys("╭╮╰╯─━┌┐└┘├┤┬┴┼═╔╗╚╝╠╣", " "))
_BAR = re.compile(r"\d{1,3}%\||\bit/s\]|\bs/it\]|[█▏▎▍▌▋▊▉]{2}")


def window(text: str) -> str:
    """The parts of a long text around what matters, from one pass over it."""
    if len(text) <= 2 * WINDOW:
        return text
    low = text.lower()
    spans: list[tuple[int, int]] = [(0, 4000), (len(text) - WINDOW // 2, len(text))]
    for word in LOUD:
        at = low.find(word)
        for _ in range(3):
            if at < 0:
                break
            spans.append((max(0, at - WINDOW // 2), at + WINDOW // 4))
            at = low.find(word, at + WINDOW)
    spans.sort()
    merged: list[tuple[int, int]] = []
    for start, end in spans:
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return "\n".join(text[start:end] for start, end in merged)


def clean_lines(text: str) -> list[tuple[str, str]]:
    """(rank, line) of each line as the program printed it; the rank is empty where no prefix tells it."""
    text = window(text)
    if "\\n" in text and text.count("\n") < 4:
        text = text.replace("\\r\\n", "\n").replace("\\n", "\n").replace('\\"', '"')
    if "&" in text and ("&lt;" in text or "&quot;" in text or "&gt;" in text or "&#" in text or "&amp;" in text):
        text = html.unescape(text)
    text = text.replace("\x00", " ").replace("\u00a0", " ")
    lines: list[tuple[str, str]] = []
    for raw in re.split(r"\r\n|\n|\r", text):
        line = _ANSI.sub("", raw[:MAX_LINE])
        if "<" in line:
            line = _TAG.sub("", line)
        line = line.translate(_BOX)
        rank = ""
        for _ in range(4):  # prefixes come one inside the other
            found = _RANK.match(line)
            rank = found.group(1) if found else rank
            shorter = _strip_prefix(line)
            if shorter == line:
                break
            line = shorter
        line = line.rstrip(" │┃║|\t") if line.endswith(("│", "┃", "║")) else line
        if _BAR.search(line[:400]):
            continue
        lines.append((rank, line))
    return lines


def _strip_prefix(line: str) -> str:
    for pattern in _PREFIXES:
        found = pattern.match(line)
        if found and found.end():
            return line[found.end() :]
    return line


def squashed(lines: list[str]) -> str:
    """All characters but white space: a line that was wrapped, in a word even, reads as it was."""
    return re.sub(r"[\s\u3000]+", "", "".join(lines)).translate(_WIDE)


_WIDE = str.maketrans("（）；：，。［］", "();:,.[]")


def printable(text: str) -> str:
    """`text` with control characters left out, so that nothing of a paste reaches the terminal as a command."""
    return "".join(character for character in _ANSI.sub("", text) if character.isprintable() or character in "\n\t")
