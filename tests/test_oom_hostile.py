"""Whatever is pasted: no exception but the one for nothing, no figure that is not there, no command to the terminal,
and no text that takes long."""

import dataclasses
import random
import re
import time
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptfit.errors import GptfitError
from gptfit.logfile import read_log
from gptfit.oom.clean import clean_lines, printable
from gptfit.oom.read import OomFacts, read_paste
from oom_pastes import LABELS, LAYOUTS, UNITS, labelled

FIGURES = [field.name for field in dataclasses.fields(OomFacts) if field.name.endswith("_bytes")]
NAMES = {
    **{name.lower(): size for name, size in UNITS.items()},
    **{f"{unit[0]}b".lower(): UNITS[unit] for unit in list(UNITS)[1:]},
}
texts = st.sampled_from(sorted(LABELS)).map(labelled)


def printed_sizes(text: str) -> set[int]:
    """All sizes that a text prints, or one rank of it, white space, bars and quotes aside: a slow and plain reading."""
    lines = clean_lines(text)
    ranks = {line.rank for line in lines}
    parts = ["".join(line.text for line in lines if rank in ("", line.rank) or not line.rank) for rank in {"", *ranks}]
    plain = "\n".join(re.sub(r"[\s|*`\"'│]", "", part) for part in parts).lower()
    found = re.findall(r"(?=(?<!\d)(\d[\d,]*(?:\.\d+)?)(bytes?|[kmgt]i?b?))", plain)
    sizes: set[int] = set()
    for number, unit in found:
        factor = NAMES.get(unit, UNITS.get(f"{unit[0].upper()}iB", 1))
        forms = {number.replace(",", ""), number.replace(",", ".")}  # a comma may be either mark
        sizes |= {round(float(form) * factor) for form in forms if form.count(".") < 2}
    return sizes


def mutated(rng: random.Random, text: str) -> str:
    """Torn, doubled, shuffled, soiled or laid out anew."""
    first, last = sorted((rng.randint(0, len(text)), rng.randint(0, len(text))))
    lines = text.split("\n")
    rng.shuffle(lines)
    soil = bytes(rng.randrange(256) for _ in range(30)).decode("latin-1")
    return rng.choice(
        (
            text[:first] + text[min(last, first + 40) :],
            text[:first] + text[last:],
            text[:last] + text[first:last] + text[last:],
            "\n".join(lines),
            text[:first] + soil + text[first:],
            text + labelled(rng.choice(sorted(LABELS))),
            "\n".join(LAYOUTS[rng.choice(sorted(LAYOUTS))](rng, text.split("\n"))) if text.count("\n") > 1 else text,
            text.replace("\n", rng.choice((" ", "\r", "\n\n", "\\n", ""))),
            "".join(character * rng.choice((0, *[1] * 30, 2)) for character in text),
        )
    )[:12_000]


@settings(max_examples=300, deadline=None)
@given(text=texts, seed=st.integers(0, 10**6), times=st.integers(1, 4))
def test_a_spoilt_paste_is_read_without_a_figure_that_it_does_not_print(text, seed, times):
    rng = random.Random(seed)
    for _ in range(times):
        text = mutated(rng, text) or text
    try:
        facts = read_paste(text)
    except GptfitError:
        return
    printed = printed_sizes(text)
    stated = {name: getattr(facts, name) for name in FIGURES if name != "other_processes_bytes"}
    assert {name: size for name, size in stated.items() if size is not None and size not in printed} == {}


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
