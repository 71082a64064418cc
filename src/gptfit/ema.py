"""An average of the weights over the steps, which is evaluated and exported in their place."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Ema:
    """Exponential moving average of the parameters of `model`, as large as they are, in their dtype and on their
    device; of sharded parameters each rank averages its part.

    It starts as the weights are. The first updates forget faster than `decay` says, by (1 + n) / (10 + n) of n
    updates (tf.train.ExponentialMovingAverage), or a run shorter than 1 / (1 - decay) steps would average its start.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = list(model.parameters())
        self.averages = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self, n_updates: int) -> None:
        """After an optimizer step that `n_updates` were made before. Allocates nothing."""
        decay = min(self.decay, (1 + n_updates) / (10 + n_updates))
        averages, weights = ([own(tensor) for tensor in group] for group in (self.averages, self.parameters))
        torch._foreach_lerp_(averages, weights, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    @contextmanager
    def exchanged(self) -> Iterator[None]:
        """Within the block the model has the average, and the average's place keeps the weights."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for average, parameter in zip(self.averages, self.parameters, strict=True):
            if isinstance(parameter, DTensor):  # FSDP gathers from the memory that it knows, so the values move
                kept = own(parameter).clone()
                own(parameter).copy_(own(average))
                own(average).copy_(kept)
            else:
                parameter.data, average.data = average.data, parameter.data


def own(tensor: Tensor) -> Tensor:
    """The part of `tensor` that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
