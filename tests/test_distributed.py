"""Two processes that talk through gloo train as one does: the same losses, the same files, the same end."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from faults import Fault
from gptfit import checkpoint, metrics
from gptfit.config import make_run
from gptfit.distributed import Ranks, check_size, launched
from gptfit.errors import GptfitError
from gptfit.model import GPT
from gptfit.train import train
from ranks import Job, as_processes, train_together
from tokens import few_tokens

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("steps")
    few_tokens(folder)
    return folder


def small(dataset: Path, **changes: Any) -> dict[str, Any]:
    return {
        "n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 257, "block_size": 16, "dataset": str(dataset),
        "batch_size": 3, "gradient_accumulation_steps": 4, "dtype": "float32", "compile": False,
        "learning_rate": 1e-2, "max_iters": 20, "warmup_iters": 2, "eval_interval": 10, "eval_iters": 3,
        "checkpoint_interval": 10, **changes,
    }  # fmt: skip


def said(folder: Path, name: str, rank: int) -> dict[str, Any]:
    return json.loads((folder / f"{name}-rank{rank}.json").read_text())


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in metrics.read(folder)]


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory) -> Path:
    """One process and two, each strategy, the same run."""
    folder = tmp_path_factory.mktemp("trained")
    train(make_run(small(dataset)), folder / "one")
    train_together(folder, 2, [Job(strategy, small(dataset, n_gpus=2, strategy=strategy)) for strategy in STRATEGIES])
    return folder


STRATEGIES = ("ddp", "fsdp")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_train_as_one(trained, strategy):
    one, two = metrics.read(trained / "one"), metrics.read(trained / strategy)
    assert [entry["step"] for entry in two] == list(range(1, 21))
    assert [entry["tokens"] for entry in two] == [entry["tokens"] for entry in one]
    assert [entry["loss"] for entry in two] == pytest.approx([entry["loss"] for entry in one], abs=1e-3)
    assert [entry["grad_norm"] for entry in two] == pytest.approx([entry["grad_norm"] for entry in one], rel=1e-3)
    assert two[-1]["loss"] < two[0]["loss"] - 0.5
    assert two[-1]["val_loss"] == pytest.approx(one[-1]["val_loss"], abs=1e-3)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rank_0_alone_tells_and_writes(trained, strategy):
    assert said(trained, strategy, 0)["steps"] == list(range(1, 21)) and said(trained, strategy, 1)["steps"] == []
    assert said(trained, strategy, 1)["step"] == 20
    names = sorted(path.name for path in (trained / strategy).iterdir())
    checkpoints = [f"checkpoint-000000{step}{'' if strategy == 'fsdp' else '.pt'}" for step in (10, 20)]
    assert names == [*checkpoints, "metrics.jsonl", "run.yaml"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_signal_to_one_process_ends_both_with_a_checkpoint(dataset, tmp_path, strategy):
    keys = small(dataset, n_gpus=2, strategy=strategy)
    train_together(tmp_path, 2, [Job("run", keys, faults=[Fault("signal", 2, rank=1)])])
    for rank in (0, 1):
        assert (said(tmp_path, "run", rank)["step"], said(tmp_path, "run", rank)["stopped_by"]) == (3, "SIGTERM")
    found = checkpoint.latest_valid(tmp_path / "run")
    assert found is not None and found.checkpoint.step == 3


def diverge(rank: int, run: dict[str, Any], folder: Path) -> None:
    """Trains with a loss that is no number on rank 1 alone; says how it ended."""
    real = GPT.forward
    GPT.forward = lambda self, x, y: real(self, x, y) * (math.nan if rank == 1 and len(x) == 3 else 1)
    try:
        train(make_run(run), folder / "run", device_name="cpu")
    except (GptfitError, SystemExit) as error:
        (folder / f"end-{rank}").write_text(f"{type(error).__name__}: {error}")


def test_a_loss_that_is_no_number_on_one_rank_ends_both_and_is_said_once(dataset, tmp_path):
    as_processes(2, diverge, small(dataset, n_gpus=2), tmp_path)
    assert (tmp_path / "end-0").read_text().startswith("GptfitError: step 1: the loss is nan")
    assert (tmp_path / "end-1").read_text() == "SystemExit: 2"


def test_the_shares_of_the_ranks_are_the_sequences_of_the_step():
    starts = np.arange(24)
    shares = [Ranks(rank, 4).share(starts) for rank in range(4)]
    assert [len(share) for share in shares] == [6] * 4 and np.array_equal(np.concatenate(shares), starts)


def test_as_many_processes_as_gpus_or_a_line_to_type(monkeypatch):
    run = make_run({"n_gpus": 2, "gradient_accumulation_steps": 4})
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert launched() == Ranks(0, 1, 0)
    with pytest.raises(GptfitError, match="n_gpus=2, but this is one process") as alone:
        check_size(run, launched())
    assert "torchrun --standalone --nproc_per_node=2 -m gptfit train" in (alone.value.hint or "")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert launched() == Ranks(3, 4, 1)
    with pytest.raises(GptfitError, match="n_gpus=2, but torchrun started 4 processes"):
        check_size(run, launched())


def at_step_10(trained: Path, name: str, to: Path) -> None:
    """The folder of a run as it was after its tenth step."""
    to.mkdir()
    (path,) = (trained / name).glob("checkpoint-00000010*")
    (shutil.copytree if path.is_dir() else shutil.copy)(path, to / path.name)
    shutil.copy(trained / name / "metrics.jsonl", to)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_checkpoint_of_two_processes_has_what_one_process_writes(trained, strategy):
    """Shapes of every weight and state, by the same names; and nearly the same values."""
    one, two = (checkpoint.load(checkpoint.checkpoint_paths(trained / name)[0]) for name in ("one", strategy))
    torch.testing.assert_close(dict(two.model), dict(one.model), rtol=0, atol=1e-3)
    assert two.optimizer["state"].keys() == one.optimizer["state"].keys()
    for index, state in one.optimizer["state"].items():
        torch.testing.assert_close(two.optimizer["state"][index], state, rtol=0, atol=1e-3)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_process_goes_on_from_a_checkpoint_of_two(trained, dataset, tmp_path, strategy):
    at_step_10(trained, strategy, tmp_path / "run")
    train(make_run(small(dataset)), tmp_path / "run", resume=True)
    assert losses(tmp_path / "run") == pytest.approx(losses(trained / "one"), abs=1e-3)


@pytest.mark.slow
def test_other_numbers_of_processes_go_on_from_a_checkpoint(trained, dataset, tmp_path):
    """Named by who wrote it and who goes on: bit for bit where that is the same number and strategy."""
    for n, pairs in {2: ["ddp-ddp", "fsdp-fsdp", "one-fsdp"], 4: ["fsdp-ddp", "ddp-fsdp"]}.items():
        jobs = [Job(pair, small(dataset, n_gpus=n, strategy=pair.split("-")[1]), resume=True) for pair in pairs]
        for job in jobs:
            at_step_10(trained, job.out.split("-")[0], tmp_path / job.out)
        train_together(tmp_path, n, jobs)
        for job in jobs:
            assert losses(tmp_path / job.out) == pytest.approx(losses(trained / "one"), abs=1e-3)
    for strategy in STRATEGIES:
        assert losses(tmp_path / f"{strategy}-{strategy}") == losses(trained / strategy)


@pytest.mark.slow
def test_the_command_under_torchrun_prints_once(dataset, tmp_path):
    keys = [f"{key}={value}" for key, value in small(dataset, max_iters=2, eval_interval=0).items()]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    gptfit = ["-m", "gptfit", "train", *keys, "n_gpus=2", "--out", str(tmp_path / "a"), "--device", "cpu"]
    done = subprocess.run([*torchrun, *gptfit], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("step 2/2") == 1 and done.stderr.count("2 × cpu") == 1
