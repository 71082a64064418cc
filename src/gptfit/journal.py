"""events.jsonl: what happened to a run beside its steps, a line each, so that its report can be made again.

Nothing is ever taken back: a step that a resume does again has happened twice. No run ends for its journal.
"""

import json
import platform
import shlex
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gptfit import __version__
from gptfit.errors import GptfitError
from gptfit.events import NAME, Event, Finished, Listener, Measured, Note, Sampled, Saved, Started, Stepped

PACKAGES = ("torch", "numpy")
MAX_TEXT = 2000  # characters of a note or a sample that are kept


class Journal:
    """A listener that tells `listener` too. `launched` is what was known before the run; it is written, and the folder
    touched, once the run has started."""

    def __init__(self, folder: Path, launched: Mapping[str, Any], listener: Listener) -> None:
        self.folder, self.listener = folder, listener
        self.step = 0
        self.started = False
        self.waiting = [line("launched", 0, **launched)]
        self.lock = threading.Lock()  # a signal is told of by a thread of its own

    def __call__(self, event: Event) -> None:
        self.listener(event)
        if isinstance(event, Stepped):
            self.step = event.step
            return
        if isinstance(event, Started):
            self.step, self.started = event.step, True
        self.write(line(type(event).__name__.lower(), self.step, **told(event)))

    def write(self, entry: str) -> None:
        with self.lock:
            self.waiting.append(entry)
            if self.started:
                with suppress(OSError), (self.folder / NAME).open("a", encoding="utf-8") as file:
                    file.write("".join(self.waiting))
                    self.waiting.clear()


def line(kind: str, step: int, **values: Any) -> str:
    return json.dumps({"event": kind, "at": round(time.time(), 3), "step": step, **values}) + "\n"


def told(event: Event) -> dict[str, Any]:
    """What is kept of an event beside its kind and step."""
    if isinstance(event, Started):
        run = event.run
        return {
            "device": event.device,
            "n_params": event.n_params,
            "data": event.data,
            "n_train_tokens": event.n_train_tokens,
            "tokenizer": event.tokenizer,
            "max_iters": run.max_iters,
            "batch_size": run.batch_size,
            "gradient_accumulation_steps": run.gradient_accumulation_steps,
        }
    if isinstance(event, Note | Sampled):
        return {"text": event.text[:MAX_TEXT]}
    if isinstance(event, Measured):
        return {
            "allocated_bytes": event.allocated_bytes,
            "reserved_bytes": event.reserved_bytes,
            "card_used_bytes": event.card_used_bytes,
            "predicted": dict(event.predicted),
        }
    if isinstance(event, Saved):
        return {"path": event.path.name}
    if isinstance(event, Finished):
        return {"seconds": round(event.seconds, 3), "stopped_by": event.stopped_by}
    return {}


def surroundings() -> dict[str, Any]:
    """The command that was typed, and the versions that it ran with."""
    found = {"gptfit": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return {"command": shlex.join(["gptfit", *sys.argv[1:]]), "versions": found, "platform": platform.platform()}


@contextmanager
def journaled(folder: Path, launched: Mapping[str, Any], listener: Listener) -> Iterator[Journal]:
    """A listener for train(), which leaves events.jsonl and report.html in the folder, however the run ends."""
    journal = Journal(folder, {**surroundings(), **launched}, listener)
    try:
        yield journal
    except BaseException as error:
        text = error.message if isinstance(error, GptfitError) else f"{type(error).__name__}: {error}"
        journal.write(line("failed", journal.step, text=text[:MAX_TEXT]))
        raise
    finally:
        if journal.started:
            listener(Note(leave_report(folder)))


def leave_report(folder: Path) -> str:
    """Writes the report; a line that says where it is, or why there is none."""
    try:
        from gptfit.report.html_run import write_report
        from gptfit.report.run_facts import read_run

        return f"report {write_report(read_run(folder))}"
    except Exception as error:  # a page about the run must not be its end
        reason = error.message if isinstance(error, GptfitError) else f"{type(error).__name__}: {error}"
        return f"no report: {reason.splitlines()[0][:200] if reason else ''}"
