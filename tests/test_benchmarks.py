"""The benchmarks run, and what they compare is comparable: nanoGPT's loop learns as ours does, step for step."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gptfit.config import make_run
from gptfit.data import load_batch
from gptfit.model import GPT
from gptfit.optim import build_optimizer, learning_rate_at, set_learning_rate

torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import chunked_loss  # noqa: E402
from nanogpt_train import NanoGPTTrainer  # noqa: E402

TINY = {
    "n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 61, "block_size": 16, "batch_size": 4, "dtype": "float32",
    "gradient_accumulation_steps": 2, "compile": False, "learning_rate": 1e-2, "warmup_iters": 2, "max_iters": 8,
}  # fmt: skip


def test_nanogpts_loop_takes_the_steps_that_our_parts_take_on_the_same_batches():
    """Eight steps, warm-up, cosine, decay and clipping in them, from the same weights: the same parameters."""
    run = make_run(TINY)
    tokens = np.random.default_rng(0).integers(0, 61, 2000).astype(np.uint16)
    nanogpt = NanoGPTTrainer(run, tokens, torch.device("cpu"))
    model = GPT(run)
    model.load_state_dict(nanogpt.model.state_dict())
    optimizer = build_optimizer(model, run)
    rng = np.random.default_rng(1)
    for step in range(run.max_iters):
        parts = [rng.integers(0, len(tokens) - run.block_size, run.batch_size) for _ in range(run.micro_steps)]
        batches = [load_batch(tokens, part, run, torch.device("cpu")) for part in parts]
        waiting = iter([*batches[1:], batches[0]])
        nanogpt.batch, nanogpt.get_batch = batches[0], lambda waiting=waiting: next(waiting)
        nanogpt.step()
        set_learning_rate(optimizer, learning_rate_at(step, run))
        for batch in batches:
            (model(*batch) / run.micro_steps).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
    for (name, ours), theirs in zip(model.named_parameters(), nanogpt.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5, msg=name)


def test_the_chunked_loss_is_timed_beside_the_full_one(capsys, monkeypatch):
    monkeypatch.setattr(chunked_loss, "N_EMBD", 16)
    monkeypatch.setattr(chunked_loss, "VOCAB_SIZE", 50)
    monkeypatch.setattr("sys.argv", ["chunked_loss.py", "--tokens", "256", "--rounds", "1"])
    chunked_loss.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[0] for row in rows] == ["full", "64", "128", "256"]
    assert float(rows[0][2]) == pytest.approx(1.0) and all(float(row[2]) > 0 for row in rows)
