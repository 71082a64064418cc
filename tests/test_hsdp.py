"""Sharded within a node, replicated over nodes: four processes as two nodes of two, beside one process."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from faults import Fault
from gptfit import checkpoint, metrics
from gptfit.asked import Asked
from gptfit.cluster import start_script
from gptfit.config import make_run
from gptfit.distributed import Ranks, check_size
from gptfit.errors import GptfitError
from gptfit.memory.step import pieces, steady_step
from gptfit.train import train
from peaks import measure_jobs
from ranks import Job, as_processes, train_together
from tokens import few_tokens

torch.set_num_threads(1)

NODES = {"n_gpus": 4, "shard_gpus": 2, "strategy": "hsdp"}


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("steps")
    few_tokens(folder, 20_000, 4_000)
    return {
        "n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 257, "block_size": 16, "dataset": str(folder),
        "batch_size": 4, "gradient_accumulation_steps": 8, "dtype": "float32", "compile": False, "ema_decay": 0.5,
        "learning_rate": 1e-2, "max_iters": 6, "warmup_iters": 2, "eval_interval": 3, "eval_iters": 3,
        "checkpoint_interval": 3,
    }  # fmt: skip


@pytest.fixture(scope="module")
def trained(keys, tmp_path_factory) -> Path:
    """One process and two nodes of two: to the end, in two halves, and with memory that runs out on one rank, before
    and after a micro-batch whose gradients have not been sent to the other node."""
    folder = tmp_path_factory.mktemp("trained")
    train(make_run(keys), folder / "one")
    shared = {**keys, **NODES}
    faults = [Fault("backward", 1, rank=3, call=1), Fault("backward", 2, rank=0, call=3)]
    faults += [Fault("evaluation", 2, rank=2, call=1)]
    jobs = [
        Job("whole", shared),
        Job("halves", {**shared, "max_iters": 3, "lr_decay_iters": 6}),
        Job("halves", shared, resume=True),
        Job("faults", shared, faults=faults),
    ]
    train_together(folder, 4, jobs)
    return folder


def losses(folder: Path, key: str = "loss") -> list[float]:
    return [entry[key] for entry in metrics.read(folder) if entry.get(key) is not None]


@pytest.mark.parametrize("name", ["whole", "faults"])
def test_two_nodes_of_two_train_as_one_process(trained, name):
    assert len(losses(trained / name)) == 6 and losses(trained / name)[-1] < losses(trained / name)[0] - 0.2
    for key in ("loss", "val_loss", "grad_norm"):
        assert losses(trained / name, key) == pytest.approx(losses(trained / "one", key), abs=1e-3)
    one, four = (checkpoint.load(checkpoint.checkpoint_paths(trained / n)[0]) for n in ("one", name))
    for part in ("model", "ema"):
        torch.testing.assert_close(dict(getattr(four, part)), dict(getattr(one, part)), rtol=0, atol=1e-3)


def test_memory_ran_out_and_was_survived(trained):
    notes = json.loads((trained / "faults-rank0.json").read_text())["notes"]
    assert sum(note.startswith("out of memory; going on with micro-batches of") for note in notes) == 3


def test_what_was_resumed_is_the_same_bit_for_bit(trained):
    for key in ("loss", "val_loss"):
        assert losses(trained / "halves", key) == losses(trained / "whole", key)


def test_the_twin_needs_what_a_process_of_two_nodes_allocates(keys, tmp_path):
    """Three micro-batches: the first makes the parts of gradients, the last sends them to the other node."""
    values = {
        **keys, **NODES, "n_head": 4, "n_embd": 128, "vocab_size": 1001, "bias": True, "loss_chunk_size": 16,
        "batch_size": 1, "gradient_accumulation_steps": 12, "eval_interval": 0, "checkpoint_interval": 0,
    }  # fmt: skip
    as_processes(4, measure_jobs, {"hsdp": values}, tmp_path)
    run = make_run(values)
    live_bytes = steady_step(run, pieces(run, "gptfit", whole=False)).peak().live_bytes
    assert live_bytes == pytest.approx(json.loads((tmp_path / "peaks.json").read_text())["hsdp"], rel=0.005)


def test_a_part_is_that_of_the_nodes_gpus():
    """The figures of 32 GPUs in nodes of 8 are those of fsdp on 8, whose step has as many micro-batches."""

    def live_bytes(n_gpus: int, strategy: str) -> int:
        run = make_run({"n_gpus": n_gpus, "strategy": strategy, "gradient_accumulation_steps": 2 * n_gpus})
        return steady_step(run, pieces(run, "gptfit", whole=False)).peak().live_bytes

    assert live_bytes(32, "hsdp") == live_bytes(8, "fsdp") > live_bytes(32, "fsdp")


@pytest.mark.parametrize("values", [{"n_gpus": 8}, {"n_gpus": 12}, {"n_gpus": 4, "shard_gpus": 1}, {}])
def test_nodes_that_are_none_are_refused(values):
    with pytest.raises(GptfitError, match="strategy hsdp shards over shard_gpus"):
        make_run({"strategy": "hsdp", "gradient_accumulation_steps": 24, **values})


def test_processes_of_a_machine_are_whole_groups(monkeypatch):
    run = make_run({"n_gpus": 16, "strategy": "hsdp", "gradient_accumulation_steps": 16})
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    check_size(run, Ranks(0, 16, 0))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(GptfitError, match="shard_gpus=8, but torchrun started 4 processes on this machine") as caught:
        check_size(run, Ranks(0, 16, 0))
    assert caught.value.hint is not None and caught.value.hint.startswith("shard_gpus=4")


def test_slurm_starts_nodes_of_that_size_and_says_it_of_fsdp():
    def script(**keys: Any) -> str:
        run = make_run({"gradient_accumulation_steps": 16, **keys})
        return start_script("slurm", Asked("gpt2", ()), run, "out")

    fours = script(n_gpus=16, strategy="hsdp", shard_gpus=4)
    assert "--nnodes=4 --nproc_per_node=4 " in fours and "--gpus-per-node=4\n" in fours
    said = script(n_gpus=16, strategy="fsdp")
    assert "# within a node and sends" in said and max(len(line) for line in said.splitlines()) <= 80
    for other in (fours, script(n_gpus=8, strategy="fsdp"), script(n_gpus=16, strategy="ddp")):
        assert "hsdp shards" not in other
