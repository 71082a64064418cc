"""What a run shows while it goes: one live line on a terminal, plain lines elsewhere. All of it to stderr."""

import math
import shlex
import sys
import threading
import time
from contextlib import suppress
from typing import Any, TextIO, cast

from rich.console import Console
from rich.live import Live
from rich.text import Text

from gptfit.config import RunConfig
from gptfit.events import Event, Finished, Measured, Note, Sampled, Saved, Started, Stepped
from gptfit.forms import refusal
from gptfit.units import counted, format_bytes

# Columns of the narrowest terminal that is usual.
WIDTH = 80

# Weight of the newest step in the average that the remaining time is reckoned with.
SMOOTHING = 0.1

# Seconds without a line, after which a step is told of though none is due.
SILENCE = 60.0
# Seconds that a first step is waited for in silence, and how long it must take to be worth a line of its own.
PATIENCE, SLOW = 20.0, 10.0


class Lasting:
    """A stream that may break (a pipe whose reader ends, a terminal that is closed, a full disk): what is said then is
    lost, and nothing else. No run ends for that."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):  # ValueError: it is closed
            return self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class Progress:
    """A listener for train(). Use it as a context manager: leaving it puts the terminal right."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.console = Console(file=cast(TextIO, Lasting(stream or sys.stderr)), highlight=False, soft_wrap=True)
        self.live = Live(console=self.console, refresh_per_second=4, transient=True)
        self.run: RunConfig | None = None
        self.max_iters = self.log_interval = 1
        self.seconds: float | None = None
        self.steps = 0
        self.told = 0.0
        self.waiting: threading.Timer | None = None

    def __enter__(self) -> "Progress":
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._no_longer_waiting()
        self.live.stop()

    def __call__(self, event: Event) -> None:
        if isinstance(event, Stepped):
            self._stepped(event)
            return
        if isinstance(event, Started):
            self.run, self.max_iters, self.log_interval = event.run, event.run.max_iters, event.run.log_interval
            self.told = time.monotonic()
            self._wait(event.step + 1)
        for line in lines(event, self.run):
            self.console.print(Text(line))
        if isinstance(event, Finished):
            self._no_longer_waiting()
            self.live.stop()

    def _wait(self, step: int) -> None:
        """Says after a while that the first step is under way: on a CPU it may take minutes."""
        if step <= self.max_iters:
            text = f"step {step}/{self.max_iters} is under way, {clock(PATIENCE)} so far; what it took is told then"
            self.waiting = threading.Timer(PATIENCE, lambda: self.console.print(Text(text)))
            self.waiting.daemon = True
            self.waiting.start()

    def _no_longer_waiting(self) -> None:
        if self.waiting is not None:
            self.waiting.cancel()
            self.waiting = None

    def _stepped(self, record: Stepped) -> None:
        self._no_longer_waiting()
        self.steps += 1
        # The first step of a process compiles, allocates and warms up: it says nothing of the others.
        if self.steps <= 2 or self.seconds is None:
            self.seconds = record.seconds
        else:
            self.seconds += SMOOTHING * (record.seconds - self.seconds)
        line = step_line(record, self.max_iters, self.seconds * (self.max_iters - record.step))
        left, now = self.max_iters - record.step, time.monotonic()
        if self.steps == 1 and record.seconds >= SLOW and left:
            rest = f"{left:,} more like it take {clock(left * record.seconds)}"
            self.console.print(Text(f"the first step took {clock(record.seconds)}; {rest}"))
        if self.live.is_started:
            self.live.update(Text(line))
        due = record.val_loss is not None
        if not self.live.is_started:
            due = due or record.step % self.log_interval == 0 or not left or now - self.told >= SILENCE
        if due:
            self.told = now
            self.console.print(Text(line))


