"""The figures of an out-of-memory message, read from text without white space.

The messages are those of c10/cuda/CUDACachingAllocator.cpp of torch 1.0 to 2.14, its HIP and XPU twins,
CUDAMallocAsyncAllocator.cpp and MPSAllocator.mm. A figure that is cut, or could be two, is not a figure.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from gptfit.oom.pattern import lazy

UNITS = {"b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
# Windows and WSL print 17179869184.00 GiB, all ones, where the driver does not tell; no card has an exabyte.
UNKNOWN_BYTES = 1 << 60
LONGEST = 4000

_NUMBER = r"(?P<number>\d{1,3}(?:,\d{3}){1,4}(?:\.\d{1,4})?(?![\d.])|\d{1,20}(?:[.,]\d{1,9})?|\d{1,20}\.(?=[kmgt]i?b))"
# A bare letter is a unit only where the next word shows that it is whole.
_UNIT = r"(?P<unit>bytes?|[kmgt]i?b(?:ytes?)?|[kmgt]i?(?=[;,.)(]|is|total|al|reserved|cached|free|mem|in|of|gpu))"
_SIZE = _NUMBER + _UNIT
_SIZE_OR_BYTES = _NUMBER + r"(?P<unit>bytes?|[kmgt]i?b|[kmgt](?=at|free)|b(?!y))"  # Paddle's, XLA's on a TPU
# Not the end of a longer number; a full stop before it ends a sentence.
_WHOLE = r"(?:(?<=gpu\d )|(?<=gpu\d\d )|(?<=inuse\.)|(?<=isfree\.)|(?<![\d.])(?<!\d ))" + _SIZE
_IS = r"(?:is|are|was)?"
_ASKED = r"tr(?:ied|ies|ying)(?:to)?alloc(?:ate|ating)?:?(?:about|~)?"


def _compiled(*patterns: str) -> tuple[re.Pattern[str], ...]:
    return tuple(lazy(pattern) for pattern in patterns)


ANY = {
    "tried_bytes": _compiled(
        rf"{_ASKED}{_SIZE}",
        rf"requested:{_SIZE}",
        rf"(?:尝试|试图|嘗試)分配(?:了)?:?{_SIZE}",
        rf"unabletoallocate{_SIZE}",
        rf"failedtocuda(?:host)?calloc(?:async)?{_SIZE}",
        rf"invalidbuffersize:{_SIZE}",
        rf"attemptingto(?:allocate|reserve){_SIZE_OR_BYTES}",
        rf"failedtoalloc(?:ate(?:requestfor)?)?{_SIZE}",
        rf"outofmemoryallocating{_SIZE}",
        rf"requestedamountofgpumemory\({_SIZE}",
        rf"cannotallocate{_SIZE_OR_BYTES}",
        rf"allocating{_SIZE}ondevice",
    ),
    "beside_bytes": _compiled(rf"otherallocations:{_SIZE}"),
    "private_pools_bytes": _compiled(rf"with{_SIZE}allocatedinprivate"),
    "allowed_bytes": _compiled(rf"{_WHOLE}allowed(?=[;,.)])", rf"maxallowed:{_SIZE}", rf"fraction\):{_SIZE}"),
}
# torch 2.1 and later, in sentences; also what the asynchronous allocator and MPS print behind a colon.
SENTENCES = {
    "total_bytes": _compiled(rf"totalcapa\w{{1,7}}?(?:of|:|is){_SIZE}", rf"devicelimit:{_SIZE}"),
    "free_bytes": _compiled(
        rf"ofwhich{_SIZE}", rf"{_WHOLE}{_IS}free(?![d(])", rf"free\(accordingto\w{{1,8}}\):{_SIZE}"
    ),
    "process_bytes": _compiled(rf"thisprocesshas{_SIZE}", rf"{_WHOLE}inusebythisprocess"),
    "allocated_bytes": _compiled(
        rf"oftheallocatedmemory{_SIZE}",
        rf"{_WHOLE}(?:is|already|are)allocated(?!in)",
        rf"mpsallocated:{_SIZE}",
        rf"currentlyallocated:{_SIZE}",
    ),
    "reserved_unallocated_bytes": _compiled(rf"{_WHOLE}{_IS}reserved(?!intotal)"),
}
# Up to torch 2.0, in brackets; also what people type from memory.
BRACKETS = {
    "total_bytes": _compiled(
        rf"{_WHOLE}(?:of)?(?:total|max)?capa\w{{1,7}}",
        rf"totalcapa\w{{1,7}}?(?:of|:|is){_SIZE}",
        rf"{_WHOLE}total(?=[;,)])",
    ),
    "free_bytes": _compiled(
        rf"{_WHOLE}{_IS}free(?!d)", rf"availablememoryisonly{_SIZE_OR_BYTES}", rf"thereare{_SIZE_OR_BYTES}free"
    ),
    "allocated_bytes": _compiled(rf"{_WHOLE}(?:is|are)?(?:al{{1,2}}ready)?allocated(?!in)"),
    "reserved_bytes": _compiled(rf"{_WHOLE}{_IS}reserved(?!\w{{0,20}}but)"),
    "reserved_unallocated_bytes": _compiled(rf"{_WHOLE}{_IS}reserved(?:by\w{{1,10}})?but(?:un|not)"),
    "process_bytes": _compiled(rf"{_WHOLE}inusebythisprocess"),
    # Before torch 1.4: reserved less allocated (in 1.4 and later the word is "reserved", and it is the total).
    "cached_bytes": _compiled(rf"{_WHOLE}{_IS}(?:cached|incache)"),
}
_SENTENCES = lazy(
    r"capa\w{1,7}?of\d|ofwhich|memoryinuse|butunallocated|ofthealloc|thisprocesshas|mpsallocated|currentlyallocated|devicelimit"
)
_TOTAL = lazy(r"hasa?totalcapa")
_OTHER = lazy(rf"process(?P<pid>\d{{1,12}})has{_SIZE}")
_OTHER_BEGUN = lazy(r"process\d{1,12}(?:has|$|\d|h$|ha$)")
_OTHERS_OVER = lazy(r"oftheallocated|allowed;|isallocatedby|isreservedby")
_DEVICE_SENTENCE = lazy(r"(?:gpu|npu|xpu|device):?(\d{1,3})(?=hasa?total|wouldexceed)")
_DEVICE = lazy(r"(?:\b|[a-z])(?:gpu|npu|mlu|xpu):?(\d{1,2})(?=[;,:)]| \d)")
_START = lazy(
    r"(?P<error>outofmemoryerror)"
    r"|(?P<memory>(?:cuda|hip|xpu|npu|mlu|musa|mpsbackend)(?:driver)?(?:error:?)?outofmemory|allocationondevice\d{0,3}would)"
    r"|(?P<tried>tr(?:ied|ies|ying)(?:to)?alloc|(?:尝试|试图|嘗試)分配|unabletoallocate\d|failedtocuda\w{0,4}calloc|invalidbuffersize"
    r"|attemptingto(?:allocate|reserve)\d|failedtoalloc(?:ate(?:requestfor)?)?\d|outofmemoryallocating\d"
    r"|cannotallocate\d|requestedamountofgpumemory|allocating[\d.]{1,16}[kmgt]i?bondevice)"
)
_END = lazy(r"traceback\(most|thestacktracebelow")
_ORDER = {"error": 0, "memory": 1, "tried": 2}


@dataclass(frozen=True, slots=True)
class Message:
    """One message in a stream: where it begins, its text, and its figures in whole bytes; an absent one is not told."""

    start: int
    text: str
    figures: Mapping[str, int] = field(default_factory=dict)
    device_index: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def told(self) -> int:
        return len(self.figures) + (self.device_index is not None)


def messages_in(text: str) -> list[Message]:
    """All out-of-memory messages of a stream's text, in order."""
    starts: list[int] = []
    last = 3
    for found in _START.finditer(text):
        order = _ORDER[found.lastgroup or "tried"]
        if not starts or order <= last or found.start() - starts[-1] > 400:
            starts.append(found.start())
        last = order
    if not starts and _SENTENCES.search(text):
        starts = [0]
    ends = [*starts[1:], len(text)] if starts else []
    return [_message(text, start, end) for start, end in zip(starts, ends, strict=True)]


