"""Whole runs on a CPU: resumed, interrupted, split otherwise, out of memory; and what they leave on disk."""

import json
import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from gptfit import checkpoint, data, metrics
from gptfit import train as module
from gptfit.config import RunConfig, make_run
from gptfit.device import HeldMemory, adapt, set_expandable_segments
from gptfit.errors import GptfitError
from gptfit.events import Event, Measured, Note, Saved, Started, Stepped
from gptfit.model import GPT
from gptfit.progress import measured_lines
from gptfit.sample import sample
from gptfit.train import train

CPU = torch.device("cpu")

# Threads that wait for one another on a busy machine take longer than these shapes take on one.
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return words_in(tmp_path_factory.mktemp("words"))


def words_in(folder: Path) -> Path:
    """Bytes with something to learn in them: words of a small alphabet."""
    rng = np.random.default_rng(0)
    words = [rng.integers(97, 123, rng.integers(2, 7)).astype(np.uint16) for _ in range(12)]
    text = np.concatenate([np.append(words[i], 32) for i in rng.integers(0, 12, 8000)]).astype(np.uint16)
    text[:-2000].tofile(folder / "train.bin")
    text[-2000:].tofile(folder / "val.bin")
    (folder / "meta.json").write_text(json.dumps({"dtype": "uint16", "vocab_size": 257, "tokenizer": "byte"}))
    return folder


def tiny(dataset: Path, **changes: Any) -> RunConfig:
    return make_run(
        {
            "n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 257, "block_size": 16, "dataset": str(dataset),
            "batch_size": 3, "gradient_accumulation_steps": 2, "dtype": "float32", "compile": False, "dropout": 0.1,
            "learning_rate": 1e-2, "max_iters": 10, "lr_decay_iters": 10, "warmup_iters": 2, "eval_interval": 4,
            "eval_iters": 2, "checkpoint_interval": 5, **changes,
        }
    )  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = checkpoint.latest_valid(folder)
    assert found is not None
    return dict(found.checkpoint.model)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in metrics.read(folder)]


def stop_at(step: int, act: Callable[[], None]) -> Callable[[Event], None]:
    def listen(event: Event) -> None:
        if isinstance(event, Stepped) and event.step == step:
            act()

    return listen


