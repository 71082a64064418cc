"""Runs as several processes on this CPU: `train_together` starts them, each trains the same jobs one after another."""

import json
import multiprocessing
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from faults import Fault, injected
from gptfit.config import make_run
from gptfit.distributed import joined, launched
from gptfit.events import Event, Note, Stepped
from gptfit.train import train

# A server that has imported torch once forks each process: half a second instead of three.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["ranks", "torch.distributed.fsdp", "torch.nn.parallel"])


@dataclass(frozen=True)
class Job:
    """One run, and what is to happen to it."""

    out: str
    run: dict[str, Any]
    resume: bool = False
    faults: list[Fault] = field(default_factory=list)


def train_together(folder: Path, n: int, jobs: list[Job], timeout: float = 60.0) -> None:
    """Trains `jobs` as `n` processes, in folder/JOB.out; what each rank was told goes to folder/OUT-rankR.json."""
    as_processes(n, train_jobs, folder, jobs, timeout=timeout)


def as_processes(n: int, work: Callable[..., None], *arguments: Any, timeout: float = 60.0) -> None:
    """work(rank, *arguments) in `n` processes that can talk; fails unless all of them end well and in time."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    processes = [CONTEXT.Process(target=start, args=(rank, n, port, work, arguments)) for rank in range(n)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout)
    codes = [process.exitcode for process in processes]
    for process in processes:
        if process.is_alive():
            process.kill()
    assert codes == [0] * n, f"exit codes {codes}; None is one that hung"


def start(rank: int, n: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()})
    with joined(launched()):
        work(rank, *arguments)


def train_jobs(rank: int, folder: Path, jobs: list[Job]) -> None:
    for job in jobs:
        (folder / f"{job.out}-rank{rank}.json").write_text(json.dumps(trained(job, folder)))


def trained(job: Job, folder: Path) -> dict[str, Any]:
    events: list[Event] = []
    with injected(job.faults):
        finished = train(make_run(job.run), folder / job.out, job.resume, None, events.append, "cpu")
    return {
        "notes": [event.text for event in events if isinstance(event, Note)],
        "steps": [event.step for event in events if isinstance(event, Stepped)],
        "step": finished.step,
        "stopped_by": finished.stopped_by,
    }
