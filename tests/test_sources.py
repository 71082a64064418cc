"""From files of every form to token files: the same ids however many processes and shards, a stable split."""

import gzip
import io
import json
import random
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptfit.config import make_run
from gptfit.data import load_batch, open_dataset
from gptfit.errors import GptfitError
from gptfit.prepare import is_for_validation, prepare
from gptfit.progress import Counter
from gptfit.shards import Shards, windows
from gptfit.sources import documents, list_files
from gptfit.tokenizer import get_tokenizer

CPU = torch.device("cpu")


def texts(n: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    words = ["loss", "gradient", "naïve", "日本", "😀", "step\n", "  "]
    return [f"{i} " + " ".join(rng.choices(words, k=rng.randrange(1, 30))) for i in range(n)]


def write_lines(path: Path, rows: list[Any]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def read(folder: Path, part: str) -> list[int]:
    data = open_dataset(make_run({"vocab_size": 5000, "block_size": 1, "dataset": str(folder)}))
    return list(getattr(data, part)[:])


def documents_in(folder: Path, part: str) -> list[str]:
    """The texts between the ends of text, decoded."""
    raw = b"".join(bytes([i]) if i < 256 else b"\xff" for i in read(folder, part))
    return [piece.decode() for piece in raw.split(b"\xff")]


def test_every_document_is_in_one_part_by_its_hash_and_stays_there(tmp_path: Path) -> None:
    rows = texts(400)
    some = write_lines(tmp_path / "some.jsonl", [{"text": text} for text in rows[:300]])
    rest = write_lines(tmp_path / "rest.jsonl.gz", [{"text": text} for text in rows[300:]])
    prepare([some], "byte", tmp_path / "a", 0.2)
    made = prepare([rest, some], "byte", tmp_path / "b", 0.2)
    assert (made.split, made.n_documents, made.n_files) == ("documents", 400, 2)
    train, val = (documents_in(tmp_path / "b", part) for part in ("train", "val"))
    order = rows[300:] + rows[:300]
    assert val == [text for text in order if is_for_validation(text.encode(), 0.2)]
    assert train == [text for text in order if not is_for_validation(text.encode(), 0.2)]
    assert 50 < len(val) < 110  # 80 expected, 8 a standard deviation
    assert documents_in(tmp_path / "a", "val") == [text for text in rows[:300] if text in set(val)]


def test_a_folder_of_all_forms_and_its_keys(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("plain")
    write_lines(folder / "b.jsonl", [{"body": "first", "id": 1}, {"body": ""}, {"body": "second"}])
    (folder / "deep" / "c.txt.gz").write_bytes(gzip.compress(b"packed"))
    (folder / "deep" / "d.bin").write_bytes(b"\0\1")
    made = prepare([folder], "byte", tmp_path / "out", 0.2, field="body", split="tail")
    ids = [*read(tmp_path / "out", "train"), *read(tmp_path / "out", "val")]
    assert ids == [*b"plain", 256, *b"first", 256, *b"second", 256, *b"packed"]
    assert (made.n_documents, made.skipped) == (4, (folder / "deep" / "d.bin",))


def test_stdin_of_json_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = io.BytesIO(b'{"t": "from a pipe"}\n{"t": "two"}\n')
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=lines))
    prepare(["-"], "byte", tmp_path, 0.3, field="t", split="tail")
    assert [*read(tmp_path, "train"), *read(tmp_path, "val")] == [*b"from a pipe", 256, *b"two"]


@pytest.mark.parametrize(
    "line, said",
    [
        ("{", "in.jsonl:2: not JSON"),
        ("[1]", "in.jsonl:2: expected an object"),
        ('{"texts": "x"}', 'in.jsonl:2 has no key "text"; did you mean texts?'),
        ('{"text": 3}', 'in.jsonl:2: "text" is no text'),
        ("[" * 100_000, "in.jsonl:2: not JSON"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_written(line: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(GptfitError) as caught:
        prepare([tmp_path / "in.jsonl"], "byte", tmp_path / "out")
    assert said in caught.value.message and list((tmp_path / "out").iterdir()) == []


def test_a_damaged_gzip_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(random.Random(0).randbytes(5000))[:-2000])
    with pytest.raises(GptfitError, match=r'cannot read ".*a\.txt\.gz"'):
        prepare([tmp_path / "a.txt.gz"], "byte", tmp_path / "out")


def test_shards_and_processes_change_no_id(tmp_path: Path) -> None:
    """Some megabytes, so that several batches are under way at once."""
    source = write_lines(tmp_path / "in.jsonl", [{"text": text} for text in texts(60_000)])
    one = prepare([source], "byte", tmp_path / "one", 0.3)
    many = prepare([source], "byte", tmp_path / "many", 0.3, shard_bytes=999_999, workers=2)
    assert many.n_shards > 6 and one.n_shards == 2 and (one.n_train, one.n_val) == (many.n_train, many.n_val)
    sizes = [path.stat().st_size for path in (tmp_path / "many").glob("*.bin")]
    assert max(sizes) == 999_998
    run = make_run({"vocab_size": 257, "block_size": 64, "dataset": str(tmp_path / "one")})
    whole, parts = (open_dataset(make_run({**run.model_dump(), "dataset": str(tmp_path / n)})) for n in ("one", "many"))
    assert isinstance(parts.train, Shards) and whole.fingerprint == parts.fingerprint
    assert np.array_equal(parts.train[:], whole.train) and np.array_equal(parts.val[:], whole.val)
    edge = 499_999
    starts = np.array([0, edge - 65, edge - 64, edge - 30, edge, len(whole.train) - 65])
    for got, expected in zip(*(load_batch(d.train, starts, run, CPU) for d in (parts, whole)), strict=True):
        assert torch.equal(got, expected)
    # Fewer shards than before: the old ones are gone, and would not be read.
    prepare([source], "byte", tmp_path / "many", 0.3, shard_bytes=3_000_000)
    assert np.array_equal(open_dataset(run).train, np.concatenate([read_part(tmp_path / "many")]))


def read_part(folder: Path) -> np.ndarray:
    meta = json.loads((folder / "meta.json").read_text())
    names = ["train.bin", *(f"train-{i:05d}.bin" for i in range(1, meta["train_shards"]))]
    assert sorted(path.name for path in folder.glob("train*")) == sorted(names)
    return np.concatenate([np.fromfile(folder / name, dtype=np.uint16) for name in names])


def test_the_tail_is_cut_across_shards(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(bytes(range(32, 127)) * 3)
    made = prepare([tmp_path / "t.txt"], "byte", tmp_path / "out", 0.5, shard_bytes=40)
    assert (made.n_train, made.n_val, made.split) == (143, 142, "tail")
    assert bytes(read(tmp_path / "out", "train") + read(tmp_path / "out", "val")) == bytes(range(32, 127)) * 3


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.data())
@settings(max_examples=60, deadline=None)
def test_shards_read_as_one_array(sizes: list[int], data: st.DataObject) -> None:
    whole = np.arange(sum(sizes), dtype=np.uint16)
    shards = Shards(np.split(whole, np.cumsum(sizes)[:-1]))
    start, stop = (data.draw(st.none() | st.integers(-60, 60)) for _ in range(2))
    assert np.array_equal(shards[start:stop], whole[start:stop]) and len(shards) == len(whole)
    length = data.draw(st.integers(1, len(whole)))
    starts = np.array(data.draw(st.lists(st.integers(0, len(whole) - length), min_size=1, max_size=5)))
    assert np.array_equal(windows(shards, starts, length), windows(whole, starts, length))


def test_files_of_two_goes_are_not_read_together(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(b"some text that is long enough" * 4)
    prepare([tmp_path / "t.txt"], "byte", tmp_path / "out", 0.2)
    with (tmp_path / "out" / "train.bin").open("ab") as file:
        file.write(b"\1\0")
    with pytest.raises(GptfitError, match=r"train\.bin.* hold 94 tokens, but meta\.json says 93"):
        read(tmp_path / "out", "train")


def test_parquet_is_read_a_row_group_at_a_time(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [*texts(3000), None]
    parquet.write_table(pa.table({"text": rows, "n": list(range(3001))}), tmp_path / "a.parquet", row_group_size=700)
    assert [piece.text.decode() for piece in documents(list_files([tmp_path], tmp_path / "o").files)] == rows[:-1]
    with pytest.raises(GptfitError, match='has no column "body"'):
        list(documents([tmp_path / "a.parquet"], "body"))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(GptfitError, match="cannot read"):
        list(documents([tmp_path / "b.parquet"]))


def test_parquet_without_its_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gptfit: Any) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    done = gptfit("data", "prepare", str(tmp_path / "a.parquet"), "--out", str(tmp_path / "out"))
    assert done.code == 2 and "needs the package pyarrow" in done.err and "pip install pyarrow" in done.err


def test_a_tokenizer_is_learned(tmp_path: Path, gptfit: Any) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    source = write_lines(tmp_path / "in.jsonl", [{"text": text} for text in texts(500)])
    out = tmp_path / "out"
    assert gptfit("data", "prepare", str(source), "--out", str(out), "--train-bpe", "300").code == 0
    meta = json.loads((out / "meta.json").read_text())
    coder = get_tokenizer(meta["tokenizer"])
    assert meta["vocab_size"] == coder.n_vocab == 300
    text = "\n".join(texts(40, seed=7)) + "  Ünseen\ttext"
    ids = coder.encode(text.encode()).tolist()
    assert coder.decode(ids) == text and len(ids) < 0.6 * len(text.encode())
    # The package's own reading of the same merges.
    merges = [tuple(line.split(" ")) for line in (out / "vocab.bpe").read_text().splitlines()[1:]]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocab = {token: i for i, token in enumerate([*sorted(alphabet), *("".join(pair) for pair in merges)])}
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = tokenizers.decoders.ByteLevel()
    assert [theirs.decode([i]) for i in theirs.encode(text).ids if i > 255] == [
        coder.decode([i]) for i in ids if i > 255
    ]


def test_a_line_whose_text_is_null_is_one_without_text(tmp_path: Path, gptfit: Any) -> None:
    lines = ['{"text": "one of two"}', '{"text": null}', '{"text": "two of two"}', '{"text": ""}']
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    done = gptfit("data", "prepare", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out"), "--json")
    made = json.loads(done.out)
    assert (made["schema"], made["n_documents"], made["n_blank"]) == ("gptfit.prepared/1", 2, 2)
    assert made["n_train"] + made["n_val"] >= 20 and made["folder"] == str(tmp_path / "out")


@pytest.mark.parametrize("words, said", [(("100",), "257 ids are the bytes"), (("300", "-"), "reads its text twice")])
def test_a_tokenizer_that_cannot_be_learned(words: tuple[str, ...], said: str, tmp_path: Path, gptfit: Any) -> None:
    (tmp_path / "a.txt").write_text("text")
    done = gptfit(
        "data", "prepare", str(tmp_path / "a.txt"), *words[1:], "--out", str(tmp_path / "o"), "--train-bpe", words[0]
    )
    assert done.code == 2 and said in done.err


def test_a_counter_speaks_seldom_and_cleans_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    terminal, pipe = Terminal(), io.StringIO()
    with Counter(terminal) as shown, Counter(pipe) as logged:
        for second in range(0, 62):
            now[0] = float(second)
            shown(second * 1000)
            logged(second * 1000)
    assert pipe.getvalue() == "30,000 tokens, 1,000 a second\n60,000 tokens, 1,000 a second\n"
    assert terminal.getvalue().count("\r") == 62 and terminal.getvalue().endswith("\r\x1b[K")
