"""Whole screens, as printed 80 columns wide; and sums, products and lengths that are worked out again from the text.

`python tests/test_screens.py` writes the present screens to tests/screens; so does `make docs`.
"""

import re
from pathlib import Path

import pytest
from rich.style import Style

from documents import ROOT, run, run_in
from gptfit.memory.tape import DTYPE_BYTES
from gptfit.report.bars import CONTEXT, FREE, KINDS, OTHERS, SLACK, cells
from gptfit.report.formulas import WHY
from gptfit.report.output import PLAIN
from gptfit.units import MiB

SCREENS = Path(__file__).parent / "screens"

COMMANDS = {
    "plan": "plan --gpu rtx4070",
    "plan-nanogpt": "plan batch_size=16 --program nanogpt --gpu rtx4070",
    "plan-nothing-fits": "plan gpt2-xl --gpu gtx1650",
    "plan-tokens": "plan shakespeare-char --gpu rtx3060 --reserve 0 --tokens 1B",
    "estimate": "estimate gpt2 batch_size=6 --gpu rtx4070",
    "estimate-nanogpt": "estimate gpt2 --program nanogpt batch_size=16 --gpu rtx4070",
    "estimate-chars": "estimate shakespeare-char --gpu h100-sxm -v",
    "estimate-formulas": "estimate gpt2 compile=False batch_size=4 --program nanogpt --gpu rtx4070 --formulas",
    "gpus-rtx4070": "gpus rtx4070",
    "models": "models",
    "accuracy": "accuracy",
    "explain-oom": "explain-oom tests/data/oom/008-gpt-forward-plain.txt",
    "replay": "replay tests/data/snapshots/attention-backward-3090.json.gz",
    "error": "plan --gpu rtx4071",
}
ESTIMATES = [name for name in COMMANDS if re.match("(plan|estimate)(?!-nothing)", name)]

# What is to be copied is not wrapped.
COPIED = ("  gptfit ", "  python ", "error: ", "hint: ")
PART = re.compile(r"(?:^| )  ([A-Z=.^#?])  (\S+(?: \S+)*) +([\d,]+\.\d)")
PRODUCT = re.compile(r"(?:(\d+) × )?\[([\d × ]+)\] × (\d) B(?:, each ([\d,]+) B)?  +([\d,]+\.\d)$")


def golden(name: str) -> str:
    return (SCREENS / f"{name}.txt").read_text(encoding="utf-8")


def number(text: str) -> float:
    return float(text.replace(",", ""))


def parts_of(text: str) -> dict[str, float]:
    """MiB by the letter of a part."""
    return {letter: number(figure) for line in text.splitlines() for letter, _, figure in PART.findall(line)}


def bar_of(text: str) -> str:
    return next(line.strip() for line in text.splitlines() if re.fullmatch(r"  [A-Z.#?]{20,}", line))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_screen_is_as_it_was(name: str) -> None:
    assert run(f"gptfit {COMMANDS[name]}") == golden(name), "`make docs` writes the present screens"


def test_no_screen_is_left_over() -> None:
    assert {path.stem for path in SCREENS.glob("*.txt")} == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_screen_fits_a_screen(name: str) -> None:
    lines = golden(name).splitlines()
    assert [line for line in lines if len(line) > 80 and not line.startswith(COPIED)] == []
    assert len(lines) <= 45 or name == "estimate-formulas"


@pytest.mark.parametrize("name", ESTIMATES)
def test_the_parts_of_the_card_add_up(name: str) -> None:
    parts = parts_of(golden(name))
    held = [figure for letter, figure in parts.items() if letter not in "=.^#"]
    assert len(held) >= 6
    # Each is rounded to a tenth, and up to two that would be 0.0 are left out.
    assert parts["="] == pytest.approx(sum(held), abs=0.05 * (len(held) + 3))
    assert parts["="] + parts.get(".", 0.0) == pytest.approx(max(parts["="], parts["^"]), abs=0.16)


@pytest.mark.parametrize("name", ESTIMATES)
def test_a_bar_is_as_long_as_its_part(name: str) -> None:
    text = golden(name)
    parts, bar = parts_of(text), bar_of(text)
    usable, others = parts["^"], parts.get("#", 0.0)
    full = max(parts["="], usable + others)
    mark = text.splitlines()[text.splitlines().index(f"  {bar}") + 1].index("^") - 2
    assert mark + 1 == pytest.approx(len(bar) * usable / full, abs=0.51)
    parts["#"] = full - max(parts["="], usable)
    for letter in parts.keys() - {"=", "^"}:
        assert bar.count(letter) == pytest.approx(len(bar) * parts[letter] / full, abs=1.01), letter
    assert set(bar) <= set(parts)
    assert bar == "".join(letter * bar.count(letter) for letter in dict.fromkeys(bar)), "a part is in two pieces"


