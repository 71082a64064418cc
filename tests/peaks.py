"""Peaks of real steps on this CPU, from torch's profiler: it is told of every allocation of torch's CPU allocator, in
C++ too, where DDP's buckets and FSDP's buffers are made."""

import gc
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter
from torch.profiler import ProfilerActivity, profile

from gptfit import train as module
from gptfit.config import make_run
from gptfit.train import train


def gather(self: Any, output_tensor: Tensor, input_tensor: Tensor, *_: Any, **__: Any) -> None:
    output_tensor.view(-1, len(input_tensor))[:] = input_tensor


def scatter(self: Any, output_tensor: Tensor, input_tensor: Tensor, *_: Any, **__: Any) -> None:
    output_tensor.copy_(input_tensor[: len(output_tensor)])


class Done:
    """An all-reduce that has ended."""

    def __init__(self, buffer: Tensor) -> None:
        self.future: torch.futures.Future[list[Tensor]] = torch.futures.Future()
        self.future.set_result([buffer])

    def get_future(self) -> torch.futures.Future[list[Tensor]]:
        return self.future


def without_wires() -> None:
    """DDP and FSDP without gloo, which takes scratch of its own and frees tensors in threads that no profiler sees.
    What is computed is wrong then, what is allocated is not."""
    DefaultAllGather.__call__ = gather
    DefaultReduceScatter.__call__ = scatter
    real = dist.all_reduce
    dist.all_reduce = lambda tensor, *rest, **options: Done(tensor) if options else real(tensor, *rest)


def measured_peak(keys: dict[str, Any], out: Path, n_steps: int = 3) -> int:
    """Bytes alive at the worst instant of the last of `n_steps` steps of that run."""
    gc.collect()  # what an earlier run left would be freed in this one
    times: list[int] = []
    real = module._step

    def step(session: Any) -> Any:
        times.append(time.time_ns())
        record = real(session)
        times.append(time.time_ns())
        return record

    module._step = step
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            train(make_run({**keys, "max_iters": n_steps}), out, device_name="cpu")
    finally:
        module._step = real
    began, ended = times[-2:]

    def rounded(n_bytes: int) -> int:  # as CUDA's allocator does, blocks of 512 bytes
        return -(-abs(n_bytes) // 512) * (512 if n_bytes > 0 else -512)

    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += rounded(event.nbytes())
        if began <= event.start_ns() <= ended:
            peak = max(peak, alive)
    return peak


def measure_jobs(rank: int, jobs: dict[str, dict[str, Any]], folder: Path) -> None:
    """The peak of each job on rank 0, into folder/peaks.json."""
    without_wires()
    peaks = {name: measured_peak(keys, folder / name) for name, keys in jobs.items()}
    if rank == 0:
        (folder / "peaks.json").write_text(json.dumps(peaks))
