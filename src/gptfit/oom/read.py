"""A pasted text to facts: which error it is, every figure it prints, where it happened.

The message is read with all white space taken out, so wrapping does not matter. A figure that was cut off is not
a figure: nothing is guessed.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from gptfit.errors import GptfitError
from gptfit.oom.clean import clean_lines, squashed
from gptfit.oom.frames import Frame, phase_of, read_frames
from gptfit.oom.kinds import kind_of
from gptfit.oom.runkeys import program_of, run_keys

_UNITS = {"bytes": 1, "byte": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_UNITS |= {"KB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30, "TB": 1 << 40}
_UNITS = {unit.lower(): size for unit, size in _UNITS.items()}
SIZE = r"(\d{1,18}(?:\.\d{1,6})?)(bytes|byte|[KMGT]iB|[KMGT]B)"
UNKNOWN_BYTES = 1 << 60  # WSL prints 17179869184.00 GiB where the driver does not tell


@dataclass(frozen=True, slots=True)
class OomFacts:
    """What the text says. None where it does not."""

    kind: str
    wording: str
    explanation: str
    tried_bytes: int | None
    device_index: int | None
    total_bytes: int | None
    free_bytes: int | None
    process_bytes: int | None
    other_processes_bytes: int | None
    allocated_bytes: int | None
    reserved_bytes: int | None
    reserved_unallocated_bytes: int | None
    private_pools_bytes: int | None
    allowed_bytes: int | None
    phase: str
    frames: tuple[Frame, ...]
    config: Mapping[str, object]
    program: str
    notes: tuple[str, ...]


_FLAGS = re.I
PATTERNS = {
    "tried_bytes": re.compile(rf"triedtoallocate{SIZE}", _FLAGS),
    "total_bytes": re.compile(rf"(?:totalcapaci?tyof{SIZE}|;{SIZE}totalcapaci?ty)", _FLAGS),
    "free_bytes": re.compile(rf"(?:ofwhich{SIZE}isfree|;{SIZE}free[;)])", _FLAGS),
    "process_bytes": re.compile(rf"thisprocesshas{SIZE}memoryinuse", _FLAGS),
    "allocated_bytes": re.compile(
        rf"(?:{SIZE}isallocatedbypytorch|;{SIZE}alreadyallocated|mpsallocated:{SIZE})", _FLAGS
    ),
    "reserved_bytes": re.compile(rf"{SIZE}reservedintotalbypytorch", _FLAGS),
    "reserved_unallocated_bytes": re.compile(rf"(?<![\d.]){SIZE}isreservedbypytorchbutunallocated", _FLAGS),
    "private_pools_bytes": re.compile(rf"{SIZE}allocatedinprivatepools", _FLAGS),
    "allowed_bytes": re.compile(rf"(?:{SIZE}allowed;|maxallowed:{SIZE})", _FLAGS),
}
_PROCESS = re.compile(rf"process\d{{1,10}}has{SIZE}memoryinuse", _FLAGS)
_DEVICE = re.compile(r"(?:\(gpu|\.gpu|gpu)(\d{1,3})(?:;|hasatotal)", _FLAGS)
_ANCHOR = re.compile(r"tried to allocate|out of memory|outofmemory", _FLAGS)


def read_paste(text: str) -> OomFacts:
    """The facts of a pasted traceback or log. Raises GptfitError if there is nothing in it."""
    if not text.strip():
        raise GptfitError("the paste is empty", "paste the traceback, from the first line to the last")
    ranked = clean_lines(text)
    lines = [line for _, line in ranked]
    kind, wording, explanation = kind_of(lines)
    message = squashed(_message_lines(ranked))
    figures = {name: _figure(pattern, message) for name, pattern in PATTERNS.items()}
    notes: list[str] = []
    others: int | None = None
    if "totalcapacityof" in message.lower() or "totalcapactyof" in message.lower():
        sizes = [_bytes(number, unit) for number, unit in _PROCESS.findall(message)]
        others = sum(size for size in sizes if size < UNKNOWN_BYTES)
        if len(sizes) != len([size for size in sizes if size < UNKNOWN_BYTES]):
            notes.append("the driver does not tell what other processes hold (Windows or WSL)")
        if figures["process_bytes"] is None and len(sizes) == 1:
            notes.append("the one process named may be this one, seen from inside a container")
    for name, value in figures.items():
        if value is not None and value >= UNKNOWN_BYTES:
            figures[name] = None
    device = _DEVICE.search(message)
    frames = read_frames(lines)
    if message.lower().count("triedtoallocate") > 1:
        notes.append("the message stands there more than once; the first is read")
    if kind == "mps":
        figures["total_bytes"] = None
    return OomFacts(
        kind=kind,
        wording=wording or _wording(message, figures),
        explanation=explanation,
        device_index=int(device.group(1)) if device else None,
        other_processes_bytes=others,
        phase="data" if kind == "shm" else phase_of(frames, lines),
        frames=tuple(frames),
        config=run_keys(lines),
        program=program_of(lines),
        notes=tuple(notes),
        **figures,
    )


def _message_lines(ranked: list[tuple[str, str]]) -> list[str]:
    """The lines of the message: from the first that speaks of it to the end of its paragraph, of one rank."""
    whole = [bool(_ANCHOR.search(line)) for _, line in ranked]
    for index, (rank, line) in enumerate(ranked):
        follows = ranked[index + 1][1][:40] if index + 1 < len(ranked) else ""
        wrapped = not any(whole) and bool(_ANCHOR.search(line[-40:] + follows))
        if whole[index] or wrapped:
            found: list[str] = []
            for other, text in ranked[index : index + 60]:
                if found and (
                    text.lstrip().startswith(("Traceback", 'File "')) or (not text.strip() and len(found) > 1)
                ):
                    break
                if other == rank or not other:
                    found.append(text)
            return found
    return []


def _figure(pattern: re.Pattern[str], message: str) -> int | None:
    found = pattern.search(message)
    if found is None:
        return None
    parts = [part for part in found.groups() if part is not None]
    return _bytes(parts[0], parts[1])


def _bytes(number: str, unit: str) -> int:
    """The printed figure times its unit, to whole bytes. Decimal-looking units mean powers of 1024 here, too."""
    return round(float(number) * _UNITS[unit.lower()])


def _wording(message: str, figures: Mapping[str, int | None]) -> str:
    low = message.lower()
    if "capacty" in low:
        return "torch2.1"
    if "pytorch_alloc_conf" in low:
        return "torch2.9"
    if "totalcapacityof" in low:
        return "torch2.2"
    if "cached)" in low:
        return "torch<1.4"
    if figures.get("reserved_bytes") is not None or "totalcapacity" in low:
        return "torch1.x"
    return "unknown"
