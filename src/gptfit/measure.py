"""One rung of the ladder on the GPU that is here: the trainer's own steps, in a process of their own.

`measure_rung` starts `python -m gptfit.measure`, hands it the run on stdin, and reads one JSON object from the last
line of its stdout. A fresh process has no cached blocks, no kernels and no context of the rung before.
"""

import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from gptfit.calibration import Machine, Reading, Rung
from gptfit.config import RunConfig, derive, make_run
from gptfit.device import ALLOCATOR_VARIABLES
from gptfit.driver import DriverGpu, detect
from gptfit.errors import GptfitError
from gptfit.events import Event, Note, Started, Stepped
from gptfit.gpus import GpuProfile
from gptfit.train import train

# Optimizer state exists from the second step on. Short steps go on for a while: one alone is no measure of speed.
MIN_STEPS, MAX_STEPS, STEADY_SECONDS = 3, 50, 1.0
# A first compilation of GPT-2 takes a minute or two where the processor is slow.
LIMIT_SECONDS = 900
N_SEQUENCES = 64


class _Enough(Exception):
    """Ends training from within its listener: the model is still alive, and no checkpoint is written."""


@dataclass(slots=True)
class Watch:
    """Listens to a training until it has shown enough. Raises _Enough then, GptfitError where it is not as asked.

    process_bytes and reserved_bytes are of the same instant, after the last step.
    """

    run: RunConfig
    uuid: str
    before: Sequence[DriverGpu]
    steps: list[Stepped] = field(default_factory=list)
    process_bytes: int | None = None
    reserved_bytes: int = 0

    def __call__(self, event: Event) -> None:
        if isinstance(event, Note) and event.text.startswith("out of memory"):
            raise GptfitError(
                event.text, "close what else uses the card"
            )  # with smaller micro-batches it is another run
        if isinstance(event, Started) and (event.run.dtype, event.run.compile) != (self.run.dtype, self.run.compile):
            raise GptfitError(f"this card cannot do dtype={self.run.dtype} compile={self.run.compile}")
        if isinstance(event, Stepped):
            self.steps.append(event)
            if self._has_enough():
                self.process_bytes = process_bytes(os.getpid(), self.uuid, self.before, detect())
                self.reserved_bytes = torch.cuda.memory_reserved() if torch.cuda.is_available() else 0
                raise _Enough

    def _has_enough(self) -> bool:
        n = len(self.steps)
        return n >= MIN_STEPS and (n >= MAX_STEPS or sum(step.seconds for step in self.steps[1:]) >= STEADY_SECONDS)

    @property
    def seconds_per_step(self) -> float:
        """The median, without the first step, which compiles and makes the optimizer's state."""
        return median(step.seconds for step in self.steps[1:])


def process_bytes(pid: int, uuid: str, before: Sequence[DriverGpu], now: Sequence[DriverGpu]) -> int | None:
    """What process `pid` holds on that card, as the driver lists it. Where it lists no such process (in a container, or
    under WSL), by how much the card's use has grown, as long as it has; None if the driver says nothing of the card."""
    then_gpu, now_gpu = (next((gpu for gpu in gpus if gpu.uuid == uuid), None) for gpus in (before, now))
    if now_gpu is None:
        return None
    listed = [process.used_bytes for process in now_gpu.processes if process.pid == pid and process.used_bytes]
    if listed:
        return max(listed)
    grown = now_gpu.used_bytes - then_gpu.used_bytes if then_gpu else 0
    return grown if grown > 0 else None


