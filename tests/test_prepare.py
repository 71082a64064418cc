"""Preparations that are cut short: whatever ends them, the same command goes on, to the same bytes as in one go."""

import gzip
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gptfit import batches, sources, unfinished
from gptfit import prepare as module
from gptfit.config import make_run
from gptfit.data import open_dataset
from gptfit.errors import GptfitError
from gptfit.prepare import prepare
from gptfit.shards import ShardWriter
from gptfit.sources import Place, blocks, pieces

WORDS = ["loss", "gradient", "naïve", "日本", "😀", "the", "step\n", "\n", "  "]


class Killed(BaseException):
    """Nobody catches it, as nobody could."""


def text(rng: random.Random, n: int) -> str:
    return " ".join(rng.choices(WORDS, k=n))


def corpus(folder: Path, seed: int = 0) -> list[Path]:
    """A file of every form that needs no package, with empty ones, blank lines, and long ones without a break."""
    rng = random.Random(seed)
    folder.mkdir()
    lines = "".join(
        "\n" if i % 7 == 3 else json.dumps({"text": "" if i % 11 == 5 else text(rng, rng.randrange(30))}) + "\n"
        for i in range(60)
    )
    contents = {
        "a.txt": text(rng, 400).encode(),
        "b.jsonl": lines.encode(),
        "c.txt": b"",
        "d.txt.gz": gzip.compress(b"\xef\xbb\xbf" + text(rng, 400).encode()),
        "e.jsonl.gz": gzip.compress(lines.encode() + b"\n\n"),
        "f.txt": ("日本" * 200).encode(),
        "g.txt": text(rng, 300).encode(),
    }
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    return sorted(folder.iterdir())


def ranks(path: Path) -> str:
    """A few pairs of bytes, so that where a text is cut makes a difference."""
    merges = ["Ġ t", "h e", "l o", "s s", "lo ss", "Ġt he", "g r", "Ċ Ċ"]
    path.write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    return str(path)


