"""What the documents say is what the program says: outputs, figures and examples in them are made again.

* A block of a shell session, `console`, is one command behind `$` and all that it prints.
* `<!--= expression -->text<!--/-->` is the expression's value. Its names are those of figures.py, and those that the
  page sets in a block `<!-- figures … -->`.
* A block `pycon` is a Python session from the top of the page to its end; what it prints is made again, too.
* A block `sh` is a list of commands: each is run, in a folder of its own, unless NOT_RUN says why it is not.

`make docs` writes them all.
"""

import contextlib
import doctest
import io
import os
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from gptfit.cli import main

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))

SESSION = re.compile(r"^```console\n\$ (gptfit [^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHELL = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PYTHON = re.compile(r"^```pycon\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
SETTING = re.compile(r"^<!-- figures\n(.*?)^-->$", re.MULTILINE | re.DOTALL)
VALUE = re.compile(r"<!--=(.*?)-->(.*?)<!--/-->", re.DOTALL)

# What a page may show without its being run here, and why.
NOT_RUN = {
    "gptfit train": "trains for minutes; tests/test_train.py runs it",
    "gptfit sample": "needs a trained run; tests/test_train.py",
    "gptfit export": "needs a trained run; tests/test_export.py",
    "gptfit data prepare": "needs the user's text; tests/test_data.py",
    "python": "nanoGPT's own scripts are not here",
    "torchrun": "needs several GPUs; tests/test_distributed.py runs two processes",
}


@cache
def run(command: str, width: int = 80) -> str:
    """What `gptfit …` prints on a pipe so many columns wide, or its error."""
    return run_in(ROOT, command, width)[1]


def run_in(folder: Path, command: str, width: int = 80) -> tuple[int, str]:
    """The exit code, too, where it runs in `folder`."""
    code = 0
    with captured(folder, width) as printed:
        try:
            main(shlex.split(command, comments=True)[1:])
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, printed.getvalue()


@contextlib.contextmanager
def captured(folder: Path, width: int = 80) -> Iterator[io.StringIO]:
    """What is printed, on a machine without a GPU and without measurements of its own."""
    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        patch.setenv("COLUMNS", str(width))
        patch.setenv("GPTFIT_PROFILES", os.devnull)
        for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "WORLD_SIZE", "RANK"):  # a trainer sets these
            patch.delenv(name, raising=False)
        patch.setattr("gptfit.driver.detect", list)
        patch.setattr(sys, "displayhook", lambda value: print(repr(value)) if value is not None else None)
        patch.chdir(folder)
        yield shown


def refreshed(text: str) -> str:
    """The page as it would be written now."""
    text = SESSION.sub(lambda match: f"```console\n$ {match[1]}\n{run(match[1])}```", text)
    return with_values(with_python(text))


def with_values(text: str) -> str:
    import figures

    names: dict[str, Any] = dict(vars(figures))
    for setting in SETTING.findall(text):
        exec(setting, names)
    return VALUE.sub(lambda match: f"<!--={match[1]}-->{eval(textwrap.dedent(match[1]).strip(), names)}<!--/-->", text)


def with_python(text: str) -> str:
    """Each example of a Python session, and what it prints."""
    names: dict[str, Any] = {}

    def session(match: re.Match[str]) -> str:
        lines: list[str] = []
        for example in doctest.DocTestParser().get_examples(match[1]):
            first, *rest = example.source.splitlines()
            lines += [f">>> {first}", *(f"... {line}" for line in rest), *printed(example.source, names)]
        return "```pycon\n" + "".join(f"{line}\n" for line in lines) + "```"

    return PYTHON.sub(session, text) if PYTHON.search(text) else text


def printed(source: str, names: dict[str, Any]) -> list[str]:
    with captured(ROOT) as shown:
        exec(compile(source, "<page>", "single"), names)
    return shown.getvalue().splitlines()


def shell_commands(block: str) -> list[str]:
    """The lines of an `sh` block, those that go on behind a backslash as one."""
    lines = (line.strip() for line in block.replace("\\\n", " ").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def reason_not_to_run(command: str) -> str | None:
    words = shlex.split(command, comments=True)
    if "--print" in words:  # prints how to start a run
        return None
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    return next(
        (NOT_RUN[name] for name in (" ".join(words[:3]), " ".join(words[:2]), words[0]) if name in NOT_RUN), None
    )


def prose(text: str) -> str:
    """The page without blocks, code, and what is computed."""
    return re.sub(r"`[^`\n]+`", "", VALUE.sub("", SETTING.sub("", FENCE.sub("", text))))