def test_a_run_leaves_its_config_its_metrics_and_its_checkpoints(dataset, tmp_path):
    run, events = tiny(dataset), []
    finished = train(run, tmp_path, on_event=events.append)
    assert make_run(yaml.safe_load((tmp_path / "run.yaml").read_text())) == run
    entries = metrics.read(tmp_path)
    assert [entry["step"] for entry in entries] == list(range(1, 11))
    assert [entry["tokens"] for entry in entries] == [96 * i for i in range(1, 11)]
    assert [entry["step"] for entry in entries if "val_loss" in entry] == [4, 8, 10]
    wanted = {"step", "loss", "lr", "tokens", "seconds", "tokens_per_second", "grad_norm"}
    assert wanted | {"peak_allocated_bytes", "peak_reserved_bytes"} == set(entries[0])
    assert [event.step for event in events if isinstance(event, Saved)] == [5, 10]
    assert (finished.step, finished.stopped_by, finished.loss) == (10, "", entries[-1]["loss"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-00000005.pt", "checkpoint-00000010.pt", "metrics.jsonl", "run.yaml",
    ]  # fmt: skip


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adafactor", "lion"])
def test_resumed_is_bit_for_bit_uninterrupted(dataset, tmp_path, optimizer):
    run = tiny(dataset, optimizer=optimizer)
    train(run, tmp_path / "whole")
    train(run, tmp_path / "parts", on_event=stop_at(5, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    torch.manual_seed(99)
    train(run, tmp_path / "parts", resume=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


@pytest.mark.parametrize(("dtype", "optimizer"), [("float16", "adamw"), ("float16", "muon"), ("bfloat16", "adamw")])
def test_half_precision_trains_and_resumes_with_its_scaler(dataset, tmp_path, dtype, optimizer):
    run = tiny(dataset, dtype=dtype, optimizer=optimizer, max_iters=8)
    train(run, tmp_path / "whole")
    train(run, tmp_path / "parts", on_event=stop_at(5, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    train(run, tmp_path / "parts", resume=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert losses(tmp_path / "whole")[-1] < losses(tmp_path / "whole")[0] - 0.2
    found = checkpoint.latest_valid(tmp_path / "parts")
    assert found is not None and ("scale" in found.checkpoint.scaler) == (dtype == "float16")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_the_step_saves_and_leaves_the_handlers_as_they_were(dataset, tmp_path, name):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    number = getattr(signal, name)
    finished = train(tiny(dataset), tmp_path, on_event=stop_at(3, lambda: os.kill(os.getpid(), number)))
    assert (finished.step, finished.stopped_by) in ((3, name), (4, name))
    found = checkpoint.latest_valid(tmp_path)
    assert found is not None and found.checkpoint.step == finished.step == len(losses(tmp_path))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_sigusr1_saves_and_goes_on_as_often_as_it_comes(dataset, tmp_path):
    events: list[Event] = []

    def listen(event: Event) -> None:
        events.append(event)
        if isinstance(event, Stepped) and event.step in (3, 7):
            os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.getsignal(signal.SIGUSR1)
    finished = train(tiny(dataset), tmp_path, on_event=listen)
    assert (finished.step, finished.stopped_by) == (10, "")
    assert [event.step for event in events if isinstance(event, Saved)] == [3, 5, 7, 10]
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_second_signal_is_obeyed_at_once(dataset, tmp_path):
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tiny(dataset), tmp_path, on_event=stop_at(3, twice))


def test_a_crash_costs_the_steps_since_the_checkpoint_and_leaves_each_line_once(dataset, tmp_path):
    class Crash(Exception):
        pass

    def crash() -> None:
        raise Crash

    run = tiny(dataset)
    train(run, tmp_path / "whole")
    with pytest.raises(Crash):
        train(run, tmp_path / "parts", on_event=stop_at(8, crash))
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # torn
    started: list[Started] = []
    train(
        run, tmp_path / "parts", resume=True, on_event=lambda e: started.append(e) if isinstance(e, Started) else None
    )
    assert started[0].step == 5
    lines = (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 11))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


@pytest.mark.parametrize(("batch_size", "accumulation"), [(6, 1), (1, 6), (2, 3)])
def test_any_split_into_micro_batches_is_the_same_step(dataset, tmp_path, batch_size, accumulation):
    train(tiny(dataset, dropout=0.0, max_iters=4), tmp_path / "a")
    split = tiny(dataset, dropout=0.0, max_iters=4, batch_size=batch_size, gradient_accumulation_steps=accumulation)
    train(split, tmp_path / "b")
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), rel=1e-5)
    for a, b in zip(weights(tmp_path / "a").values(), weights(tmp_path / "b").values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def limit_batch(monkeypatch: pytest.MonkeyPatch, at_most: int) -> list[int]:
    """Makes the model run out of memory above `at_most` sequences; the sizes it is asked for."""
    asked: list[int] = []
    real = GPT.forward

    def forward(self: GPT, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        asked.append(len(idx))
        if len(idx) > at_most:
            torch.rand(3)  # what dropout drew before the failure must be drawn again
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …")
        return real(self, idx, targets)

    monkeypatch.setattr(GPT, "forward", forward)
    return asked


def test_out_of_memory_makes_micro_batches_smaller_and_the_step_the_same(dataset, tmp_path, monkeypatch):
    run = tiny(dataset, batch_size=8, gradient_accumulation_steps=1, max_iters=3, eval_batch_size=9, eval_interval=3)
    smaller = tiny(
        dataset, batch_size=4, gradient_accumulation_steps=2, max_iters=3, eval_batch_size=9, eval_interval=3
    )
    train(smaller, tmp_path / "planned")
    asked, notes = limit_batch(monkeypatch, 5), []
    train(run, tmp_path / "met", on_event=lambda e: notes.append(e.text) if isinstance(e, Note) else None)
    assert asked[:6] == [8, 4, 4, 4, 4, 4]  # 8 split at 7 is 4 and 4, and stays so
    assert losses(tmp_path / "met") == losses(tmp_path / "planned")
    assert same(weights(tmp_path / "met"), weights(tmp_path / "planned"))
    assert metrics.read(tmp_path / "met")[-1]["val_loss"] == pytest.approx(
        metrics.read(tmp_path / "planned")[-1]["val_loss"], rel=1e-5
    )
    assert notes[0] == (
        "out of memory; going on with micro-batches of 7 (were 8), the same tokens a step "
        "(CUDA out of memory. Tried to allocate 2.00 GiB)"
    )


@pytest.mark.parametrize("steps", [1, 2])
def test_every_micro_batch_was_read_while_the_one_before_it_was_computed(dataset, tmp_path, monkeypatch, steps):
    """But for the first; also over the bounds of steps, and behind an evaluation."""
    happened: list[str] = []
    real_read, real_forward = data.read_batch, GPT.forward

    def read(*arguments: Any) -> Any:
        happened.append("read")
        return real_read(*arguments)

    def forward(self: GPT, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        happened.append("compute" if torch.is_grad_enabled() else "evaluate")
        return real_forward(self, x, y)

    monkeypatch.setattr(data, "read_batch", read)
    monkeypatch.setattr(GPT, "forward", forward)
    train(tiny(dataset, max_iters=4, gradient_accumulation_steps=steps, eval_iters=1, eval_batch_size=3), tmp_path)
    n = 4 * steps
    assert happened == ["read", *["compute", "read"] * (n - 1), "compute", "read", "evaluate"]


def test_where_no_sequence_fits_it_is_said_in_one_line(dataset, tmp_path, monkeypatch):
    limit_batch(monkeypatch, 0)
    with pytest.raises(GptfitError, match="out of memory with batch_size=1") as caught:
        train(tiny(dataset), tmp_path)
    assert "\n" not in caught.value.message


def test_folders_are_not_mixed_up(dataset, tmp_path):
    run = tiny(dataset, max_iters=2)
    with pytest.raises(GptfitError, match="no checkpoint in"):
        train(run, tmp_path / "a", resume=True)
    train(run, tmp_path / "a")
    with pytest.raises(GptfitError, match="already holds a run, at step 2"):
        train(run, tmp_path / "a")
    with pytest.raises(GptfitError, match=r"n_layer=3, but the checkpoint .* has n_layer=2"):
        train(tiny(dataset, n_layer=3), tmp_path / "a", resume=True)
    events: list[Event] = []
    assert train(tiny(dataset, max_iters=3), tmp_path / "a", resume=True, on_event=events.append).step == 3
    assert [e.text for e in events if isinstance(e, Note)] == ["resumed with max_iters=3 (was 2)"]


def test_resuming_keeps_the_settings_that_were_changed(dataset, tmp_path):
    train(tiny(dataset, max_iters=2), tmp_path)
    train(tiny(dataset, max_iters=4, weight_decay=0.7, optimizer_impl="for-loop"), tmp_path, resume=True)
    found = checkpoint.latest_valid(tmp_path)
    assert found is not None
    groups = found.checkpoint.optimizer["param_groups"]
    assert [(g["weight_decay"], g["fused"]) for g in groups] == [(0.7, False), (0.0, False)]


def test_a_finished_run_resumed_has_nothing_to_do(dataset, tmp_path):
    run = tiny(dataset, max_iters=2)
    train(run, tmp_path)
    before = (tmp_path / "metrics.jsonl").read_text()
    assert train(run, tmp_path, resume=True).step == 2
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_it_learns_and_its_sample_is_made_of_the_words(dataset, tmp_path):
    run = tiny(dataset, dropout=0.0, n_embd=64, batch_size=16, max_iters=200, lr_decay_iters=200, eval_interval=200)
    finished = train(run, tmp_path)
    first = losses(tmp_path)[0]
    assert first == pytest.approx(math.log(257), abs=0.2)
    assert finished.loss < first - 3 and finished.val_loss is not None and finished.val_loss < first - 3
    text = sample(tmp_path, "", 200, temperature=0.5, seed=1)
    raw = np.fromfile(dataset / "train.bin", dtype=np.uint16).astype(np.uint8).tobytes().decode()
    words = set(raw.split())
    drawn = text.split()[1:-1]
    assert sum(word in words for word in drawn) > 0.5 * len(drawn) > 5


@pytest.mark.slow
def test_a_model_for_a_cpu_learns_python_in_seconds(tmp_path):
    """Four layers of 128 on the built-in data: what a first run on any machine is like."""
    run = make_run(
        {
            "n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 128, "vocab_size": 257, "batch_size": 8,
            "gradient_accumulation_steps": 1, "learning_rate": 3e-3, "warmup_iters": 10, "max_iters": 60,
            "eval_interval": 60, "eval_iters": 4,
        }
    )  # fmt: skip
    finished = train(run, tmp_path)
    assert finished.val_loss is not None and finished.val_loss < losses(tmp_path)[0] - 2
    assert finished.seconds < 60


def test_sampling_is_a_function_of_its_seed(dataset, tmp_path):
    train(tiny(dataset, max_iters=1), tmp_path)
    draws = {seed: sample(tmp_path, "ab", 30, seed=seed) for seed in (1, 2)}
    assert draws[1] != draws[2] and draws[1] == sample(tmp_path, "ab", 30, seed=1) and draws[1].startswith("ab")
    greedy = {sample(tmp_path, "ab", 30, temperature=0, seed=seed) for seed in (1, 2)}
    assert len(greedy) == 1 and greedy == {sample(tmp_path, "ab", 30, top_k=1)}
    assert sample(tmp_path, "ab", 0) == "ab"
    with pytest.raises(GptfitError, match="no checkpoint"):
        sample(tmp_path / "nowhere")


def test_measured_stands_beside_predicted_at_the_second_step(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "held_memory", lambda device: HeldMemory(2 << 30, 3 << 30, 4 << 30))
    events: list[Event] = []
    predicted = {"allocated_bytes": 2 << 30, "reserved_bytes": 3 * (1 << 30) * 101 // 100}
    train(tiny(dataset, max_iters=3), tmp_path, predicted=predicted, on_event=events.append)
    at = [i for i, event in enumerate(events) if isinstance(event, Measured)]
    assert len(at) == 1 and isinstance(events[at[0] + 1], Stepped) and events[at[0] + 1].step == 2
    shown = "\n".join(measured_lines(events[at[0]]))
    assert "allocated 2.00 GiB, predicted 2.00 GiB (+0.00 %)" in shown and "predicted 3.03 GiB (+1.00 %)" in shown
    assert metrics.read(tmp_path)[0]["peak_reserved_bytes"] == 3 << 30


def test_metrics_write_no_nan(tmp_path):
    record = Stepped(1, 2.0, 1e-3, 10, 0.5, 20.0, math.inf, None, None)
    metrics.append(tmp_path, record)
    metrics.append(tmp_path, replace(record, step=2, grad_norm=1.0))
    assert [entry["grad_norm"] for entry in metrics.read(tmp_path)] == [None, 1.0]
    metrics.keep_until(tmp_path, 1)
    assert [entry["step"] for entry in metrics.read(tmp_path)] == [1]


def test_a_cpu_changes_only_what_nobody_asked_for():
    adapted, notes = adapt(make_run({}), CPU)
    assert (adapted.dtype, adapted.compile, len(notes)) == ("float32", False, 2)
    asked = make_run({"dtype": "bfloat16", "compile": True})
    assert adapt(asked, CPU) == (asked, ())


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "a:1"}, {"PYTORCH_CUDA_ALLOC_CONF": "a:1,expandable_segments:True"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"},) * 2,
    ],
)
def test_expandable_segments_join_what_the_user_set(before, after, monkeypatch):
    environment = dict(before)
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr("sys.platform", "linux")
    set_expandable_segments(False)
    assert environment == before
    set_expandable_segments(True)
    assert environment == after
