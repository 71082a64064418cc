"""A pasted text to facts: which error it is, every figure it prints, where it happened, which run it was.

The message is read with all white space taken out, so wrapping does not matter. A figure that was cut off is not
a figure: nothing is guessed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from gptfit.errors import GptfitError
from gptfit.oom.clean import Line, clean_lines, printable, window
from gptfit.oom.figures import THIS_PROCESS, Message, best_of, messages_in, processes_in, repetitions
from gptfit.oom.frames import Frame, is_header, read_frames
from gptfit.oom.hints import (
    ShapeHint,
    gpu_name,
    has_adapters,
    model_name,
    program_of,
    progress_of,
    shapes_in,
    torch_version,
)
from gptfit.oom.kinds import Kind, is_error, kind_of
from gptfit.oom.phases import from_frames, phase_of, phase_of_text
from gptfit.oom.runkeys import run_keys
from gptfit.oom.signs import cards_in, collects, gathers, has_ranks, kept_by, offloads, steps_before
from gptfit.oom.stream import Stream, logical_lines, squashed, stream_of

__all__ = ["Frame", "OomFacts", "ShapeHint", "printable", "read_paste"]

# Kinds whose message has figures of an allocation.
WITH_FIGURES = frozenset(
    (
        "cuda_caching_allocator",
        "cuda_async_allocator",
        "per_process_limit",
        "hip",
        "xpu",
        "mps",
        "host_ram",
        "nccl",
        "cuda_driver",
    )
)


# Of more ranks the first ones are read apart.
MOST_RANKS = 16


@dataclass(frozen=True, slots=True)
class OomFacts:
    """What the text says; None, or "", where it does not. Figures are the printed ones, in whole bytes.

    `kind` is one of the kinds of `gptfit.oom.kinds`; `wording` tells torch's version for the caching allocator's
    message (torch<1.4, torch1.x, torch2.1, torch2.2 for 2.2 to 2.8, torch2.3 for its cut message, torch2.9 and
    later), else which message it was. `explanation` says what it is instead, for `not_oom`. `reserved_bytes` is the
    total that torch before 2.1 prints, `cached_bytes` what torch before 1.4 calls so (reserved less allocated),
    `reserved_unallocated_bytes` the figure of torch 2.1 and later; `other_processes_bytes` the sum of its "Process N
    has" sentences, 0 where its list names none; `processes` has their ids and bytes, where no sentence is of this
    process. `progress` is "first" before the first optimizer step was over, "later"
    after it. `config` has the run's keys as the text tells them, `config_places`
    where: see `gptfit.oom.runkeys.PLACES`. `model` is the preset of a well-known model that the text names, `adapters`
    says that only a few added weights are trained. `frames` are those of the traceback that the message ends.
    `beside_bytes` is what MPS counts beside tensors; `cards` are bytes in use and in all of each GPU that nvidia-smi
    lists in the text; `steps` how many steps its log counts before; `kept` is the line that keeps tensors from step to
    step, `collected` says that an evaluation failed as it collected its batches' logits,
    `gathered` that FSDP put whole parameters together for a checkpoint, `offload` that DeepSpeed was
    told to keep things in the computer's memory. `near` are the lines before a message that has no frames,
    `named_bytes` what each process named by its id holds, this one too where it is named so; `ranked` says that several
    processes train together, where more was free than was asked for.
    """

    kind: str
    wording: str
    explanation: str = ""
    tried_bytes: int | None = None
    device_index: int | None = None
    total_bytes: int | None = None
    free_bytes: int | None = None
    process_bytes: int | None = None
    other_processes_bytes: int | None = None
    processes: tuple[tuple[str, int], ...] = ()
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    reserved_unallocated_bytes: int | None = None
    private_pools_bytes: int | None = None
    allowed_bytes: int | None = None
    cached_bytes: int | None = None
    beside_bytes: int | None = None
    phase: str = "unknown"
    progress: str = ""
    frames: tuple[Frame, ...] = ()
    config: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
    config_places: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    n_params: int | None = None
    tokens_per_step: int | None = None
    program: str = "unknown"
    shapes: tuple[ShapeHint, ...] = ()
    torch_version: str = ""
    gpu: str = ""
    model: str = ""
    adapters: bool = False
    cards: tuple[tuple[int, int], ...] = ()
    steps: int = 0
    kept: str = ""
    collected: bool = False
    gathered: bool = False
    offload: bool = False
    near: tuple[str, ...] = ()
    named_bytes: tuple[int, ...] = ()
    ranked: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Paste:
    """One text in the forms that the steps read: its lines, the same squashed, unwrapped, and as one stream."""

    lines: Sequence[Line]
    squashed: Sequence[str]
    logical: Sequence[tuple[int, str]]
    stream: Stream


def read_paste(text: str) -> OomFacts:
    """The facts of a pasted traceback or log. Raises GptfitError if there is nothing in it."""
    text = window(text)
    lines = clean_lines(text) if text.strip() else []
    if not lines:
        raise GptfitError("the paste is empty", "paste the traceback, from the first line to the last")
    parts = [squashed(line.text) for line in lines]
    wrapped = [replace(line, rank="") for line in lines] if _jumbled(lines, parts) else lines
    paste = _Paste(lines, parts, logical_lines(wrapped), stream_of(lines, parts))
    texts = [line.text for line in lines]
    kind = kind_of(texts, paste.stream)
    message, stream, notes = _message(paste, kind)
    figures = dict(message.figures) if message is not None and kind.kind in WITH_FIGURES else {}
    if kind.kind == "mps":
        figures.pop("total_bytes", None)
    kind = _limited(kind, figures)
    every = read_frames(paste.logical)
    frames = tuple(_clean(frame) for frame in _traceback(paste, stream, message, kind))
    quoted = [frame.code for _, frame in every]
    sources = [line for _, line in paste.logical]
    program = program_of(texts)
    run = run_keys(sources, quoted, program)
    shapes = shapes_in([*(frame.code for frame in frames), *sources[-2000:]])
    wording = kind.wording or ("" if kind.kind == "not_oom" else _wording(message, paste.stream))
    config, places = _with_shapes(run.values, run.places, shapes)
    for key, value in from_frames(frames).items():
        if places.get(key, "code") == "code":
            config[key], places[key] = value, "frames"
    phase = _phase(kind, frames, texts if frames else _around(paste, texts, stream, message))
    named = message is not None and "other_processes_bytes" in figures and THIS_PROCESS not in message.text
    return OomFacts(
        kind=kind.kind,
        wording=wording,
        explanation=printable(kind.explanation),
        device_index=message.device_index if message is not None and figures else None,
        phase=phase,
        processes=tuple(processes_in(message.text)) if message is not None and named else (),
        named_bytes=tuple(size for _, size in processes_in(message.text)) if message is not None else (),
        progress=progress_of(texts, phase),
        frames=frames,
        config=MappingProxyType(config),
        config_places=MappingProxyType(places),
        n_params=run.n_params,
        tokens_per_step=run.tokens_per_step,
        program=program,
        shapes=shapes,
        torch_version=torch_version(texts, _wording(message, paste.stream) if figures else ""),
        gpu=printable(gpu_name(texts)),
        model=model_name(texts),
        adapters=has_adapters(texts),
        cards=cards_in(text) if "MiB" in text else (),
        steps=steps_before(text) if kind.kind != "not_oom" else 0,
        kept=printable(kept_by(frames)),
        collected=collects(frames),
        gathered=gathers(frames, text),
        ranked=figures.get("free_bytes", 0) > figures.get("tried_bytes", 0) and has_ranks(text),
        near=() if frames else _near(texts, stream, message),
        offload=kind.kind == "host_killed" and offloads(text),
        notes=tuple(notes),
        **figures,
    )


def _jumbled(lines: Sequence[Line], parts: Sequence[str]) -> bool:
    """Whether what looks like ranks is none: frames of a rank that began no traceback, though there is one only."""
    begun = {line.rank for line, part in zip(lines, parts, strict=True) if is_header(part)}
    framed = {line.rank for line, part in zip(lines, parts, strict=True) if part.startswith("file")}
    return len(begun) == 1 and not framed <= begun


def _message(paste: _Paste, kind: Kind) -> tuple[Message | None, Stream, list[str]]:
    """The message to read, the stream it stands in, and notes.

    The first message with figures, or its fullest repetition. Ranks that print between each other's lines are parted.
    Where only one rank has a message, and parting tears it, the ranks are no ranks: the text is read as it stands.
    """
    lines, everything = paste.lines, paste.stream
    found = messages_in(everything.text)
    best, stream = best_of(found), everything
    if best is None:
        return None, everything, []
    ranks = sorted({line.rank for line in lines} - {""})[:MOST_RANKS]
    by_rank = {rank: stream_of(lines, paste.squashed, rank) for rank in ranks} if len(ranks) > 1 else {}
    parted = by_rank.get(lines[everything.line_at(best.start)].rank)
    others = [message for one in by_rank.values() for message in messages_in(one.text)] or found
    if parted is not None:
        own = best_of(messages_in(parted.text))
        starts = {lines[everything.line_at(message.start)].rank for message in found if message.figures} - {""}
        if own is not None and (len(starts) > 1 or own.told >= best.told):
            whole = best.text if len(starts) < 2 and own.told == best.told else own.text  # its end may be torn off
            best, stream = replace(own, text=whole), parted
    return best, stream, _notes(best, others, kind)


def _notes(best: Message, messages: Sequence[Message], kind: Kind) -> list[str]:
    """What is to be said of the message that is read, and of those that are not."""
    notes = list(best.notes)
    told = [message for message in messages if message.figures]
    same = list(repetitions(best, told))
    other = {tuple(message.figures.items()) for message in told if message not in same}
    if other:
        noun = "message stands" if len(other) == 1 else "messages stand"
        notes.append(f"{len(other)} other out-of-memory {noun} there; the first is read")
    elif len(same) > 1:
        notes.append("the message stands there more than once; the first is read")
    if kind.kind == "cuda_caching_allocator" and best.text.endswith("gpu") and "tried_bytes" in best.figures:
        notes.append("the message is cut after the word GPU, as torch 2.3 cut it: no other figure was printed")
    return notes


def _limited(kind: Kind, figures: Mapping[str, int]) -> Kind:
    """A message of the caching allocator under a memory fraction, where it is the fraction that refused."""
    allowed, tried = figures.get("allowed_bytes"), figures.get("tried_bytes")
    if kind.kind != "cuda_caching_allocator" or allowed is None or tried is None:
        return kind
    held = figures.get(
        "reserved_bytes", figures.get("allocated_bytes", 0) + figures.get("reserved_unallocated_bytes", 0)
    )
    room = tried <= figures.get("free_bytes", tried)
    return Kind("per_process_limit", "", "", kind.at) if room or held + tried > allowed else kind


def _wording(message: Message | None, everything: Stream) -> str:
    """Which torch printed the caching allocator's message."""
    text = message.text if message is not None else everything.text
    if "morethan1eb" in text:
        return "more than 1EB"
    if "capacty" in text:
        return "torch2.1"
    if "pytorch_alloc_conf" in text or "optimizing-memory-usage-with-pytorch" in text:
        return "torch2.9"
    if "totalcapacityof" in text or "butunallocated" in text:
        return "torch2.2"
    if text.endswith((".gpu", "bgpu")) and "triedtoallocate" in text:
        return "torch2.3"
    figures = message.figures if message is not None else {}
    if "cached_bytes" in figures:
        return "torch<1.4"
    return "torch1.x" if "reserved_bytes" in figures or "totalcapacity" in text else "unknown"


