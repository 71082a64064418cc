"""Spoilt pastes through the whole of explain-oom: `python tests/fuzz_oom.py 10000` runs that many cases by hand.

What must hold of every answer is in `judge`; the tests run some hundred cases of it.
"""

import io
import json
import random
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from gptfit.asked import Asked
from gptfit.errors import GptfitError
from gptfit.oom.clean import clean_lines
from gptfit.oom.diagnose import Diagnosis, explain_text
from gptfit.oom.tensors import prints_as
from gptfit.report.lists import NOTHING, diagnosis_view
from oom_pastes import LABELS, LAYOUTS, UNITS, labelled

SECONDS = 5.0
EVIL = ("\x1b]0;owned\x07", "\x1b[2J", "\x9b31m", "\x08\x08", "\u202e", "\x1bc", "\x07", "\x1b]8;;http://x\x1b\\", "\0")
HUGE = ("9" * 30, "1" + "0" * 400, "1e999", "-1", "0", "nan", "inf", "17179869184.00", "999999999999.99", "٣", "²")
KEYS = ("batch_size", "n_layer", "n_embd", "n_head", "block_size", "vocab_size", "gradient_accumulation_steps", "depth")
FIGURES = (
    *("tried_bytes", "total_bytes", "free_bytes", "process_bytes", "allocated_bytes", "reserved_bytes"),
    "reserved_unallocated_bytes",
)
NAMES = {
    **{name.lower(): size for name, size in UNITS.items()},
    **{f"{unit[0]}b".lower(): UNITS[unit] for unit in list(UNITS)[1:]},
}
Spoil = Callable[[random.Random, str], str]


def _span(rng: random.Random, text: str) -> tuple[int, int]:
    first, last = sorted((rng.randint(0, len(text)), rng.randint(0, len(text))))
    return first, last


def _cut(rng: random.Random, text: str) -> str:
    first, last = _span(rng, text)
    return rng.choice((text[:first] + text[min(last, first + 40) :], text[:first] + text[last:], text[first:last]))


def _doubled(rng: random.Random, text: str) -> str:
    first, last = _span(rng, text)
    return text[:last] + text[first:last] * rng.randint(1, 3) + text[last:]


def _shuffled(rng: random.Random, text: str) -> str:
    lines = text.split("\n")
    rng.shuffle(lines)
    return "\n".join(lines)


def _interleaved(rng: random.Random, text: str) -> str:
    """Two pastes, line by line, as two processes write to one file."""
    sides = [text.split("\n"), labelled(rng.choice(sorted(LABELS))).split("\n")]
    found = []
    while any(sides):
        found.append(rng.choice([side for side in sides if side]).pop(0))
    return "\n".join(found)


def _soiled(rng: random.Random, text: str) -> str:
    at = rng.randint(0, len(text))
    return text[:at] + bytes(rng.randrange(256) for _ in range(60)).decode("latin-1") + text[at:]


def _evil(rng: random.Random, text: str) -> str:
    for _ in range(12):
        at = rng.randint(0, len(text))
        text = text[:at] + rng.choice(EVIL) + text[at:]
    return text


def _huge(rng: random.Random, text: str) -> str:
    """Some of the numbers, or all, replaced by others."""
    share = rng.choice((0.1, 0.5, 1))
    return re.sub(r"\d+(?:\.\d+)?", lambda found: rng.choice(HUGE) if rng.random() < share else found.group(), text)


def _keys(rng: random.Random, text: str) -> str:
    """Keys of a run that nobody could train, or that anyone could."""
    value = rng.choice((*HUGE, "1", "7", "64", "1000", "100000000", "999999999999"))
    return "\n".join(f"Overriding: {key} = {value}" for key in rng.sample(KEYS, rng.randint(1, 4))) + "\n" + text


