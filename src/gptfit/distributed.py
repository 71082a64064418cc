"""Several processes that train as one, a GPU each: who they are, and what they agree on.

torchrun starts them and says by environment variables who is who. Words between them (a flag, a loss, a signal's
number) are CPU tensors through gloo, so that they need nothing of a GPU that has just run out of memory.
"""

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

from gptfit.config import RunConfig
from gptfit.device import pick_device
from gptfit.errors import GptfitError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among `size`; alone it agrees with itself at no cost."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """The one that prints and writes."""
        return self.rank == 0

    def share(self, sequences: np.ndarray) -> np.ndarray:
        """This rank's part of the sequences of a step, equal on all ranks to within one."""
        return np.array_split(sequences, self.size)[self.rank]

    def total(self, *values: float) -> list[float]:
        """Each value summed over all ranks."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def largest(self, *values: float) -> list[float]:
        """The largest of each value over all ranks."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def any(self, flag: bool) -> bool:
        return self.largest(flag)[0] > 0

    def _reduced(self, values: Sequence[float], how: dist.ReduceOp.RedOpType) -> list[float]:
        if self.size == 1:
            return list(values)
        tensor = torch.tensor([float(value) for value in values], dtype=torch.float64)
        dist.all_reduce(tensor, how)
        return tensor.tolist()

    def words(self, text: str) -> list[str]:
        """A text of each rank."""
        if self.size == 1:
            return [text]
        texts: list[str] = [""] * self.size
        dist.all_gather_object(texts, text)
        return texts

    @contextmanager
    def together(self) -> Iterator[None]:
        """Where one rank fails in the block, all of them end: the first that failed says why, the others quietly.

        Without it those that did not fail would wait for the others until a timeout.
        """
        error: GptfitError | None = None
        try:
            yield
        except GptfitError as raised:
            error = raised
        first_failed = self.size - int(self.largest(0 if error is None else self.size - self.rank)[0])
        if error is not None and first_failed == self.rank:
            raise error
        if first_failed < self.size:
            raise SystemExit(2)


def launched() -> Ranks:
    """Who this process is, as torchrun's variables say; alone without them."""
    values = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    if not values["WORLD_SIZE"].isdigit():
        return Ranks()
    return Ranks(int(values["RANK"] or 0), int(values["WORLD_SIZE"]), int(values["LOCAL_RANK"] or 0))


def check_size(run: RunConfig, ranks: Ranks) -> None:
    """Raises GptfitError unless there is a process for each GPU of `run`, and each node has whole groups of shards."""
    if run.n_gpus == ranks.size:
        here = os.environ.get("LOCAL_WORLD_SIZE", "")  # torchrun's
        if run.strategy == "hsdp" and here.isdigit() and int(here) % run.shard_gpus:
            raise GptfitError(
                f"shard_gpus={run.shard_gpus}, but torchrun started {here} processes on this machine",
                f"shard_gpus={here}, or --nproc_per_node={run.shard_gpus}",
            )
        return
    if ranks.size == 1:
        raise GptfitError(
            f"n_gpus={run.n_gpus}, but this is one process; each GPU needs its own",
            f"torchrun --standalone --nproc_per_node={run.n_gpus} -m gptfit train …, or n_gpus=1",
        )
    raise GptfitError(
        f"n_gpus={run.n_gpus}, but torchrun started {ranks.size} processes",
        f"n_gpus={ranks.size}, or --nproc_per_node={run.n_gpus}",
    )


def own_device(name: str, ranks: Ranks) -> torch.device:
    """The device `name` of this process: among several, each has the GPU of its local rank.

    Raises GptfitError where there are fewer GPUs than processes, or one GPU is named for all.
    """
    device = pick_device(name)
    if ranks.size == 1 or device.type != "cuda":
        return device
    if device.index is not None:
        raise GptfitError(f'device "{name}" is one GPU for {ranks.size} processes', "leave --device out")
    if ranks.local_rank >= torch.cuda.device_count():
        raise GptfitError(
            f"process {ranks.local_rank} of this machine finds {torch.cuda.device_count()} GPUs",
            "start as many processes as there are GPUs: --nproc_per_node=gpu",
        )
    return torch.device("cuda", ranks.local_rank)


@contextmanager
def joined(ranks: Ranks) -> Iterator[None]:
    """Within the block the processes can talk: gloo between CPUs, NCCL between GPUs where there are any."""
    if ranks.size == 1 or dist.is_initialized():
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
        ranks.any(False)  # nobody leaves while another still talks
    finally:
        gc.collect()  # what holds the group in a cycle would end its threads when Python is gone
        with suppress(RuntimeError, ValueError):
            dist.destroy_process_group()
