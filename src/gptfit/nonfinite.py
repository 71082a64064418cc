"""A loss or gradients that are no numbers: the run stops before they are saved, or leaves that step out.

One bad step is enough to ruin all weights, as clipping divides every gradient by a norm that is no number.
"""

import math

from torch import Tensor

from gptfit.errors import GptfitError
from gptfit.events import Note
from gptfit.session import Session

# Steps left out one after the other: then it is not the data, it is the weights.
MOST_IN_A_ROW = 10


def trouble(loss: float, norm: Tensor | None, scaled: bool) -> str:
    """What is wrong with a step's mean loss or the norm of its gradients, in words; nothing if all is well.

    `scaled`: gradients overflow now and then under a loss scale, which then gets smaller and leaves the step out.
    """
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if norm is not None and not scaled and not math.isfinite(float(norm)):
        return f"the norm of the gradients is {float(norm)}"
    return ""


def leave_out(session: Session, what: str) -> None:
    """Counts a step that is not applied as `what` is wrong with it, and says so; nothing where that is empty.

    Raises GptfitError after too many in a row.
    """
    if not what:
        session.skipped_in_a_row = 0
        return
    session.skipped += 1
    session.skipped_in_a_row += 1
    if session.skipped_in_a_row >= MOST_IN_A_ROW:
        raise GptfitError(
            f"{MOST_IN_A_ROW} steps in a row were left out, the last one step {session.step + 1}: {what}", hint(session)
        )
    session.emit(Note(f"step {session.step + 1} is left out, {session.skipped} so far: {what}"))


def stop(session: Session, what: str) -> None:
    """Raises GptfitError where something is wrong with the step just done."""
    if what:
        raise GptfitError(f"step {session.step}: {what}; it is not saved", hint(session))


def hint(session: Session) -> str:
    how = "a lower learning_rate, or on_nan=skip to leave such steps out"
    return (
        f"the last good checkpoint is {session.saved}; resume with {how}" if session.saved else f"begin anew with {how}"
    )
