"""Whatever is pasted: no exception but the one for nothing, no figure that is not there, no command to the terminal,
and no text that takes long."""

import dataclasses
import importlib
import pkgutil
import random
import re
import time
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fuzz_oom
import gptfit.oom
from gptfit.errors import GptfitError
from gptfit.logfile import read_log
from gptfit.oom.clean import printable
from gptfit.oom.read import read_paste
from gptfit.oom.wordings import Rule
from oom_pastes import LABELS, labelled

texts = st.sampled_from(sorted(LABELS)).map(labelled)


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 10**9))
def test_a_spoilt_paste_is_answered_without_a_fault(seed):
    """No exception, no command to the terminal, no figure that it does not print, none stated as sure that is not;
    `python tests/fuzz_oom.py 10000` runs more of them."""
    assert fuzz_oom.judge(fuzz_oom.spoilt(seed)) == []


def test_the_judge_of_spoilt_pastes_can_condemn(monkeypatch):
    text = labelled("008-gpt-forward-plain")
    assert fuzz_oom.judge(text) == []
    honest = fuzz_oom.explain_text
    monkeypatch.setattr(fuzz_oom, "printed_sizes", lambda text: set())
    assert "tried_bytes" in " ".join(fuzz_oom.judge(text))
    monkeypatch.setattr(fuzz_oom, "explain_text", lambda text: dataclasses.replace(honest(text), summary="\x1b[2J"))
    assert "a control character is shown" in fuzz_oom.judge(text)


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=400) | st.binary(max_size=400).map(lambda raw: raw.decode("latin-1")))
def test_any_text_is_answered_or_refused(text):
    try:
        assert read_paste(text).kind
    except GptfitError as error:
        assert "empty" in error.message


@settings(max_examples=100, deadline=None)
@given(text=texts, seed=st.integers(0, 10**6))
def test_nothing_of_a_paste_can_command_a_terminal(text, seed):
    rng = random.Random(seed)
    evil = ("\x1b]0;owned\x07", "\x1b[2J", "\x9b31m", "\x08\x08", "\u202e", "\x1bc", "\x07", "\x1b]8;;http://x\x1b\\")
    for _ in range(12):
        at = rng.randint(0, len(text))
        text = text[:at] + rng.choice(evil) + text[at:]
    facts = read_paste(text)
    shown = [
        facts.wording,
        facts.explanation,
        facts.gpu,
        facts.torch_version,
        *facts.notes,
        *facts.config,
        *facts.config_places,
    ]
    shown += [part for frame in facts.frames for part in (frame.file, frame.function, frame.code)]
    shown += [value for value in facts.config.values() if isinstance(value, str)]
    assert [text for text in shown if not (text.isprintable() or text == "")] == []
    assert all(character.isprintable() or character in "\n\t" for character in printable(text))


# Each would be slow for a pattern that backtracks, or for one that is tried at every place.
UNITS_OF_GARBAGE = (
    *(
        "a",
        "1",
        "1.",
        "1,",
        "> ",
        'File "',
        "File a.py",
        "\\n",
        "\\n  ",
        '{"a":',
        "&lt;",
        "<span ",
        "\x1b[",
        "\x1b]",
        "1%|",
    ),
    *("1it [", "━", "| ", "/a.py:1 in ", "batch_size=", "--batch_size ", "tried to allocate 1", "CUDA out of memory. "),
    *(
        "process 1 has ",
        "torch.Size([1,",
        "empty_strided((1,",
        "aError.",
        "Aa",
        "assertion ",
        "nccl",
        "[rank0]: ",
        "2026-01-01 ",
    ),
    *(
        "out of resource: ",
        "worker(pid",
        "/dev/shm",
        "would exceed",
        "parameters",
        'File "a", line 1, in ',
        "--> 1 ",
        "^~",
        "（",
    ),
)


def patterns() -> list[re.Pattern[str]]:
    """Every regular expression of the package."""
    found: dict[str, re.Pattern[str]] = {}
    for module in pkgutil.iter_modules(gptfit.oom.__path__):
        waiting = [*vars(importlib.import_module(f"gptfit.oom.{module.name}")).values()]
        while waiting:
            value = waiting.pop()
            if isinstance(value, tuple | list):
                waiting += value
            elif isinstance(value, dict):
                waiting += value.values()
            elif isinstance(value, Rule):
                waiting.append(value.pattern)
            elif hasattr(value, "finditer") and isinstance(getattr(value, "pattern", None), str):
                found[value.pattern] = value
    return list(found.values())


