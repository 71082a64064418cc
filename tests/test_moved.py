"""Data and runs that are moved to another place, or made anew, take the tokenizer of their own with them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from gptfit import metrics
from gptfit.errors import GptfitError
from gptfit.prepare import prepare
from gptfit.sample import sample
from gptfit.tokenizer import get_tokenizer
from gptfit.train import train
from test_train import tiny

TEXT = "the quick brown fox jumps over the lazy dog, and the dog sleeps. " * 200


def prepared(folder: Path, merges: list[str]) -> Path:
    """Tokens of a vocab.bpe of few merges that lies beside them."""
    folder.mkdir(parents=True)
    (folder / "vocab.bpe").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (folder / "in.txt").write_text(TEXT)
    prepare([folder / "in.txt"], str(folder / "vocab.bpe"), folder)
    return folder


MERGES = ["t h", "th e", "o g", "d og"]


def test_data_and_run_are_moved_and_still_sampled(tmp_path: Path) -> None:
    data = prepared(tmp_path / "here" / "data", MERGES)
    shutil.move(tmp_path / "here", tmp_path / "there")
    run = tiny(tmp_path / "there" / "data", vocab_size=320, eval_interval=5)
    train(run, tmp_path / "there" / "out")
    assert not data.exists()
    # Bits per byte need the tokenizer, which said where it was made.
    assert all("val_bpb" in entry for entry in metrics.read(tmp_path / "there" / "out") if "val_loss" in entry)
    text = sample(tmp_path / "there" / "out", "the dog", 20, seed=3)
    shutil.move(tmp_path / "there" / "out", tmp_path / "out")
    shutil.rmtree(tmp_path / "there")
    assert sample(tmp_path / "out", "the dog", 20, seed=3) == text


def test_a_run_keeps_the_tokenizer_that_its_ids_are_of(tmp_path: Path) -> None:
    data = prepared(tmp_path / "data", MERGES)
    train(tiny(data, vocab_size=320, eval_interval=0), tmp_path / "out")
    text = sample(tmp_path / "out", "the dog", 20, seed=3)
    (data / "vocab.bpe").write_text("#version: 0.2\na b\nc d\ne f\ng h\n")
    assert sample(tmp_path / "out", "the dog", 20, seed=3) == text


def test_a_tokenizer_that_is_gone_is_no_unknown_one() -> None:
    with pytest.raises(GptfitError, match='there is no rank file "/nowhere/'):
        get_tokenizer("/nowhere/vocab.bpe")
    with pytest.raises(GptfitError, match='unknown tokenizer "gtp2"; did you mean gpt2'):
        get_tokenizer("gtp2")


def test_data_that_are_there_already_are_said_to_be_replaced(tmp_path: Path, gptfit: Any) -> None:
    (tmp_path / "in.txt").write_text(TEXT)
    words = ("data", "prepare", str(tmp_path / "in.txt"), "--out", str(tmp_path / "data"))
    assert gptfit(*words).err == ""
    (tmp_path / "in.txt").write_text(TEXT * 2)
    assert f"{tmp_path / 'data'} holds data already; they are replaced" in gptfit(*words).err
    assert json.loads((tmp_path / "data" / "meta.json").read_text())["n_train"] > len(TEXT)
