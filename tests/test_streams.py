"""How a command ends where no answer comes: an error, Ctrl-C, a reader that goes away, a stream closed or full."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def test_debug_shows_where_an_error_came_from(gptfit: Any) -> None:
    quiet, loud = gptfit("estimate", "gpt3"), gptfit("--debug", "estimate", "gpt3")
    assert "Traceback" not in quiet.err
    assert "Traceback" in loud.err
    assert loud.err.endswith(quiet.err)


def test_an_unexpected_error_is_one_line_too(gptfit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("gptfit.presets.preset_names", fail)
    result = gptfit("models")
    assert (result.code, result.out) == (2, "")
    assert result.err.splitlines()[0] == "error: internal error: RuntimeError: first line second line"
    assert "--debug" in result.err


def test_ctrl_c_is_quiet(gptfit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gptfit.presets.preset_names", interrupt)
    result = gptfit("models")
    assert (result.code, result.out, result.err) == (130, "", "")


def test_ctrl_c_is_quiet_while_it_is_imported(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt\n")
    from_there = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for start in (["-m", "gptfit"], ["-c", "from gptfit.__main__ import main; main()"]):
        done = subprocess.run([sys.executable, *start, "models"], env=from_there, capture_output=True, timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


def test_a_reader_that_goes_away_is_no_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "gptfit", "models"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(30) == 0
    process.stderr.close()


@pytest.mark.parametrize(
    ("redirection", "code", "said"),
    [
        ("plan --gpu rtx4070 >&-", 0, ""),
        ("plan --gpu rtx4071 2>&-", 2, ""),
        ("plan --gpu rtx4070 <&- >&- 2>&-", 0, ""),
        ("explain-oom <&-", 2, "error: the pasted text is empty, expected the text of an error"),
        *(
            pytest.param(
                f"{words} > /dev/full",
                2,
                "error: cannot write the answer: no space left on device",
                marks=pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux alone has it"),
            )
            for words in ("estimate --json", "models", "--help", "plan --help", "--version", "data")
        ),
        pytest.param(
            "plan --gpu rtx4071 2> /dev/full",
            2,
            "",
            marks=pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux alone has it"),
        ),
        ("--help | head -1", 0, ""),
        ("plan --gpu rtx4070 --json | head -1", 0, ""),
    ],
)
def test_streams_may_be_closed_or_full(redirection: str, code: int, said: str) -> None:
    line = f"{shlex.quote(sys.executable)} -m gptfit {redirection}"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=60)
    assert done.returncode == code and len(done.stdout.splitlines()) == line.count("| head -1")
    assert (done.stderr.splitlines() or [""])[0] == said