def seconds_on(pattern: re.Pattern[str], line: str) -> float:
    begin = time.process_time()
    list(pattern.finditer(line))
    return time.process_time() - begin


def test_no_pattern_takes_more_than_a_line_is_long():
    """Four times the line is some four times the work: sixteen times is what a pattern that goes back takes."""
    slow = []
    for pattern in patterns():
        for unit in ("a", "1", "_", " ", "/", "1.", "a.", "a=", "File ", "x.py:1", "[", "--", "|"):
            short, long = (unit * (length // len(unit)) for length in (2_000, 8_000))
            if seconds_on(pattern, long) > 0.05:
                seconds = [min(seconds_on(pattern, line) for _ in range(3)) for line in (short, long)]
                if seconds[1] > 10 * seconds[0]:
                    slow.append((pattern.pattern[:60], unit, seconds))
    assert slow == []


def test_a_pattern_that_goes_back_is_seen():
    pattern = re.compile(r"\s*x\s*$")
    assert seconds_on(pattern, " " * 16_000) > 10 * seconds_on(pattern, " " * 4_000)


@pytest.mark.parametrize("unit", UNITS_OF_GARBAGE)
def test_a_line_of_a_megabyte_takes_no_time(unit):
    begin = time.process_time()
    line = unit * (1_000_000 // len(unit))
    read_paste(f"Tried to allocate 2.00 GiB. {line}\nCUDA out of memory. Tried to allocate 3.00 GiB.")
    assert time.process_time() - begin < 5


@pytest.mark.parametrize("unit", UNITS_OF_GARBAGE)
def test_garbage_of_one_kind_takes_no_time(unit):
    begin = time.process_time()
    for text in (unit * (60_000 // len(unit)), (unit * (60 // len(unit)) + "\n") * 800):
        try:
            read_paste(text)
        except GptfitError as error:
            assert "empty" in error.message
    assert time.process_time() - begin < 20


LOSS_LINE = "2026-07-12 03:12:11,123 INFO step 100000 loss 3.21 gpu memory 11.2 GB lr 6e-4 dt 123.4ms shared\n"
BAR = "step 100000/600000:  12%|█▏        | 100000/600000 [12:31<1:02:00,  1.32it/s, loss=3.21]\r"


@pytest.mark.parametrize("place", [0, 0.5, 1])
def test_of_a_log_of_fifty_megabytes_a_part_is_read(tmp_path, place):
    message = labelled("004-gpt-backward-quote").replace("> ", "")
    lines = (LOSS_LINE + BAR) * 1000
    blocks = 50_000_000 // len(lines.encode())
    path = tmp_path / "train.log"
    with path.open("w", encoding="utf-8") as file:
        for block in range(blocks + 1):
            file.write(message if block == int(place * blocks) else lines)
    tracemalloc.start()
    begin = time.process_time()
    text = read_log(str(path))
    seconds, (_, peak_bytes) = time.process_time() - begin, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (len(text) < 300_000, peak_bytes < 100 << 20, seconds < 10) == (True, True, True)
    facts = read_paste(text)
    assert (facts.kind, facts.tried_bytes, facts.phase) == ("cuda_caching_allocator", 1 << 30, "backward")


def test_a_figure_is_not_put_together_across_what_is_left_out():
    filler = "x" * 7_000
    text = "Tried to allocate 1." + filler * 60 + "54 GiB. GPU 0" + filler * 60
    assert read_paste(text).tried_bytes is None


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "gb18030"])
def test_a_log_is_read_in_the_encodings_that_shells_write(tmp_path, encoding):
    path = tmp_path / "train.log"
    path.write_bytes(("\0\0" * 300 + labelled("003-gpt-model_load-chinese")).encode(encoding))
    assert read_paste(read_log(str(path))).kind == LABELS["003-gpt-model_load-chinese"]["kind"]
