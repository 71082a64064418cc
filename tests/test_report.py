"""What is printed: columns that add up, widths that hold, and text that any terminal or pipe can take."""

import contextlib
import io
import json
import re
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptfit.asked import Asked
from gptfit.config import make_run
from gptfit.door import ConfigSource, read_config
from gptfit.estimate import estimate
from gptfit.gpus import all_gpus, load_gpu
from gptfit.plan import plan
from gptfit.report import cards, output
from gptfit.report.plans import MAX_CANDIDATES, after_plan, candidates_view, delta_text, plan_view
from gptfit.report.terminal import after_estimate, estimate_view, notes_view, shares
from gptfit.units import MiB, counted, format_bytes, format_mib

# A part of the card: its letter in the bar, its name, MiB; two of them may share a line.
PART = re.compile(r"(?:^| )  ([A-Z=.^#?])  (\S+(?: \S+)*) +([\d,]+\.\d)")
FIGURE = re.compile(r"-?[\d,]+\.\d$")


def shown(*views: Any, width: int = 80) -> str:
    """What the views print on a pipe of that width."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setenv("COLUMNS", str(width))
        for view in views:
            output.show(view)
    return printed.getvalue()


def number(text: str) -> float:
    return float(text.replace(",", ""))


def part_figures(text: str) -> dict[str, float]:
    """The MiB of each part of the card, by its letter."""
    found = [match.groups() for line in text.splitlines() for match in PART.finditer(line)]
    assert len({letter for letter, _, _ in found}) == len(found)
    return {letter: number(figure) for letter, _, figure in found}


def figures(text: str) -> dict[str, float]:
    """The MiB at the end of each row, by the row's first words."""
    rows = {}
    for line in text.splitlines():
        found = FIGURE.search(line)
        if line.startswith("  ") and found:
            rows[re.split(r"\s{2,}", line.strip())[0]] = number(found[0])
    return rows


def bar_line(text: str) -> str:
    """The bar: the first line that is letters alone."""
    return next(line.strip() for line in text.splitlines() if re.fullmatch(r"  [A-Z.#?]{20,}", line))


RUNS = st.fixed_dictionaries(
    {
        "n_layer": st.integers(1, 4),
        "n_embd": st.sampled_from([96, 768]),
        "batch_size": st.integers(1, 64),
        "block_size": st.sampled_from([64, 1000, 1024]),
        "gradient_accumulation_steps": st.integers(1, 8),
        "loss": st.sampled_from(["full", "chunked"]),
        "dtype": st.sampled_from(["float32", "bfloat16"]),
        "optimizer": st.sampled_from(["adamw", "sgd", "adamw8bit"]),
        "compile": st.just(False),
    }
)
CARDS = st.sampled_from([None, "rtx4070", "gtx1650", "h100-sxm"])


@settings(max_examples=25, deadline=None)
@given(values=RUNS, card=CARDS)
def test_printed_columns_add_up(values: dict[str, Any], card: str | None) -> None:
    answer = estimate(make_run(values), "gptfit", load_gpu(card) if card else None)
    text = shown(estimate_view(answer))
    process, _, tensors = text.partition("alive then")
    parts, rows = part_figures(process), figures(tensors.split("tokens/s")[0])
    # Each figure is rounded to a tenth, and parts that would be 0.0 are left out.
    held = [figure for letter, figure in parts.items() if letter not in "=.^#"]
    assert parts["="] == pytest.approx(sum(held), abs=0.05 * len(held) + 0.16)
    if card:
        free = parts["^"] - parts["="]
        assert parts.get(".", 0.0) == pytest.approx(max(0.0, free), abs=0.16)
        assert parts["^"] == pytest.approx(load_gpu(card).total_bytes / MiB, abs=0.06)
    line = bar_line(text)
    assert len(line) == 72
    full = max(parts["="], parts.get("^", 0.0))
    for letter in set(parts) - {"=", "^"}:
        assert line.count(letter) == pytest.approx(72 * parts[letter] / full, abs=1.01)
    assert set(line) <= set(parts)
    total = rows.pop("allocated")
    assert total == pytest.approx(answer.allocated_bytes / MiB, abs=0.06)
    assert len(rows) <= 11
    assert sum(n_bytes for _, n_bytes in shares(answer)) == answer.process_bytes
    verdict = {"fits": "Fits: ", "does_not_fit": "Does not fit: ", None: "Needs "}[answer.verdict]
    assert text.startswith(verdict if answer.certain is not False else verdict.replace(":", ", but within the error:"))


