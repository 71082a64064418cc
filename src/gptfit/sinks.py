"""Where a run's metrics go beside metrics.jsonl: metrics.csv, TensorBoard, Weights & Biases.

A sink is a listener that also closes. A package is imported when its sink is asked for, and never else. One that
fails while the run goes is left out from there on: no run of days ends for its log.
"""

import atexit
import csv
import importlib.util
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Protocol

from gptfit import metrics
from gptfit.errors import GptfitError, nearest
from gptfit.events import Event, Finished, Listener, Note, Sampled, Started, Stepped

COLUMNS = tuple(field.name for field in fields(Stepped))


class Sink(Protocol):
    def start(self, event: Started) -> None: ...
    def step(self, event: Stepped) -> None: ...
    def close(self) -> None: ...


class CsvSink:
    """metrics.csv: the columns of metrics.jsonl, a line a step. Begun anew from it, so that a resume repeats none."""

    def __init__(self) -> None:
        self.path = Path()

    def start(self, event: Started) -> None:
        self.path = event.out_dir / "metrics.csv"
        with self.path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(metrics.read(event.out_dir))

    def step(self, event: Stepped) -> None:
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, COLUMNS).writerow(asdict(event))

    def close(self) -> None:
        pass


class TensorboardSink:
    """Event files in DIR/tensorboard. A resumed run hides the steps that it does again."""

    def __init__(self) -> None:
        _need("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self.open: Callable[..., Any] = SummaryWriter
        self.writer: Any = None

    def start(self, event: Started) -> None:
        purge = event.step + 1 if event.step else None
        self.writer = self.open(log_dir=str(event.out_dir / "tensorboard"), purge_step=purge)
        self.writer.add_text("run", "\n".join(f"    {k}: {v}" for k, v in event.run.model_dump().items()), event.step)

    def step(self, event: Stepped) -> None:
        for name, value in scalars(event).items():
            self.writer.add_scalar(name, value, event.step)

    def sample(self, event: Sampled) -> None:
        self.writer.add_text("sample", "\n".join(f"    {line}" for line in event.text.splitlines()), event.step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class WandbSink:
    """A run of Weights & Biases, which goes on when ours is resumed; project, entity and mode come from WANDB_…"""

    def __init__(self) -> None:
        _need("wandb")
        import wandb  # pyright: ignore[reportMissingImports]

        self.wandb: Any = wandb
        self.run: Any = None

    def start(self, event: Started) -> None:
        known = event.out_dir / "wandb-id.txt"
        old = known.read_text().strip() if event.step and known.is_file() else None
        self.run = self.wandb.init(
            dir=str(event.out_dir), config=event.run.model_dump(), id=old, resume="allow" if old else None
        )
        known.write_text(f"{self.run.id}\n")

    def step(self, event: Stepped) -> None:
        self.run.log(scalars(event), step=event.step)

    def close(self) -> None:
        if self.run is not None:
            self.run.finish()


SINKS: dict[str, Callable[[], Sink]] = {"csv": CsvSink, "tensorboard": TensorboardSink, "wandb": WandbSink}


def scalars(event: Stepped) -> dict[str, float]:
    """What of a step is drawn over its number: every figure that is known."""
    return {key: value for key, value in asdict(event).items() if key != "step" and value is not None}


class Logs:
    """A listener that tells `listener`, and every sink of `names`, a comma between them.

    Raises GptfitError for an unknown name, and for a sink whose package is not installed.
    """

    def __init__(self, names: str, listener: Listener | None = None) -> None:
        asked = dict.fromkeys(name.strip() for name in names.split(",") if name.strip())
        for name in asked:
            if name not in SINKS:
                raise GptfitError(f'unknown log "{name[:40]}"{nearest(name, SINKS, 1)}', f"logs are {', '.join(SINKS)}")
        self.listener: Listener = listener or (lambda event: None)
        self.sinks = {name: SINKS[name]() for name in asked}
        atexit.register(self.close)  # a run that ends with an error has no last event

    def __call__(self, event: Event) -> None:
        self.listener(event)
        for name, sink in tuple(self.sinks.items()):
            try:
                if isinstance(event, Started):
                    sink.start(event)
                elif isinstance(event, Stepped):
                    sink.step(event)
                elif isinstance(event, Sampled) and isinstance(sink, TensorboardSink):
                    sink.sample(event)
            except Exception as error:  # of another's package: anything
                del self.sinks[name]
                reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
                self.listener(Note(f"--log {name} failed: {reason}; going on without it"))
        if isinstance(event, Finished):
            self.close()

    def close(self) -> None:
        atexit.unregister(self.close)
        for sink in self.sinks.values():
            with suppress(Exception):
                sink.close()
        self.sinks.clear()


def _need(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise GptfitError(
            f"--log {package} needs the package {package}, which is not installed", f"pip install {package}"
        )
