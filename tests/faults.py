"""Running out of memory at a chosen instant of a run."""

import importlib
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptfit import train as module
from gptfit.model import Block
from gptfit.parallel import REHEARSED_TOKENS

MESSAGE = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.65 GiB of which 1.25 GiB is free."
)


adam: Any = importlib.import_module("torch.optim.adam")  # torch.optim takes the name away


@dataclass(frozen=True)
class Fault:
    """What is missing, or a SIGTERM: once, in step `step` (from 0), on `rank` (-1: on all). `call` counts calls of a
    block's forward or backward, of the optimizer's step, or of its update of a group; an evaluation's in the step
    before it."""

    where: str  # forward, backward, optimizer, group, evaluation, signal
    step: int
    rank: int = 0
    call: int = 0


@contextmanager
def injected(faults: list[Fault]) -> Iterator[None]:
    """Within the block torch runs out of memory as `faults` say."""
    here = int(os.environ.get("RANK", "0"))
    left = {fault for fault in faults if fault.rank in (here, -1)}
    calls: dict[str, int] = {}
    now = [0]

    def met(where: str) -> None:
        calls[where] = calls.get(where, -1) + 1
        for fault in [f for f in left if (f.where, f.step, f.call) == (where, now[0], calls[where])]:
            left.remove(fault)
            raise torch.OutOfMemoryError(MESSAGE)

    def step(session: Any) -> Any:
        now[0] = session.step
        calls.clear()
        for fault in [f for f in left if (f.where, f.step) == ("signal", session.step)]:
            left.remove(fault)
            os.kill(os.getpid(), signal.SIGTERM)
        return real_step(session)

    def forward(self: Block, x_BTC: Tensor, *rest: Any) -> Tensor:
        rehearses = x_BTC.shape[1] == REHEARSED_TOKENS
        if not rehearses:
            met("forward" if torch.is_grad_enabled() else "evaluation")
        y_BTC = real_forward(self, x_BTC, *rest)
        if y_BTC.requires_grad and not rehearses:
            y_BTC.register_hook(lambda grad: met("backward"))
        return y_BTC

    def optimize(self: Any, *arguments: Any, **options: Any) -> Any:
        met("optimizer")
        return real_optimize(self, *arguments, **options)

    def update_group(*arguments: Any, **options: Any) -> Any:
        met("group")
        return real_group(*arguments, **options)

    real_group = adam.adam
    adam.adam = update_group
    real_step, real_forward, real_optimize = module._step, Block.forward, torch.optim.AdamW.step
    module._step, Block.forward, torch.optim.AdamW.step = step, forward, optimize
    try:
        yield
    finally:
        adam.adam = real_group
        module._step, Block.forward, torch.optim.AdamW.step = real_step, real_forward, real_optimize
    assert not left, f"these did not happen: {left}"
