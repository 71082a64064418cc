"""A sharded run's checkpoints: written in parts, read by any number of processes, whole or passed over."""

import json
import os
import pickle
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from gptfit import checkpoint, metrics, sharded_checkpoint
from gptfit.config import make_run
from gptfit.errors import GptfitError
from gptfit.init_from import start_weights
from gptfit.model import GPT
from gptfit.sample import sample
from gptfit.train import train
from ranks import Job, as_processes, train_jobs, train_together
from tokens import few_tokens

torch.set_num_threads(1)

LAST, BEFORE = "checkpoint-00000006", "checkpoint-00000003"


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> dict[str, Any]:
    """Two optimizers, an average, and vectors that are shorter than there are processes."""
    folder: Path = tmp_path_factory.mktemp("steps")
    few_tokens(folder)
    return {
        "n_layer": 2, "n_head": 8, "n_embd": 16, "vocab_size": 257, "block_size": 16, "dataset": str(folder),
        "batch_size": 2, "gradient_accumulation_steps": 4, "dtype": "float32", "compile": False, "qk_norm": True,
        "optimizer": "muon", "ema_decay": 0.5, "learning_rate": 1e-2, "max_iters": 6, "warmup_iters": 2,
        "eval_interval": 3, "eval_iters": 2, "checkpoint_interval": 3,
    }  # fmt: skip


def train_in_small_files(rank: int, folder: Path, jobs: list[Job]) -> None:
    sharded_checkpoint.FILE_BYTES = 5000
    train_jobs(rank, folder, jobs)


