"""Token files: written and read back, read as nanoGPT reads them, and the order of batches."""

import io
import json
import os
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptfit.config import RunConfig, make_run
from gptfit.data import VAL, load_batch, open_dataset, sequence_starts
from gptfit.errors import GptfitError
from gptfit.prepare import blocks, prepare

CPU = torch.device("cpu")


def run_for(folder: Path | str, **changes) -> RunConfig:
    return make_run({"vocab_size": 257, "block_size": 8, "dataset": str(folder), **changes})


def write_bins(folder: Path, train: list[int], val: list[int]) -> None:
    """As nanoGPT's prepare.py writes them."""
    folder.mkdir(exist_ok=True)
    np.array(train, dtype=np.uint16).tofile(folder / "train.bin")
    np.array(val, dtype=np.uint16).tofile(folder / "val.bin")


# A zero byte is no text's, and a mark before it is dropped.
TEXT = st.text(st.characters(exclude_characters="\0\ufeff", exclude_categories=["Cs"]), min_size=1)


@given(st.lists(TEXT, min_size=1, max_size=4), st.floats(0.01, 0.9))
@settings(max_examples=25, deadline=None)
def test_prepared_text_comes_back_and_is_nanogpts_format(tmp_path_factory, texts, val_fraction):
    folder = tmp_path_factory.mktemp("data")
    files = [folder / f"{i}.txt" for i in range(len(texts))]
    for path, text in zip(files, texts, strict=True):
        path.write_bytes(text.encode())
    expected = list(b"\xff".join(text.encode() for text in texts))  # \xff is no byte of UTF-8: it marks the places
    expected = [256 if i == 255 else i for i in expected]
    if len(expected) < 2:
        with pytest.raises(GptfitError, match="no text"):
            prepare(files, "byte", folder / "out", val_fraction)
        return
    made = prepare(files, "byte", folder / "out", val_fraction)
    # nanoGPT: np.memmap(path, dtype=np.uint16, mode='r')
    train, val = (np.fromfile(folder / "out" / f"{part}.bin", dtype=np.uint16) for part in ("train", "val"))
    assert [*train.tolist(), *val.tolist()] == expected
    assert (len(train), len(val)) == (made.n_train, made.n_val) and len(val) == max(
        1, int(len(expected) * val_fraction)
    )


def test_a_folder_is_read_sorted_without_hidden_binary_or_own_files(tmp_path):
    for name, text in {"b/two.txt": b"two", "a.txt": b"one", ".git/x": b"no", "c.png": b"\x89P\0NG"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text)
    for _ in range(2):  # the second time, the first one's output lies in the folder
        made = prepare([tmp_path], "byte", tmp_path / "out", 0.2)
        ids = [i for part in ("train", "val") for i in np.fromfile(tmp_path / "out" / f"{part}.bin", dtype=np.uint16)]
        assert ids == [*b"one", 256, *b"two"]
        assert made.n_files == 2 and made.skipped == (tmp_path / "c.png",)


def test_stdin_is_a_source(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(b"from a pipe")))
    assert prepare(["-"], "byte", tmp_path, 0.1).n_train == 10


@given(st.text(alphabet=st.sampled_from("ab é\n😀"), max_size=200), st.integers(4, 40))
def test_blocks_cut_between_characters_and_lose_nothing(text, size):
    pieces = list(blocks(io.BytesIO(text.encode()), size))
    assert "".join(piece.decode() for piece in pieces) == text


def test_blocks_keep_memory_bounded_without_a_line_or_a_space():
    pieces = list(blocks(io.BytesIO("é".encode() * 5000), 100))
    assert max(map(len, pieces)) <= 104 and b"".join(pieces).decode() == "é" * 5000


def test_large_vocabularies_take_uint32(tmp_path, monkeypatch):
    from gptfit import prepare as module
    from gptfit.tokenizer import ByteTokenizer

    coder = ByteTokenizer()
    coder.n_vocab = 100_000
    coder.encode = lambda data: np.frombuffer(data, dtype=np.uint8).astype(np.uint32) + 70_000
    monkeypatch.setattr(module, "get_tokenizer", lambda name: coder)
    (tmp_path / "t").write_bytes(b"abcdefghijkl" * 4)
    prepare([tmp_path / "t"], "byte", tmp_path / "out", 0.4)
    data = open_dataset(run_for(tmp_path / "out", vocab_size=100_000))
    assert data.train[:3].tolist() == [70_097, 70_098, 70_099] and data.vocab_size == 100_000


