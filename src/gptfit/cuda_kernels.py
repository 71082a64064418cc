"""Functions whose CUDA kernels allocate other tensors than the CPU's, in CUDA's form on any device.

A function mode replaces them while a step is traced on fake CPU tensors. The ops put in their place are those
that torch dispatches to on CUDA, with torch's own derivatives; only a fake tensor can run them on a CPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from gptfit.recorder import Recorder

aten = torch.ops.aten


class CudaKernels(TorchFunctionMode):
    """Attention and dropout as on CUDA. Enter it before autocast, which is to see them first.

    It also tells `recorder` of tensors that such code has on the host: those that torch.tensor makes, unless
    it is given another tensor's device. Step counters of optimizers are such.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return attention(*args, **kwargs)
        if func in (F.dropout, torch.dropout):
            return dropout(*args, **kwargs)
        if func is torch.tensor and kwargs.get("device") in (None, "cpu"):
            self.recorder.making_on_host = True
            try:
                return func(*args, **kwargs)
            finally:
                self.recorder.making_on_host = False
        return func(*args, **kwargs)

    @contextmanager
    def in_backward(self) -> Iterator[None]:
        """Keeps the mode on inside backward, where checkpoints run their forward again: torch takes a function
        mode off while it calls a function for it, and `Tensor.backward` is such a function."""
        autograd: Any = torch.autograd
        original = autograd._engine_run_backward

        def run(*args: Any, **kwargs: Any) -> Any:
            with self:
                return original(*args, **kwargs)

        autograd._engine_run_backward = run
        try:
            yield
        finally:
            autograd._engine_run_backward = original


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, train: bool = True) -> Tensor:
    """at::dropout on CUDA: native_dropout, which keeps a bool mask (aten/src/ATen/native/Dropout.cpp)."""
    if p == 0.0 or not training or not train:
        return input
    return torch.native_dropout(input, p, True)[0]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """at::scaled_dot_product_attention as it chooses on CUDA (aten/src/ATen/native/transformers): flash for half
    precision without a mask; memory-efficient for the rest where heads agree; else written out."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    size = query.shape[-1]
    if half and attn_mask is None and size <= 256 and value.shape[-1] == size:
        scale = scale if scale is not None else size**-0.5
        q, k, v = (padded(part, 8) for part in (query, key, value))
        out = aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, False, scale=scale)[0]
        return out if out.shape[-1] == size else out[..., :size]
    if query.shape[1] == key.shape[1] and size % (8 if half else 4) == 0:
        needs_grad = torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value))
        bias = attn_mask
        if bias is not None and bias.dtype == torch.bool:
            bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill_(bias.logical_not(), -torch.inf)
        if bias is not None:
            bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, needs_grad, dropout_p, is_causal, scale=scale
        )[0]
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )


def padded(x: Tensor, multiple: int) -> Tensor:
    """`x` with its last dimension filled up with zeros, a copy, unless it is a multiple already."""
    missing = -x.shape[-1] % multiple
    return F.pad(x, (0, missing)) if missing else x
