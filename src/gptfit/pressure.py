"""Something else takes memory on the card while a run goes: micro-batches get smaller before steps get slower.

An allocator that is refused memory hands back all that it has cached and asks again: the step still works, and takes
several times as long; under Windows' driver it is not even refused, and memory goes to and from the system's. So what
is watched is the room that this process has, its own and what is free, and how often the allocator asked twice.
"""

from gptfit.device import HeldMemory, release_cached
from gptfit.events import Note
from gptfit.session import Session
from gptfit.survival import LESS_ROOM, smaller
from gptfit.units import MiB, format_bytes

# Less room than this much below that of the first steady step is someone else's doing: drivers and libraries of our
# own take a few MiB at a time.
GROWN_BYTES = 32 * MiB
# Of the card, what has to stay free: the next kernel that is loaded, the next evaluation.
LOW_SHARE = 1 / 64
# Retries in so many steps one after the other are no accident of the allocator.
IN_A_ROW = 3


class Pressure:
    """Told of the memory after each step; says when the micro-batch has to become smaller.

    The first steady step is what the others are compared with: up to it a run makes its states and its workspaces.
    """

    def __init__(self) -> None:
        self.first: HeldMemory | None = None
        self.last_retries = self.in_a_row = 0

    def felt(self, held: HeldMemory) -> bool:
        """Whether others have taken so much that this process's next allocations would have to wait or fail."""
        if self.first is None:
            self.first, self.last_retries = held, held.retries
            return False
        retried = held.retries > self.last_retries
        self.last_retries = held.retries
        self.in_a_row = self.in_a_row + 1 if retried else 0
        grown = self.first.room_bytes - held.room_bytes >= GROWN_BYTES
        low = held.free_bytes < LOW_SHARE * held.total_bytes
        return (grown and (low or retried)) or self.in_a_row >= IN_A_ROW

    def start_over(self) -> None:
        """After a change: the next step is the first again."""
        self.first, self.in_a_row = None, 0


def yield_memory(session: Session, pressure: Pressure) -> None:
    """Makes the micro-batch of `session` smaller where `pressure` is felt, on all ranks alike, and says so once."""
    held = session.held
    felt = held is not None and pressure.felt(held)
    if not session.ranks.any(felt):
        return
    before = session.micro_batch
    pressure.start_over()
    if before == 1 or session.run.optimizer_in_backward:
        return  # what is left is to run out of memory, which says what to do
    room = round(held.room_bytes * (1 - LESS_ROOM) - LOW_SHARE * held.total_bytes) if held else None
    size = smaller(session, before, room) if felt else before
    session.micro_batch = -int(session.ranks.largest(-size)[0])
    release_cached(session.device)
    left = f"{format_bytes(held.room_bytes)} are left to it" if held else "less is left to it"
    session.emit(
        Note(
            f"memory on the card is taken beside this run, {left}: micro-batches of {session.micro_batch} "
            f"from here on (were {before}), the same tokens a step"
        )
    )
