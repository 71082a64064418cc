"""What "enough" means: what is missing by the text's own figures is saved, and the run, read again, fits the card as
it was left."""

from dataclasses import dataclass

from gptfit.oom.case import Case
from gptfit.oom.read import OomFacts

MiB, GiB = 1 << 20, 1 << 30
# Unused memory that is normal: of nanoGPT's and gptfit's steps replayed on 1020 cards that are too small for them
# (three models, 4 to 16 sequences, segments that cannot be expanded), those that expandable segments would have carried
# through had at least 5 % of what was reserved unused wherever that was 1.25 times what was asked for: 47 of 56. Of 24
# with as many times that and less than 5 %, none.
UNUSED_SHARE = 0.05
UNUSED_TIMES = 1.25


def unallocated_bytes(facts: OomFacts) -> int | None:
    """What PyTorch reserved and did not use; torch before 2.1 prints the reserved total instead, before 1.4 what it
    calls cached, the difference."""
    if facts.cached_bytes is not None:
        return facts.cached_bytes
    if facts.reserved_unallocated_bytes is None and facts.reserved_bytes is not None and facts.allocated_bytes:
        return max(0, facts.reserved_bytes - facts.allocated_bytes)
    return facts.reserved_unallocated_bytes


def reserved_bytes(facts: OomFacts) -> int | None:
    """What PyTorch held of the card."""
    if facts.reserved_bytes is not None or facts.allocated_bytes is None:
        return facts.reserved_bytes
    return facts.allocated_bytes + (facts.reserved_unallocated_bytes or facts.cached_bytes or 0)


def fragmented(facts: OomFacts) -> bool:
    """Whether much more is reserved and unused than was asked for, and than is normal."""
    unused, reserved = unallocated_bytes(facts), reserved_bytes(facts)
    if unused is None or not reserved or not facts.tried_bytes:
        return False
    return unused >= UNUSED_TIMES * facts.tried_bytes and unused >= UNUSED_SHARE * reserved


def lent_bytes(facts: OomFacts) -> int:
    """What is allocated beyond what the card has: Windows' driver lends the computer's memory."""
    if facts.allocated_bytes is None or facts.total_bytes is None:
        return 0
    lent = facts.allocated_bytes - facts.total_bytes
    return lent if lent > 64 * MiB else 0  # figures are printed to two decimals


def missing_bytes(facts: OomFacts) -> int | None:
    """What was lacking for what was asked for; None where the text does not say."""
    tried, reserved = facts.tried_bytes, reserved_bytes(facts)
    if tried is None:
        return None
    if lent_bytes(facts) and reserved is not None and facts.total_bytes is not None:
        return reserved + tried - facts.total_bytes
    if facts.allowed_bytes is not None and reserved is not None and reserved + tried > facts.allowed_bytes:
        return reserved + tried - facts.allowed_bytes
    return None if facts.free_bytes is None else max(0, tried - facts.free_bytes)


def hidden_bytes(facts: OomFacts) -> int:
    """What of the card is neither free nor this process's nor a named process's. Where this process's figure is not
    printed, its context is among that."""
    total, free = facts.total_bytes, facts.free_bytes
    own = max(facts.process_bytes or 0, reserved_bytes(facts) or 0) or None
    if total is None or free is None or own is None or facts.kind not in ("cuda_caching_allocator", "hip"):
        return 0
    return max(0, total - free - own - (facts.other_processes_bytes or 0))


# What a process holds beside PyTorch, at most, where it is not told: a context, kernels that old CUDA versions loaded
# all at once, workspaces, NCCL and the contexts of other ranks.
MOST_BESIDE = 5 * GiB // 2
LEAST_FOREIGN = 512 * MiB


def foreign_bytes(facts: OomFacts) -> int:
    """What is surely another process's though the message names none, where without it the tensor would have fitted."""
    hidden, missing = hidden_bytes(facts), missing_bytes(facts)
    told = facts.process_bytes is not None and facts.process_bytes >= (reserved_bytes(facts) or 0)  # a container: 0
    foreign = hidden if told else hidden - MOST_BESIDE
    return foreign if missing and foreign >= max(missing, LEAST_FOREIGN) else 0


def ranks_alike(facts: OomFacts) -> int:
    """How many of the other processes named hold a context and hardly more, and all the same: ranks of one job that
    have all touched this GPU."""
    own = facts.process_bytes
    others = [size for size in facts.named_bytes if size != own and LEAST_CONTEXT <= size <= MOST_CONTEXT]
    return len(others) if len(others) > 1 and max(others) - min(others) <= 16 * MiB else 0


LEAST_CONTEXT, MOST_CONTEXT = 100 * MiB, GiB
# Beyond what another process's coming and going, or the driver's own use, may explain.
LEAST_SPARE = 256 * MiB


def spare_bytes(facts: OomFacts) -> int:
    """What was free, or is told by nothing to be in use, where that is clearly more than what was asked for; else 0."""
    tried, total, reserved = facts.tried_bytes, facts.total_bytes, reserved_bytes(facts)
    if tried is None or facts.kind not in ("cuda_caching_allocator", "hip", "xpu") or facts.allowed_bytes is not None:
        return 0
    if facts.free_bytes is not None:
        return facts.free_bytes if facts.free_bytes >= tried + LEAST_SPARE else 0
    if total is None or reserved is None or facts.kind != "xpu":
        return 0
    return total - reserved if reserved + tried < total // 2 else 0


@dataclass(frozen=True, slots=True)
class Prospect:
    """The failed run, None where it is not known; the room it had on the card, None where the text does not tell; and
    what was missing of it."""

    case: Case | None
    room: int | None
    missing: int | None
    within: tuple[str, ...]

    def enough(self, saves: int, after: Case | None = None, more: int = 0) -> bool | None:
        """Whether `after` (the run as it was) fits, with `more` room; None where that cannot be said."""
        after = after or self.case
        if self.missing is not None and saves < self.missing:
            return False
        return None if after is None or self.room is None else after.fits(self.room + more, self.within)
