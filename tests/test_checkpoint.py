"""Checkpoints that meet full disks, crashes and changed bytes."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from gptfit import checkpoint as module
from gptfit.checkpoint import Checkpoint, checkpoint_paths, latest_valid, load, restore_rng, rng_state, save
from gptfit.config import derive, make_run
from gptfit.distributed import Ranks
from gptfit.errors import GptfitError

RUN = make_run({"n_layer": 1, "n_head": 1, "n_embd": 4, "vocab_size": 5, "seed": -3, "learning_rate": 3e-4})


def make(step: int, **changes: Any) -> Checkpoint:
    torch.manual_seed(step)
    values: dict[str, Any] = {
        "step": step, "run": RUN, "model": {"w": torch.randn(50, 20)}, "scaler": {}, "rng": rng_state(),
        "optimizer": {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(50, 20)}}, "param_groups": []},
        "tokenizer": "char:\nab", "data_fingerprint": "f00",
    }  # fmt: skip
    return Checkpoint(**{**values, **changes})


@pytest.mark.parametrize("keep", [1, 3])
def test_as_many_are_kept_as_the_run_says(tmp_path, keep):
    run = derive(RUN, keep_checkpoints=keep)
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, make(step, run=run))
    assert steps(tmp_path) == [5, 4, 3][:keep]


def steps(folder: Path) -> list[int]:
    return [int(path.stem.split("-")[1]) for path in checkpoint_paths(folder)]


def test_everything_comes_back(tmp_path):
    made = make(7)
    got = load(save(tmp_path, made))
    assert got.run == RUN and (got.step, got.tokenizer, got.data_fingerprint) == (7, "char:\nab", "f00")
    assert torch.equal(got.model["w"], made.model["w"])
    assert torch.equal(got.optimizer["state"][0]["exp_avg"], made.optimizer["state"][0]["exp_avg"])
    torch.manual_seed(7)
    torch.randn(50, 20)
    expected = torch.randn(3)
    restore_rng(got.rng)
    assert torch.equal(torch.randn(3), expected)


def test_the_newest_two_are_kept_in_the_order_of_steps(tmp_path):
    for step in (9, 10, 100, 1000):
        save(tmp_path, make(step))
    assert steps(tmp_path) == [1000, 100]
    save(tmp_path, make(1000))
    assert steps(tmp_path) == [1000, 100]
    found = latest_valid(tmp_path)
    assert found is not None and found.checkpoint.step == 1000 and found.skipped == ()


class FullDisk:
    """A file on a disk with room for `room` more bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: Any) -> int:
        if len(memoryview(data).cast("B")) > self.room:
            self.file.write(memoryview(data).cast("B")[: self.room])
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= len(memoryview(data).cast("B"))
        return self.file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.mark.parametrize("room", [0, 100, 3000, 9000])
def test_a_full_disk_leaves_the_previous_one_and_one_line(tmp_path, monkeypatch, room):
    save(tmp_path, make(1))
    before = checkpoint_paths(tmp_path)[0].read_bytes()
    real = torch.save
    monkeypatch.setattr(module.torch, "save", lambda content, file: real(content, FullDisk(file, room)))
    with pytest.raises(GptfitError, match="no space left") as caught:
        save(tmp_path, make(2))
    assert "\n" not in caught.value.message
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00000001.pt"]
    assert checkpoint_paths(tmp_path)[0].read_bytes() == before


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_full_disk_at_the_end_is_no_different(tmp_path, monkeypatch, call):
    save(tmp_path, make(1))

    def full(*_arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((os, "fsync", full) if call == "fsync" else (Path, "replace", full)))
    with pytest.raises(GptfitError, match="no space left"):
        save(tmp_path, make(2))
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00000001.pt"]


def test_an_interrupt_while_writing_is_still_an_interrupt(tmp_path, monkeypatch):
    save(tmp_path, make(1))

    def interrupt(_content: Any, file: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(module.torch, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, make(2))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00000001.pt"]


def test_what_a_killed_process_left_is_no_checkpoint_and_goes(tmp_path):
    (tmp_path / ".checkpoint-00000002.pt.123.partial").write_bytes(b"half")
    assert latest_valid(tmp_path) is None
    save(tmp_path, make(1))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00000001.pt"]


@pytest.mark.parametrize("damage", ["cut", "empty", "byte", "junk"])
def test_a_damaged_newest_is_passed_over_with_a_word(tmp_path, damage):
    save(tmp_path, make(1))
    path = save(tmp_path, make(2))
    content = bytearray(path.read_bytes())
    weight = content.find(make(2).model["w"].numpy().tobytes()[:64])
    assert weight > 0
    content[weight + 10] ^= 1  # one bit of one weight
    path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "byte": content, "junk": b"PK" * 99}[damage])
    found = latest_valid(tmp_path)
    assert found is not None and found.checkpoint.step == 1
    assert len(found.skipped) == 1 and "checkpoint-00000002.pt" in found.skipped[0]
    path.with_name("checkpoint-00000001.pt").write_bytes(b"")
    with pytest.raises(GptfitError, match="none of the 2 checkpoints"):
        latest_valid(tmp_path)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/was-here",))

    torch.save({"format": 1, "model": Evil()}, tmp_path / "checkpoint-1.pt")
    with pytest.raises(GptfitError, match="cannot read the checkpoint"):
        load(tmp_path / "checkpoint-1.pt")
    assert not (tmp_path / "was-here").exists()


def test_another_format_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FORMAT", 2)
    path = save(tmp_path, make(1))
    monkeypatch.undo()
    with pytest.raises(GptfitError, match="format 2, this version reads 1"):
        load(path)


def test_processes_that_see_other_folders_or_damage_agree(tmp_path, monkeypatch):
    """The words of the other process are made up here."""
    save(tmp_path, make(1))
    save(tmp_path, make(2))
    names = "checkpoint-00000002.pt checkpoint-00000001.pt"
    for others, expected in (([names, "it is torn", ""], 1), ([names, "", ""], 2), (["checkpoint-00000001.pt"], None)):
        answers = iter(others)
        monkeypatch.setattr(Ranks, "words", lambda self, text, answers=answers: [text, next(answers)])
        if expected is None:
            with pytest.raises(GptfitError, match="not all processes find the same checkpoint"):
                latest_valid(tmp_path, Ranks(0, 2))
            continue
        found = latest_valid(tmp_path, Ranks(0, 2))
        assert found is not None and found.checkpoint.step == expected
        assert found.skipped == (("it is torn; passed over",) if expected == 1 else ())
