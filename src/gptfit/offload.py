"""Activation offload: what forward saves for backward waits in host memory, and comes back when backward asks for it.

Copies run on the stream that computes, so a tensor may be freed as soon as its copy is queued. Each saved tensor goes
by itself: one that two operations save is copied twice, and of q, k and v, which are views of one storage, each is laid
out anew. What is smaller than MIN_BYTES stays, as do parameters, which are alive all along.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gptfit.memory.autograd import OFFLOAD_MIN_BYTES


class Handle(NamedTuple):
    """A saved tensor in host memory, and where it was."""

    copy: Tensor
    device: torch.device


class Offload(torch.autograd.graph.saved_tensors_hooks):
    """A context: what is saved for backward inside of it goes to host memory."""

    def __init__(self) -> None:
        super().__init__(self.pack, self.unpack)

    def pack(self, tensor: Tensor) -> Tensor | Handle:
        stays = tensor.is_leaf and tensor.requires_grad
        if stays or tensor.numel() * tensor.element_size() < OFFLOAD_MIN_BYTES:
            return tensor
        with torch.no_grad():
            return Handle(self.to_host(tensor), tensor.device)

    def unpack(self, saved: Tensor | Handle) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        copy = saved.copy
        back = torch.empty_strided(copy.shape, copy.stride(), dtype=copy.dtype, device=saved.device)
        return back.copy_(copy, non_blocking=True)

    def to_host(self, tensor: Tensor) -> Tensor:
        if not torch.ops.aten.is_non_overlapping_and_dense(tensor):  # a part of another tensor
            tensor = tensor.contiguous()
        return self.empty_on_host(tensor).copy_(tensor, non_blocking=True)

    def empty_on_host(self, tensor: Tensor) -> Tensor:
        """Room for `tensor`, laid out alike, pinned where its device has use for that."""
        return torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda
        )
