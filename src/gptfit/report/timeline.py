"""A step's tape as a picture of it: bytes by category at a few hundred instants, and what is alive at each."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from gptfit.config import RunConfig
from gptfit.estimate import under_program
from gptfit.memory.step import pieces, steady_step
from gptfit.memory.tape import Buffer, Event, Item, Loop, Mark, Tape

# Instants drawn: more than a phone has columns, few enough for a small file. The largest of each stretch is kept.
MAX_INSTANTS = 360
# Of the width, what a phase gets at least: the loss is a few events, and decides.
LEAST_SHARE = 0.09
LARGEST = 8  # rows of a live set


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of the picture, from `start` to `end` (0 to 1)."""

    name: str
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Instant:
    """The worst moment of the stretch that begins at `x` (0 to 1). `largest` are buffers and how many of each."""

    x: float
    phase: str
    op: str
    categories: dict[str, int]
    largest: tuple[tuple[Buffer, int], ...]
    n_more: int

    @property
    def live_bytes(self) -> int:
        return sum(self.categories.values())


@dataclass(frozen=True, slots=True)
class Timeline:
    """One optimizer step. Its width counts allocations and frees, not time; no phase is too narrow to be seen."""

    instants: tuple[Instant, ...]
    phases: tuple[Span, ...]
    parts: tuple[Span, ...]

    @property
    def peak(self) -> int:
        """The first instant that holds most."""
        return max(range(len(self.instants)), key=lambda i: self.instants[i].live_bytes)


def timeline_of(run: RunConfig, program: str) -> Timeline:
    """The steady step of `run`; micro-steps from the second on are alike, and drawn once."""
    run = under_program(run, program)
    return timeline(steady_step(run, pieces(run, program, whole=False)))


def timeline(tape: Tape) -> Timeline:
    """A tape that begins with what is alive when the step starts, marked as setup."""
    head, parts = divided(tape.items)
    n_setup = n_events(head)
    flat = Tape([*head, *(item for _, items in parts for item in items)])
    totals = list(running(flat))[n_setup:]
    marks = [(max(0, at - n_setup), mark) for at, mark in flat.marks() if mark.phase != "setup"]
    phases = list(stretches(marks, len(totals)))
    places, picked = laid_out(phases, totals)
    ends = [0]
    for _, items in parts:
        ends.append(ends[-1] + n_events(items))
    where = {start: span.start for (start, _, _), span in zip(phases, places, strict=True)} | {len(totals): 1.0}
    part_spans = (
        Span(name, nearest_start(where, start), nearest_start(where, end))
        for (name, _), (start, end) in zip(parts, pairwise(ends), strict=True)
    )
    return Timeline(tuple(instants(flat, n_setup, picked, marks)), tuple(places), tuple(part_spans))


def divided(items: list[Item]) -> tuple[list[Item], list[tuple[str, list[Item]]]]:
    """What was there before, and the parts of a step: the first micro-step, one for all others, the optimizer."""
    marks = [(i, item.phase) for i, item in enumerate(items) if isinstance(item, Mark)]
    start = next((i for i, phase in marks if phase != "setup"), len(items))
    end = next((i for i, phase in marks if phase == "optimizer"), len(items))
    at, repeated = next(((i, item) for i, item in enumerate(items) if is_micro_steps(item)), (end, None))
    parts = [("micro-step 1" if repeated else "forward and backward", items[start:at])]
    if isinstance(repeated, Loop):
        name = "micro-step 2" if repeated.n == 1 else f"micro-steps 2 to {repeated.n + 1}, all alike"
        parts.append((name, [*repeated.body, *items[at + 1 : end]]))
    return items[:start], [*parts, ("optimizer", items[end:])]


def is_micro_steps(item: Item) -> bool:
    """Whether it is a loop that goes forward in each round: others are over blocks, or chunks of the loss."""
    return (
        isinstance(item, Loop)
        and not item.numbered
        and any(isinstance(one, Mark) and one.phase == "forward" for one in item.body)
    )


def n_events(items: list[Item]) -> int:
    return sum(item.n * n_events(item.body) if isinstance(item, Loop) else isinstance(item, Event) for item in items)


def running(tape: Tape) -> Iterator[int]:
    live_bytes = 0
    for sign, _, buffer in tape.expand():
        live_bytes += sign * buffer.n_bytes
        yield live_bytes


def stretches(marks: list[tuple[int, Mark]], n: int) -> Iterator[tuple[int, int, str]]:
    """First event, end and name of each run of marks of one phase that has an event."""
    starts = [(at, mark.phase) for i, (at, mark) in enumerate(marks) if not i or marks[i - 1][1].phase != mark.phase]
    for (start, name), (end, _) in pairwise([*starts, (n, "")]):
        if end > start:
            yield start, end, name


def laid_out(phases: list[tuple[int, int, str]], totals: list[int]) -> tuple[list[Span], list[tuple[float, int]]]:
    """Where each phase is drawn; and of each column its place and the event that holds most."""
    shares = [max(LEAST_SHARE, (end - start) / len(totals)) for start, end, _ in phases]
    spans: list[Span] = []
    picked: list[tuple[float, int]] = []
    x = 0.0
    for (start, end, name), share in zip(phases, shares, strict=True):
        width = share / sum(shares)
        n = min(end - start, max(1, round(MAX_INSTANTS * width)))
        edges = [start + (end - start) * i // n for i in range(n + 1)]
        for i, (low, high) in enumerate(pairwise(edges)):
            picked.append((x + width * i / n, max(range(low, high), key=totals.__getitem__)))
        spans.append(Span(name, x, min(1.0, x + width)))
        x += width
    return spans, picked


def nearest_start(where: dict[int, float], event: int) -> float:
    """The place of the phase that begins at `event` or before it."""
    return where[max((start for start in where if start <= event), default=min(where))]


def instants(
    tape: Tape, n_setup: int, picked: list[tuple[float, int]], marks: list[tuple[int, Mark]]
) -> Iterator[Instant]:
    """What is alive after each of the `picked` events, numbered from the first one behind setup."""
    live: Counter[Buffer] = Counter()
    totals: dict[str, int] = {}
    at = 0  # of the next mark
    todo = iter([*picked, (1.0, -1)])
    x, wanted = next(todo)
    for number, (sign, _, buffer) in enumerate(tape.expand(), start=-n_setup):
        live[buffer] += sign
        totals[buffer.category] = totals.get(buffer.category, 0) + sign * buffer.n_bytes
        if number != wanted:
            continue
        while at < len(marks) and marks[at][0] <= number:
            at += 1
        _, mark = marks[max(0, at - 1)]
        alive = sorted(
            ((one, count) for one, count in live.items() if count), key=lambda item: -item[0].n_bytes * item[1]
        )
        yield Instant(x, mark.phase, mark.op, dict(totals), tuple(alive[:LARGEST]), len(alive[LARGEST:]))
        x, wanted = next(todo)