def made(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of some bytes, and a record of every batch."""
    monkeypatch.setattr(sources, "BLOCK_BYTES", 64)
    monkeypatch.setattr(batches, "BLOCK_BYTES", 300)
    monkeypatch.setattr(module, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(os, "fsync", lambda _handle: None)  # the disk need not be waited for: the system stays up


@contextmanager
def killed_at(patch: pytest.MonkeyPatch, n: int) -> Iterator[list[int]]:
    """Ends what it holds at the n-th of all that touches the disk: ids written, a record, a file moved or removed."""
    calls = [0]

    def wrapped(real: Callable[..., Any], after: bool) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            calls[0] += 1
            here = calls[0] == n
            if here and not after:
                raise Killed
            answer = real(*arguments, **options)
            if here:
                raise Killed
            return answer

        return call

    with patch.context() as within:
        within.setattr(ShardWriter, "write", wrapped(ShardWriter.write, after=n % 2 == 0))
        within.setattr(ShardWriter, "shorten", wrapped(ShardWriter.shorten, after=False))
        within.setattr(module, "save", wrapped(unfinished.save, after=n % 2 == 0))
        for name in ("replace", "unlink"):
            within.setattr(Path, name, wrapped(getattr(Path, name), after=n % 2 == 0))
        yield calls


@pytest.mark.parametrize("split", ["documents", "tail"])
@pytest.mark.parametrize("shard_bytes", [0, 500])
def test_killed_anywhere_it_ends_with_the_same_bytes(
    split: str, shard_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None
) -> None:
    files, coder = corpus(tmp_path / "in"), ranks(tmp_path / "vocab.bpe")
    how: dict[str, Any] = {"split": split, "shard_bytes": shard_bytes, "workers": 1}
    with killed_at(monkeypatch, 0) as calls:
        whole = prepare(files, coder, tmp_path / "whole", 0.3, **how)
    expected, total = made(tmp_path / "whole"), calls[0]
    assert total > 100 and whole.n_blank > 15 and whole.n_empty == 1
    rng = random.Random(f"{split} {shard_bytes}")
    for index, first in enumerate(sorted(rng.sample(range(1, total + 1), 5)) + list(range(total - 4, total + 1))):
        out = tmp_path / f"out{index}"
        at, n_kills = first, 0
        while True:
            try:
                with killed_at(monkeypatch, at):
                    done = prepare(files, coder, out, 0.3, **how)
                break
            except Killed:
                n_kills += 1
                at = rng.randrange(3, total)
                if (out / ".preparing").is_dir():
                    with pytest.raises(GptfitError, match="half prepared"):
                        open_dataset(make_run({"dataset": str(out)}))
        assert n_kills and made(out) == expected
        assert (done.n_documents, done.n_blank, done.n_empty) == (whole.n_documents, whole.n_blank, whole.n_empty)


def test_the_rest_of_the_pieces_is_the_same_from_any_place(tmp_path: Path, small: None) -> None:
    files = corpus(tmp_path / "in")
    found = list(pieces(files))
    assert len(found) > 200
    for index, piece in enumerate(found):
        if index % 5 == 0:
            assert list(pieces(files, start=piece.after)) == found[index + 1 :]


def test_rows_of_parquet_are_gone_on_with(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    rows = [None if i % 10 == 4 else f"row {i}" for i in range(500)]
    parquet.write_table(pa.table({"text": rows}), tmp_path / "a.parquet", row_group_size=70)
    found = list(pieces([tmp_path / "a.parquet"]))
    assert [piece.text.decode() for piece in found if piece.text] == [row for row in rows if row]
    for index in range(0, 501, 23):
        assert list(pieces([tmp_path / "a.parquet"], start=found[index].after)) == found[index + 1 :]


SCRIPT = """
import sys
from gptfit import batches, cli, prepare
prepare.SAVE_SECONDS, batches.BLOCK_BYTES = 0.0, 1 << 17
cli.main(sys.argv[1:])
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")
def test_kill_9_at_random_moments(tmp_path: Path) -> None:
    rng = random.Random(5)
    source = tmp_path / "in.jsonl"
    with source.open("w") as file:
        for i in range(12_000):
            file.write(json.dumps({"text": f"{i} {text(rng, 60)}"}) + "\n")
    words = ["data", "prepare", str(source), "--val-fraction", "0.2", "--shard-size", "1MiB", "--out"]

    def start(out: Path) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            [sys.executable, "-c", SCRIPT, *words, str(out), "--workers", "2"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    prepare([source], "byte", tmp_path / "whole", 0.2, shard_bytes=1 << 20)
    record = tmp_path / "out" / ".preparing" / "progress.json"
    gone_on_from, kills, code, said = [0], 0, None, b""
    while code is None or code < 0:  # killed
        process = start(tmp_path / "out")
        before, deadline = record.read_bytes() if record.exists() else b"", time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if record.exists() and record.read_bytes() != before:
                time.sleep(rng.random() * 0.05)
                break
            time.sleep(0.001)
        if process.poll() is None and kills < 3:
            process.kill()
            kills += 1
        _, said = process.communicate(timeout=60)
        if b"going on from" in said:
            gone_on_from.append(int(said.split(b"from ")[1].split()[0].replace(b",", b"")))
        code = process.returncode
    assert code == 0, said
    assert kills >= 2 and len(gone_on_from) == kills + 1 and gone_on_from == sorted(set(gone_on_from))
    assert made(tmp_path / "out") == made(tmp_path / "whole")


def cut_short(files: list[Path], out: Path, patch: pytest.MonkeyPatch, n: int = 40, **how: Any) -> int:
    """Leaves a preparation of which something is done; returns how many tokens."""
    with pytest.raises(Killed), killed_at(patch, n):
        prepare(files, "byte", out, **how)
    return unfinished.read(out)[1].n


def test_other_sources_or_options_are_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None, gptfit: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    corpus(tmp_path / "in")
    files, out = sorted(Path("in").iterdir()), Path("out")
    n = cut_short(files, out, monkeypatch, split="tail")
    command = ["data", "prepare", *map(str, files), "--out", str(out), "--split", "tail"]
    a, rest = files[0], files[1:]

    def refused(words: list[str]) -> str:
        done = gptfit(*words)
        assert done.code == 2 and f"cut short at {n:,} tokens" in done.err and "--restart" in done.err
        assert f"gptfit {shlex.join(command)}" in done.err
        return " ".join(done.err.split())

    assert "--val-fraction was 0.05 then, 0.1 now" in refused([*command, "--val-fraction", "0.1"])
    assert "--shard-size was not given then, 1MiB now" in refused([*command, "--shard-size", "1MiB"])
    assert "--split was tail then, documents now" in refused([*command[:-1], "documents"])
    assert f'{files[-1]}" is no longer among' in refused([w for w in command if w != str(files[-1])])
    assert f'{a}" is no longer among' in refused([w for w in command if w != str(a)])
    stat = rest[-1].stat()
    os.utime(rest[-1], ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert f'{rest[-1]}" was changed since' in refused(command)
    rest[-1].write_bytes(b"longer " * 1000)
    assert f'{rest[-1]}" had {stat.st_size:,} bytes then, 7,000 now' in refused(command)
    assert gptfit(*command, "--restart").code == 0
    prepare(files, "byte", tmp_path / "whole", split="tail")
    assert made(out) == made(tmp_path / "whole")


def test_training_says_how_to_finish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None, gptfit: Any) -> None:
    monkeypatch.chdir(tmp_path)
    corpus(tmp_path / "in")
    files, out = sorted(Path("in").iterdir()), Path("out")
    n = cut_short(files, out, monkeypatch)
    done = gptfit("train", "tiny", f"dataset={out}", "max_iters=1", "--out", str(tmp_path / "run"))
    assert done.code == 2 and f"half prepared: {n:,} tokens so far" in done.err
    assert f"gptfit data prepare {' '.join(map(str, files))} --out {out}" in done.err


def test_a_full_disk_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None) -> None:
    files, out, calls = corpus(tmp_path / "in"), tmp_path / "out", [0]

    def full(_handle: int) -> None:
        calls[0] += 1
        if calls[0] > 30:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as within, pytest.raises(GptfitError, match="no space left to write") as caught:
        within.setattr(os, "fsync", full)
        prepare(files, "byte", out)
    n = unfinished.read(out)[1].n
    assert n and f"the same command goes on from {n:,} tokens" in caught.value.hint
    began: list[str] = []
    prepare(files, "byte", out, on_begin=began.append)
    prepare(files, "byte", tmp_path / "whole")
    assert began[0].startswith(f"going on from {n:,} tokens, file ") and made(out) == made(tmp_path / "whole")


def test_two_at_once_do_not_mix(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    (tmp_path / "a.txt").write_text("some text")
    module.make_folder(tmp_path / "out")
    with unfinished.locked(tmp_path / "out"), pytest.raises(GptfitError, match="another process prepares data"):
        prepare([tmp_path / "a.txt"], "byte", tmp_path / "out")
    prepare([tmp_path / "a.txt"], "byte", tmp_path / "out")


def test_a_file_that_lost_its_end_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None
) -> None:
    files, out = corpus(tmp_path / "in"), tmp_path / "out"
    cut_short(files, out, monkeypatch)
    os.truncate(out / ".preparing" / "train.bin", 10)
    with pytest.raises(GptfitError, match="somebody changed it") as caught:
        prepare(files, "byte", out)
    assert "--restart" in caught.value.hint


UTF16 = "text\n".encode("utf-16")


@pytest.mark.parametrize(
    "name, data, said",
    [
        ("a.txt", b"text\0text", "not text: a zero byte at offset 4"),
        ("a.txt", b"x" * 3_000_000 + b"\n\0", "not text: a zero byte at offset 3,000,001"),
        ("a.txt", b"caf\xe9 au lait", "not UTF-8: byte 0xe9 at offset 3"),
        ("a.txt", b"\xef\xbb\xbfcaf\xe9 au lait", "not UTF-8: byte 0xe9 at offset 6"),
        ("a.txt", "日本".encode()[:-1], "not UTF-8: byte 0xe6 at offset 3"),
        ("a.txt", UTF16, "is UTF-16 (by its byte order mark ff fe)"),
        ("a.txt", "text\n".encode("utf-16-le"), "is UTF-16LE (every other byte is zero)"),
        ("a.txt", "text\n".encode("utf-16-be"), "is UTF-16BE (every other byte is zero)"),
        ("a.txt", "text\n".encode("utf-32"), "is UTF-32 (by its byte order mark"),
        ("a.jsonl", '{"text": "x"}\n'.encode("utf-16"), "is UTF-16 (by its byte order mark ff fe)"),
        ("a.txt", gzip.compress(b"text", mtime=0), "is packed with gzip, not text"),
        ("a.txt.zst", b"\x28\xb5\x2f\xfd\x24", "is packed with zstd, not text"),
        ("a.txt.gz", gzip.compress(b"te\0xt", mtime=0), "not text: a zero byte at offset 2"),
        ("a.txt.gz", b"text", "not a gzipped file"),
        ("a.txt.gz", gzip.compress(random.Random(0).randbytes(5000))[:-2000], "cannot read"),
        ("a.txt", b"", "there is no text in"),
        ("a.txt", b"\xef\xbb\xbf", "there is no text in"),
        ("a.jsonl", b"\n\n", "there is no text in"),
        ("a.jsonl", b'{"txt": "x"}\n', 'a.jsonl:1 has no key "text"; did you mean txt?'),
    ],
)
def test_what_is_no_text_is_one_line(name: str, data: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(GptfitError) as caught:
        prepare([tmp_path / name], "byte", tmp_path / "out")
    assert said in caught.value.message and name in caught.value.message and "\n" not in caught.value.message
    assert caught.value.hint and not list((tmp_path / "out").iterdir())


def test_in_a_folder_it_is_passed_over_and_counted(tmp_path: Path, gptfit: Any) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    contents = {"a.md": b"one", "b.md": b"x" * 2_000_000 + b"\xe9", "c.md": UTF16, "d.md": b"", "e.md": b"\0"}
    for name, data in {**contents, "f.md.gz": b"no gzip", "g.md": b"\xef\xbb\xbftwo", "h.jsonl": b"\n"}.items():
        (folder / name).write_bytes(data)
    done = gptfit("data", "prepare", str(folder), "--out", str(tmp_path / "out"), "--split", "tail")
    assert done.code == 0
    passed = "passed over: 4 files that are not UTF-8 text, 1 empty file, 1 line or row without text; the first is "
    assert passed in " ".join(done.out.split())
    raw = b"".join((tmp_path / "out" / f"{part}.bin").read_bytes() for part in ("train", "val"))
    assert raw[::2] == b"one\0two" and raw[6:8] == b"\0\1"  # 256, and no mark


def test_a_pipe_begins_anew_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None) -> None:
    import io
    import types

    def feed() -> None:
        monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(b"some text " * 200)))

    said: list[str] = []
    feed()
    with pytest.raises(Killed), killed_at(monkeypatch, 20):
        prepare(["-"], "byte", tmp_path / "out", on_begin=said.append)
    assert unfinished.read(tmp_path / "out")[1].n == 0 and (tmp_path / "out" / ".preparing").is_dir()
    feed()
    done = prepare(["-"], "byte", tmp_path / "out", on_begin=said.append)
    assert done.n_train + done.n_val == 2000
    assert said == ["stdin comes once: cut short, this begins anew; from a file it would go on"] * 2


def test_blocks_do_not_depend_on_where_reading_began(tmp_path: Path) -> None:
    import io

    data = text(random.Random(3), 2000).encode()
    found = list(blocks(io.BytesIO(data), 50))
    at = 0
    for index, block in enumerate(found):
        assert list(blocks(io.BytesIO(data[at:]), 50)) == found[index:]
        at += len(block)
    assert Place() == Place(0, 0, 0, 0) and at == len(data)
