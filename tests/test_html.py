"""The page of an answer: one file that loads nothing, shows the figures of the answer, and escapes what it is told."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from gptfit.cli import main
from gptfit.config import make_run
from gptfit.door import ConfigSource, read_config
from gptfit.estimate import estimate
from gptfit.memory.step import pieces, steady_step
from gptfit.memory.tape import Event, Mark, Tape, make_buffer
from gptfit.report.html import estimate_page
from gptfit.report.html_parts import Html, joined, tag
from gptfit.report.timeline import MAX_INSTANTS, timeline, timeline_of
from gptfit.units import format_bytes, format_mib

VOID = {"meta", "link", "input", "br"}
# Whatever a browser would fetch by itself.
LOADING = {"src", "srcset", "href", "action", "data", "poster", "background", "ping"}


class Reader(HTMLParser):
    """Elements, texts, and whether each tag is closed where it should be."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.texts)

    def charts(self) -> list[dict[str, Any]]:
        return [json.loads(script) for script in self.scripts if script.startswith("{")]


def ran(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(words)
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One of each command, and where nothing fits."""
    lines = {
        "estimate": ["estimate", "gpt2", "batch_size=4", "--gpu", "rtx4070", "--reserve", "1GiB"],
        "no card": ["estimate", "gpt2", "batch_size=4", "gradient_accumulation_steps=1"],
        "plan": ["plan", "batch_size=16", "--program", "nanogpt", "--gpu", "rtx4070"],
        "nothing fits": ["plan", "gpt2-xl", "--gpu", "rtx3060"],
    }
    folder = tmp_path_factory.mktemp("pages")
    found: dict[str, str] = {}
    for name, words in lines.items():
        path = folder / f"{name}.html"
        with pytest.raises(SystemExit) as end:
            main([*words, "--html", str(path)])
        assert end.value.code in (0, 1)
        found[name] = path.read_text(encoding="utf-8")
    return found


PAGES = ("estimate", "no card", "plan", "nothing fits")


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_whole_small_and_loads_nothing(pages: dict[str, str], name: str) -> None:
    page = pages[name]
    assert len(page.encode()) < 500_000
    reader = Reader(page)
    for element, attributes in reader.elements:
        for key in LOADING & attributes.keys():
            assert (attributes[key] or "").startswith(("#", "data:,")), (element, attributes)
        assert not [key for key in attributes if key.startswith("on")]
    assert "@import" not in page and "url(" not in page
    policy = next(a["content"] or "" for _, a in reader.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    for drawing in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(drawing)


@pytest.mark.parametrize("name", PAGES)
def test_a_page_can_be_used_by_keyboard_and_read_aloud(pages: dict[str, str], name: str) -> None:
    reader = Reader(pages[name])
    for element, attributes in reader.elements:
        if element in ("input", "svg"):
            assert attributes.get("aria-label") or attributes.get("aria-hidden") == "true", attributes
        if (attributes.get("class") or "") == "scroll":
            assert attributes["tabindex"] == "0" and attributes["aria-label"]
        if (attributes.get("class") or "").startswith("dot"):
            assert element == "button" and attributes["aria-label"]
    assert dict(reader.elements)["html"]["lang"] == "en"
    tables = [element for element, _ in reader.elements if element == "table"]
    captions = [element for element, _ in reader.elements if element == "caption"]
    assert len(tables) == len(captions) > 0


def test_the_page_of_an_estimate_has_its_figures(pages: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    words = ("estimate", "gpt2", "batch_size=4", "--gpu", "rtx4070", "--reserve", "1GiB", "--json")
    answer = json.loads(ran(capsys, *words)[1])
    reader = Reader(pages["estimate"])
    for key in ("live_bytes", "allocated_bytes", "reserved_bytes", "process_bytes"):
        assert format_bytes(answer["peak"][key]) in reader.text
    for row in answer["tensors"]:
        assert row["name"] in reader.texts
        assert format_mib(row["bytes"]) in reader.texts
    for line in answer["assumptions"]:
        assert line in reader.texts
    assert "PyTorch on Linux shows 11.56 GiB" in reader.text, "where the card's numbers are from"
    chart = reader.charts()[0]
    peak = chart["instants"][chart["peak"]]
    assert peak["mib"] == pytest.approx(answer["peak"]["live_bytes"] / 2**20, abs=0.01)
    assert peak["words"] == f"{answer['peak']['instant']['phase']} ({answer['peak']['instant']['op']})"
    name, _, _, _, each = chart["buffers"][peak["rows"][0][0]]
    largest = answer["tensors"][0]
    assert (name, each * peak["rows"][0][1]) == (largest["name"], pytest.approx(largest["bytes"] / 2**20, abs=0.1))
    limits = re.findall(r'class="limit" style="bottom:calc\(([\d.]+)%', pages["estimate"])
    budget = answer["gpu"]
    assert float(limits[1]) / float(limits[0]) == pytest.approx(
        budget["usable_bytes"] / budget["total_bytes"], abs=1e-3
    )
    assert "gptfit estimate gpt2 batch_size=4 --gpu rtx4070 --reserve 1GiB" in reader.texts


def test_the_top_of_the_chart_is_the_process(pages: dict[str, str]) -> None:
    """The drawn peak, in units of the drawing, against the free line: as the process against what is free."""
    answer = estimate_of("gpt2", "batch_size=4")
    tops = [
        min(float(y) for y in re.findall(r"V([\d.]+)", path))
        for path in re.findall(r'<path d="(M0 1000H[^"]*Z)"', pages["estimate"])
    ]
    usable = float(re.findall(r'class="limit" style="bottom:calc\(([\d.]+)%', pages["estimate"])[0])
    full = 11.58 * 2**30 / (usable / 100)
    assert (1000 - min(tops)) / 1000 * full == pytest.approx(answer.process_bytes, rel=2e-3)


def estimate_of(*words: str) -> Any:
    from gptfit.gpus import load_gpu

    return estimate(read_config(words[0], words[1:]).run, "gptfit", load_gpu("rtx4070"), 1 << 30)


def test_the_page_of_a_plan_has_its_choices_and_changes(
    pages: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    answer = json.loads(ran(capsys, "plan", "batch_size=16", "--program", "nanogpt", "--gpu", "rtx4070", "--json")[1])
    reader = Reader(pages["plan"])
    dots = [a for _, a in reader.elements if (a.get("class") or "").startswith("dot ")]
    labels = [a["aria-label"] or "" for a in dots]
    for candidate in answer["candidates"]:
        choice, speed = candidate["choice"], f"{candidate['tokens_per_second']:,.0f} tokens/s"
        assert [one for one in labels if f"batch_size {choice['batch_size']}, " in one and speed in one]
    assert len([one for one in labels if one.startswith("chosen: ")]) == 1
    given = next(one for one in labels if one.startswith("as given: "))
    assert given.endswith("does not fit")
    assert format_bytes(answer["as_given"]["peak"]["process_bytes"]) in given
    widths = [float(w) for w in re.findall(r'<i class="(?:less|more)" style="width:([\d.]+)%', pages["plan"])]
    deltas = [abs(lever["process_delta_bytes"]) for lever in answer["levers"] if lever["process_delta_bytes"]]
    assert widths == pytest.approx([100 * delta / max(deltas) for delta in deltas], abs=0.06)
    for lever in answer["levers"]:
        assert lever["why"] in reader.texts
    assert len(reader.charts()) == 2, "the choice and the run as given"


def test_a_dot_left_of_the_line_fits(pages: dict[str, str]) -> None:
    line = float(re.findall(r'transform="translate\(([\d.]+) 0\)"></path></svg>', pages["plan"])[-1])
    dots = [a for _, a in Reader(pages["plan"]).elements if (a.get("class") or "").startswith("dot ")]
    for one in dots:
        x = float(re.findall(r"left:([\d.]+)%", one["style"] or "")[0])
        assert (x <= line) == (one["aria-label"] or "").endswith(", fits")
    assert len(dots) > 10


HOSTILE = "<script>alert(1)</script>\"'&</title>"


def test_hostile_text_stays_text() -> None:
    run = make_run({"n_layer": 1, "n_head": 2, "n_embd": 64, "block_size": 32, "vocab_size": 97})
    source = ConfigSource(run, HOSTILE, notes=(HOSTILE,))
    page = estimate_page(estimate(run), source, None, HOSTILE)
    reader = Reader(page)
    assert "<script>alert" not in page
    assert len([element for element, _ in reader.elements if element == "script"]) == 2
    assert len([text for text in reader.texts if HOSTILE in text]) >= 3
    name = "</script><b>"
    figure = Tape([Mark("setup", ""), Mark("forward", "x"), Event(1, make_buffer(name, "activation", (4,), "int8"))])
    drawn = timeline(figure)
    assert drawn.instants[0].largest[0][0].name == name
    from gptfit.report.html_timeline import timeline_figure

    markup = timeline_figure(estimate(run), drawn, name)
    assert name not in markup and Reader(markup).charts()[0]["buffers"][0][0] == name


def test_whatever_is_not_markup_is_escaped() -> None:
    assert tag("a", "<b>", ["&", tag("i", '"')], title='"<', class_="x", hidden=True, empty=None) == (
        '<a title="&quot;&lt;" class="x" hidden>&lt;b&gt;&amp;<i>&quot;</i></a>'
    )
    assert isinstance(joined(["<"]), Html)
    assert tag("meta", charset="utf-8") == '<meta charset="utf-8">'


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"gradient_accumulation_steps": 1},
        {"gradient_accumulation_steps": 2, "compile": False, "loss": "full"},
        {"activation_checkpointing": "block", "compile": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("program", ["gptfit", "nanogpt"])
def test_a_timeline_keeps_the_peak_of_each_phase(keys: dict[str, Any], program: str) -> None:
    if program == "nanogpt":
        keys = {key: value for key, value in keys.items() if key not in ("loss", "activation_checkpointing")}
    run = make_run({"n_layer": 30, "n_head": 4, "n_embd": 64, "block_size": 64, "vocab_size": 1009, **keys})
    drawn, answer = timeline_of(run, program), estimate(run, program)
    peak = drawn.instants[drawn.peak]
    assert (peak.live_bytes, peak.phase, peak.op) == (answer.live_bytes, answer.phase, answer.op)
    peaks: dict[str, int] = {}
    for one in drawn.instants:
        peaks[one.phase] = max(peaks.get(one.phase, 0), one.live_bytes)
    # The closed form counts a phase from what was alive as it began, the picture from its first event on.
    assert all(peaks[name] <= n_bytes for name, n_bytes in answer.phases)
    assert peaks.keys() == dict(answer.phases).keys()
    assert len(drawn.instants) <= MAX_INSTANTS + len(drawn.phases)
    xs = [one.x for one in drawn.instants]
    assert xs == sorted(xs) and xs[0] == 0 and xs[-1] < 1
    for spans in (drawn.phases, drawn.parts):
        assert [one.start for one in spans[1:]] == [one.end for one in spans[:-1]]
        assert spans[0].start == 0 and spans[-1].end == pytest.approx(1)
    assert min(one.end - one.start for one in drawn.phases) > 0.03


def test_a_timeline_by_hand() -> None:
    x, y = (make_buffer(name, "activation", (n,), "uint8") for name, n in (("x", 1024), ("y", 2048)))
    w = make_buffer("w", "parameter", (512,), "uint8")
    items = [Mark("setup", ""), Event(1, w), Mark("forward", "a"), Event(1, x), Event(1, y), Mark("backward", "b"),
             Event(-1, y), Event(-1, x), Mark("optimizer", "step"), Event(1, x), Event(-1, x)]  # fmt: skip
    drawn = timeline(Tape(items))
    assert [(one.phase, one.op, one.live_bytes, len(one.largest)) for one in drawn.instants] == [
        ("forward", "a", 1536, 2), ("forward", "a", 3584, 3), ("backward", "b", 1536, 2), ("backward", "b", 512, 1),
        ("optimizer", "step", 1536, 2), ("optimizer", "step", 512, 1),
    ]  # fmt: skip
    assert drawn.peak == 1 and drawn.instants[1].largest[0] == (y, 1)
    assert [one.name for one in drawn.phases] == ["forward", "backward", "optimizer"]
    assert [one.name for one in drawn.parts] == ["forward and backward", "optimizer"]


def test_the_largest_model_makes_a_small_page() -> None:
    source = read_config("gpt2-xl", ["compile=false", "batch_size=2"])
    page = estimate_page(estimate(source.run), source, None, "gptfit estimate gpt2-xl")
    events = sum(1 for _ in steady_step(source.run, pieces(source.run, "gptfit")).expand())
    assert events > 100_000 and len(page.encode()) < 250_000


def test_the_answer_is_the_same_with_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (("estimate", "gpt2", "--json"), ("plan", "gpt2", "--gpu", "rtx4070", "--json")):
        assert ran(capsys, *words, "--html", str(tmp_path / "page.html")) == ran(capsys, *words)


@pytest.mark.parametrize("where", ["missing/page.html", "", ".", "file/page.html"])
@pytest.mark.parametrize("command", ["plan", "estimate"])
def test_where_it_cannot_be_written_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, where: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("kept")
    code, out, err = ran(capsys, command, "gpt2", "--gpu", "rtx4070", "--html", where)
    assert (code, out) == (2, "")
    assert err.startswith("error: cannot write") and len(err.splitlines()) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
