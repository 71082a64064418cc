"""Stopping a run politely: the first signal asks, the second one is obeyed at once. SIGUSR1 asks for a checkpoint.

Python runs a handler between two of its own instructions, and a backward on a CPU may be one of these for minutes. So
a thread is told of each signal, too, by the interpreter's wakeup file descriptor: it answers at once, and ends the
process where a second signal finds it still busy.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

# Absent on Windows.
SAVE = getattr(signal, "SIGUSR1", None)
HANGUP = getattr(signal, "SIGHUP", None)
STOP = (signal.SIGINT, signal.SIGTERM)

# Seconds in which a second signal may end the run by an exception, which leaves the terminal and the report right.
GRACE = 1.0
SHOW_CURSOR = b"\x1b[?25h"


class Asked:
    """Whether someone asked to stop: the signal's name, or an empty string; and whether to save and go on."""

    def __init__(self) -> None:
        self.signal = ""
        self.save = False


@contextmanager
def stop_on_signal(tell: Callable[[str], object] = lambda text: None) -> Iterator[Asked]:
    """Within the block SIGINT and SIGTERM are noted rather than obeyed; a second one acts as it always did, and where
    that takes more than GRACE seconds, ends the process. SIGUSR1, which Slurm sends where it is told to before it takes
    a machine back, is noted as often as it comes. SIGHUP, of a terminal that is closed, is sent by the shell and by the
    kernel: it asks to stop, and is never the second signal; under nohup it stays ignored. What becomes of a signal is
    told at once, from another thread.

    Outside the main thread, where Python allows no handlers, nothing is caught.
    """
    asked = Asked()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.getsignal(number) for number in STOP}

    def note(number: int, _frame: FrameType | None) -> None:
        asked.signal = signal.Signals(number).name
        restore()

    def restore() -> None:
        for number in STOP:
            signal.signal(number, before[number])

    def note_save(_number: int, _frame: FrameType | None) -> None:
        asked.save = True

    def note_hangup(number: int, _frame: FrameType | None) -> None:
        asked.signal = asked.signal or signal.Signals(number).name

    hangups = [HANGUP] if HANGUP and signal.getsignal(HANGUP) == signal.SIG_DFL else []
    with attended(tell):
        for number in STOP:
            signal.signal(number, note)
        for number in hangups:
            signal.signal(number, note_hangup)
        before_save = signal.signal(SAVE, note_save) if SAVE else None
        try:
            yield asked
        finally:
            restore()
            for number in hangups:
                signal.signal(number, signal.SIG_DFL)
            if SAVE:
                signal.signal(SAVE, before_save)


@contextmanager
def attended(tell: Callable[[str], object]) -> Iterator[None]:
    """Within the block a thread hears of each signal that Python handles."""
    ears, mouth = os.pipe()
    os.set_blocking(mouth, False)  # as set_wakeup_fd wants it
    left = threading.Event()
    thread = threading.Thread(target=attend, args=(ears, tell, left), daemon=True, name="signals")
    thread.start()
    before = signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
    try:
        yield
    finally:
        left.set()
        signal.set_wakeup_fd(before)
        os.write(mouth, b"\0")
        thread.join()
        os.close(ears)
        os.close(mouth)


def attend(ears: int, tell: Callable[[str], object], left: threading.Event) -> None:
    """Answers signals, each a byte in `ears`, until it reads a zero."""
    stopping = hung_up = False

    def say(text: str) -> None:
        with suppress(Exception):  # nobody listens, or not any more
            tell(text)

    while number := os.read(ears, 1)[0]:
        if number == SAVE:
            say("SIGUSR1: saves after this step, and goes on")
        elif number == HANGUP and not hung_up:
            hung_up = True
            say("SIGHUP: the terminal is gone; ends after this step, with a checkpoint")
        elif number in STOP and not stopping:
            stopping = True
            say(f"{signal.Signals(number).name}: ends after this step, with a checkpoint; again to end now")
        elif number in STOP and not left.wait(GRACE):
            end(number, say)


def end(number: int, say: Callable[[str], object]) -> None:
    """Ends the process as the signal would have. Checkpoints are written beside and renamed: the last one is whole."""
    say(f"{signal.Signals(number).name} again: ends now; the last checkpoint is as it was")
    if sys.stderr.isatty():
        os.write(sys.stderr.fileno(), SHOW_CURSOR)
    os._exit(128 + number)


def ignore_save() -> None:
    """A SIGUSR1 that comes before a run can save, or when it is done, is no reason to die of."""
    if SAVE and signal.getsignal(SAVE) == signal.SIG_DFL:
        signal.signal(SAVE, signal.SIG_IGN)