@pytest.mark.parametrize("name", ["estimate", "estimate-nanogpt", "estimate-chars"])
def test_what_is_alive_adds_up(name: str) -> None:
    rows = golden(name).partition("alive then")[2].splitlines()[1:13]
    figures = [number(line.split()[-1]) for line in rows]
    assert rows[-1].startswith("  allocated ")
    assert sum(figures[:-1]) == pytest.approx(figures[-1], abs=0.05 * len(figures))
    shaped = [re.split(r"\s{2,}", line.strip()) for line in rows[:10]]
    for _, shape, dtype, count, figure in shaped:
        product = int(count) * DTYPE_BYTES[dtype]
        for length in shape.split("×"):
            product *= int(length)
        assert number(figure) == pytest.approx(product / MiB, abs=0.06)


def test_formulas_give_their_figures_and_the_sums_theirs() -> None:
    text = golden("estimate-formulas")
    sums, figures, checked = [], [], 0
    for line in text.partition("Alive at the peak")[2].splitlines():
        if found := PRODUCT.search(line):
            count, shape, size, each, figure = found.groups()
            n_bytes = int(size)
            for length in shape.split(" × "):
                n_bytes *= int(length)
            n_bytes = int(count or 1) * (int(number(each)) if each else n_bytes)
            assert number(figure) == pytest.approx(n_bytes / MiB, abs=0.051), line
            figures.append(number(figure))
            checked += 1
        elif re.match(r"  \d+ smaller ", line):
            figures.append(number(line.split()[-1]))
        elif line.startswith("  sum "):
            sums.append(number(line.split()[-1]))
            assert sums[-1] == pytest.approx(sum(figures), abs=0.05 * (len(figures) + 1)), line
            figures = []
    categories = re.findall(r"^(\w+(?: \w+)?): ", text, re.MULTILINE)
    assert checked > 40 and len(sums) >= 6 and len(sums) == len(set(categories) & set(WHY)) and not figures
    allocated = re.search(r"allocated, the sum of all: ([\d,.]+) MiB", text)
    assert allocated and number(allocated[1]) == pytest.approx(sum(sums), abs=0.4)


def test_lengths_add_up_and_none_is_off_by_a_cell() -> None:
    for sizes in ([1, 1, 1], [5, 0, 7, 10**12], [0, 3], [10**11 + 7, 3, 2 * 10**11]):
        lengths = cells(sizes, 72)
        assert sum(lengths) == 72
        assert all(abs(n - 72 * size / sum(sizes)) <= 1 for n, size in zip(lengths, sizes, strict=True))


def test_parts_are_told_apart_by_letter_and_by_colour_on_any_background() -> None:
    kinds = (CONTEXT, *KINDS, SLACK, FREE, OTHERS)
    assert len({kind.letter for kind in kinds}) == len(kinds)
    styles = [Style.parse(kind.style) for kind in kinds]
    coloured = [style for style in styles if style.bgcolor is not None]
    assert len({style.bgcolor for style in coloured}) == len(coloured) == len(KINDS) + 1
    # A letter's colour is never left to meet a background that is not its own.
    assert all((style.color is None) == (style.bgcolor is None) for style in styles)


ESCAPE = re.compile(r"\x1b\[([\d;]*)m")


def test_colours_are_for_a_terminal_that_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    command, plain = f"gptfit {COMMANDS['plan']}", golden("plan")
    coloured = run_in(ROOT, command)[1]  # `run` remembers what it printed before
    bare = ESCAPE.sub("", coloured).splitlines()
    assert len(bare) == len(plain.splitlines())
    at = plain.splitlines().index(f"  {bar_of(plain)}")
    assert bare[at].split()[:4] == ["C", "P", "O", "G"], "a colour fills its run, the letter names it"
    assert any(code.startswith(("3", "4")) for code in ESCAPE.findall(coloured))
    monkeypatch.setenv("NO_COLOR", "1")
    without = run_in(ROOT, command)[1]
    assert [line.rstrip() for line in ESCAPE.sub("", without).splitlines()] == plain.splitlines()
    assert set(ESCAPE.findall(without)) <= {"0", "1", "2"}


@pytest.mark.parametrize("width", [40, 200])
@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "explain-oom"])
def test_nothing_overflows(name: str, width: int) -> None:
    lines = run(f"gptfit {COMMANDS[name]}", width).splitlines()
    wide = [line for line in lines if len(line) > min(width, 100) and not line.startswith(COPIED)]
    assert wide == []


def test_all_cards_are_listed_on_a_screen() -> None:
    text = run("gptfit gpus")
    assert len(text.splitlines()) <= 60 and max(map(len, text.splitlines())) <= 80
    names = {path.stem for path in (ROOT / "src" / "gptfit" / "profiles").glob("*.yaml")}
    assert names <= set(text.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_letter_has_a_plain_form(name: str) -> None:
    assert golden(name).translate(PLAIN).isascii()


def write_screens() -> None:
    SCREENS.mkdir(exist_ok=True)
    for name, command in COMMANDS.items():
        (SCREENS / f"{name}.txt").write_text(run(f"gptfit {command}"), encoding="utf-8")


if __name__ == "__main__":
    write_screens()
