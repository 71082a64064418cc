"""The README says what the program does: outputs are run again, commands and options exist, no figure stands alone.

`python tests/test_docs.py` writes the present outputs into README.md.
"""

import contextlib
import io
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from gptfit.cli import app, main

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = (README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md")

# A block of a shell session: one command behind `$`, and all that it prints.
SESSION = re.compile(r"^```console\n\$ (gptfit [^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
FIGURE = re.compile(r"\d[\d.,]*\s*(?:[KMGT]i?B\b|tokens/s|%|times\b|x faster)")

root = typer.main.get_command(app)


def run(command: str, width: int = 80) -> str:
    """What `gptfit …` prints on a pipe so many columns wide, or its error."""
    printed = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        patch.setenv("COLUMNS", str(width))
        patch.setenv("GPTFIT_PROFILES", os.devnull)
        patch.chdir(ROOT)
        with contextlib.suppress(SystemExit):
            main(shlex.split(command)[1:])
    return printed.getvalue()


def sessions() -> list[tuple[str, str]]:
    return SESSION.findall(README.read_text(encoding="utf-8"))


def typed_commands() -> list[str]:
    """Every command line in the documents: behind `$` or at the start of a line in a block, or in backticks."""
    found: list[str] = []
    for path in DOCS:
        text = path.read_text(encoding="utf-8")
        for fence in FENCE.findall(text):
            found += re.findall(r"^(?:\$ )?((?:gptfit|make) [^\n#]*)", fence, re.MULTILINE)
        found += re.findall(r"`((?:gptfit|make) [^`\n]*)`", FENCE.sub("", text))
    return sorted({command.strip() for command in found})


def commands_of(group: Any, path: str = "") -> dict[str, Any]:
    """All commands by the words that reach them: `plan`, `data prepare`."""
    found: dict[str, Any] = {}
    for name, command in getattr(group, "commands", {}).items():
        words = f"{path} {name}".strip()
        found |= commands_of(command, words) if hasattr(command, "commands") else {words: command}
    return found


COMMANDS = commands_of(root)


@pytest.mark.parametrize("command, printed", sessions(), ids=[command for command, _ in sessions()])
def test_an_output_in_the_readme_is_what_the_command_prints(command: str, printed: str) -> None:
    assert run(command) == printed, "python tests/test_docs.py writes the present output"


@pytest.mark.parametrize("line", typed_commands())
def test_a_command_in_the_documents_exists(line: str) -> None:
    program, *words = shlex.split(line)
    if program == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[0] in targets
        return
    if words[0].startswith("-"):
        return
    name = next((name for name in (" ".join(words[:2]), words[0]) if name in COMMANDS), None)
    assert name is not None, f"there is no command {words[0]}"
    options = {option for parameter in COMMANDS[name].params for option in (*parameter.opts, *parameter.secondary_opts)}
    for word in words:
        if word.startswith("-") and "=" not in word and word != "-":
            assert word in options | {"--help", "-h", "--debug"}, f"{name} has no option {word}"


def test_every_command_is_in_the_readme() -> None:
    text = README.read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f"gptfit {name}" not in text] == []


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_no_figure_stands_outside_of_an_output(path: Path) -> None:
    assert FIGURE.findall(FENCE.sub("", path.read_text(encoding="utf-8"))) == []


def test_the_readme_shows_outputs() -> None:
    assert len(sessions()) >= 2


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str) -> None:
    text = run(f"gptfit {name} --help")
    assert text.startswith(f"Usage: gptfit {name}")
    assert len(text.splitlines()) > 4
    assert max(map(len, text.splitlines())) <= 100
    for parameter in COMMANDS[name].params:
        if not getattr(parameter, "hidden", False):
            assert parameter.help, f"{name} {parameter.opts} has no help"


def write_outputs() -> None:
    text = README.read_text(encoding="utf-8")
    text = SESSION.sub(lambda match: f"```console\n$ {match[1]}\n{run(match[1])}```", text)
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    os.chdir(ROOT)
    write_outputs()
