"""What a run shows: its lines on a terminal, and its profile."""

import gzip
import io
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from gptfit.config import RunConfig
from gptfit.errors import GptfitError
from gptfit.events import Event, Finished, Note, Started, Stepped
from gptfit.export import export
from gptfit.progress import Progress, clock, step_line
from gptfit.progress import lines as told
from gptfit.train import train
from test_train import losses, tiny, words_in


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return words_in(tmp_path_factory.mktemp("words"))


def test_plain_progress_is_one_line_a_logged_step(dataset, tmp_path):
    stream = io.StringIO()
    with Progress(stream) as progress:
        train(tiny(dataset, log_interval=5, eval_interval=0), tmp_path, on_event=progress)
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines if line.startswith("step")] == ["5/10", "10/10"]
    assert "loss" in lines[2] and "tokens/s" in lines[2] and "eta" in lines[2]
    assert lines[-3].startswith("done at step 10")
    assert lines[-2:] == [
        f"text from it: gptfit sample --out {tmp_path}",
        f"for transformers, or nanoGPT with --format nanogpt: gptfit export --out {tmp_path}",
    ]


@pytest.mark.parametrize("evaluated", [{}, {"val_loss": 10.8249}, {"val_loss": 10.8249, "val_bpb": 3.456}])
@pytest.mark.parametrize("peak", [None, 141 << 30])
@pytest.mark.parametrize(("tokens_per_second", "seconds"), [(512.0, 30.0), (1_234_567.0, 999_999.0)])
def test_a_step_is_a_line_of_a_terminal(evaluated, peak, tokens_per_second, seconds):
    record = Stepped(600_000, 10.8249, 6e-4, 10, 0.5, tokens_per_second, 1.0, peak, peak, **evaluated)
    line = step_line(record, 600_000, seconds)
    assert len(line) <= 80
    assert line.startswith("step 600000/600000  loss 10.8249")
    for key, word in (("val_loss", "val loss 10.8249"), ("val_bpb", "3.456 bits per byte")):
        assert (word in line) == (key in evaluated)
    short = step_line(replace(record, step=5, loss=2.5), 50, 30.0)
    if not evaluated and tokens_per_second < 1000:
        assert "lr 6.00e-04" in short and "eta 0:30" in short and ("peak 141.00 GiB" in short) == (peak is not None)


def test_a_stopped_run_says_how_to_go_on(tmp_path):
    stopped = Finished(7, 2.0, None, 3.0, "SIGTERM", tmp_path / "a b" / "checkpoint-00000007.pt")
    assert told(stopped)[1:] == [f"go on with it: gptfit train --resume --out '{tmp_path}/a b'"]
    assert told(replace(stopped, checkpoint=None))[1:] == []


def test_a_profile_is_a_trace_of_three_steps(dataset, tmp_path):
    events: list[Event] = []
    run = tiny(dataset, eval_interval=0)
    train(run, tmp_path / "with", on_event=events.append, profile=True)
    train(run, tmp_path / "without")
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    assert [e.text for e in events if isinstance(e, Note)] == [
        f"profile of steps 3 to 5: {tmp_path}/with/profile-trace.json.gz"
    ]
    trace = json.loads(gzip.decompress((tmp_path / "with" / "profile-trace.json.gz").read_bytes()))
    names = [event.get("name", "") for event in trace["traceEvents"]]
    assert sum(name.startswith("Optimizer.step") for name in names) == 3
    train(tiny(dataset, max_iters=2), tmp_path / "short", on_event=events.append, profile=True)
    assert [e.text for e in events if isinstance(e, Note)][-1].startswith("no profile: it begins at the third step")


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3661, "1:01:01")])
def test_clock(seconds, text):
    assert clock(seconds) == text


def record(step: int, seconds: float) -> Stepped:
    return Stepped(step, 2.0, 6e-4, 10, seconds, 10 / seconds, 1.0, None, None)


def told_of(tmp_path: Path, run: RunConfig, *events: Event) -> list[str]:
    stream = io.StringIO()
    with Progress(stream) as progress:
        progress(Started(run, "cpu", 1000, "words", 100, "byte", 0, tmp_path))
        for event in events:
            progress(event)
    return stream.getvalue().splitlines()[2:]


