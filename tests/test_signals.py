"""Signals while the interpreter is busy elsewhere, and when there is nothing to save."""

import shlex
import signal
import subprocess
import sys
import threading
import time

import pytest

from gptfit import signals
from gptfit.cli import main

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")

# hashlib lets other threads run, as torch does, and lets no handler of Python's run before it is done: minutes here.
BUSY = """
import hashlib, sys
from gptfit.signals import stop_on_signal
with stop_on_signal(lambda text: print(text, file=sys.stderr, flush=True)):
    print("busy", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"a", b"b", 2_000_000_000)
"""

QUIET = """
import os, signal
from gptfit.signals import ignore_save, stop_on_signal
ignore_save()
os.kill(os.getpid(), signal.SIGUSR1)
with stop_on_signal() as asked:
    os.kill(os.getpid(), signal.SIGUSR1)
    assert asked.save
os.kill(os.getpid(), signal.SIGUSR1)
print("alive")
"""


def busy() -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", BUSY], stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None and process.stdout.readline() == "busy\n"
    time.sleep(0.5)  # for it to be inside of the call
    return process


def line_of(process: subprocess.Popen[str], seconds: float = 10) -> str:
    assert process.stderr is not None
    too_late = threading.Timer(seconds, process.kill)
    too_late.start()
    try:
        return process.stderr.readline()
    finally:
        too_late.cancel()


@pytest.mark.parametrize(
    ("first", "second"), [("SIGTERM", "SIGINT"), ("SIGINT", "SIGINT"), ("SIGTERM", "SIGTERM")]
)  # fmt: skip
def test_a_long_call_is_no_excuse_for_silence(first: str, second: str) -> None:
    process = busy()
    try:
        process.send_signal(getattr(signal, first))
        assert line_of(process) == f"{first}: ends after this step, with a checkpoint; again to end now\n"
        assert process.poll() is None
        process.send_signal(getattr(signal, second))
        began = time.monotonic()
        assert line_of(process) == f"{second} again: ends now; the last checkpoint is as it was\n"
        assert process.wait(10) == 128 + getattr(signal, second)
        assert time.monotonic() - began < 5
    finally:
        process.kill()
        process.communicate()


def test_a_checkpoint_asked_for_is_answered_at_once_each_time() -> None:
    process = busy()
    try:
        for _ in range(2):
            process.send_signal(signal.SIGUSR1)
            assert line_of(process) == "SIGUSR1: saves after this step, and goes on\n"
    finally:
        process.kill()
        process.communicate()


def test_there_is_no_moment_at_which_asking_for_a_checkpoint_kills() -> None:
    done = subprocess.run([sys.executable, "-c", QUIET], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr


def test_the_command_never_dies_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    try:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
        with pytest.raises(SystemExit):
            main(["train", "no-such-preset"])
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_nothing_is_left_behind() -> None:
    before = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(before)
    n_threads = threading.active_count()
    with signals.stop_on_signal():
        assert threading.active_count() == n_threads + 1
    assert threading.active_count() == n_threads
    assert signal.set_wakeup_fd(before) == before


HANGS_UP = """
import os, signal, sys
from gptfit.signals import stop_on_signal
told = []
with stop_on_signal(told.append) as asked:
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGHUP)
    print(asked.signal, flush=True)
print(told)
os.kill(os.getpid(), signal.SIGHUP)
print("alive")
"""


@pytest.mark.parametrize(("before", "code", "said"), [("", -1, ["SIGHUP"]), ("trap '' HUP;", 0, ["", "[]", "alive"])])
def test_a_closed_terminal_asks_to_stop_and_nohup_keeps_from_it(before: str, code: int, said: list[str]) -> None:
    """The shell and the kernel both send it, so that the second one must not end the run at once."""
    line = f"{before} exec {shlex.quote(sys.executable)} -c {shlex.quote(HANGS_UP)}"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=60)
    lines = done.stdout.splitlines()
    assert (done.returncode, lines[: len(said)]) == (code, said), done.stderr
    if code:
        assert lines[1:] == ["['SIGHUP: the terminal is gone; ends after this step, with a checkpoint']"]
