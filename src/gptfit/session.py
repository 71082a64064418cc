"""A run while it goes."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from gptfit.checkpoint import Checkpoint, checkpoint_path, rng_state, save, save_sharded
from gptfit.config import RunConfig
from gptfit.data import Dataset, Feed
from gptfit.device import HeldMemory
from gptfit.distributed import Ranks
from gptfit.ema import Ema
from gptfit.events import Event, Started
from gptfit.model import GPT
from gptfit.optim import Stepper
from gptfit.parallel import Sharded, Strategy

# Its states are tensors of torchao's or bitsandbytes' own, which are saved whole.
GATHERED = ("adamw8bit",)


@dataclass(frozen=True, slots=True)
class Good:
    """A step that fitted: its micro-batch, and the most that the allocator handed out in it."""

    micro_batch: int
    allocated_bytes: int


@dataclass(frozen=True, slots=True)
class Correction:
    """What two measured steps change: the run to go on with, whose numbers of training are the same, its micro-batch,
    and what is predicted of it (an Estimate's figures in bytes). `note` says it in a line."""

    run: RunConfig
    micro_batch: int
    predicted: Mapping[str, int]
    note: str


# What is made of the memory of two steps; None where it is as predicted.
Refit = Callable[[HeldMemory], Correction | None]


@dataclass(slots=True)
class Session:
    """What changes while a run goes: the model, its optimizer, completed steps, the micro-batch that fits."""

    run: RunConfig
    device: torch.device
    data: Dataset
    model: GPT
    optimizer: Stepper
    scaler: torch.amp.GradScaler
    emit: Callable[[Event], None]
    ranks: Ranks
    strategy: Strategy
    feed: Feed
    ema: Ema | None = None
    step: int = 0
    tokens: int = 0  # of all steps so far, whose sizes a resume may have changed
    micro_batch: int = 0
    eval_batch: int = 0
    good: Good | None = None  # the last one, on a GPU
    held: HeldMemory | None = None  # after the last step, on a GPU
    saved: Path | None = None  # the newest good checkpoint
    skipped: int = 0
    skipped_in_a_row: int = 0

    def started(self, out: Path) -> Started:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else str(self.device)
        name = f"{self.ranks.size} × {name}" if self.ranks.size > 1 else name
        n_params = sum(parameter.numel() for parameter in self.model.parameters())
        data = self.data
        return Started(self.run, name, n_params, data.name, len(data.train), data.tokenizer, self.step, out)

    def averaged(self) -> AbstractContextManager[None]:
        """Within the block the model has the average of its weights, where one is kept."""
        return self.ema.exchanged() if self.ema else nullcontext()

    def save(self, out: Path) -> Path:
        """A checkpoint in the folder `out`, on all ranks together: of shards each writes its own, else one writes all.

        Raises GptfitError where it cannot be written.
        """
        if isinstance(self.strategy, Sharded) and self.run.optimizer not in GATHERED:
            names = [name for name, _ in self.model.named_parameters()]
            ema = dict(zip(names, self.ema.averages, strict=True)) if self.ema else {}
            self.saved = save_sharded(out, self._checkpoint(), self.model, self.optimizer, ema, self.ranks)
        else:
            checkpoint = self.checkpoint()
            with self.ranks.together():
                if self.ranks.first:
                    save(out, checkpoint)
            self.saved = checkpoint_path(out, self.step)
        return self.saved

    def checkpoint(self) -> Checkpoint:
        """The whole of it, on the first rank."""
        with self.averaged():
            ema = self.strategy.gathered(self.model.state_dict()) if self.ema else {}
        model, optimizer = (self.strategy.gathered(of.state_dict()) for of in (self.model, self.optimizer))
        return replace(self._checkpoint(), model=model, optimizer=optimizer, ema=ema)

    def _checkpoint(self) -> Checkpoint:
        """All but the weights and states."""
        return Checkpoint(
            step=self.step,
            tokens=self.tokens,
            run=self.run,
            model={},
            optimizer={},
            scaler=self.scaler.state_dict(),
            rng=rng_state(),
            tokenizer=self.data.tokenizer,
            data_fingerprint=self.data.fingerprint,
        )