def all_views(width: int) -> str:
    source = read_config("gpt2", ["batch_size=16", "n_layer=2"])
    source = ConfigSource(
        source.run, "gpt2", program="nanogpt", ignored={"out_dir": "out_dir = 'x'"}, notes=("a note",)
    )
    profile = load_gpu("rtx4070")
    answer, planned = estimate(source.run, "gptfit", profile), plan(source, profile)
    return shown(
        estimate_view(answer, estimate(source.run, "nanogpt", profile), verbose=True),
        after_estimate(answer, Asked("gpt2")),
        plan_view(planned, verbose=True),
        notes_view(source, None, verbose=True),
        after_plan(planned, source, Asked("gpt2"), None),
        cards.gpu_view(profile),
        cards.seen_view([]),
        width=width,
    )


@pytest.mark.parametrize("width", [40, 47, 55, 60, 66, 80, 200])
@pytest.mark.parametrize("tokens", [491520, 50000])
def test_the_best_choices_lose_columns_before_a_number_is_broken(width: int, tokens: int) -> None:
    """Each has one line, with its micro-batch, memory and speed; the wider, the more there is beside them."""
    made = plan(read_config("gpt2-medium", ()), load_gpu("rtx3060"), tokens_per_step=tokens)
    printed = shown(candidates_view(made), width=width).splitlines()
    rows = printed[printed.index(next(line for line in printed if "tokens/s" in line)) + 1 :]
    assert len(rows) == len(made.candidates[:MAX_CANDIDATES]) and max(map(len, printed)) <= width
    for row, candidate in zip(rows, made.candidates, strict=False):
        assert candidate.speed is not None
        words = row.split()
        assert words[-1] == f"{candidate.speed.tokens_per_second:,.0f}"
        assert format_bytes(candidate.reserved_bytes) in row and f"{candidate.run.batch_size}" in words
    if width == 80:
        assert f"{made.candidates[0].run.gradient_accumulation_steps}" in rows[0].split()


@pytest.mark.parametrize("width", [40, 80])
def test_no_line_is_wider_than_the_pipe(width: int) -> None:
    lines = all_views(width).splitlines()
    # What is to be copied is not wrapped.
    wide = [line for line in lines if len(line) > width and not line.startswith(("  gptfit ", "  python "))]
    assert wide == []


def test_a_pipe_gets_no_colours_and_no_trailing_spaces() -> None:
    text = all_views(80)
    assert "\x1b" not in text
    assert [line for line in text.splitlines() if line != line.rstrip()] == []
    assert text.endswith("\n") and not text.endswith("\n\n")


def test_a_terminal_without_unicode_gets_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    unicode_text = all_views(80)
    assert not unicode_text.isascii()
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    output.write(unicode_text)
    plain = raw.getvalue().decode("ascii")
    assert "?" not in plain, "a letter has no plain form"
    assert plain.splitlines()[0] == unicode_text.splitlines()[0]


def test_json_is_one_object_of_finite_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    output.respond(True, lambda: {"schema": "x", "name": "ü×"}, [])
    assert json.loads(capsys.readouterr().out) == {"schema": "x", "name": "ü×"}
    with pytest.raises(ValueError, match="JSON"):
        output.write_json({"x": float("inf")})


@given(st.integers(-(1 << 45), 1 << 45))
def test_a_difference_has_its_sign_or_is_nothing(delta_bytes: int) -> None:
    text = delta_text(delta_bytes)
    if text == "0":
        assert abs(delta_bytes) <= 0.05 * MiB
    else:
        assert text[0] == ("+" if delta_bytes > 0 else "-")
        assert text.lstrip("+-") == format_mib(abs(delta_bytes))


def test_every_card_can_be_shown() -> None:
    for profile in all_gpus():
        text = shown(cards.gpu_view(profile))
        assert all(key in text for key in profile.sources), profile.name


def test_what_to_type_keeps_what_was_typed() -> None:
    asked = Asked("my config.py", ("--batch_size=8", "n_layer=2"))
    assert asked.gptfit("train", {"batch_size": 4}) == "gptfit train 'my config.py' batch_size=4 n_layer=2"
    assert asked.nanogpt({"compile": True}) == (
        "python train.py 'my config.py' --batch_size=8 --n_layer=2 --compile=True"
    )
    assert Asked().gptfit("plan", {}, "--gpu", "rtx4070") == "gptfit plan --gpu rtx4070"


@pytest.mark.parametrize(("n", "text"), [(0, "0 retries"), (1, "1 retry"), (2, "2 retries"), (1234, "1,234 retries")])
def test_one_is_not_counted_as_many(n: int, text: str) -> None:
    assert counted(n, "retry", "retries") == text
    assert counted(n, "event").endswith("event" if n == 1 else "events")
