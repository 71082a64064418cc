"""Everything before a run's first step: its folder, data, model and optimizer, new or as a checkpoint has them."""

import gc
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.utils._pytree import tree_map_only

from gptfit import metrics
from gptfit.checkpoint import Checkpoint, Found, latest_valid, restore_rng
from gptfit.config import ModelConfig, RunConfig
from gptfit.data import TRAIN, Dataset, Feed, open_dataset
from gptfit.device import adapt, release_cached, start
from gptfit.distributed import Ranks, own_device
from gptfit.ema import Ema
from gptfit.errors import GptfitError
from gptfit.events import Listener
from gptfit.init_from import start_weights
from gptfit.model import GPT
from gptfit.optim import build_optimizer, learning_rate_at, load_state
from gptfit.parallel import share_model
from gptfit.replacing import replacing
from gptfit.session import Correction, Session
from gptfit.unfinished import locked

RUN_FILE = "run.yaml"

# What a checkpoint's weights and states have the shape of, or mean something by.
FREE_KEYS = ("dropout", "attention")
SHAPING_KEYS = (*(key for key in ModelConfig.model_fields if key not in FREE_KEYS), "param_dtype", "optimizer")


def set_up(
    run: RunConfig, out: Path, resume: bool, device_name: str, ranks: Ranks, emit: Listener, held: ExitStack
) -> tuple[Session, tuple[str, ...]]:
    """A session that can step, and the lines that someone should read about it.

    The folder is this run's alone until `held` is left. Whatever may fail on one rank comes first: from where the model
    is shared on, the ranks wait for one another.
    """
    with ranks.together():
        device = own_device(device_name, ranks)
        run, notes = adapt(run, device)
        if ranks.first and ranks.size > 1:
            open_dataset(run)  # prepares the built-in one, which the others then find
    with ranks.together():
        data = open_dataset(run)
        _make(out)
        if ranks.first:
            held.enter_context(locked(out, "trains into"))
    with ranks.together():
        found = _find_checkpoint(out, run, resume, ranks)
    start(device, run.seed)
    first_notes: list[str] = []
    begin = None if found else lambda model: first_notes.extend(start_weights(model, run))
    session = _build(run, device, data, ranks, emit, found.checkpoint if found else None, begin)
    if found is not None:
        session.saved = found.path
        first_notes += [*found.skipped, *_changes(found.checkpoint, run, data)]
    with ranks.together():
        if ranks.first:
            _write_run(run, out)
            _keep_rank_file(data.tokenizer, out)
            metrics.keep_until(out, session.step)
    with ranks.together():
        if not (out / RUN_FILE).is_file():
            raise GptfitError(
                f'"{out}" is not the same folder to all processes', "--out must be a folder that all machines share"
            )
    return session, (*notes, *first_notes)


def corrected(session: Session, correction: Correction, out: Path) -> Session:
    """A session that goes on from the step that `session` is at as `correction` says; of one process.

    Where more than the micro-batch changes, `session` is used up: what it holds on the device is let go of before
    the new one takes its own.
    """
    run, device = correction.run, session.device
    _write_run(run, out)
    if rebuilds(session.run, run):
        kept = replace(session.checkpoint(), run=run)
        on_cpu = {part: _on_cpu(getattr(kept, part)) for part in ("model", "optimizer", "ema")}
        kept = replace(kept, **on_cpu)
        data, ranks, emit = session.data, session.ranks, session.emit
        del session.model, session.optimizer, session.strategy, session.ema
        gc.collect()  # compiled code and hooks refer to one another in cycles
        saved, skipped = session.saved, session.skipped
        session = _build(run, device, data, ranks, emit, kept)
        session.saved, session.skipped = saved, skipped
    session.run, session.micro_batch, session.eval_batch = run, correction.micro_batch, run.eval_batch_size
    release_cached(device)
    return session


def rebuilds(before: RunConfig, after: RunConfig) -> bool:
    """Whether a step of `after` is of other code than one of `before`."""
    split = {"batch_size", "gradient_accumulation_steps", "eval_batch_size"}
    return before.model_dump(exclude=split) != after.model_dump(exclude=split)


