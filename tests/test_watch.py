"""Schedules, an early end, samples and bits per byte."""

import io
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gptfit import metrics
from gptfit import train as module
from gptfit.config import make_run
from gptfit.data import VAL, load_batch, open_dataset, sequence_starts
from gptfit.errors import GptfitError
from gptfit.estimate import estimate
from gptfit.events import Event, Note, Sampled
from gptfit.model import GPT
from gptfit.optim import learning_rate_at
from gptfit.prepare import prepare
from gptfit.progress import Progress
from gptfit.tokenizer import token_bytes
from gptfit.train import train
from gptfit.watch import is_spent
from ranks import Job, train_together
from test_train import CPU, same, tiny, weights
from test_train import dataset as dataset

torch.set_num_threads(1)

SCHEDULE = {
    "learning_rate": 1.0, "min_lr": 0.1, "warmup_iters": 10, "max_iters": 100, "lr_decay_iters": 90,
    "cooldown_iters": 20,
}  # fmt: skip


def rates(**keys: Any) -> list[float]:
    run = make_run({**SCHEDULE, **keys})
    return [learning_rate_at(step, run) for step in range(100)]


def test_wsd_is_level_and_then_falls() -> None:
    got = rates(lr_schedule="wsd")
    assert got[:10] == rates()[:10] and got[10:71] == [1.0] * 61 and got[90:] == [0.1] * 10
    assert got[75] == pytest.approx(0.1 + 0.9 * (1 - math.sqrt(5 / 20)))
    assert all(a > b for a, b in pairwise(got[70:91]))
    assert rates(lr_schedule="wsd", cooldown_iters=0)[10:90] == [1.0] * 80
    assert make_run({"max_iters": 1000}).cooldown_iters == 200


def test_constant_warms_up_and_stays() -> None:
    assert rates(lr_schedule="constant") == rates()[:10] + [1.0] * 90
    assert rates(lr_schedule="wsd", decay_lr=False) == [1.0] * 100