def _traceback(paste: _Paste, stream: Stream, message: Message | None, kind: Kind) -> list[Frame]:
    """The frames of the traceback that the message ends; of its first repetition that has one."""
    headers = [number for number, part in enumerate(paste.squashed) if is_header(part)]
    ends = [len(paste.lines)]
    if message is not None and kind.kind in WITH_FIGURES:
        ends = sorted({stream.line_at(again.start) for again in repetitions(message, messages_in(stream.text))})
    elif kind.at >= 0:
        ends = [paste.stream.line_at(kind.at)]
    before = next((frames for end in ends if (frames := _frames_before(paste, headers, end))), [])
    return before or _frames_after(paste, headers, ends[0] if ends else -1)


def _frames_before(paste: _Paste, headers: Sequence[int], end: int) -> list[Frame]:
    """Frames between the last traceback header up to a line and that line; of that line's rank, if ranks mix there."""
    lines = paste.lines
    end = min(end, len(lines) - 1)
    before = [number for number in headers if number <= end]
    begin, rank = before[-1] if before else 0, lines[end].rank
    own = [number for number in before if lines[number].rank == rank]
    if rank and own and len({lines[number].rank for number in before} - {""}) > 1:
        chosen = [row for row in paste.logical if own[-1] <= row[0] <= end and lines[row[0]].rank in ("", rank)]
        frames = [frame for _, frame in read_frames(chosen)]
        if sum(not frame.code for frame in frames) < 2 and frames:  # ranks that are none tear frames from their code
            return frames
    rows = [row for row in paste.logical if begin <= row[0] <= end]
    ended = max((at for at, row in enumerate(rows[:-1]) if _ends_another(row[1])), default=-1)
    return [frame for _, frame in read_frames(rows[ended + 1 :])]


