"""Training: `train` reads from top to bottom, and all that follows is what it calls.

A step has n = batch_size · gradient_accumulation_steps sequences, which follow from the seed and the step.
They are split into micro-batches, each weighted by its share of n: any split makes the same step, so one
that turns out too large for the GPU is made smaller and the step done again. Several ranks (one process a GPU)
each take their part of the n; what ends a step early on one of them ends it on all.

Shapes: B sequences of a micro-batch, T block_size.
"""

import math
import signal
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from gptfit import metrics
from gptfit.config import RunConfig
from gptfit.data import TRAIN, VAL, load_batch, sequence_starts
from gptfit.device import held_memory, reset_peaks, set_expandable_segments
from gptfit.distributed import Ranks, check_size, joined, launched
from gptfit.events import Finished, Listener, Measured, Note, Saved, Stepped
from gptfit.nonfinite import leave_out, stop, trouble
from gptfit.optim import learning_rate_at, set_learning_rate
from gptfit.pressure import Pressure, yield_memory
from gptfit.profiling import Profile
from gptfit.session import Correction, Good, Refit, Session
from gptfit.setup import corrected, set_up
from gptfit.signals import Asked, stop_on_signal
from gptfit.survival import create_surviving, fitting, step_surviving
from gptfit.watch import Watch


def train(
    run: RunConfig,
    out_dir: Path | str,
    resume: bool = False,
    predicted: Mapping[str, int] | None = None,
    on_event: Listener | None = None,
    device_name: str = "",
    refit: Refit | None = None,
    profile: bool = False,
) -> Finished:
    """Trains `run` to its end, or until SIGINT or SIGTERM; SIGUSR1 saves a checkpoint and goes on. Leaves run.yaml,
    metrics.jsonl and checkpoints in `out_dir`.

    `predicted` are an estimate's figures in bytes (allocated_bytes, reserved_bytes, process_bytes), reported
    beside what the second step measured on a GPU; `refit` is asked then whether another run, of the same numbers of
    training, suits what was measured; `profile` traces the third to the fifth step into the folder.

    Raises GptfitError for a folder that already holds a run (unless `resume`) or that another process trains into, for
    one without a checkpoint (if `resume`), for data that do not suit the run, for a loss that is no number, for a full
    disk, and where not even one sequence fits in memory.
    """
    ranks, out, began = launched(), Path(out_dir), time.perf_counter()
    set_expandable_segments(run.expandable_segments)
    listener = on_event if ranks.first else None
    with joined(ranks), ExitStack() as held:
        with ranks.together():
            check_size(run, ranks)
        session, notes = set_up(run, out, resume, device_name, ranks, listener or (lambda event: None), held)
        for note in notes:
            session.emit(Note(note))
        session.emit(session.started(out))
        profile = profile and ranks.first
        done = _run(session, out, predicted or {}, refit if ranks.size == 1 else None, began, profile)
        if isinstance(done, Correction):
            session.emit(Note(done.note))
            session = corrected(session, done, out)
            done = _run(session, out, done.predicted, None, began, profile)
    assert isinstance(done, Finished)
    return done


def _run(
    session: Session, out: Path, predicted: Mapping[str, int], refit: Refit | None, began: float, profile: bool
) -> Finished | Correction:
    """Steps until the run's last, or a signal, with what is due after each of them; or until `refit` corrects it."""
    run, emit, ranks = session.run, session.emit, session.ranks
    first = session.step
    record: Stepped | None = None
    saved: Saved | None = None
    watch = Watch(run, session.data, session.model, out, emit, ranks.first, session.averaged)
    pressure, profiler = Pressure(), Profile(profile, out, session.device, emit)
    create_surviving(session)
    with stop_on_signal(lambda text: emit(Note(text))) as asked:
        stopped, _ = _agreed(ranks, asked)
        while session.step < run.max_iters and not stopped:
            profiler.before_step()
            record = _step(session)
            profiler.after_step()
            correction = None
            if session.step == first + 2 and (held := session.held) is not None:
                emit(Measured(held.allocated_bytes, held.reserved_bytes, held.card_used_bytes, predicted))
                correction = refit(held) if refit else None
            if session.step >= first + 2:
                yield_memory(session, pressure)
            last = session.step == run.max_iters
            if run.eval_interval and (last or session.step % run.eval_interval == 0):
                record = watch.evaluated(record, _evaluate(session))
            with ranks.together():
                if ranks.first:
                    metrics.append(out, record)
            watch.tell(record)
            stopped, wanted = _agreed(ranks, asked)
            stopped = stopped or watch.spent(record)
            due = run.checkpoint_interval and session.step % run.checkpoint_interval == 0
            if due or wanted or last or stopped:
                saved = Saved(session.step, session.save(out))
                emit(saved)
            if correction and not (last or stopped):
                return correction
        stopped_by = stopped if session.step < run.max_iters else ""
    profiler.close()
    loss, val_loss = (record.loss, record.val_loss) if record else (math.nan, None)
    path = saved.path if saved else None
    finished = Finished(session.step, loss, val_loss, time.perf_counter() - began, stopped_by, path)
    emit(finished)
    return finished