def _message(text: str, start: int, end: int) -> Message:
    end = min(end, start + LONGEST)
    over = _END.search(text, start + 20, end)
    # Written with its own beginning, so that a figure at the very start of a paste is seen to be cut.
    part = text[start : over.start() if over else end]
    figures, notes = read_figures(part, cut_before=start == 0)
    device = (_DEVICE_SENTENCE.search(part) or _DEVICE.search(part)) if figures else None
    return Message(start, part, figures, int(device.group(1)) if device else None, notes)


def read_figures(part: str, cut_before: bool) -> tuple[dict[str, int], tuple[str, ...]]:
    """The figures of one message, and notes on those that cannot be told."""
    notes: list[str] = []
    sentences = bool(_SENTENCES.search(part))
    spans: dict[str, tuple[int, int]] = {}
    figures: dict[str, int] = {}
    for name, patterns in {**ANY, **(SENTENCES if sentences else BRACKETS)}.items():
        for pattern in patterns:
            found = pattern.search(part)
            if found is not None and not (cut_before and not part[: found.start("number")].strip(".,")):
                spans[name] = found.span("number")
                figures[name] = in_bytes(found.group("number"), found.group("unit"))
                break
    for name in _claimed_twice(spans):
        del figures[name]
    if sentences and _TOTAL.search(part) and "xpuoutof" not in part:  # torch asks for the list on CUDA alone
        others = _others(part, notes)
        if others is not None:
            figures["other_processes_bytes"] = others
    for name in [name for name, size in figures.items() if size >= UNKNOWN_BYTES]:
        del figures[name]
        notes.append("the driver does not tell what processes hold (Windows or WSL)" if "process" in name else "")
    if "morethan1eb" in part:
        notes.append("more than an exabyte was asked for: a size was computed wrongly, the card is not the matter")
    return figures, tuple(dict.fromkeys(note for note in notes if note))