def _frames_after(paste: _Paste, headers: Sequence[int], end: int) -> list[Frame]:
    """Frames of a traceback that was logged after its message; none where it ends with another error."""
    begin = next((number for number in headers if number > end), 0 if not headers else -1)
    if begin < 0:
        return []
    rows = [row for row in paste.logical if row[0] >= begin]
    over = next((at for at, row in enumerate(rows) if is_error(row[1])), len(rows))
    if over < len(rows) and _ends_another(rows[over][1]):
        return []
    return [frame for _, frame in read_frames(rows[:over])]


def _ends_another(text: str) -> bool:
    """Whether a line ends the traceback of an error that is not about memory."""
    return is_error(text) and "memory" not in text.lower()


NEAR = 4


def _around(paste: _Paste, texts: Sequence[str], stream: Stream, message: Message | None) -> Sequence[str]:
    """The lines that may speak of the message: not those of another error's traceback before it or after it."""
    if message is None:
        return texts
    end = stream.line_at(message.start)
    begin = max((number for number, text in enumerate(texts[:end]) if _ends_another(text)), default=-1) + 1
    over = next((number for number, part in enumerate(paste.squashed) if number > end and is_header(part)), len(texts))
    return texts[begin:over]


def _near(texts: Sequence[str], stream: Stream, message: Message | None) -> tuple[str, ...]:
    """The lines just before the message, where no frame was pasted: mostly the line of code that failed."""
    if message is None:
        return ()
    end = stream.line_at(message.start)
    return tuple(printable(text.strip())[:400] for text in texts[max(0, end - NEAR) : end])


