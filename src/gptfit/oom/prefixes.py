"""What loggers, launchers, schedulers and mail put before a line, and the rank that some of it tells."""

import re

from gptfit.oom.pattern import lazy

_LEVELS = (
    r"(?:ERROR|CRITICAL|FATAL|WARNING|WARN|INFO|DEBUG|NOTICE|TRACE|STDERR|STDOUT"
    r"|stderr|stdout|error|warning|info|Error)"
)
_DATE = (
    r"\d{4}[-/.]\d\d[-/.]\d\d[T ,_]{1,2}\d\d:\d\d(?::\d\d(?:[.,]\d{1,9})?)?"
    r"(?:\s?(?:Z|UTC|[A-Z]{3,4}|[+-]\d\d:?\d\d))?"
)
# Taken off wherever they begin a line, one inside the other.
_PREFIX = lazy(
    r"(?:"
    + "|".join(
        (
            r"(?:[>»＞]\s?){1,12}",
            r"[│┃║╎┆▌▏|](?=\s|$)\s?",
            r"[\[(]?(?:default|rank|RANK|Rank|worker|Worker|local_rank)[ _:=-]?\d{1,5}[\]:)|]{1,3}\s?",
            r"\((?:\w{1,40} )?(?:rank|pid)=\d{1,9}[^)\n]{0,60}\)\s?",
            r"\w{1,40} (?:rank|pid)=\d{1,9}(?: pid=\d{1,9})?\)\s?",
            r"\[\d{1,4},\d{1,5}\]<std(?:err|out)>:\s?",
            r"\[\d{1,4}\]:\s",
            r"\[pod/[^\]\n]{1,160}\]\s",
            rf"\[?{_DATE}\]?(?:\s?-\s|\s?[|,:]\s?|\s{{1,4}}|$)(?:\[[^\]\n]{{1,60}}\]\s?){{0,4}}(?:[-|:]\s)?",
            r"\[?\d\d:\d\d:\d\d(?:[.,]\d{1,6})?\]?(?:\s?[|:-])?\s{1,4}",
            r"\[?\d\d/\d\d/\d{2,4} \d\d:\d\d:\d\d(?:[.,]\d{1,6})?\]?(?:\s?[|:-])?\s{1,4}",
            r"[A-Z][a-z]{2}\s{1,2}\d{1,2} \d\d:\d\d:\d\d(?:\.\d{1,6})? [\w.-]{1,64} [\w./-]{1,64}(?:\[\d{1,9}\])?:\s?",
            r"[EWIFVC]\d{4} \d\d:\d\d:\d\d\.\d{1,9}\s{1,6}\d{1,20} [^\]\n]{1,120}\]\s?(?:\[[\d/_]{1,12}\]\s?){0,2}",
            rf"\[{_LEVELS}(?:\|[^\]\n]{{1,100}})?\](?:\s?[:|-])?\s?",
            rf"{_LEVELS}:[\w.]{{1,80}}:(?=\S|\s|$)",
            rf"(?:std(?:err|out) [FP]|[-|:]?\s?{_LEVELS}(?=[\s:|\]-]))\s?[:|\]-]?\s?(?:[-|]\s)?",
            r"[\w.<>]{1,80}:[\w.<>]{1,80}:\d{1,6}\s[-|]\s",
            r"[\w.-]{1,64} [\w./-]{1,64}\[\d{1,9}\]:\s",
            r"E\s{3,}(?=\S)",
        )
    )
    + ")"
)
_RANK = lazy(
    r"(?:default|rank|RANK|Rank|worker|Worker|local_rank)[ _:=-]?(\d{1,5})|\[\d{1,4},(\d{1,5})\]<|^\[(\d{1,4})\]:"
)
# Taken off only where many lines of a paste have them: what they look like may as well be a line's own beginning.
_COMMON = {
    "number": lazy(r"\s{0,6}(\d{1,6})(?::\s|\s?[|│)]\s?|\t|\.\s)"),
    "label": lazy(r"[\w.@/-]{1,60}\s{0,30}\|\s?"),
    "name": lazy(r"[\w.@-]{1,40}:\s"),
    "comment": lazy(r"\s{0,12}(?:#{1,6}|/{2,4}|--|;{1,3}|%{1,3}|\*{1,2})(?:\s|$)"),
    "diff": lazy(r"[+-](?![+-])\s?"),
    "cell": lazy(r"\s{0,12}\|\s?"),
}
_NO_NAME = lazy(r"(?:[\w.]{0,80}(?:Error|Exception|Warning)|Traceback|File|Process|NCCL|CUDA|torch|return)\b")
_BOX_TAIL = "│┃║╎┆▐"
_BOX = lazy(r"[─━═╭╮╰╯┌┐└┘├┤┬┴┼╔╗╚╝╠╣╦╩╬╌╍┄┅┈┉]+")


def common_prefixes(raw: list[str]) -> tuple[re.Pattern[str], ...]:
    """Those of the doubtful prefixes that at least two fifths of the lines begin with."""
    sample = [_PREFIX.sub("", line, count=1) if _PREFIX.match(line) else line for line in raw[:2000]]
    found: list[re.Pattern[str]] = []
    for kind, pattern in _COMMON.items():
        hits = [match.group() for line in sample if (match := pattern.match(line)) and _plausible(kind, line)]
        if len(hits) < 2 or len(hits) < 0.4 * len(sample):
            continue
        if kind in ("name", "label") and len(set(hits)) > max(8, len(hits) // 4):
            continue
        found.append(pattern)
    return tuple(found)


def _plausible(kind: str, line: str) -> bool:
    return kind != "name" or not _NO_NAME.match(line)


def strip_prefixes(line: str, common: tuple[re.Pattern[str], ...]) -> tuple[str, str]:
    """The line without what stands before it, and the rank, or an empty text."""
    rank = ""
    for _ in range(6):
        found = _PREFIX.match(line.lstrip() if line[:1].isspace() else line)
        if found is not None and found.end():
            line = line.lstrip()[found.end() :] if line[:1].isspace() else line[found.end() :]
            rank = rank or _rank_of(found.group())
            continue
        for pattern in common:
            doubtful = pattern.match(line)
            if doubtful is not None:
                number = doubtful.group().strip(" :")
                rank = rank or (number if number.isdigit() else "")
                line = line[doubtful.end() :]
                break
        else:
            break
    if line[-3:].strip().endswith(tuple(_BOX_TAIL)):
        line = line.rstrip()[:-1].rstrip()
    return (_BOX.sub(" ", line) if not line.isascii() else line), rank


def _rank_of(prefix: str) -> str:
    found = _RANK.search(prefix)
    return next((part for part in found.groups() if part is not None), "") if found else ""
