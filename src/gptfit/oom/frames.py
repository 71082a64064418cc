"""The frames of tracebacks: Python's own, rich's, IPython's and pytest's, wrapped or not."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from gptfit.oom.pattern import lazy

MOST_FRAMES = 400

_PYTHON = lazy(
    r'File\s{0,3}(?:"([^"\n]{1,400})"|((?:[A-Za-z]:)?[\w./\\<>~ -]{1,300}?(?:\.py|>)))'
    r"\s{0,3},?\s{0,3}line\s{0,3}(\d{1,7})"
    r"(?:\s{0,3},?\s{0,3}in\s{0,3}(<?[\w.]{1,120}>?)(?:\(\))?(?:\s{2,}(\S.{0,400}))?)?"
)
_RICH = lazy(r"\s{0,3}(\S[^\n]{0,300}?\.pyx?|[^\s<]{0,200}<[\w. ]{1,60}>):(\d{1,7}) in\s{0,3}([\w.<>]{1,120})?\s*$")
_RICH_ARROW = lazy(r"\s{0,3}[❱>]\s{1,3}(\d{1,7})\s{1,3}[│|]?([ │|]{0,80})(\S.{0,400})")
_CELL = lazy(r"\s{0,3}(?:Cell|Input) In\s?\[(\d{1,5})\](?:, (?:line|in) (?:<cell )?(?:line: )?(\d{1,7}))?")
_IPYTHON = lazy(r"\s{0,3}File (\S[^\n]{0,300}?):(\d{1,7}), in ([\w.<>]{1,120})")
_IPYTHON_OLD = lazy(
    r"\s{0,3}(~?/\S{1,300}\.pyx?|[A-Za-z]:\\\S{1,300}\.py|<ipython-input-\S{1,60}>|/tmp/ipykernel_\S{1,80})"
    r" in ([\w.<>]{1,120})"
)
_ARROW = lazy(r"\s{0,3}-{2,8}> ?(\d{1,7})\s(.{0,400})")
_PYTEST = lazy(r"\s{0,8}([\w./\\-]{1,300}\.py):(\d{1,7}): in ([\w.<>]{1,120})")
_CARETS = lazy(r"[\s^~]+$")
_NO_CODE = lazy(
    r"\s{0,4}(?:File\s|Traceback \(most|During handling|The above exception|\[Previous line|frame #\d|"
    r"(?:[a-z_]\w{0,40}\.){0,6}[A-Z]\w{0,60}(?:Error|Exception|Interrupt|Exit)\b)"
)
_HEADER = lazy(r"traceback\(most")


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame: where, and the line of code if it was printed."""

    file: str
    line: int
    function: str
    code: str


def read_frames(lines: Sequence[tuple[int, str]]) -> list[tuple[int, Frame]]:
    """(line number, frame) in the order printed, outermost first. `lines` are (number, text) of logical lines."""
    frames: list[tuple[int, Frame]] = []
    index = 0
    while index < len(lines) and len(frames) < MOST_FRAMES:
        number, text = lines[index]
        if _CARETS.match(text):
            index += 1
            continue
        frame, used = _frame_at(lines, index)
        if frame is not None:
            if not frames or frames[-1][1] != frame:
                frames.append((number, frame))
            index += used
            continue
        arrow = _ARROW.match(text) or _RICH_ARROW.match(text)
        if arrow is not None and frames:
            _give_code(frames, int(arrow.group(1)), arrow.groups()[-1].strip())
        index += 1
    return frames


def _give_code(frames: list[tuple[int, Frame]], line: int, code: str) -> None:
    """The marked line of a listing belongs to the frame above it."""
    number, last = frames[-1]
    if not last.code:
        frames[-1] = (number, Frame(last.file, last.line or line, last.function, code))


