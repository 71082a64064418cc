"""The reader of pasted out-of-memory texts: the labelled pastes, whatever layout, and nothing made up."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptfit.errors import GptfitError
from gptfit.oom.read import OomFacts, read_paste
from oom_pastes import FIGURES, FRAMES, LABELS, LAYOUTS, STYLES, Paste, cut_at, labelled, written

pastes = st.builds(
    lambda seed, style, phase: written(random.Random(seed), style, phase),
    st.integers(0, 10**6),
    st.sampled_from(STYLES),
    st.sampled_from(sorted(FRAMES)),
)


def read(facts: OomFacts, keys: object) -> dict[str, object]:
    return {key: getattr(facts, key) for key in keys}  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", LABELS)
def test_every_labelled_paste_is_read_as_labelled(name):
    label = LABELS[name]
    keys = [key for key in ("kind", "wording", "phase", *FIGURES) if key in label]
    assert read(read_paste(labelled(name)), keys) == {key: label[key] for key in keys}


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=6, deadline=None)
@given(paste=pastes, seed=st.integers(0, 10**6))
def test_a_layout_does_not_change_the_facts(layout, paste, seed):
    text = "\n".join(LAYOUTS[layout](random.Random(seed), list(paste.lines)))
    assert read(read_paste(text), paste.truth) == paste.truth


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(sorted(LABELS)), width=st.integers(40, 200), seed=st.integers(0, 10**6))
def test_a_labelled_paste_may_be_cut_quoted_or_escaped_once_more(name, width, seed):
    label = LABELS[name]
    keys = [key for key in ("kind", *FIGURES) if key in label]
    lines = labelled(name).splitlines()
    for changed in (
        cut_at(lines, width),
        LAYOUTS["quoted"](random.Random(seed), lines),
        LAYOUTS["entities"](random.Random(seed), lines),
        LAYOUTS["json"](random.Random(seed), lines),
    ):
        assert read(read_paste("\n".join(changed)), keys) == {key: label[key] for key in keys}


@settings(max_examples=150, deadline=None)
@given(paste=pastes, layout=st.sampled_from(["as it is", "cut at 80", "quoted", "any rank"]), data=st.data())
def test_a_torn_paste_tells_less_and_nothing_else(paste, layout, data):
    text = "\n".join(LAYOUTS[layout](random.Random(0), list(paste.lines)))
    middle = data.draw(st.integers(1, len(text) - 1))
    for part in (text[:middle], text[middle:]):
        facts = read_paste(part + ".")
        for key in FIGURES:
            assert getattr(facts, key) in (None, paste.truth[key]), (key, part)


@settings(max_examples=60, deadline=None)
@given(paste=pastes, other=pastes, width=st.sampled_from([0, 80]), seed=st.integers(0, 10**6))
def test_ranks_that_print_between_each_other_are_not_mixed(paste, other, width, seed):
    rng = random.Random(seed)
    parts = [
        [f"[rank{rank}]: {line}" for line in cut_at(list(one.lines), width or 9999)]
        for rank, one in enumerate((paste, other))
    ]
    lines: list[str] = []
    while any(parts):
        lines.append(rng.choice([part for part in parts if part]).pop(0))
    facts = read_paste("\n".join(lines))
    assert read(facts, FIGURES) in (read_from(paste), read_from(other))
    assert facts.phase in (paste.truth["phase"], other.truth["phase"])
    if paste.truth["tried_bytes"] != other.truth["tried_bytes"]:
        assert any("1 other out-of-memory message" in note for note in facts.notes)


def read_from(paste: Paste) -> dict[str, object]:
    return {key: paste.truth[key] for key in FIGURES}


def test_the_message_may_be_the_last_of_a_long_log_or_its_first():
    paste = written(random.Random(3), "torch2.9", "backward")
    noise = "".join(f"2026-07-12 03:12:11,123 INFO step {step} loss 3.21 gpu memory 11.2 GB\n" for step in range(9000))
    for text in (noise + "\n".join(paste.lines), "\n".join(paste.lines) + "\n" + noise):
        assert len(text) > 600_000
        assert read(read_paste(text), paste.truth) == paste.truth


def test_the_frames_are_those_of_the_traceback_that_the_message_ends():
    paste = written(random.Random(1), "torch2.2", "optimizer")
    for layout in ("launcher", "rich", "notebook", "cut at 60", "twice"):
        text = "\n".join(LAYOUTS[layout](random.Random(0), list(paste.lines)))
        frames = read_paste(text).frames
        functions = [function for _, function, _ in FRAMES["optimizer"]]
        assert [frame.function for frame in frames] == functions, layout
        assert frames[-1].code == "exp_avg_sq_sqrt = torch._foreach_sqrt(device_exp_avg_sqs)"
        assert frames[-1].file.endswith("torch/optim/adamw.py")


@pytest.mark.parametrize("text", ["", " \n\t", "\x1b[0m", "\u200b\n"])
def test_an_empty_paste_is_refused(text):
    with pytest.raises(GptfitError, match="empty"):
        read_paste(text)
