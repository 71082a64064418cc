"""What the trainer learns beside nanoGPT: the same data and budget, three seeds, the final validation loss of each.

    python benchmarks/loss_curve.py [--seeds 3] [--steps 400] [--threads 1] [KEY=VALUE …]

Each has its own initial weights and its own order of the data, as in real life; the validation sequences are the same.
Ours is the trainer as a user runs it, nanoGPT the loop of nanogpt_train.py. The data are the Python library's sources.
"""

import argparse
import tempfile
from pathlib import Path
from statistics import fmean

import torch
from nanogpt_train import NanoGPTTrainer

from gptfit.config import RunConfig, derive, make_run
from gptfit.data import VAL, Dataset, load_batch, open_dataset, sequence_starts
from gptfit.scalars import parse_override
from gptfit.train import train

TINY = {
    "n_layer": 4, "n_head": 4, "n_embd": 96, "vocab_size": 320, "block_size": 64, "batch_size": 16,
    "gradient_accumulation_steps": 2, "dtype": "float32", "compile": False, "learning_rate": 2e-3,
    "warmup_iters": 50, "eval_iters": 100, "eval_batch_size": 16, "checkpoint_interval": 0,
}  # fmt: skip


def ours(run: RunConfig) -> float:
    """Final validation loss of the trainer."""
    with tempfile.TemporaryDirectory() as folder:
        finished = train(run, Path(folder), device_name="cpu")
    assert finished.val_loss is not None
    return finished.val_loss


def nanogpt(run: RunConfig, data: Dataset) -> float:
    """Final validation loss of nanoGPT's loop, over the sequences that ours is evaluated on."""
    torch.manual_seed(run.seed)
    device = torch.device("cpu")
    trainer = NanoGPTTrainer(run, data.train, device)
    for _ in range(run.max_iters):
        trainer.step()
    n = run.eval_iters * run.eval_batch_size
    starts = sequence_starts(len(data.val), run.block_size, n, run.seed, 0, VAL).reshape(run.eval_iters, -1)
    trainer.model.eval()
    with torch.no_grad():
        return fmean(float(trainer.model(*load_batch(data.val, part, run, device))[1]) for part in starts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    changes = dict(parse_override(change) for change in given.changes)
    base = make_run({**TINY, "max_iters": given.steps, "eval_interval": given.steps, **changes})
    data = open_dataset(base)
    pairs: list[tuple[float, float]] = []
    print(f"{'seed':>5} {'gptfit':>8} {'nanoGPT':>8} {'difference':>11}")
    for seed in range(1, given.seeds + 1):
        run = derive(base, seed=seed)
        own, their = ours(run), nanogpt(run, data)
        pairs.append((own, their))
        print(f"{seed:>5} {own:>8.4f} {their:>8.4f} {own / their - 1:>+11.2%}", flush=True)
    own, their = (fmean(values) for values in zip(*pairs, strict=True))
    print(f"{'mean':>5} {own:>8.4f} {their:>8.4f} {own / their - 1:>+11.2%}")


if __name__ == "__main__":
    main()