def _agreed(ranks: Ranks, asked: Asked) -> tuple[str, bool]:
    """The signal to stop that some rank was sent, empty where none was, and whether one was asked to save; known to
    all."""
    number, save = ranks.largest(signal.Signals[asked.signal] if asked.signal else 0, asked.save)
    asked.save = False
    return signal.Signals(int(number)).name if number else "", save > 0


def _step(session: Session) -> Stepped:
    """One optimizer step."""
    run, optimizer, scaler = session.run, session.optimizer, session.scaler
    reset_peaks(session.device)
    began = time.perf_counter()
    rate = learning_rate_at(session.step, run)
    set_learning_rate(optimizer, rate)
    starts = _starts(session, session.step)
    if session.ranks.size > 1:  # each rank draws (dropout) otherwise, and the same again after a resume
        torch.manual_seed(hash((run.seed, session.step, session.ranks.rank)))
    loss = fitting(session, lambda: _accumulate(session, starts))
    norm = None
    if run.grad_clip:
        scaler.unscale_(optimizer)  # pyright: ignore[reportArgumentType]
        norm = session.strategy.clip(run.grad_clip)
    # The GPU is waited for once a step: before the optimizer where its step may have to be left out, else behind it.
    mean = _mean(session, loss) if run.on_nan == "skip" else 0.0
    wrong = trouble(mean, norm, scaler.is_enabled()) if run.on_nan == "skip" else ""
    with session.ranks.together():
        leave_out(session, wrong)
    if not wrong or scaler.is_enabled():  # which sees by itself that there is nothing to apply
        with session.ranks.together():
            step_surviving(session)
        scaler.update()
    if session.ema and not wrong:
        session.ema.update(session.step)
    session.strategy.zero_grad(optimizer)
    session.step += 1
    session.tokens += run.tokens_per_step
    if run.on_nan == "stop":
        mean = _mean(session, loss)
        with session.ranks.together():
            stop(session, trouble(mean, norm, scaler.is_enabled()))
    seconds = time.perf_counter() - began
    session.held = held = held_memory(session.device)
    session.good = Good(session.micro_batch, held.allocated_bytes) if held else None
    return Stepped(
        step=session.step,
        loss=mean,
        lr=rate,
        tokens=session.tokens,
        seconds=seconds,
        tokens_per_second=run.tokens_per_step / seconds,
        grad_norm=None if norm is None else float(norm),
        peak_allocated_bytes=held.allocated_bytes if held else None,
        peak_reserved_bytes=held.reserved_bytes if held else None,
        skipped=bool(wrong) or None,
    )


def _mean(session: Session, loss: torch.Tensor) -> float:
    """Over all ranks; waits for the GPU."""
    return session.ranks.total(float(loss) / session.ranks.size)[0]


def _accumulate(session: Session, starts: np.ndarray) -> torch.Tensor:
    """Gradients of the mean loss over the sequences at `starts`, added into .grad; the loss, not yet waited for."""
    total = torch.zeros((), device=session.device)
    parts = split(starts, session.micro_batch, len(starts))
    expected = parts[1:]
    if session.step + 1 < session.run.max_iters:
        following = _starts(session, session.step + 1)
        expected.append(split(following, session.micro_batch, len(following))[0])
    for i, part in enumerate(parts):
        share = len(part) / len(starts)
        inputs_BT, targets_BT = session.feed.take(part)
        with session.strategy.micro_batch(left=len(parts) - 1 - i):
            loss = session.strategy.loss(inputs_BT, targets_BT) * share
            session.scaler.scale(loss).backward()
        total += loss.detach()
        if i < len(expected):  # a GPU has this forward and backward still before it
            session.feed.read_ahead(expected[i])
    return total


def _starts(session: Session, step: int) -> np.ndarray:
    """Where this rank's sequences of step `step`, from 0, begin."""
    run = session.run
    n = run.batch_size * run.gradient_accumulation_steps
    n_tokens = len(session.data.tokens(TRAIN))
    return session.ranks.share(sequence_starts(n_tokens, run.block_size, n, run.seed, step))


@torch.no_grad()
def _evaluate(session: Session) -> float:
    """Mean loss over eval_iters · eval_batch_size sequences of the validation data, the same ones every time."""
    run, tokens = session.run, session.data.tokens(VAL)
    n = run.eval_iters * run.eval_batch_size
    starts = session.ranks.share(sequence_starts(len(tokens), run.block_size, n, run.seed, 0, VAL))

    def mean() -> float:
        total = torch.zeros((), device=session.device)
        parts = split(starts, session.eval_batch, -(-n // session.ranks.size))
        for i, part in enumerate(parts):
            # A rank without a sequence left takes part all the same.
            part_or_any = part if len(part) else np.zeros(1, np.int64)
            inputs_BT, targets_BT = load_batch(tokens, part_or_any, run, session.device)
            with session.strategy.micro_batch(left=len(parts) - 1 - i):
                loss = session.strategy.loss(inputs_BT, targets_BT)
            total += loss * (len(part) / n)
        return float(total)

    session.model.eval()
    try:
        with session.averaged():
            return session.ranks.total(fitting(session, mean, evaluating=True))[0]
    finally:
        session.model.train()


def split(starts: np.ndarray, at_most: int, largest_share: int) -> list[np.ndarray]:
    """Pieces of equal size, to within one, none larger than `at_most`; as many on each rank, whose shares are up to
    `largest_share`."""
    return np.array_split(starts, -(-largest_share // at_most))
