"""Stopping a run politely: the first signal asks, the second one is obeyed at once. SIGUSR1 asks for a checkpoint."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# Absent on Windows.
SAVE = getattr(signal, "SIGUSR1", None)


class Asked:
    """Whether someone asked to stop: the signal's name, or an empty string; and whether to save and go on."""

    def __init__(self) -> None:
        self.signal = ""
        self.save = False


@contextmanager
def stop_on_signal() -> Iterator[Asked]:
    """Within the block SIGINT and SIGTERM are noted rather than obeyed; a second one acts as it always did. SIGUSR1,
    which Slurm sends where it is told to before it takes a machine back, is noted as often as it comes.

    Outside the main thread, where Python allows no handlers, nothing is caught.
    """
    asked = Asked()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}

    def note(number: int, _frame: FrameType | None) -> None:
        asked.signal = signal.Signals(number).name
        restore()

    def restore() -> None:
        for number in numbers:
            signal.signal(number, before[number])

    def note_save(_number: int, _frame: FrameType | None) -> None:
        asked.save = True

    for number in numbers:
        signal.signal(number, note)
    before_save = signal.signal(SAVE, note_save) if SAVE else None
    try:
        yield asked
    finally:
        restore()
        if SAVE:
            signal.signal(SAVE, before_save)
