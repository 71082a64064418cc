"""Out of memory: what failed is done again, smaller, and the numbers of training stay the same.

A forward or backward is repeated with micro-batches that the estimate, corrected by the last step that fitted, says
will fit; the optimizer's step is repeated as it is where no parameter has moved yet.
"""

import traceback
from collections.abc import Callable
from typing import TypeVar, cast

import torch

from gptfit.checkpoint import restore_rng, rng_state
from gptfit.config import RunConfig, derive
from gptfit.device import release_cached, room_bytes
from gptfit.errors import GptfitError
from gptfit.events import Note
from gptfit.memory.step import pieces, steady_peak
from gptfit.memory.whole_run import evaluation_bytes
from gptfit.oom.diagnose import explain_text
from gptfit.optim import create_first
from gptfit.session import Session

T = TypeVar("T")

# What a micro-batch that should have fitted, and did not, has the room taken to be smaller by: fragmentation.
LESS_ROOM = 0.03


def fitting(session: Session, attempt: Callable[[], T], evaluating: bool = False) -> T:
    """`attempt`, again with smaller micro-batches for as long as it runs out of memory on some rank.

    Raises GptfitError where one sequence at a time is too much.
    """
    name = "eval_batch_size" if evaluating else "batch_size"
    failures = 0
    while True:
        rng, reason, trace, room, result = rng_state(), "", "", None, None
        try:
            result = attempt()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            reason, trace = first_line(error), traceback.format_exc()
        # Out here the traceback is gone, and with it the tensors that the failed attempt held.
        if reason:
            room = room_bytes(session.device)
            release_cached(session.device)
            session.strategy.play_out()
        if not session.ranks.any(bool(reason)):
            return cast(T, result)
        failures += 1
        reason, trace = (next(text for text in session.ranks.words(own) if text) for own in (reason, trace))
        if not evaluating:
            session.optimizer.zero_grad()
        session.strategy.start_over()
        release_cached(session.device)
        restore_rng(rng)
        size = session.eval_batch if evaluating else session.micro_batch
        failed = derive(session.run, eval_batch_size=size) if evaluating else session.run
        with session.ranks.together():
            check_again(session.run, name, size, evaluating, reason)
        if room is not None:
            room = round(room * (1 - LESS_ROOM) ** (failures - 1))
        before, size = size, -int(session.ranks.largest(-smaller(session, size, room, evaluating))[0])
        if evaluating:
            session.eval_batch = size
        else:
            session.micro_batch = size
        sizes = f"micro-batches of {size} (were {before})"
        session.emit(Note(f"out of memory; going on with {sizes}, the same tokens a step ({reason})"))
        if why := explained(trace, failed):
            session.emit(Note(f"why: {why}"))


def check_again(run: RunConfig, name: str, size: int, evaluating: bool, reason: str) -> None:
    """Raises GptfitError where what ran out of memory cannot be done again with less."""
    if run.optimizer_in_backward and not evaluating:
        raise GptfitError(
            f"out of memory with optimizer_in_backward, where some parameters may have moved: {reason}",
            "resume with a smaller batch_size; gptfit plan shows what fits",
        )
    if size == 1:
        raise GptfitError(
            f"out of memory with {name}=1: {reason}",
            "gptfit plan shows what fits; activation_checkpointing=block and a smaller block_size need less",
        )


def smaller(session: Session, size: int, room: int | None, evaluating: bool = False) -> int:
    """The largest micro-batch below `size` whose peak is predicted to fit in `room` bytes; an eighth less where
    the room is not known."""
    if room is None:
        return size - max(1, size // 8)
    factor = 1.0
    if session.good is not None:
        factor = session.good.allocated_bytes / peak_bytes(session.run, session.good.micro_batch, False)
    low, high = 1, size - 1
    while low < high:
        middle = (low + high + 1) // 2
        if factor * peak_bytes(session.run, middle, evaluating) <= room:
            low = middle
        else:
            high = middle - 1
    return low


def peak_bytes(run: RunConfig, micro_batch: int, evaluating: bool) -> int:
    """The estimate's live bytes at the worst instant of a steady step, or of an evaluation."""
    if evaluating:
        own = derive(run, eval_batch_size=micro_batch)
        return evaluation_bytes(pieces(own, "gptfit"))
    steps = -(-run.batch_size * run.micro_steps // micro_batch) * run.n_gpus
    return steady_peak(derive(run, batch_size=micro_batch, gradient_accumulation_steps=steps), "gptfit")[0]


def create_surviving(session: Session) -> None:
    """What the run wants before its first forward, as far as there is room: the rest comes when it is needed."""
    try:
        create_first(session.model, session.optimizer, session.run)
        return
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        reason = first_line(error)
    session.optimizer.zero_grad()
    release_cached(session.device)
    what = f"created_first={session.run.created_first}"
    session.emit(Note(f"out of memory with {what}; what is missing is created when it is needed ({reason})"))


def step_surviving(session: Session) -> None:
    """The optimizer's step. Where it runs out of memory before a parameter has moved, as it does when it makes its
    states, what is cached is handed back and the step done again.

    Raises GptfitError where that is not enough, or some parameters have moved already.
    """
    optimizer, scaler, run = session.optimizer, session.scaler, session.run
    for retry in (False, True):
        versions = [parameter._version for parameter in session.model.parameters()]
        parts = parts_of(session)
        known = [set(part.state) for part in parts]
        try:
            scaler.step(optimizer)  # pyright: ignore[reportArgumentType]
            return
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            reason = first_line(error)
        moved = has_moved(session, versions)
        if retry or moved:
            raise GptfitError(
                f"out of memory in the optimizer's step: {reason}",
                f"gptfit plan shows what fits; optimizer={run.optimizer} keeps its states whatever the batch size is",
            )
        for part, before in zip(parts, known, strict=True):
            for parameter in [parameter for parameter in part.state if parameter not in before]:
                del part.state[parameter]  # some of its tensors may be missing
        release_cached(session.device)
        session.emit(Note(f"out of memory in the optimizer's step; done again with what was cached ({reason})"))


def has_moved(session: Session, versions: list[int]) -> bool:
    """Whether a step that failed may have changed a parameter. Fused kernels leave no version: they step a group whole,
    and its counters with it; so the counters of all groups are equal where none has been stepped."""
    if session.run.optimizer == "sgd" and session.run.optimizer_impl == "fused":
        return True  # it has no counters
    counters = [
        {float(part.state[parameter].get("step", 0)) if parameter in part.state else 0.0 for parameter in parameters}
        for part in parts_of(session)
        for parameters in [[parameter for group in part.param_groups for parameter in group["params"]]]
    ]
    now = [parameter._version for parameter in session.model.parameters()]
    return versions != now or any(len(values) > 1 for values in counters)


def parts_of(session: Session) -> tuple[torch.optim.Optimizer, ...]:
    return cast(tuple[torch.optim.Optimizer, ...], getattr(session.optimizer, "parts", (session.optimizer,)))


def explained(trace: str, run: RunConfig) -> str:
    """What explain-oom says of the traceback, in a line; nothing where it has nothing to say."""
    try:
        return explain_text(trace, run, "gptfit").summary
    except Exception:  # a diagnosis must not end the run that it is about
        return ""


def is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate" in str(error)


def first_line(error: BaseException) -> str:
    return str(error).split("\n")[0].split(". GPU")[0][:200]