def test_a_full_disk_replaces_nothing_and_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "t").write_bytes(b"some text")
    prepare([tmp_path / "t"], "byte", tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    (tmp_path / "t").write_bytes(b"another text")

    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(GptfitError, match="no space left"):
        prepare([tmp_path / "t"], "byte", tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@given(
    n=st.integers(1, 64), shorter=st.integers(1, 64), seed=st.integers(-(2**40), 2**40), step=st.integers(0, 10**9),
    n_tokens=st.integers(10, 10**10),
)  # fmt: skip
def test_the_order_of_sequences_is_a_function_of_seed_and_step(n, shorter, seed, step, n_tokens):
    starts = sequence_starts(n_tokens, 8, n, seed, step)
    assert starts.min() >= 0 and starts.max() + 8 + 1 <= n_tokens
    assert sequence_starts(n_tokens, 8, min(n, shorter), seed, step).tolist() == starts[:shorter].tolist()
    if n_tokens > 10**6 and n > 4:
        for other in ((seed + 1, step), (seed, step + 1)):
            assert sequence_starts(n_tokens, 8, n, *other).tolist() != starts.tolist()
        assert sequence_starts(n_tokens, 8, n, seed, step, VAL).tolist() != starts.tolist()


def test_starts_are_even():
    starts = np.concatenate([sequence_starts(108, 8, 100, 7, step) for step in range(200)])
    counts = np.bincount(starts, minlength=100)
    assert len(counts) == 100 and abs(counts - 200).max() < 75  # 5.3 standard deviations of a binomial


def test_targets_are_the_inputs_one_token_on(tmp_path):
    write_bins(tmp_path / "d", list(range(50)), list(range(20)))
    data = open_dataset(run_for(tmp_path / "d", vocab_size=50257))
    x, y = load_batch(data.train, np.array([0, 41]), run_for("x"), CPU)
    assert x.tolist() == [list(range(8)), list(range(41, 49))] and torch.equal(y, x + 1)
    assert x.dtype == torch.int64 and x.is_contiguous() and y.is_contiguous()


def test_nanogpts_folder_without_meta_is_gpt2(tmp_path, monkeypatch):
    write_bins(tmp_path / "data", [], [])
    write_bins(tmp_path / "data" / "owt", list(range(50)), list(range(50)))
    monkeypatch.chdir(tmp_path)
    data = open_dataset(run_for("owt", vocab_size=50304))
    assert (data.tokenizer, data.vocab_size, len(data.train)) == ("gpt2", 50257, 50)
    with pytest.raises(GptfitError, match="50257 ids"):
        open_dataset(run_for("owt", vocab_size=257))


def test_nanogpts_meta_gives_its_alphabet(tmp_path):
    write_bins(tmp_path, [0, 1, 2] * 10, [0, 1, 2] * 10)
    meta = {"vocab_size": 3, "itos": {0: "\n", 1: "a", 2: "b"}, "stoi": {"\n": 0, "a": 1, "b": 2}}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    data = open_dataset(run_for(tmp_path, vocab_size=3))
    assert (data.tokenizer, data.vocab_size) == ("char:\nab", 3)


class Evil:
    def __reduce__(self):
        return (os.system, ("touch gptfit-was-here",))


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Evil()),
        pickle.dumps({"vocab_size": np.int64(3)}),
        b"",
        b"junk",
        pickle.dumps([1]),
        pickle.dumps({}),
    ],
    ids=["code", "numpy", "empty", "junk", "list", "no vocab_size"],
)
def test_a_meta_that_is_not_plain_is_refused_and_not_run(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    write_bins(tmp_path, [0] * 30, [0] * 30)
    (tmp_path / "meta.pkl").write_bytes(content)
    with pytest.raises(GptfitError, match=r"not a plain meta\.pkl"):
        open_dataset(run_for(tmp_path))
    assert not (tmp_path / "gptfit-was-here").exists()


@pytest.mark.parametrize("meta", ["", "{}", "[]", '{"dtype": "object", "vocab_size": 3, "tokenizer": "byte"}'])
def test_a_damaged_meta_json_is_one_line(tmp_path, meta):
    write_bins(tmp_path, [0] * 30, [0] * 30)
    (tmp_path / "meta.json").write_text(meta)
    with pytest.raises(GptfitError, match=r"cannot read .*meta\.json"):
        open_dataset(run_for(tmp_path))


def test_what_cannot_be_trained_on_is_said(tmp_path):
    with pytest.raises(GptfitError, match="there is no data set"):
        open_dataset(run_for(tmp_path / "nowhere"))
    with pytest.raises(GptfitError, match=r"holds no train\.bin"):
        open_dataset(run_for(tmp_path))
    with pytest.raises(GptfitError, match="there is no file or folder"):
        prepare([tmp_path / "nowhere"], "byte", tmp_path / "out")
    write_bins(tmp_path, [0] * 8, [0] * 30)
    with pytest.raises(GptfitError, match=r"holds 8 tokens, .* block_size \+ 1 = 9"):
        open_dataset(run_for(tmp_path, vocab_size=50257))
    write_bins(tmp_path, [0] * 20 + [257], [0] * 30)
    (tmp_path / "meta.json").write_text(json.dumps({"dtype": "uint16", "vocab_size": 257, "tokenizer": "byte"}))
    data = open_dataset(run_for(tmp_path))
    with pytest.raises(GptfitError, match="the id 257"):
        load_batch(data.train, np.array([12]), run_for(tmp_path), CPU)
    with pytest.raises(GptfitError, match="made by the tokenizer byte, not gpt2"):
        open_dataset(run_for(tmp_path, tokenizer="gpt2"))


def test_other_data_have_another_fingerprint(tmp_path):
    prints = set()
    for i, (train, val) in enumerate([([1] * 40, [2] * 20), ([1] * 39 + [3], [2] * 20), ([1] * 40, [2] * 21)]):
        write_bins(tmp_path / str(i), train, val)
        prints.add(open_dataset(run_for(tmp_path / str(i), vocab_size=50257)).fingerprint)
    assert len(prints) == 3


def test_the_default_data_are_python(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    run = make_run({"vocab_size": 257, "block_size": 128})
    data = open_dataset(run)
    assert data.tokenizer == "byte" and len(data.train) > 10 * len(data.val) > 10**6
    text = bytes(data.val[data.val < 256].astype(np.uint8)).decode(errors="replace")
    assert text.count("import ") > 50 and text.count("def ") > 300
    stamp = next(tmp_path.rglob("train.bin")).stat().st_mtime_ns
    assert open_dataset(run).fingerprint == data.fingerprint
    assert next(tmp_path.rglob("train.bin")).stat().st_mtime_ns == stamp  # prepared once


def test_the_cache_moves_where_it_can_be_written(tmp_path, monkeypatch):
    from gptfit.stdlib import cache_folder

    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cache_folder().parent == tmp_path