class Counter:
    """How far a preparation is: one line that changes on a terminal, one every half minute elsewhere."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = Lasting(stream or sys.stderr)
        self.live = self.stream.isatty()
        self.began = self.told = 0.0
        self.first: tuple[int, float] | None = None

    def __enter__(self) -> "Counter":
        return self

    def __exit__(self, _kind: object, error: object, _trace: object) -> None:
        if self.live:
            self.stream.write("\r\x1b[K")
        if isinstance(error, KeyboardInterrupt) and error.args:  # what was kept
            self.stream.write(f"{error}\n")

    def begin(self, line: str) -> None:
        self.stream.write(f"{line}\n")

    def __call__(self, n_tokens: int, share: float = 0.0) -> None:
        """`share` of the text was read; 0 where that is not known. Counted from what the first call says."""
        now = time.monotonic()
        if self.first is None:
            self.first = (n_tokens, share)
            self.began = self.told = now
        if now - self.told < (0.2 if self.live else 30.0):
            return
        self.told = now
        seconds, (before, share_before) = now - self.began, self.first
        line = f"{n_tokens:,} tokens, {(n_tokens - before) / seconds:,.0f} a second"
        if share > share_before and share:
            line += f", {share:.0%} of the text, {clock(seconds * (1 - share) / (share - share_before))} left"
        self.stream.write(f"\r{line}\x1b[K" if self.live else f"{line}\n")
        self.stream.flush()


def step_line(record: Stepped, max_iters: int, remaining_seconds: float) -> str:
    """What a terminal has room for: the learning rate, the peak and the speed give way to the rest, in this order."""
    parts = {"step": f"step {record.step}/{max_iters}", "loss": f"loss {record.loss:.4f}"}
    if record.val_loss is not None:
        parts["val"] = f"val loss {record.val_loss:.4f}"
    if record.val_bpb is not None:
        parts["bpb"] = f"{record.val_bpb:.3f} bits per byte"
    parts["lr"] = f"lr {record.lr:.2e}"
    parts["speed"] = f"{record.tokens_per_second:,.0f} tokens/s"
    parts["eta"] = f"eta {clock(remaining_seconds)}"
    if record.peak_allocated_bytes is not None:
        parts["peak"] = f"peak {format_bytes(record.peak_allocated_bytes)}"
    for name in ("lr", "peak", "speed", "eta"):
        if len("  ".join(parts.values())) <= WIDTH:
            break
        parts.pop(name, None)
    return "  ".join(parts.values())


def lines(event: Event, run: RunConfig | None = None) -> list[str]:
    """What an event other than a step is in words; `run` is the one that it happened to."""
    if isinstance(event, Started):
        run = event.run
        first = f"from step {event.step}, " if event.step else ""
        steps = counted(run.max_iters, "step")
        return [
            f"{event.n_params:,} parameters on {event.device}, {run.dtype}, {run.tokens_per_step:,} tokens a step",
            f"{event.n_train_tokens:,} tokens of {event.data}, {first}{steps}, out: {event.out_dir}",
        ]
    if isinstance(event, Note):
        return [event.text]
    if isinstance(event, Sampled):
        return [f"after step {event.step} it writes:", *(f"  {line}" for line in event.text.splitlines())]
    if isinstance(event, Measured):
        return measured_lines(event)
    if isinstance(event, Saved):
        return [f"saved {event.path}"]
    if isinstance(event, Finished):
        how = f"stopped by {event.stopped_by}" if event.stopped_by else "done"
        loss = f", loss {event.loss:.4f}" if math.isfinite(event.loss) else ""
        return [f"{how} at step {event.step} after {clock(event.seconds)}{loss}", *next_lines(event, run)]
    return []


def next_lines(event: Finished, run: RunConfig | None) -> list[str]:
    """What to type next: to go on where a signal ended the run, else to use what it learned."""
    if event.checkpoint is None:
        return []
    out = shlex.quote(str(event.checkpoint.parent))
    if event.stopped_by.startswith("SIG"):
        return [f"go on with it: gptfit train --resume --out {out}"]
    return [f"text from it: gptfit sample --out {out}", *export_lines(run, out)]


def export_lines(run: RunConfig | None, out: str) -> list[str]:
    """How to export the run; nothing where no other program has a form for its model. What has one in nanoGPT has one
    in transformers."""
    if run is None or refusal(run, "hf") is not None:
        return []
    other = ", or nanoGPT with --format nanogpt" if refusal(run, "nanogpt") is None else ""
    return [f"for transformers{other}: gptfit export --out {out}"]


def measured_lines(event: Measured) -> list[str]:
    """Measured beside predicted, a row a figure, the difference in per cent of the measured."""
    rows = []
    for name, measured_bytes in (("allocated", event.allocated_bytes), ("reserved", event.reserved_bytes)):
        predicted_bytes = event.predicted.get(f"{name}_bytes")
        beside = ""
        if predicted_bytes is not None and measured_bytes:
            off = 100 * (predicted_bytes - measured_bytes) / measured_bytes
            beside = f", predicted {format_bytes(predicted_bytes)} ({off:+.2f} %)"
        rows.append(f"second step: peak {name} {format_bytes(measured_bytes)}{beside}")
    rows.append(f"second step: the card holds {format_bytes(event.card_used_bytes)}, all processes together")
    return rows


def clock(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour."""
    whole = max(0, round(seconds))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
