"""The page of a run: from whatever its folder holds, with the figures of its files, and harmless."""

import json
import math
import random
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from gptfit.cli import main
from gptfit.config import make_run
from gptfit.errors import GptfitError
from gptfit.events import Event, Finished, Measured, Note, Sampled, Saved, Started, Stepped
from gptfit.journal import Journal, journaled
from gptfit.metrics import append
from gptfit.report.html_chart import Axis, Bin, Chart, Line, binned, chart, round_ticks
from gptfit.report.html_run import run_page
from gptfit.report.run_facts import read_run
from gptfit.report.run_summary import summary_json
from gptfit.units import format_bytes
from test_html import HOSTILE, LOADING, Reader

GIB = 1 << 30
SMALL = {"n_layer": 1, "n_head": 2, "n_embd": 64, "block_size": 32, "vocab_size": 97, "compile": False}
PREDICTED = {
    "allocated_bytes": 9 * GIB,
    "reserved_bytes": 10 * GIB,
    "process_bytes": 11 * GIB,
    "low_bytes": 10 * GIB + 5,
    "high_bytes": 12 * GIB,
    "gpu": {"name": "rtx4070", "total_bytes": 12 * GIB, "reserve_bytes": 0, "usable_bytes": 12 * GIB},
    "speed": {"tokens_per_second": 2000.0, "mfu": 0.4},
}


def step(n: int, loss: float = 2.0, **values: Any) -> Stepped:
    known: dict[str, Any] = {
        "lr": 1e-3,
        "tokens": 512 * n,
        "seconds": 0.5,
        "tokens_per_second": 1000.0,
        "grad_norm": 1.5,
        "peak_allocated_bytes": None,
        "peak_reserved_bytes": None,
    }
    return Stepped(step=n, loss=loss, **{**known, **values})


def started(out: Path, at: int = 0, device: str = "cpu", **keys: Any) -> Started:
    run = make_run({**SMALL, "max_iters": 10, "batch_size": 16, "gradient_accumulation_steps": 1, **keys})
    (out / "run.yaml").write_text(yaml.safe_dump(run.model_dump()))
    return Started(run, device, 1234, "python", 99_000, "byte", at, out)


def trained(
    out: Path, events: Iterable[Event], launched: Mapping[str, Any] | None = None, error: BaseException | None = None
) -> list[str]:
    """What train() would do of these; returns what was noted to the terminal."""
    notes: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, Note):
            notes.append(event.text)

    out.mkdir(exist_ok=True)
    with journaled(out, launched or {"given": None, "predicted": None}, listen) as journal:
        for event in events:
            if isinstance(event, Stepped):
                append(out, event)
            journal(event)
        if error is not None:
            raise error
    return notes


def page_of(out: Path) -> Reader:
    page = (out / "report.html").read_text(encoding="utf-8")
    assert len(page.encode()) < 300 * 1024
    reader = Reader(page)
    for element, attributes in reader.elements:
        for key in LOADING & attributes.keys():
            assert (attributes[key] or "").startswith(("#", "data:,")), (element, attributes)
        assert not [key for key in attributes if key.startswith("on")]
    assert not [path for path in re.findall(r' d="([^"]*)"', page) if re.search("nan|inf|e", path)]
    for drawing in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(drawing)
    return reader


