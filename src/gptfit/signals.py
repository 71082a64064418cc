"""Stopping a run politely: the first signal asks, the second one is obeyed at once."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Asked:
    """Whether someone asked to stop: the signal's name, or an empty string."""

    def __init__(self) -> None:
        self.signal = ""


@contextmanager
def stop_on_signal() -> Iterator[Asked]:
    """Within the block SIGINT and SIGTERM are noted rather than obeyed; a second one acts as it always did.

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

    for number in numbers:
        signal.signal(number, note)
    try:
        yield asked
    finally:
        restore()
