"""The documents say what the program does: what they show is made again, what they name exists, links lead somewhere.

How: documents.py. `python tests/test_docs.py` (`make docs`) writes the present outputs and figures.
"""

import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from documents import (
    FENCE,
    NOT_RUN,
    PAGES,
    README,
    ROOT,
    SESSION,
    SETTING,
    SHELL,
    VALUE,
    prose,
    reason_not_to_run,
    refreshed,
    run,
    run_in,
    shell_commands,
)
from figures import COMMANDS, public_functions

DOCS = (README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *PAGES)
FIGURE = re.compile(r"\d[\d.,]*\s*(?:[KMGT]i?B\b|tokens/s|%|times\b|x faster)")
COMMENT = re.compile(r"<!--(.*?)-->")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def sessions() -> list[tuple[str, str]]:
    return SESSION.findall(README.read_text(encoding="utf-8"))


def typed_commands() -> list[str]:
    """Every command line in the documents: behind `$` or at the start of a line in a block, or in backticks."""
    found: list[str] = []
    for path in DOCS:
        text = path.read_text(encoding="utf-8")
        for fence in FENCE.findall(text):
            if not fence.startswith("```text"):
                found += re.findall(r"^(?:\$ )?((?:gptfit|make) [^\n#]*)", fence, re.MULTILINE)
        found += re.findall(r"`((?:gptfit|make) [^`\n]*)`", FENCE.sub("", text))
    return sorted({command.strip() for command in found})


@pytest.mark.parametrize("command, printed", sessions(), ids=[command for command, _ in sessions()])
def test_an_output_in_the_readme_is_what_the_command_prints(command: str, printed: str) -> None:
    assert run(command) == printed, "python tests/test_docs.py writes the present output"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_is_what_the_program_says(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text == refreshed(text), "make docs writes the present page"


def blocks_to_run() -> list[tuple[str, ...]]:
    """The commands of each block that are not listed as not to be run."""
    blocks = [block for page in PAGES for block in SHELL.findall(page.read_text("utf-8"))]
    commands = (tuple(line for line in shell_commands(block) if reason_not_to_run(line) is None) for block in blocks)
    return sorted(set(filter(None, commands)))


@pytest.mark.parametrize("lines", blocks_to_run(), ids=lambda lines: lines[0])
def test_the_commands_of_a_block_run(lines: tuple[str, ...], tmp_path: Path) -> None:
    """Each answers, yes or no. Outputs are not shown, so not compared."""
    shutil.copytree(ROOT / "docs" / "examples", tmp_path / "docs" / "examples")
    for line in lines:
        assert line.startswith("gptfit "), f"neither run nor listed as not to be run: {line}"
        code, printed = run_in(tmp_path, line)
        assert code in (0, 1), printed


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


def test_what_is_not_run_is_shown_somewhere() -> None:
    """A reason that nothing needs any more has to go."""
    blocks = [block for page in PAGES for block in SHELL.findall(page.read_text("utf-8"))]
    lines = [line for block in blocks for line in shell_commands(block)]
    assert {reason_not_to_run(line) for line in lines} - {None} == set(NOT_RUN.values())


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_no_figure_stands_outside_of_an_output(path: Path) -> None:
    assert FIGURE.findall(prose(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_a_link_leads_to_a_file_and_a_heading(path: Path) -> None:
    for target in LINK.findall(FENCE.sub("", path.read_text(encoding="utf-8"))):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name) if name else path
        assert file.exists(), f"{target} is no file"
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{target}: no such heading"


def anchors(text: str) -> list[str]:
    """Headings as GitHub links them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_can_be_found_and_read(page: Path) -> None:
    """The README leads to it; a comment at the start of a line would swallow the words behind it."""
    text = page.read_text(encoding="utf-8")
    assert f"docs/{page.name}" in README.read_text(encoding="utf-8")
    for line in VALUE.sub("…", SETTING.sub("", FENCE.sub("", text))).splitlines():
        assert len(line) <= 120 or line.startswith("|"), line
    for line in prose_lines(text):
        comment = re.match(r"<!--.*?-->", line)
        assert comment is None or line in (comment[0], f"{comment[0]}<!--/-->"), f"words behind a comment: {line}"


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_a_page_renders(path: Path) -> None:
    """What is computed stays hidden from a reader, and no mark-up is left over."""
    text = path.read_text(encoding="utf-8")
    # GitHub's Markdown ends a comment inside of a line at two dashes.
    inside = [comment for line in prose_lines(text) if line[:4] != "<!--" for comment in COMMENT.findall(line)]
    assert [comment for comment in inside if "--" in comment] == []
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    shown = re.sub(r"<!--.*?-->|<code.*?</code>", "", html, flags=re.DOTALL)
    assert re.findall(r"&lt;!--|\*\*|`|\]\(|^\|.*", shown, re.MULTILINE) == []
    assert html.count("<table>") == len(re.findall(r"^\|[ :|-]+\|$", FENCE.sub("", text), re.MULTILINE))


def prose_lines(text: str) -> list[str]:
    return SETTING.sub("", FENCE.sub("", text)).splitlines()


def test_the_readme_shows_outputs() -> None:
    assert len(sessions()) >= 2


def test_every_function_is_in_the_pages() -> None:
    text = (ROOT / "docs" / "python-api.md").read_text(encoding="utf-8")
    assert [name for name in public_functions() if f"gptfit.{name}(" not in text] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str) -> None:
    text = run(f"gptfit {name} --help")
    assert text.startswith(f"Usage: gptfit {name}")
    assert len(text.splitlines()) > 4
    assert max(map(len, text.splitlines())) <= 100
    for parameter in COMMANDS[name].params:
        if not getattr(parameter, "hidden", False):
            assert parameter.help, f"{name} {parameter.opts} has no help"


def write(paths: list[str]) -> None:
    for path in map(Path, paths) if paths else (README, *PAGES):
        text = path.read_text(encoding="utf-8")
        path.write_text(refreshed(text), encoding="utf-8")


if __name__ == "__main__":
    os.chdir(ROOT)
    write(sys.argv[1:])
