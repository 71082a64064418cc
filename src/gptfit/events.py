"""What a training run reports, as values. Who listens decides what to print."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from gptfit.config import RunConfig

NAME = "events.jsonl"  # where a run leaves them (journal.py)


@dataclass(frozen=True, slots=True)
class Started:
    """`step` is the number of steps that were complete before: 0, or the checkpoint's."""

    run: RunConfig
    device: str
    n_params: int
    data: str
    n_train_tokens: int
    tokenizer: str
    step: int
    out_dir: Path


@dataclass(frozen=True, slots=True)
class Note:
    """One line that someone should read: a changed setting, a damaged checkpoint, a smaller micro-batch."""

    text: str


@dataclass(frozen=True, slots=True)
class Stepped:
    """One step, as metrics.jsonl holds it. `step` counts from 1; `loss` is the mean over the whole step;
    `tokens` are those trained on so far; `grad_norm` is taken before clipping. None: not known here.
    `val_loss` is in nats a token, `val_bpb` the same in bits per byte of text. `skipped`: the step was not applied."""

    step: int
    loss: float
    lr: float
    tokens: int
    seconds: float
    tokens_per_second: float
    grad_norm: float | None
    peak_allocated_bytes: int | None
    peak_reserved_bytes: int | None
    val_loss: float | None = None
    val_bpb: float | None = None
    skipped: bool | None = None


@dataclass(frozen=True, slots=True)
class Sampled:
    """What the model wrote after that step."""

    step: int
    text: str


@dataclass(frozen=True, slots=True)
class Measured:
    """Memory of the second step, the first steady one, beside what was predicted for it (keys as in Estimate)."""

    allocated_bytes: int
    reserved_bytes: int
    card_used_bytes: int
    predicted: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Saved:
    step: int
    path: Path


@dataclass(frozen=True, slots=True)
class Finished:
    """`stopped_by` names the signal that ended the run early; empty where it ran to its end."""

    step: int
    loss: float
    val_loss: float | None
    seconds: float
    stopped_by: str
    checkpoint: Path | None


Event = Started | Note | Stepped | Sampled | Measured | Saved | Finished
Listener = Callable[[Event], None]
