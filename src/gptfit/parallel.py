"""One model on several GPUs: how a micro-batch is computed and its gradients are shared.

All strategies give the mean gradient over the ranks' micro-batches, so that with equal shares the step is that
of one GPU with all the sequences.

Running out of memory on one rank. The others wait in a collective that this rank will not reach. So each
strategy knows the collectives of a step in advance, from a rehearsal on a few tokens, and counts those done: the rank
that failed plays out the rest with what is in its buffers. Then all ranks stand at the same point, and can
agree to do the step again.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gptfit.config import RunConfig
from gptfit.distributed import Ranks
from gptfit.model import GPT
from gptfit.optim import Stepper

REHEARSED_TOKENS = 8


class Strategy(Protocol):
    """How the ranks share the work on `model`."""

    model: GPT

    def loss(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor: ...

    def micro_step(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch; `last`: of the step."""
        ...

    def zero_grad(self, optimizer: Stepper) -> None: ...

    def play_out(self) -> None:
        """What this rank still owes the others of the step in which it failed."""
        ...

    def start_over(self) -> None:
        """After a step that some rank could not finish, on all ranks."""
        ...


class Alone:
    """One process: nothing to share."""

    def __init__(self, model: GPT) -> None:
        self.model = model

    def loss(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        return self.model(inputs_BT, targets_BT)

    def micro_step(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def zero_grad(self, optimizer: Stepper) -> None:
        optimizer.zero_grad()

    def play_out(self) -> None:
        pass

    def start_over(self) -> None:
        pass


class Replicated:
    """DistributedDataParallel: a whole model on each rank, gradients averaged while the last backward runs.

    Gradients are views into its buckets and stay there: set to None, the first micro-step would make a second set
    beside the buckets, which are alive in any case.
    """

    def __init__(self, model: GPT, size: int) -> None:
        self.model = model
        self.size = size
        self.wrapped: nn.Module = model
        self._wrap()

    def loss(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        return self.wrapped(inputs_BT, targets_BT)

    @contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        self.reduced = 0
        assert isinstance(self.wrapped, DistributedDataParallel)
        with nullcontext() if last else self.wrapped.no_sync():
            yield

    def zero_grad(self, optimizer: Stepper) -> None:
        optimizer.zero_grad(set_to_none=False)

    def play_out(self) -> None:
        for bucket in self.buckets[self.reduced :]:
            dist.all_reduce(bucket)

    def start_over(self) -> None:
        """A new wrapper: the reducer of a backward that was cut short takes no other."""
        self._wrap()

    def _wrap(self) -> None:
        self.wrapped = nn.Module()  # the buckets of a former wrapper go before new ones are made
        self.model.zero_grad(set_to_none=True)
        self.buckets: list[Tensor] = []
        self.wrapped = DistributedDataParallel(self.model, forward_sync_buffers=False, gradient_as_bucket_view=True)
        self.wrapped.register_comm_hook(None, self._reduce)
        # After the first backward DDP makes its buckets anew, in the order in which gradients came.
        for _ in range(2):
            self.buckets.clear()
            rehearse(self)

    def _reduce(self, _state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # pyright: ignore[reportPrivateImportUsage]
        """What DDP does by itself, counted. Buckets come in the same order on all ranks and in all steps."""
        buffer = bucket.buffer()
        if bucket.index() == len(self.buckets):
            self.buckets.append(buffer)
        self.reduced += 1
        work = dist.all_reduce(buffer.div_(self.size), async_op=True)
        assert work is not None
        return work.get_future().then(lambda future: future.value()[0])


def rehearse(strategy: Strategy) -> None:
    """Forward and backward of a few tokens, for what they set up, not compiled. Leaves gradients of zero."""
    model = strategy.model
    device = model.lm_head.weight.device
    n_tokens = min(REHEARSED_TOKENS, model.run.block_size)
    ids_BT = torch.zeros(1, n_tokens, dtype=torch.int64, device=device)
    with strategy.micro_step(last=True), torch.compiler.set_stance("force_eager"):
        strategy.loss(ids_BT, ids_BT).backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()


def share_model(model: GPT, run: RunConfig, ranks: Ranks) -> Strategy:
    """`model` under the strategy of `run`."""
    if ranks.size == 1:
        return Alone(model)
    return Replicated(model, ranks.size)