@pytest.fixture(scope="module")
def trained(keys, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    as_processes(2, train_in_small_files, folder, [Job("two", {**keys, "n_gpus": 2, "strategy": "fsdp"})])
    return folder


def losses(folder: Path) -> list[float]:
    return [entry[key] for entry in metrics.read(folder) for key in ("loss", "val_loss") if entry.get(key) is not None]


def copied(trained: Path, to: Path, *names: str) -> Path:
    """The run's folder with those of its checkpoints."""
    for name in names:
        shutil.copytree(trained / "two" / name, to / name)
    shutil.copy(trained / "two" / "metrics.jsonl", to)
    return to


def damage(folder: Path, how: str, name: str = "__1_0.distcp") -> None:
    """By a bit of a weight of the second rank's, or of another file; by half of it; by all."""
    path = folder / name
    content = bytearray(path.read_bytes())
    if how == "bit":
        content[len(content) // 2] ^= 1
    path.write_bytes(content[: len(content) // 2] if how == "cut" else content)
    if how == "gone":
        path.unlink()


def rewritten(folder: Path, metadata: bytes) -> None:
    """`metadata` in the place of a checkpoint's own, with the right checksum."""
    (folder / ".metadata").write_bytes(metadata)
    plain = torch.load(folder / "plain.pt", weights_only=True)
    plain["files"][".metadata"] = sharded_checkpoint._checksum(folder / ".metadata")
    torch.save(plain, folder / "plain.pt")


def test_each_rank_writes_about_its_half_and_other_programs_read_it(trained, tmp_path):
    sizes = [sum(file.stat().st_size for file in (trained / "two" / LAST).glob(f"__{rank}_*")) for rank in (0, 1)]
    assert min(sizes) > 0.8 * max(sizes) and len(list((trained / "two" / LAST).glob("__0_*"))) > 3
    dcp_to_torch_save(trained / "two" / LAST, tmp_path / "whole.pt")
    theirs = torch.load(tmp_path / "whole.pt", weights_only=True)
    ours = checkpoint.load(trained / "two" / LAST)
    for part in ("model", "ema"):
        own = dict(getattr(ours, part))
        assert torch.equal(own.pop("lm_head.weight"), own["transformer.wte.weight"])  # which is there once
        torch.testing.assert_close(own, theirs[part], rtol=0, atol=0)
    n_states = sum(len(part["state"]) for part in ours.optimizer["parts"])
    assert n_states == len(theirs["optimizer"]["state"]) == len(theirs["model"])


def test_one_process_samples_and_starts_from_a_folder(trained, keys, tmp_path):
    """As from a file with the tensors that torch's own tool reads out of the folder."""
    dcp_to_torch_save(trained / "two" / LAST, tmp_path / "whole.pt")
    theirs = torch.load(tmp_path / "whole.pt", weights_only=True)
    whole = checkpoint.load(trained / "two" / LAST)
    parts = {
        part: {**theirs[part], "lm_head.weight": theirs[part]["transformer.wte.weight"]} for part in ("model", "ema")
    }
    (tmp_path / "file").mkdir()
    torch.save({**whole.as_plain(), **parts}, tmp_path / "file" / "checkpoint-00000006.pt")
    for raw in (False, True):
        texts = [sample(folder, "a", 30, seed=1, raw=raw) for folder in (trained / "two", tmp_path / "file")]
        assert texts[0] == texts[1]
    for path in (trained / "two", trained / "two" / LAST):
        run = make_run({**keys, "init_from": str(path)})
        model = GPT(run)
        assert LAST in start_weights(model, run)[0]
        assert all(torch.equal(weight, theirs["ema"][name]) for name, weight in model.named_parameters())


@pytest.fixture(scope="module")
def resumed(trained, keys, tmp_path_factory) -> Path:
    """From step 3: by as many processes, twice as many, and two beside a newer one that is damaged in a file that the
    second alone looks at."""
    folder = tmp_path_factory.mktemp("resumed")
    two = {**keys, "n_gpus": 2, "strategy": "fsdp"}
    four = {**keys, "n_gpus": 4}
    jobs = {
        2: [Job("two", two, resume=True), Job("damaged", two, resume=True),
            Job("ddp", {**two, "strategy": "ddp"}, resume=True)],
        4: [Job("four", {**four, "strategy": "fsdp"}, resume=True),
            Job("nodes", {**four, "strategy": "hsdp", "shard_gpus": 2}, resume=True)],
    }  # fmt: skip
    for n, of_n in jobs.items():
        for job in of_n:
            (folder / job.out).mkdir()
            copied(trained, folder / job.out, BEFORE, *([LAST] if job.out == "damaged" else []))
        if n == 2:
            damage(folder / "damaged" / LAST, "bit", "__0_1.distcp")
        train_together(folder, n, of_n)
    return folder


def test_as_many_processes_go_on_bit_for_bit(trained, resumed):
    assert losses(resumed / "two") == losses(resumed / "damaged") == losses(trained / "two")
    one, two = (checkpoint.load(folder / "two" / LAST) for folder in (trained, resumed))
    states = [[part["state"] for part in of.optimizer["parts"]] for of in (one, two)]
    for own, other in ((dict(one.model), dict(two.model)), (dict(one.ema), dict(two.ema)), states):
        torch.testing.assert_close(own, other, rtol=0, atol=0)


def test_what_is_damaged_is_passed_over_by_all_and_replaced(resumed):
    notes = json.loads((resumed / "damaged-rank0.json").read_text())["notes"]
    assert any(f"{LAST}" in note and "__0_1.distcp has changed; passed over" in note for note in notes)
    assert sorted(path.name for path in (resumed / "damaged").glob("*checkpoint-*")) == [BEFORE, LAST]
    found = checkpoint.latest_valid(resumed / "damaged")
    assert found is not None and found.checkpoint.step == 6 and not found.skipped


@pytest.mark.parametrize("name", ["ddp", "four", "nodes", "one"])
def test_other_numbers_of_processes_and_other_strategies_go_on(trained, resumed, keys, tmp_path, name):
    folder = resumed / name
    if name == "one":
        folder = copied(trained, tmp_path, BEFORE)
        train(make_run(keys), folder, resume=True)
    assert losses(folder) == pytest.approx(losses(trained / "two"), abs=1e-3)
    kinds = [path.suffix for path in checkpoint.checkpoint_paths(folder)]
    assert kinds == ([".pt", ""] if name in ("ddp", "one") else ["", ""])


@pytest.mark.parametrize("how", ["gone", "cut", "bit"])
@pytest.mark.parametrize("name", ["__1_0.distcp", ".metadata", "plain.pt"])
def test_a_damaged_folder_is_passed_over_with_a_word(trained, tmp_path, how, name):
    folder = copied(trained, tmp_path, BEFORE, LAST)
    damage(folder / LAST, how, name)
    found = checkpoint.latest_valid(folder)
    assert found is not None and found.path.name == BEFORE
    assert len(found.skipped) == 1 and LAST in found.skipped[0] and "\n" not in found.skipped[0]
    assert name in found.skipped[0] or name == "plain.pt"


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


def test_code_in_a_folder_is_refused_and_not_run(trained, tmp_path):
    folder, mark = copied(trained, tmp_path, LAST), tmp_path / "was-here"
    metadata = sharded_checkpoint._read_metadata(folder / LAST, dict.fromkeys(os.listdir(folder / LAST)))
    described = dict(metadata.state_dict_metadata)
    hostile: list[Any] = [Evil(mark), Metadata({"x": Evil(mark)})]  # pyright: ignore
    for content in hostile:
        rewritten(folder / LAST, pickle.dumps(content))
        with pytest.raises(GptfitError, match=r"\.metadata names posix\.system"):
            checkpoint.load(folder / LAST)
    # DCP would unpickle the part of a tensor that is said to be none.
    name = next(iter(described))
    rewritten(
        folder / LAST, pickle.dumps(Metadata({**described, name: BytesStorageMetadata()}, {}, metadata.storage_data))
    )
    with pytest.raises(GptfitError, match="BytesStorageMetadata"):
        checkpoint.load(folder / LAST)
    place = next(iter(metadata.storage_data.values()))
    place.relative_path = "../elsewhere"
    rewritten(folder / LAST, pickle.dumps(metadata))
    with pytest.raises(GptfitError, match="names a file that it does not have"):
        checkpoint.load(folder / LAST)
    torch.save(Evil(mark), folder / LAST / "plain.pt")
    with pytest.raises(GptfitError, match="cannot read the checkpoint"):
        checkpoint.load(folder / LAST)
    assert not mark.exists()


def save_in_vain(rank: int, run: dict[str, Any], folder: Path) -> None:
    """Resumes where the system lets rank 1 alone write no more than its first file; says how it ended."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, before[1]))
    try:
        train(make_run(run), folder / "run", resume=True, device_name="cpu")
    except (GptfitError, SystemExit) as error:
        (folder / f"end-{rank}").write_text(f"{type(error).__name__}: {error}")


def test_what_one_rank_cannot_write_leaves_the_previous_one(trained, keys, tmp_path):
    (tmp_path / "run").mkdir()
    copied(trained, tmp_path / "run", BEFORE)
    as_processes(2, save_in_vain, {**keys, "n_gpus": 2, "strategy": "fsdp"}, tmp_path)
    ends = [(tmp_path / f"end-{rank}").read_text() for rank in (0, 1)]
    assert ends[0].startswith("GptfitError: cannot write") and ends[0].endswith(": file too large")
    assert ends[1] == "SystemExit: 2"
    assert [path.name for path in (tmp_path / "run").glob("*checkpoint-*")] == [BEFORE]


def die_in_saving(rank: int, run: dict[str, Any], folder: Path) -> None:
    """Each process is killed when it has written its parts."""
    real = sharded_checkpoint._Writer.write_data

    def write(self: Any, *arguments: Any) -> None:
        real(self, *arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    sharded_checkpoint._Writer.write_data = write  # pyright: ignore
    train(make_run(run), folder, resume=True, device_name="cpu")


def test_killed_while_saving_leaves_the_previous_one(trained, keys, tmp_path):
    copied(trained, tmp_path, BEFORE)
    run = {**keys, "n_gpus": 2, "strategy": "fsdp"}
    with pytest.raises(AssertionError, match=r"exit codes \[-9, -9\]"):
        as_processes(2, die_in_saving, run, tmp_path, timeout=30)
    assert len(list((tmp_path / f".{LAST}.partial").glob("*.distcp"))) == 2
    found = checkpoint.latest_valid(tmp_path)
    assert found is not None and found.path.name == BEFORE
    train(make_run(keys), tmp_path, resume=True)
    assert losses(tmp_path) == pytest.approx(losses(trained / "two"), abs=1e-3)
    assert not list(tmp_path.glob(".*partial"))


def test_folders_of_other_programs_are_no_checkpoints(tmp_path):
    for name in ("checkpoint-500", "checkpoint-best", "checkpoint-00000007.tmp"):
        (tmp_path / name).mkdir()
    assert checkpoint.latest_valid(tmp_path) is None