def _build(
    run: RunConfig,
    device: torch.device,
    data: Dataset,
    ranks: Ranks,
    emit: Listener,
    checkpoint: Checkpoint | None,
    begin: Callable[[GPT], object] | None = None,
) -> Session:
    """Model and optimizer on the device, from `checkpoint` or, without one, as `begin` leaves the new weights."""
    model = GPT(run).to(device)
    if begin is not None:
        with ranks.together():
            begin(model)
    with ranks.together():  # what these refuse, they refuse on all ranks
        strategy = share_model(model, run, ranks)
        optimizer = build_optimizer(model, run)
    scaler = torch.amp.GradScaler(device.type, enabled=run.dtype == "float16")
    feed = Feed(data.tokens(TRAIN), run, device)
    session = Session(run, device, data, model, optimizer, scaler, emit, ranks, strategy, feed)
    session.micro_batch, session.eval_batch = run.batch_size, run.eval_batch_size
    with ranks.together():
        if checkpoint is not None:
            _restore(session, checkpoint)
    if run.ema_decay:
        session.ema = Ema(model, run.ema_decay)
        with ranks.together():
            if checkpoint is not None and checkpoint.ema:
                _restore_ema(session, session.ema, checkpoint)
    if run.compile:
        strategy.compile()
    return session


def _write_run(run: RunConfig, out: Path) -> None:
    with replacing(out / RUN_FILE) as file:
        file.write(yaml.safe_dump(run.model_dump(), sort_keys=False).encode())


def _keep_rank_file(tokenizer: str, out: Path) -> None:
    """A copy of a tokenizer of one's own beside the checkpoints, which say nothing without it."""
    path = Path("" if tokenizer.startswith("char:") else tokenizer)
    if path.is_file() and path.parent.resolve() != out.resolve():
        with replacing(out / path.name) as file:
            file.write(path.read_bytes())


def _on_cpu(states: Mapping[str, Any]) -> dict[str, Any]:
    return tree_map_only(Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), dict(states))


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise GptfitError(f'cannot make the folder "{out}": {reason}', "give another --out") from None


def _find_checkpoint(out: Path, run: RunConfig, resume: bool, ranks: Ranks) -> Found | None:
    """The checkpoint to go on from; None for a new run."""
    found = latest_valid(out, ranks)
    if found is None:
        if resume:
            raise GptfitError(f'there is no checkpoint in "{out}" to resume from', "leave out --resume to start anew")
        return None
    if not resume:
        raise GptfitError(
            f'"{out}" already holds a run, at step {found.checkpoint.step}',
            "--resume goes on with it; another --out starts anew",
        )
    for key in SHAPING_KEYS:
        was, now = getattr(found.checkpoint.run, key), getattr(run, key)
        if was != now:
            raise GptfitError(f"{key}={now}, but the checkpoint in {out} has {key}={was}", f"resume with {key}={was}")
    if run.max_iters < found.checkpoint.step:
        raise GptfitError(
            f"max_iters={run.max_iters}, but the run in {out} is at step {found.checkpoint.step} already",
            f"resume with max_iters above {found.checkpoint.step}, or train anew in another --out",
        )
    return found


def _changes(checkpoint: Checkpoint, run: RunConfig, data: Dataset) -> tuple[str, ...]:
    before, after = checkpoint.run.model_dump(), run.model_dump()
    changed = [f"{key}={after[key]} (was {before[key]})" for key in after if after[key] != before[key]]
    notes = [f"resumed with {', '.join(changed)}"] if changed else []
    decayed = checkpoint.run.lr_decay_iters
    stays = learning_rate_at(run.max_iters - 1, run) == run.min_lr
    if stays and run.lr_decay_iters == decayed <= checkpoint.run.max_iters < run.max_iters:
        notes.append(
            f"lr_decay_iters stays {decayed}, and from there on lr is min_lr; lr_decay_iters={run.max_iters} moves it"
        )
    if checkpoint.data_fingerprint != data.fingerprint:
        notes.append("the data are not those that this run began with; it goes on with the new ones")
    return tuple(notes)


def _restore(session: Session, checkpoint: Checkpoint) -> None:
    if checkpoint.shards is not None:
        checkpoint.shards.restore(session.model, session.optimizer)
    else:
        session.strategy.load(checkpoint.model)
        load_state(session.optimizer, session.strategy.scattered(checkpoint.optimizer, session.optimizer))
    if checkpoint.scaler and session.scaler.is_enabled():
        session.scaler.load_state_dict(dict(checkpoint.scaler))
    session.step = checkpoint.step
    known = checkpoint.tokens
    session.tokens = checkpoint.step * checkpoint.run.tokens_per_step if known is None else known
    restore_rng(checkpoint.rng)


def _restore_ema(session: Session, ema: Ema, checkpoint: Checkpoint) -> None:
    if checkpoint.shards is not None:
        names = [name for name, _ in session.model.named_parameters()]
        checkpoint.shards.read_weights("ema", dict(zip(names, ema.averages, strict=True)))
        return
    with session.averaged():
        session.strategy.load(checkpoint.ema)