def _claimed_twice(spans: Mapping[str, tuple[int, int]]) -> set[str]:
    """Figures that two words lay claim to: a part of the message is missing between them."""
    names = sorted(spans, key=lambda name: spans[name])
    return {name for first, second in pairwise(names) if spans[second][0] < spans[first][1] for name in (first, second)}


def _others(part: str, notes: list[str]) -> int | None:
    """The sum of what "Process N has ..." says: 0 where a whole list names none, None where it is not whole."""
    sizes = [size for _, size in processes_in(part)]
    if len(sizes) < len(_OTHER_BEGUN.findall(part)) or not _OTHERS_OVER.search(part):
        return None
    if any(size >= UNKNOWN_BYTES for size in sizes):
        notes.append("the driver does not tell what other processes hold (Windows or WSL)")
        return None
    if len(sizes) == 1 and THIS_PROCESS not in part:
        notes.append(MAYBE_THIS_ONE)
    return sum(sizes)


THIS_PROCESS = "thisprocesshas"
MAYBE_THIS_ONE = "the one process named may be this one, seen from inside a container"


def processes_in(part: str) -> list[tuple[str, int]]:
    """The id of each process that the message names by it, and what it holds."""
    return [(row.group("pid"), in_bytes(row.group("number"), row.group("unit"))) for row in _OTHER.finditer(part)]


def in_bytes(number: str, unit: str) -> int:
    """The printed figure times its unit, to whole bytes. Decimal-looking units mean powers of 1024 here, too."""
    if "," in number:
        grouped = re.fullmatch(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?", number)
        number = number.replace(",", "" if grouped else ".")
    return round(float(number) * UNITS[unit[0]])


def best_of(messages: list[Message]) -> Message | None:
    """The first message with a figure; of its repetitions the fullest."""
    first = next((message for message in messages if message.figures), None)
    if first is None:
        return messages[0] if messages else None
    return max(repetitions(first, messages), key=lambda message: message.told)


def repetitions(first: Message, messages: Sequence[Message]) -> Iterator[Message]:
    """`first`, and those that print the same: no figure differs from its figures."""
    for message in messages:
        common = first.figures.keys() & message.figures.keys()
        if message is first or (
            "tried_bytes" in common and all(first.figures[k] == message.figures[k] for k in common)
        ):
            yield message
