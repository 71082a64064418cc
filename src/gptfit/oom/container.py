"""Which of the processes that a message names is this one. Process ids in a container are not the driver's: torch then
prints `Process 3412 has …` of this process too, and no `this process has …`."""

from dataclasses import replace

from gptfit.oom.enough import MiB, reserved_bytes
from gptfit.oom.figures import MAYBE_THIS_ONE
from gptfit.oom.read import OomFacts

PRINTED = 10 * MiB  # two figures printed to two decimals of a GiB
MOST_CONTEXT = 3 << 30  # a context with its libraries and NCCL's buffers is smaller


def seen_from_outside(facts: OomFacts) -> OomFacts:
    """The facts with this process told from the others, where all of them and what PyTorch holds would not fit the
    card. Where PyTorch alone holds more than the card has (Windows lends the computer's memory) that tells nothing."""
    total, reserved, others = facts.total_bytes, reserved_bytes(facts), facts.other_processes_bytes
    if facts.process_bytes is not None or not facts.processes or total is None or not reserved or others is None:
        return facts
    if reserved > total or reserved + others + (facts.free_bytes or 0) <= total + 2 * PRINTED:
        return facts
    fitting = [row for row in facts.processes if 0 <= row[1] - reserved + PRINTED <= MOST_CONTEXT]
    own = min(fitting, key=lambda row: row[1], default=None)
    if own is None:
        note = "the processes named and this one hold more than the card has: which of them is this one is not told"
    else:
        note = f"process {own[0]} is this one, seen from inside a container: both would not fit the card"
    return replace(
        facts,
        process_bytes=own[1] if own else None,
        other_processes_bytes=others - own[1] if own else None,
        notes=(*(one for one in facts.notes if one != MAYBE_THIS_ONE), note),
    )
