"""What several test files share."""

import os
from typing import Any

import pytest

# What was measured on this machine's own card is no matter of the tests: those of overlays name a folder of theirs.
os.environ["GPTFIT_PROFILES"] = os.devnull


class Result:
    """What one command left: exit code, stdout, stderr."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def gptfit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs one command in this process, on a machine without a GPU."""
    from gptfit import cli

    monkeypatch.setattr("gptfit.driver.detect", list)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*words: str) -> Result:
        with pytest.raises(SystemExit) as end:
            cli.main(words)
        printed = capsys.readouterr()
        assert isinstance(end.value.code, int)
        return Result(end.value.code, printed.out, printed.err)

    return run