def _phase(kind: Kind, frames: Sequence[Frame], texts: Sequence[str]) -> str:
    if kind.kind == "shm":
        return "data"
    return phase_of(frames) if frames else phase_of_text(texts)


def _clean(frame: Frame) -> Frame:
    return Frame(printable(frame.file), frame.line, printable(frame.function), printable(frame.code))


# Logits are the only tensor of a GPT whose last dimension is this large.
LEAST_VOCABULARY = 16_000


def _with_shapes(
    values: Mapping[str, object], places: Mapping[str, str], shapes: Sequence[ShapeHint]
) -> tuple[dict[str, object], dict[str, str]]:
    """The keys, with those that shapes tell, where nothing else does."""
    told = shape_keys(shapes)
    new = {key: value for key, value in told.items() if key not in values or places[key] == "code"}
    return {**values, **new}, {**places, **dict.fromkeys(new, "shapes")}


def shape_keys(shapes: Sequence[ShapeHint]) -> dict[str, object]:
    """What a compiled graph's own buffer of logits [B, T, V] tells of the run."""
    told: dict[str, object] = {}
    for hint in shapes:
        if hint.source == "empty_strided" and hint.shape[-1] >= LEAST_VOCABULARY:
            if len(hint.shape) == 3:
                told |= dict(zip(("batch_size", "block_size", "vocab_size"), hint.shape, strict=True))
            elif len(hint.shape) == 2:
                told["vocab_size"] = hint.shape[-1]
            told["compile"] = True
            if hint.dtype in ("bfloat16", "float16"):
                told["dtype"] = hint.dtype
    return told