def ran(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(words)
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


def test_a_run_on_a_cpu_leaves_its_page(tmp_path: Path) -> None:
    steps = [step(n, 5 - 0.3 * n, val_loss=5.5 - 0.3 * n if n % 5 == 0 else None, val_bpb=None) for n in range(1, 11)]
    last = Finished(10, 2.0, 2.5, 6.0, "", tmp_path / "checkpoint-00000010.pt")
    notes = trained(tmp_path, [started(tmp_path), *steps, Saved(10, tmp_path / "checkpoint-00000010.pt"), last])
    assert notes == [f"report {tmp_path / 'report.html'}"]
    reader = page_of(tmp_path)
    assert "finished: 10 of 10 steps" in reader.texts
    for text in ("5,120", "2.0000", "2.5000", "not measured: no GPU", "1,000"):
        assert text in reader.texts, text
    assert "Train loss: 4.7000 after step 1, lowest 2.0000 after 10, 2.0000 after 10." in reader.text
    assert "5.0 seconds in steps" in reader.text
    assert not list(tmp_path.glob(".*partial"))


def test_memory_and_speed_are_beside_what_was_predicted(tmp_path: Path) -> None:
    measured = Measured(9 * GIB, 8 * GIB, 11 * GIB, PREDICTED)
    steps = [step(1, peak_allocated_bytes=GIB, peak_reserved_bytes=8 * GIB),
             step(2, peak_allocated_bytes=8 * GIB, peak_reserved_bytes=8 * GIB)]  # fmt: skip
    given = make_run({**SMALL, "batch_size": 64}).model_dump()
    events = [started(tmp_path, device="NVIDIA GeForce RTX 4070"), *steps, measured]
    trained(tmp_path, events, {"given": given, "predicted": PREDICTED})
    reader = page_of(tmp_path)
    assert "8.00 GiB (+12.50\u00a0%)" in reader.texts, "allocated: 9 predicted, 8 measured"
    assert "8.00 GiB (+25.00\u00a0%)" in reader.texts, "reserved: 10 predicted, 8 measured"
    assert "20.0%" in reader.texts, "half the predicted speed is half the predicted MFU"
    assert format_bytes(11 * GIB) in reader.texts
    rows = re.findall(
        r"<tr><td>batch_size</td><td>(\d+)</td><td>(\d+)</td></tr>", (tmp_path / "report.html").read_text()
    )
    assert rows == [("64", "16")], "as given, chosen"


def test_train_leaves_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command itself: to its end, resumed, and refused where there is a run already."""
    keys = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 257, "batch_size": 2}
    more = ("gradient_accumulation_steps=1", "tokenizer=byte", "compile=false", "dtype=float32", "eval_iters=1")
    words = ("train", *(f"{key}={value}" for key, value in keys.items()), *more, "--device", "cpu")
    out = tmp_path / "a run"
    code, _, err = ran(capsys, *words, "max_iters=2", "--out", str(out))
    assert code == 0 and err.splitlines()[-1] == f"report {out / 'report.html'}", err
    reader = page_of(out)
    assert "finished: 2 of 2 steps" in reader.texts and "not measured: no GPU" in reader.texts
    assert "after step 2, on cpu" not in reader.text
    page = (out / "report.html").read_bytes()
    assert ran(capsys, *words, "max_iters=2", "--out", str(out))[0] == 2
    assert (out / "report.html").read_bytes() == page, "what is refused leaves the page of the run that is there"
    code, _, err = ran(capsys, *words, "max_iters=4", "learning_rate=1e11", "grad_clip=0", "warmup_iters=0",
                       "decay_lr=false", "--resume", "--out", str(out))  # fmt: skip
    text = page_of(out).text
    assert "after step 2, on cpu, micro-batches of 2, 1 a step" in text
    assert code == 2 and "failed after step 3 of 4" in text and "the loss is " in text


def test_a_run_that_fails_says_why_and_the_error_goes_on(tmp_path: Path) -> None:
    with pytest.raises(GptfitError, match="no number"):
        trained(tmp_path, [started(tmp_path), step(1)], error=GptfitError("step 2: the loss is no number"))
    reader = page_of(tmp_path)
    assert "failed after step 1 of 10" in reader.texts and "step 2: the loss is no number" in reader.texts


def test_a_run_that_never_started_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(GptfitError):
        trained(tmp_path, [Note("before")], error=GptfitError("already holds a run"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "stopped_by, words", [("SIGTERM", "stopped by SIGTERM after step 1"), ("patience", "stopped early after step 1")]
)
def test_a_run_that_is_stopped_says_by_what(tmp_path: Path, stopped_by: str, words: str) -> None:
    trained(tmp_path, [started(tmp_path), step(1), Finished(1, 2.0, None, 1.0, stopped_by, None)])
    assert any(text.startswith(words) for text in page_of(tmp_path).texts)


def test_what_happened_is_told_with_kills_and_resumes(tmp_path: Path) -> None:
    oom = "out of memory; going on with micro-batches of 7, the same tokens a step (CUDA out of memory)"
    first = [started(tmp_path), step(1), Note(oom), Sampled(1, "abc def"), step(2), step(3)]
    for event in first:  # without the end: as kill -9 leaves it
        if isinstance(event, Stepped):
            append(tmp_path, event)
    journal = Journal(tmp_path, {}, lambda event: None)
    for event in first:
        journal(event)
    assert read_run(tmp_path).state == ("unknown", "no last word after step 3 of 10: killed, or still going")
    trained(tmp_path, [started(tmp_path, at=2), step(3, loss=1.0), Finished(3, 1.0, None, 1.0, "SIGINT", None)])
    reader = page_of(tmp_path)
    assert oom in reader.texts and "abc def" in reader.texts
    assert "killed" in reader.texts and "what began after step 0 left no last word" in reader.texts
    assert "after step 2, on cpu, micro-batches of 16, 1 a step" in reader.texts
    facts = read_run(tmp_path)
    assert list(facts.series.steps) == [1, 2, 3], "each step once, the later one of two"
    assert facts.series.last("loss") == 1.0


def test_metrics_alone_are_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for n in range(1, 4):
        append(tmp_path, step(n))
    code, out, err = ran(capsys, "report", str(tmp_path))
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == "no last word after step 3: killed, or still going"
    assert "".join(out.split()).endswith(f"report{tmp_path / 'report.html'}")
    assert max(map(len, out.splitlines())) <= 80
    page_of(tmp_path)
    answer = json.loads(ran(capsys, "report", str(tmp_path), "--json", "--html", str(tmp_path / "other.html"))[1])
    assert answer["schema"] == "gptfit.report/1" and answer["report"] == str(tmp_path / "other.html")
    assert (answer["state"], answer["step"], answer["tokens"], answer["step_seconds"]) == ("unknown", 3, 1536, 1.5)
    assert (tmp_path / "other.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("where", ["missing", "file", "empty"])
def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str) -> None:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "empty").mkdir()
    code, out, err = ran(capsys, "report", str(tmp_path / where))
    assert (code, out) == (2, "")
    assert err.startswith("error: there is no metrics.jsonl in") and len(err.splitlines()) == 2
    assert (tmp_path / "file").read_text() == "kept" and list((tmp_path / "empty").iterdir()) == []


HOSTILE_METRICS = (
    "",
    "\n\n",
    "not json\n[1]\nnull\n",
    '{"step": 1}\n',
    '{"step": 1, "loss": NaN, "lr": Infinity, "tokens_per_second": -Infinity, "grad_norm": 1e999}\n',
    '{"step": 1, "loss": 1e308}\n{"step": 2, "loss": -1e308}\n',
    '{"step": 1, "loss": "<script>alert(1)</script>", "lr": [], "tokens": {}, "seconds": true}\n',
    '{"step": 1, "loss": 1' + "0" * 400 + "}\n",
    '{"step": 999999999999999999999, "loss": 1}\n{"step": -4, "loss": 1}\n{"step": true, "loss": 1}\n',
    '{"step": 5, "loss": 0}\n{"step": 3, "loss": -2.5, "grad_norm": 0}\n{"step": 4, "lo',
    "[" * 5000 + "\n",
    '{"step": 1, "loss": 2, "tokens_per_second": 0, "seconds": 0, "peak_allocated_bytes": 0, "val_loss": 1e-30}\n',
    "\ufffd\x00\x1b[31m\n",
)


@pytest.mark.parametrize("text", HOSTILE_METRICS, ids=range(len(HOSTILE_METRICS)))
def test_hostile_metrics_are_harmless(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")
    code, out, err = ran(capsys, "report", str(tmp_path), "--json")
    assert (code, err) == (0, ""), err
    json.loads(out, parse_constant=lambda word: pytest.fail(word))
    page_of(tmp_path)


EVENTS = (
    {"event": "sampled", "step": 1, "text": HOSTILE},
    {"event": "note", "step": 1, "text": HOSTILE, "at": 1e300},
    {"event": HOSTILE, "step": 1},
    {"event": "failed", "step": 1, "text": HOSTILE},
    {"event": "launched", "step": 0, "command": HOSTILE, "versions": {HOSTILE: HOSTILE}, "given": {"a": HOSTILE}},
    {"event": "launched", "step": 0, "predicted": {"gpu": 7, "speed": {"mfu": "x", "tokens_per_second": 0}}},
    {"event": "launched", "step": 0, "predicted": {"gpu": {"total_bytes": 10**400}, "allocated_bytes": 10**400}},
    {"event": "measured", "step": 1, "allocated_bytes": "x", "predicted": []},
    {"event": "measured", "step": 1, "allocated_bytes": 10**400, "card_used_bytes": 10**400},
    {"event": "started", "step": 1, "device": HOSTILE, "max_iters": "x", "n_params": HOSTILE},
    {"event": "finished", "step": 10**12, "stopped_by": HOSTILE},
)


@pytest.mark.parametrize("entry", EVENTS, ids=range(len(EVENTS)))
def test_hostile_events_are_harmless(tmp_path: Path, capsys: pytest.CaptureFixture[str], entry: Any) -> None:
    append(tmp_path, step(1))
    (tmp_path / "run.yaml").write_text(f"n_layer: {json.dumps(HOSTILE)}\nmax_iters: [1]\n? [a, b]\n: 3\n")
    (tmp_path / "events.jsonl").write_text(json.dumps(entry) + "\nnot json\n" + json.dumps(entry)[:-9])
    code, _, err = ran(capsys, "report", str(tmp_path))
    assert (code, err) == (0, ""), err
    reader = page_of(tmp_path)
    assert "<script>alert" not in (tmp_path / "report.html").read_text()
    assert len([element for element, _ in reader.elements if element == "script"]) == 1


def test_a_page_that_cannot_be_made_does_not_end_the_run(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    notes = trained(tmp_path, [started(tmp_path), step(1)])
    assert len(notes) == 1 and notes[0].startswith("no report: cannot write")


def test_a_run_of_150_000_steps_is_a_small_page(tmp_path: Path) -> None:
    dice = random.Random(1)
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for n in range(1, 150_001):
            loss = 2 + 9 / n**0.3 + dice.gauss(0, 0.1)
            loss = 99.0 if n == 123_456 else loss
            val = f', "val_loss": {loss + 0.1}' if n % 2000 == 0 else ""
            file.write(f'{{"step": {n}, "loss": {loss}, "lr": 1e-3, "tokens": {n}, "seconds": 0.1{val}}}\n')
    kinds = ({"event": "saved"}, {"event": "note", "text": "x" * 1000}, {"event": "sampled", "text": "<" * 4000})
    with (tmp_path / "events.jsonl").open("w") as file:
        for n in range(0, 150_000, 150):
            file.write("".join(json.dumps({**kind, "step": n, "at": 1e9 + n}) + "\n" for kind in kinds))
    began = time.perf_counter()
    facts = read_run(tmp_path)
    page = run_page(facts)
    assert time.perf_counter() - began < 60
    assert len(page.encode()) < 300 * 1024
    assert "Each point is up to 600 steps: the line is their mean, the band their least and most." in page
    assert "99.0000" in page, "the one step that stands out is in the band and in the table"
    assert summary_json(facts, tmp_path)["tokens"] == 150_000


def test_bins_have_least_mean_and_most() -> None:
    from array import array

    values = array("d", [1.0, math.nan, 3.0, 8.0, math.nan, math.nan, 5.0])
    assert binned(range(1, 8), values, 4) == [
        Bin(1, 2, 1.0, 1.0, 1.0), Bin(3, 4, 3.0, 5.5, 8.0), None, Bin(7, 7, 5.0, 5.0, 5.0),
    ]  # fmt: skip


def test_a_line_is_drawn_where_its_values_are() -> None:
    bins = [Bin(n, n, v, v, v) for n, v in ((0, 10.0), (5, 0.0), (10, 5.0))]
    drawn = chart(Chart("x", [Line("a", "red", bins)], "{:g}".format, from_zero=True))
    path = re.findall(r'd="M([^"]*)" class="curve"', str(drawn))[0]
    points = [tuple(map(float, point.split())) for point in path.split("L")]
    assert points == [(0, pytest.approx(1000 - 1000 / 1.08, abs=0.1)), (500, 1000),
                      (1000, pytest.approx(1000 - 500 / 1.08, abs=0.1))]  # fmt: skip


def test_axes() -> None:
    log = Axis(0.1, 1000, True)
    assert (log.at(0.1), log.at(10), log.at(1000)) == (0, pytest.approx(0.5), 1)
    assert round_ticks(0, 89) == [0, 20, 40, 60, 80]
    assert round_ticks(0, 0) == []
    assert Axis(1.0, 100.0, True).ticks() == pytest.approx([1, 2, 5, 10, 20, 50, 100])