def test_a_slow_first_step_says_what_the_others_take(dataset, tmp_path):
    run = tiny(dataset, max_iters=101, log_interval=10)
    assert told_of(tmp_path, run, record(1, 90.0))[0] == "the first step took 1:30; 100 more like it take 2:30:00"
    assert told_of(tmp_path, run, record(1, 0.5), record(2, 0.5)) == []


def test_no_minute_passes_without_a_line(dataset, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("gptfit.progress.time.monotonic", lambda: now[0])
    stream, steps = io.StringIO(), []
    with Progress(stream) as progress:
        progress(Started(tiny(dataset, max_iters=200, log_interval=100), "cpu", 1, "words", 1, "byte", 0, tmp_path))
        for step in range(1, 30):
            now[0] += 25.0
            progress(record(step, 25.0))
    steps = [int(line.split()[1].partition("/")[0]) for line in stream.getvalue().splitlines() if "loss" in line]
    assert steps and max(b - a for a, b in zip([0, *steps], steps, strict=False)) * 25.0 <= 75.0


def test_a_first_step_that_takes_long_is_told_to_be_under_way(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("gptfit.progress.PATIENCE", 0.05)
    stream = io.StringIO()
    with Progress(stream) as progress:
        progress(Started(tiny(dataset), "cpu", 1, "words", 1, "byte", 3, tmp_path))
        end = time.monotonic() + 10
        while "under way" not in stream.getvalue() and time.monotonic() < end:
            time.sleep(0.01)
    assert "step 4/10 is under way" in stream.getvalue()
    stream = io.StringIO()
    with Progress(stream) as progress:
        progress(Started(tiny(dataset), "cpu", 1, "words", 1, "byte", 3, tmp_path))
        progress(record(4, 0.01))
        time.sleep(0.2)
    assert "under way" not in stream.getvalue()


@pytest.mark.parametrize(
    ("changes", "forms"),
    [
        ({}, ("hf", "nanogpt")),
        ({"tie_embeddings": False}, ("hf",)),
        ({"norm": "rmsnorm", "mlp": "swiglu", "position": "rope"}, ("hf",)),
        ({"norm": "rmsnorm", "mlp": "swiglu", "position": "rope", "qk_norm": True}, ()),
        ({"n_kv_head": 1}, ()),
        ({"mlp": "swiglu"}, ()),
    ],
)
def test_only_forms_that_the_model_has_are_offered(dataset, tmp_path, changes, forms):
    events: list[Event] = []
    run = tiny(dataset, max_iters=1, eval_interval=0, **changes)
    finished = train(run, tmp_path, on_event=events.append)
    line = "".join(told(finished, run)[2:])
    assert ("gptfit export" in line, "nanogpt" in line) == ("hf" in forms, "nanogpt" in forms)
    for form in ("hf", "nanogpt"):
        if form in forms:
            export(tmp_path, format=form)
        else:
            with pytest.raises(GptfitError, match="form"):
                export(tmp_path, format=form)


def test_a_run_is_not_resumed_to_a_step_that_it_is_past(dataset, tmp_path):
    train(tiny(dataset, max_iters=4, eval_interval=0), tmp_path)
    before = (tmp_path / "run.yaml").read_text()
    with pytest.raises(GptfitError, match=r"max_iters=2, but the run in .* is at step 4 already"):
        train(tiny(dataset, max_iters=2, eval_interval=0), tmp_path, resume=True)
    assert (tmp_path / "run.yaml").read_text() == before


@pytest.mark.parametrize("end", [BrokenPipeError(32, "broken pipe"), OSError(5, "terminal gone"), ValueError("closed")])
def test_a_run_outlives_whoever_reads_of_it(dataset, tmp_path, end):
    """`gptfit train 2>&1 | tee log`, and tee is ended; a terminal that was closed; a full disk under the log."""

    class Breaks(io.StringIO):
        def write(self, text: str) -> int:
            if "step 2/" in self.getvalue():
                raise end
            return super().write(text)

    stream = Breaks()
    with Progress(stream) as progress:
        finished = train(tiny(dataset), tmp_path / "out", on_event=progress)
    assert finished.step == 10
    assert "step 2/" in stream.getvalue() and "step 3/" not in stream.getvalue()