def measure_here(run: RunConfig, uuid: str, device_name: str = "cuda") -> dict[str, Any]:
    """Trains `run` on random tokens for a few steps, in this process; its figures. Raises GptfitError."""
    watch = Watch(run, uuid, detect())
    with tempfile.TemporaryDirectory(prefix="gptfit-measure-") as folder:
        tokens = np.random.default_rng(run.seed).integers(0, run.vocab_size, N_SEQUENCES * (run.block_size + 1))
        for part in ("train", "val"):
            tokens.astype("<u2").tofile(Path(folder) / f"{part}.bin")
        # The vocabulary of a folder without meta.json is taken for GPT-2's.
        meta = {"dtype": "uint16", "vocab_size": run.vocab_size, "tokenizer": "byte"}
        (Path(folder) / "meta.json").write_text(json.dumps(meta))
        quiet = {"dataset": folder, "eval_interval": 0, "checkpoint_interval": 0, "max_iters": MAX_STEPS + 1}
        with suppress(_Enough):
            train(derive(run, **quiet), Path(folder) / "out", on_event=watch, device_name=device_name)
    return figures(watch)


def figures(watch: Watch) -> dict[str, Any]:
    """What was watched on a CUDA device: the peak of a steady step, the highest of what was reserved, the process then.

    Raises GptfitError where there is no such device.
    """
    reserved = [step.peak_reserved_bytes for step in watch.steps if step.peak_reserved_bytes is not None]
    allocated = watch.steps[-1].peak_allocated_bytes
    if allocated is None:
        raise GptfitError("torch has no CUDA device here", "install torch with CUDA")
    # The driver is asked after the step: what was handed back since the peak was the process's all the same.
    process = None if watch.process_bytes is None else watch.process_bytes + max(reserved) - watch.reserved_bytes
    return {
        "allocated_bytes": allocated,
        "reserved_bytes": max(reserved),
        "process_bytes": process,
        "seconds_per_step": watch.seconds_per_step,
        "total_bytes": torch.cuda.get_device_properties(0).total_memory,
        "torch": torch.__version__,
    }


def measure_rung(rung: Rung, profile: GpuProfile, gpu: DriverGpu) -> Reading:
    """One rung in a fresh process on that card. Raises GptfitError with the reason where it fails."""
    asked = json.dumps({"config": rung.run.model_dump(exclude_unset=True), "uuid": gpu.uuid})
    environment = {key: value for key, value in os.environ.items() if key not in ALLOCATOR_VARIABLES}
    # By its UUID: CUDA counts the cards in another order than the driver does.
    environment["CUDA_VISIBLE_DEVICES"] = gpu.uuid or f"{gpu.index}"
    try:
        done = subprocess.run(
            [sys.executable, "-m", "gptfit.measure"],
            input=asked,
            capture_output=True,
            text=True,
            timeout=LIMIT_SECONDS,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        raise GptfitError(f"it took longer than {LIMIT_SECONDS // 60} minutes") from None
    return reading_of(rung, profile, gpu, done.returncode, done.stdout, done.stderr)


def reading_of(rung: Rung, profile: GpuProfile, gpu: DriverGpu, code: int, out: str, err: str) -> Reading:
    """The reading in what the process printed. Raises GptfitError with its reason where there is none."""
    try:
        found: Mapping[str, Any] = json.loads(out.strip().splitlines()[-1])
    except (IndexError, ValueError):
        last = err.strip().splitlines()[-1:] or ["it said nothing"]
        raise GptfitError(f"its process ended with code {code}: {last[0][:200]}") from None
    if "error" in found:
        raise GptfitError(str(found["error"]))
    return Reading(
        name=rung.name,
        machine=Machine(
            gpu=profile.name,
            device=gpu.name,
            total_bytes=found["total_bytes"],
            driver_total_bytes=gpu.total_bytes,
            torch=found["torch"],
            driver=gpu.driver_version,
            measured_on=datetime.date.today(),
        ),
        config=rung.run.model_dump(exclude_unset=True),
        allocated_bytes=found["allocated_bytes"],
        reserved_bytes=found["reserved_bytes"],
        process_bytes=found["process_bytes"],
        seconds_per_step=found["seconds_per_step"],
    )


def main() -> None:
    """The process of one rung."""
    asked = json.load(sys.stdin)
    try:
        answer = measure_here(make_run(asked["config"]), asked["uuid"])
    except GptfitError as error:
        answer = {"error": error.message}
    except Exception as error:  # a compiler that is not there, a driver too old: the other rungs may work
        answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
