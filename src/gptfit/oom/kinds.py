"""Which error a text is about: the wording of the highest rank; among equals the first in the text."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from gptfit.oom.pattern import lazy
from gptfit.oom.stream import Stream
from gptfit.oom.wordings import FAILED, INDEX, KILLED, LAUNCHER, PINNED, RULES, SIGTERM, Rule


@dataclass(frozen=True, slots=True)
class Kind:
    """What a text is about. `explanation` says what it is instead, for what is no out-of-memory error; `at` is the
    place in the text, or -1."""

    kind: str
    wording: str = ""
    explanation: str = ""
    at: int = -1


# What other ranks report when one has ended with an ordinary error.
FOLLOWS = ("NCCL", "time limit", "SIGSEGV", "KeyboardInterrupt")
PLAIN_ERRORS = frozenset(
    ("KeyError", "ValueError", "TypeError", "AttributeError", "ImportError", "ModuleNotFoundError", "FileNotFoundError")
) | frozenset(("AssertionError", "IndexError", "NameError", "ZeroDivisionError", "NotImplementedError", "SyntaxError"))
_ERROR_LINE = lazy(
    r"\s{0,8}((?:[A-Za-z_]\w{0,60}\.){0,8}[A-Z]\w{0,60}(?:Error|Exception|Exit|Interrupt|Warning))(?::\s(.{0,300})|\s*$)"
)
_SIGNAL_ERROR = lazy(r"SignalException|ChildFailedError|CalledProcessError|Warning$")
_KILLED_LINE = lazy(
    r"\s{0,8}(?:\S{1,160}:\s?line\s\d{1,6}:\s+\d{1,9}\s+|\[\d{1,4}\]\s*[-+]?\s*\d{1,9}\s+|z?(?:sh|bash):\s"
    r"|srun: error: \S{1,60} task \S{1,20} )?"
    r"(?:Killed|killed)(?:\s|$|:)"
)
_MENTION = lazy(r"outofmemory|显存不足|爆显存|メモリ不足|gpu\d{0,2}上?.{0,6}内存不足")
# These lines come from a failed check in a kernel; later calls of libraries then fail, whatever their message says.
_ASSERTED = lazy(r"assertion.{0,160}failed|device-sideassert")


def kind_of(lines: Sequence[str], stream: Stream) -> Kind:
    """What the paste is about. `stream` is that of all `lines`."""
    text = stream.text
    best = _best(text)
    if best is not None and best[0].rank <= PINNED:
        return _kind(*best)
    if best is not None and best[0].rank == FAILED:
        asserted = _ASSERTED.search(text)
        follows = best[0].kind in ("cublas", "cudnn", "cuda_driver") and asserted is not None
        if not follows or asserted is None or asserted.start() > best[1]:
            return _kind(*best)
        explanation = f"a kernel's check failed on the GPU, and the library call after it too: {INDEX}"
        return Kind("not_oom", "device-side assert", explanation, asserted.start())
    killed = any(_KILLED_LINE.match(line) for line in lines)
    if killed or (best is not None and best[0].rank == KILLED):
        return _kind(*best) if best is not None and best[0].rank == KILLED else Kind("host_killed", "Killed")
    errors = _errors(lines)
    if best is not None:
        earlier = [error for error in errors if error[1] in PLAIN_ERRORS and error[0] < stream.line_at(best[1])]
        return _python_error(earlier[0]) if earlier and best[0].wording in FOLLOWS else _kind(*best)
    return _mentioned(errors, text)


def _best(text: str) -> tuple[Rule, int] | None:
    """The wording of the highest rank, with its place; of one rank the first in the text."""
    for _, rules in itertools.groupby(sorted(RULES, key=lambda rule: rule.rank), key=lambda rule: rule.rank):
        tried = [rule for rule in rules if not rule.words or any(word in text for word in rule.words)]
        hits = [(rule, match.start()) for rule in tried if (match := rule.pattern.search(text)) is not None]
        if hits:
            return min(hits, key=lambda hit: hit[1])
    return None


def _kind(rule: Rule, at: int) -> Kind:
    return Kind(rule.kind, rule.wording, rule.explanation, at)


def is_error(line: str) -> bool:
    """Whether a line names an exception, as the last of a traceback does."""
    found = _ERROR_LINE.match(line)
    return found is not None and not found.group(1).endswith("Warning")


def _errors(lines: Sequence[str]) -> list[tuple[int, str, str]]:
    """Line number, class and message of each exception that the launcher did not make."""
    return [
        (number, found.group(1).rpartition(".")[2], (found.group(2) or "").strip())
        for number, line in enumerate(lines)
        if (found := _ERROR_LINE.match(line)) and not _SIGNAL_ERROR.search(found.group(1))
    ]


def _python_error(error: tuple[int, str, str]) -> Kind:
    _, name, message = error
    return Kind("not_oom", name, "an ordinary Python error: " + f"{name}: {message}".rstrip(": ")[:200])


def _mentioned(errors: list[tuple[int, str, str]], text: str) -> Kind:
    """No wording of the table: an ordinary error, a signal, or a mere mention of memory."""
    mention = _MENTION.search(text)
    if any("OutOfMemory" in name for _, name, _ in errors) or (mention is not None and not errors):
        return Kind("cuda_caching_allocator", "", "", mention.start() if mention else -1)
    if errors:
        return _python_error(errors[-1])
    for rule in (SIGTERM, LAUNCHER):
        match = rule.pattern.search(text)
        if match is not None:
            return _kind(rule, match.start())
    return Kind("not_oom", "", "nothing in it speaks of memory")