def _frame_at(lines: Sequence[tuple[int, str]], index: int) -> tuple[Frame | None, int]:
    """The frame that begins at a line, and how many lines tell it."""
    text = lines[index][1]
    for pattern in (_IPYTHON, _PYTEST):
        found = pattern.match(text)
        if found is not None:
            code = "" if pattern is _IPYTHON else _code_after(lines, index + 1)
            return Frame(found.group(1), int(found.group(2)), found.group(3), code), 1
    at = text.find("File ", 0, 400)
    at = text.find('File"', 0, 400) if at < 0 else at
    if at >= 0:
        return _python_frame(lines, index, at)
    if " in" in text:
        found = _RICH.match(text)
        if found is not None:
            follows = lines[index + 1][1].strip() if index + 1 < len(lines) else ""
            function = found.group(3) or (follows if re.fullmatch(r"[\w.<>]{1,120}", follows) else "")
            return Frame(found.group(1), int(found.group(2)), function, ""), 1
        found = _IPYTHON_OLD.match(text)
        if found is not None:
            return Frame(found.group(1), 0, found.group(2), ""), 1
    found = _CELL.match(text)
    if found is not None:
        return Frame(f"cell {found.group(1)}", int(found.group(2) or 0), "<module>", ""), 1
    return _wrapped_rich(lines, index)


def _python_frame(lines: Sequence[tuple[int, str]], index: int, at: int) -> tuple[Frame | None, int]:
    """Python's own form. Where a terminal wrapped it, the following lines are taken in until it is whole."""
    text = lines[index][1][at : at + 1200]
    for used in range(1, 7):
        found = _PYTHON.match(text)
        follows = lines[index + used][1] if index + used < len(lines) else ""
        if found is not None and (found.group(4) or not _goes_on(found, text, follows)):
            code = found.group(5) or _code_after(lines, index + used)
            file = found.group(1) or found.group(2)
            return Frame(file.strip(), int(found.group(3)), found.group(4) or "", code[:400]), used
        if not follows or len(text) > 600 or 'File "' in follows:
            break
        text += follows.strip() if text.endswith(" ") or found is None else " " + follows.strip()
    found = _PYTHON.match(lines[index][1][at : at + 1200])
    if found is None:
        return None, 1
    return Frame((found.group(1) or found.group(2)).strip(), int(found.group(3)), "", _code_after(lines, index + 1)), 1


def _goes_on(found: re.Match[str], text: str, follows: str) -> bool:
    """Whether a frame without a function was cut: its line ends amid `", line 12, in`, or in the number."""
    tail = text[found.end() :].strip()
    return tail in (",", ", i", ", in") or (
        not tail and bool(re.match(r"\s{0,3}(?:\d{0,6},\s?in|,\s?in|in )", follows))
    )


def _wrapped_rich(lines: Sequence[tuple[int, str]], index: int) -> tuple[Frame | None, int]:
    """rich wraps a long path within its box: `/usr/lib/…/modules/mod`, `ule.py:1501 in _call_impl`."""
    text = lines[index][1].strip()
    if not text.startswith(("/", "~", "C:\\")) or " " in text or index + 1 >= len(lines):
        return None, 1
    for used in (2, 3):
        more = lines[index + used - 1][1].strip() if index + used - 1 < len(lines) else ""
        text += f" {more}" if more.startswith("in ") else more
        found = _RICH.match(text)
        if found is not None and found.group(3):
            return Frame(found.group(1), int(found.group(2)), found.group(3), ""), used
    return None, 1


def _code_after(lines: Sequence[tuple[int, str]], index: int) -> str:
    """The line of code below a frame: not one of carets, nor another frame. Twins of other ranks are passed over."""
    for _, text in lines[index : index + 4]:
        if _CARETS.match(text):
            continue
        if _NO_CODE.match(text):
            if "File" in text[:12] and index and text.strip() == lines[index - 1][1].strip():
                continue
            return ""
        return text.strip()[:400]
    return ""


def is_header(squashed_text: str) -> bool:
    """Whether a line, white space taken out, begins a traceback."""
    return bool(_HEADER.search(squashed_text))
