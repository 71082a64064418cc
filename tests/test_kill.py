"""A run that is killed at random moments, with no time to save, ends as if nobody had touched it.

GPTFIT_KILLS is the number of kills, GPTFIT_KILLS_SEED chooses their moments.
"""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from gptfit import metrics
from gptfit.checkpoint import checkpoint_paths, load
from tokens import few_tokens

KILLS = int(os.environ.get("GPTFIT_KILLS", "20"))
SEED = int(os.environ.get("GPTFIT_KILLS_SEED", "1"))
STEPS = 240
# Every other kill waits for a checkpoint that is being written.
PARTIAL = ".checkpoint-*.partial"
LIMIT_SECONDS = 60


def run_to_the_end(keys: dict[str, Any], out: str, resume: bool) -> None:
    """What the process does that is killed."""
    import torch

    from gptfit.config import make_run
    from gptfit.train import train

    torch.set_num_threads(1)
    train(make_run(keys), out, resume)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("data")
    few_tokens(folder, 9_000, seed=1)
    return {
        "n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 4096, "block_size": 16, "dataset": str(folder),
        "batch_size": 2, "gradient_accumulation_steps": 2, "dtype": "float32", "compile": False, "dropout": 0.1,
        "learning_rate": 1e-2, "max_iters": STEPS, "warmup_iters": 2, "eval_interval": 20, "eval_iters": 1,
        "checkpoint_interval": 4,
    }  # fmt: skip


@pytest.fixture(scope="module")
def start() -> Any:
    """Starts such a process, which finds torch imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gptfit.train", "torch._dynamo"])

    def begin(keys: dict[str, Any], out: Path, resume: bool) -> Any:
        process = context.Process(target=run_to_the_end, args=(keys, str(out), resume))
        process.start()
        return process

    return begin


def wait_until(true: Any, process: Any) -> None:
    """Until `true()`, or the process has ended by itself."""
    end = time.monotonic() + LIMIT_SECONDS
    while not true() and process.is_alive():
        assert time.monotonic() < end
        time.sleep(0.0002)


def n_lines(out: Path) -> int:
    path = out / metrics.NAME
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill(process: Any, out: Path, chance: random.Random, writing: bool) -> bool:
    """Kills it some steps after it wrote its first, or within the writing of a checkpoint; whether it was in one."""
    resumed_at = n_lines(out)
    wait_until(lambda: n_lines(out) != resumed_at, process)  # it went on, or went back to its checkpoint first
    some = n_lines(out) + chance.randrange(STEPS // KILLS * 3 // 4)
    wait_until(lambda: n_lines(out) >= some, process)
    time.sleep(chance.random() * 0.01)
    if writing:
        wait_until(lambda: list(out.glob(PARTIAL)), process)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL, "it was done before it was killed"
    return bool(list(out.glob(PARTIAL)))


def test_a_run_killed_at_random_moments_is_the_run_that_nobody_killed(
    keys: dict[str, Any], start: Any, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    undisturbed = start(keys, whole, False)
    chance, within = random.Random(SEED), 0
    for number in range(KILLS):
        process = start(keys, parts, bool(checkpoint_paths(parts)))
        within += kill(process, parts, chance, writing=number % 2 == 1)
        for path in checkpoint_paths(parts):
            load(path)  # raises where it is not whole
    assert within >= KILLS // 4, "kills within the writing of a checkpoint"
    last = start(keys, parts, True)
    for process in (last, undisturbed):
        process.join(LIMIT_SECONDS)
        assert process.exitcode == 0
    got, wanted = metrics.read(parts), metrics.read(whole)
    assert [entry["step"] for entry in got] == list(range(1, STEPS + 1))
    for key in ("loss", "grad_norm", "lr", "tokens"):
        assert [entry[key] for entry in got] == [entry[key] for entry in wanted], key
    assert [entry.get("val_loss") for entry in got] == [entry.get("val_loss") for entry in wanted]
    assert len((parts / metrics.NAME).read_text().splitlines()) == STEPS
    assert not list(parts.glob(PARTIAL)), "what the killed ones left is gone"
    print(f"{KILLS} kills, {within} of them within the writing of a checkpoint")