def _long(rng: random.Random, text: str) -> str:
    """A line of a megabyte somewhere."""
    at = rng.randint(0, len(text))
    unit = rng.choice(
        ("a", "1", "1.", "Tried to allocate ", "\x1b[", '{"a":', "> ", "|", " ", "\\n", "[rank0]: ", "é█")
    )
    return text[:at] + unit * (1_000_000 // len(unit)) + rng.choice(("\n", "")) + text[at:]


def _laid_out(rng: random.Random, text: str) -> str:
    return "\n".join(LAYOUTS[rng.choice(sorted(LAYOUTS))](rng, text.split("\n"))) if text.count("\n") > 1 else text


def _stuttered(rng: random.Random, text: str) -> str:
    return "".join(character * rng.choice((0, *[1] * 30, 2)) for character in text)


def _rejoined(rng: random.Random, text: str) -> str:
    return text.replace("\n", rng.choice((" ", "\r", "\n\n", "\\n", "")))


SPOILS: tuple[Spoil, ...] = (_cut, _doubled, _shuffled, _interleaved, _soiled, _evil, _huge, _keys, _laid_out)
SPOILS += (_stuttered, _rejoined)


def spoilt(seed: int) -> str:
    """A labelled paste, spoilt one to four times; one in fifty with a line of a megabyte in it."""
    rng = random.Random(seed)
    text = labelled(rng.choice(sorted(LABELS)))
    for _ in range(rng.randint(1, 4)):
        text = rng.choice(SPOILS)(rng, text)[:20_000] or text
    return _long(rng, text) if rng.random() < 0.02 else text


def printed_sizes(text: str) -> set[int]:
    """All sizes that a text prints, or one rank of it, bars and quotes aside, with white space and without: a slow and
    plain reading."""
    lines = clean_lines(text)
    ranks = {line.rank for line in lines}
    parts = ["".join(line.text for line in lines if rank in ("", line.rank) or not line.rank) for rank in {"", *ranks}]
    bare = [re.sub(r"[|*\\`\"'│]", "", part) for part in parts]
    plain = "\n".join([*(re.sub(r"\s", "", part) for part in bare), *bare]).lower()
    found = re.findall(r"(?=(?<!\d)(\d[\d,]*(?:\.\d+)?)\s?(bytes?|[kmgt]i?b?))", plain)
    sizes: set[int] = set()
    for number, unit in found:
        factor = NAMES.get(unit, UNITS.get(f"{unit[0].upper()}iB", 1))
        forms = {number.replace(",", ""), number.replace(",", ".")}  # a comma may be either mark
        sizes |= {round(float(form) * factor) for form in forms if form.count(".") < 2 and len(form) < 40}
    return sizes


def shown(answer: Diagnosis, asked: Asked = NOTHING) -> str:
    """What a person sees at 80 columns."""
    screen = io.StringIO()
    console = Console(file=screen, width=80, force_terminal=False, highlight=False, markup=False, emoji=False)
    for part in diagnosis_view(answer, asked):
        console.print(part, soft_wrap=bool(getattr(part, "no_wrap", False)))
    return "".join(f"{line.rstrip()}\n" for line in screen.getvalue().splitlines())


def judge(text: str) -> list[str]:
    """What is wrong with the answer to `text`; nothing, most of the time."""
    begin = time.process_time()
    try:
        answer = explain_text(text)
    except GptfitError as error:
        return [] if "empty" in error.message else [f"refused: {error.message}"]
    wrong = []
    screen, record = shown(answer), json.dumps(answer.to_json(), allow_nan=False)
    seconds = time.process_time() - begin
    if seconds > SECONDS:
        wrong.append(f"took {seconds:.1f} s")
    if not all(character.isprintable() or character == "\n" for character in screen + record):
        wrong.append("a control character is shown")
    if len(text) < 100_000:
        printed = printed_sizes(text)
        stated = {name: getattr(answer.facts, name) for name in FIGURES}
        wrong += [f"{name} {size}" for name, size in stated.items() if size is not None and size not in printed]
    tensor, tried = answer.tensor, answer.facts.tried_bytes
    if tensor and tensor.confidence == "exact" and tried is not None and not prints_as(tensor.n_bytes, tried):
        wrong.append(f"{tensor} is no {tried}")
    return wrong


def main(cases: int, begin: int = 0) -> int:
    """Runs the cases; spoilt texts that are answered wrongly are kept in the working directory."""
    failed = 0
    for seed in range(begin, begin + cases):
        text = spoilt(seed)
        try:
            wrong = judge(text)
        except Exception as error:
            wrong = [f"{type(error).__name__}: {error}"]
        if wrong:
            failed += 1
            print(seed, "; ".join(wrong)[:300], flush=True)
            Path(f"fuzz-{seed}.txt").write_text(text, encoding="utf-8", errors="surrogateescape")
    print(f"{cases} cases, {failed} wrong")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:3])))