def test_cosine_is_nanogpts() -> None:
    assert rates()[50] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 40 / 80)))


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"lr_schedule": "wds"}, "did you mean wsd"),
        ({"patience": -1}, "patience=-1"),
        ({"sample_interval": -1}, "sample_interval=-1"),
    ],
)
def test_bad_keys_are_said(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(GptfitError, match=said):
        make_run(keys)


def test_no_key_of_the_trainer_changes_an_estimate() -> None:
    keys = {"lr_schedule": "wsd", "cooldown_iters": 7, "patience": 3, "sample_interval": 9, "init_from": "somewhere"}
    for base in ({"n_layer": 2}, {"n_layer": 2, "eval_interval": 0}, {"n_layer": 2, "n_gpus": 2, "strategy": "fsdp"}):
        plain, other = (estimate(make_run({**base, **more}), "gptfit") for more in ({}, keys))
        assert (plain.live_bytes, plain.reserved_bytes) == (other.live_bytes, other.reserved_bytes)


def test_what_has_no_effect_is_said(dataset: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    run = tiny(dataset, patience=2, eval_interval=0, max_iters=2)
    assert train(run, tmp_path, on_event=events.append).stopped_by == ""
    notes = [event.text for event in events if isinstance(event, Note)]
    assert notes == ["patience=2 has nothing to count: eval_interval is 0"]


@pytest.mark.parametrize(
    "losses, patience, spent",
    [
        ([3, 2, 2.5, 2.1], 2, True),
        ([3, 2, 2.5, 1.9], 2, False),
        ([3, 2, 2, 2], 2, True),
        ([3, 2.5], 2, False),
        ([1, 2, 3, 4], 0, False),
        ([1, math.nan, math.nan], 2, True),
        ([], 1, False),
    ],
)
def test_patience_counts_evaluations_without_a_new_best(losses: list[float], patience: int, spent: bool) -> None:
    assert is_spent(losses, patience) == spent


def test_a_run_that_gets_no_better_ends_also_after_a_resume(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_evaluate", lambda session: {2: 3.0, 4: 2.0, 6: 2.5, 8: 2.4}[session.step])
    run = tiny(dataset, eval_interval=2, patience=2, checkpoint_interval=5)
    ended = train(run, tmp_path)
    assert (ended.step, ended.stopped_by) == (8, "patience")
    assert (tmp_path / "checkpoint-00000008.pt").exists()
    (tmp_path / "checkpoint-00000008.pt").unlink()
    again = train(run, tmp_path, resume=True)  # from 5, with the evaluations before it
    assert (again.step, again.stopped_by) == (8, "patience")


def test_samples_change_nothing_that_is_trained(dataset: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    printed = io.StringIO()
    progress = Progress(printed)

    def listen(event: Event) -> None:
        events.append(event)
        progress(event)

    train(tiny(dataset), tmp_path / "without")
    train(tiny(dataset, sample_interval=5), tmp_path / "with", on_event=listen)
    assert same(weights(tmp_path / "without"), weights(tmp_path / "with"))
    drawn = [event for event in events if isinstance(event, Sampled)]
    assert [event.step for event in drawn] == [5, 10] and drawn[0].text != drawn[1].text
    assert "after step 5 it writes:" in printed.getvalue() and len(drawn[0].text) > 50


def test_without_a_tokenizer_there_are_no_samples_and_one_line(dataset: Path, tmp_path: Path) -> None:
    meta = json.loads((dataset / "meta.json").read_text())
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("train.bin", "val.bin"):
        (folder / name).write_bytes((dataset / name).read_bytes())
    (folder / "meta.json").write_text(json.dumps({**meta, "tokenizer": "/nowhere/vocab.bpe"}))
    events: list[Event] = []
    train(tiny(folder, sample_interval=2), tmp_path / "out", on_event=events.append)
    assert [e.text for e in events if isinstance(e, Note)] == ['no samples: there is no rank file "/nowhere/vocab.bpe"']
    assert all("val_bpb" not in entry for entry in metrics.read(tmp_path / "out"))


def test_bits_per_byte_are_those_of_the_text_that_is_evaluated(tmp_path: Path) -> None:
    """From the probabilities of a model, token by token, and the text that the tokens stand for."""
    text = "Der Bär läuft über die Brücke. 日本語も。\n" * 60
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    letters = "".join(sorted(set(text)))
    prepare([tmp_path / "t.txt"], f"char:{letters}", tmp_path / "data", 0.3)
    run = tiny(tmp_path / "data", eval_interval=1, max_iters=1, learning_rate=1e-9, min_lr=0.0, dropout=0.0)
    train(run, tmp_path / "out")
    (entry,) = metrics.read(tmp_path / "out")
    data = open_dataset(run)
    model = GPT(run).eval()
    model.load_state_dict(weights(tmp_path / "out"))
    starts = sequence_starts(len(data.val), 16, run.eval_iters * run.eval_batch_size, run.seed, 0, VAL)
    inputs, targets = load_batch(data.val, starts, run, CPU)
    with torch.no_grad():
        nats = torch.nn.functional.cross_entropy(
            model.lm_head(model.hidden(inputs)).flatten(0, 1), targets.flatten(), reduction="sum"
        )
    n_bytes = sum(len(letters[i].encode()) for i in targets.flatten().tolist())
    assert n_bytes > targets.numel() * 1.1
    assert entry["val_bpb"] == pytest.approx(float(nats) / math.log(2) / n_bytes, rel=1e-5)


def test_bytes_of_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = token_bytes("byte")
    assert lengths is not None and lengths.tolist() == [1] * 256 + [0]
    (tmp_path / "v.bpe").write_text("#version: 0.2\nt h\nth e\n")
    ranks = token_bytes(str(tmp_path / "v.bpe"))
    assert ranks is not None and ranks.tolist() == [1] * 256 + [2, 3, 0]
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("tiktoken.get_encoding", lambda name: pytest.fail("it would be downloaded"))
    assert token_bytes("gpt2") is None and token_bytes("nowhere") is None
    assert isinstance(lengths, np.ndarray)


def test_two_processes_sample_and_end_together(dataset: Path, tmp_path: Path) -> None:
    """From the weights of another run, at a rate too small to get better: both see it, and one speaks."""
    train(tiny(dataset, max_iters=2), tmp_path / "before")
    keys = {
        "init_from": str(tmp_path / "before"), "learning_rate": 1e-30, "min_lr": 0.0, "eval_interval": 1, "patience": 2,
        "sample_interval": 2, "dropout": 0.0,
    }  # fmt: skip
    alone = train(tiny(dataset, **keys), tmp_path / "one")
    job = Job("two", {**tiny(dataset, **keys).model_dump(exclude_unset=True), "n_gpus": 2, "strategy": "ddp"})
    train_together(tmp_path, 2, [job])
    assert (alone.step, alone.stopped_by) == (3, "patience")
    one, two = metrics.read(tmp_path / "one"), metrics.read(tmp_path / "two")
    assert [e["step"] for e in two] == [1, 2, 3]
    assert [e["val_bpb"] for e in two] == pytest.approx([e["val_bpb"] for e in one])
    assert same(weights(tmp_path / "before"), weights(tmp_path / "two"))
