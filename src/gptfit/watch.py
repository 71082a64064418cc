"""What a run looks at beside its loss: bits per byte, whether it still gets better, and what its text reads like."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from gptfit import metrics
from gptfit.checkpoint import restore_rng, rng_state
from gptfit.config import RunConfig
from gptfit.data import VAL, Dataset, sequence_starts
from gptfit.errors import GptfitError
from gptfit.events import Listener, Note, Sampled, Stepped
from gptfit.model import GPT
from gptfit.sample import extend, start_ids
from gptfit.shards import windows
from gptfit.tokenizer import get_tokenizer, token_bytes

# As `gptfit sample` draws, and enough to see whether it is words.
SAMPLE_TOKENS = 128
TEMPERATURE = 0.8
TOP_K = 200

PATIENCE = "patience"


class Watch:
    """Told of every step. Only the process that prints (`first`) draws samples, of the model within `averaged`."""

    def __init__(
        self,
        run: RunConfig,
        data: Dataset,
        model: GPT,
        out: Path,
        emit: Listener,
        first: bool = True,
        averaged: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.run, self.data, self.model, self.emit, self.averaged = run, data, model, emit, averaged
        # No errors: an estimate or a measurement of the same run leaves evaluation out, or splits it otherwise.
        if run.patience and not run.eval_interval:
            emit(Note(f"patience={run.patience} has nothing to count: eval_interval is 0"))
        if run.sample_interval and run.shards > 1:
            emit(Note(f"no samples: with strategy={run.strategy} no GPU has the whole model"))
        self.sample_interval = run.sample_interval if first and run.shards == 1 else 0
        self.bytes_per_token = bytes_per_target(run, data) if run.eval_interval else None
        self.losses = [e["val_loss"] for e in metrics.read(out) if e.get("val_loss") is not None]

    def evaluated(self, record: Stepped, val_loss: float) -> Stepped:
        """The record with its validation loss, nats a token, and that in bits per byte of text where that is known."""
        self.losses.append(val_loss)
        known = self.bytes_per_token
        return replace(record, val_loss=val_loss, val_bpb=val_loss / math.log(2) / known if known else None)

    def tell(self, record: Stepped) -> None:
        """Hands the record on, and a sample where one is due."""
        self.emit(record)
        if self.sample_interval and record.step % self.sample_interval == 0:
            try:
                with self.averaged():
                    text = draw(self.model, self.data.tokenizer, self.run)
                self.emit(Sampled(record.step, text))
            except GptfitError as error:
                self.sample_interval = 0
                self.emit(Note(f"no samples: {error.message}"))

    def spent(self, record: Stepped) -> str:
        """`patience` where the run was just evaluated, and no better for that many evaluations; else nothing."""
        over = record.val_loss is not None and is_spent(self.losses, self.run.patience)
        return PATIENCE if over else ""


def is_spent(losses: Sequence[float], patience: int) -> bool:
    """Whether none of the last `patience` losses is below the best before them. 0 waits for ever."""
    if not patience or len(losses) <= patience:
        return False
    return not min(losses[-patience:]) < min(losses[:-patience])


def bytes_per_target(run: RunConfig, data: Dataset) -> float | None:
    """Mean bytes of text of the tokens that evaluation predicts; None where the tokenizer is not here.

    An end of text is predicted and is no text: it has no bytes, and its loss counts.
    """
    lengths = token_bytes(data.tokenizer)
    if lengths is None:
        return None
    tokens = data.tokens(VAL)
    starts = sequence_starts(len(tokens), run.block_size, run.eval_iters * run.eval_batch_size, run.seed, 0, VAL)
    total = 0
    for part in np.array_split(starts, -(-len(starts) // 64)):
        ids = windows(tokens, part + 1, run.block_size)
        if ids.max() >= len(lengths):
            return None
        total += int(lengths[ids].sum())
    return total / (len(starts) * run.block_size) or None


@torch.no_grad()
def draw(model: GPT, tokenizer: str, run: RunConfig) -> str:
    """Some text from the model as it is, the same dice each time; training goes on as if there had been none.

    Raises GptfitError where the tokenizer is not here.
    """
    coder = get_tokenizer(tokenizer)
    n_vocab = min(coder.n_vocab, run.vocab_size)
    ids = start_ids(coder, "", run.vocab_size)
    state, was_training = rng_state(), model.training
    model.eval()
    try:
        torch.manual_seed(run.seed)
        # Every length would be compiled anew.
        with torch.compiler.set_stance("force_eager"):
            return coder.decode(extend(model, ids, SAMPLE_TOKENS, TEMPERATURE, TOP_K, n_vocab)[1:])
    finally:
        model.train(was_training)
        restore_rng(state)
