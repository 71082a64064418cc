"""The layers of the model: matmuls and norms with explicit dtypes, and what backward computes again instead of keeping.

Eager autograd keeps the input of each matmul and each weight's copy in the compute dtype, though a norm's output is
soon made of the norm's input, and an activation of what went into it, which are kept as well. With the `Origin` of its
input a `Linear` keeps neither. Under torch.compile none of this is used: inductor decides what is made again.

Shapes: C in, F out, N tokens.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-5


class Origin(NamedTuple):
    """What a tensor is made of, all of it kept for backward anyway: it is `make(*sources)`."""

    make: Callable[..., Tensor]
    sources: tuple[Tensor | None, ...]


class Linear(nn.Linear):
    """A matmul in the compute dtype, whatever dtype the parameters have.

    With the `origin` of its input it keeps neither the input nor the weight in the compute dtype, but makes them again.
    """

    def __init__(self, n_in: int, n_out: int, bias: bool, dtype: torch.dtype, param_dtype: torch.dtype) -> None:
        super().__init__(n_in, n_out, bias=bias, dtype=param_dtype)
        self.compute_dtype = dtype

    def forward(self, input: Tensor, origin: Origin | None = None) -> Tensor:
        if origin is not None:
            sources = (None if part is None else part.detach() for part in origin.sources)
            return _RemakingLinear.apply(input, self.weight, self.bias, self.compute_dtype, origin.make, *sources)  # pyright: ignore[reportReturnType]
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        return F.linear(input, self.weight.to(self.compute_dtype), bias)


class _RemakingLinear(torch.autograd.Function):
    """F.linear that keeps what its input is made of. The gradients are those of F.linear on casts."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        make: Callable[..., Tensor],
        *sources: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(weight, *sources)
        ctx.make, ctx.dtype, ctx.has_bias = make, dtype, bias is not None
        return F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        weight, *sources = ctx.saved_tensors
        grad_x = grad @ weight.to(ctx.dtype)
        grad_NF, x_NC = grad.flatten(0, -2), ctx.make(*sources).flatten(0, -2)
        grad_weight = (grad_NF.T @ x_NC).to(weight.dtype)
        grad_bias = grad_NF.sum(0).to(weight.dtype) if ctx.has_bias else None
        return grad_x, grad_weight, grad_bias, None, None, *(None for _ in sources)


class LayerNorm(nn.Module):
    """[..., C] in, [..., C] in the compute dtype out; statistics in fp32.

    The output in the input's dtype lives only until it is cast: backward needs the input and the statistics.
    """

    def __init__(self, n_embd: int, bias: bool, dtype: torch.dtype, param_dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd, dtype=param_dtype))
        self.bias = nn.Parameter(torch.zeros(n_embd, dtype=param_dtype)) if bias else None
        self.compute_dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.compute_dtype)

    def origin(self, x: Tensor) -> Origin:
        return Origin(partial(layer_norm, dtype=self.compute_dtype), (x, self.weight, self.bias))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, NORM_EPS).to(dtype)


class RMSNorm(nn.Module):
    """[..., C] in, [..., C] in the compute dtype out; statistics in fp32."""

    def __init__(self, n_embd: int, dtype: torch.dtype, param_dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd, dtype=param_dtype))
        self.compute_dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.compute_dtype)

    def origin(self, x: Tensor) -> Origin:
        return Origin(partial(rms_norm, dtype=self.compute_dtype), (x, self.weight))


def rms_norm(x: Tensor, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, in `dtype`; statistics in fp32."""
    return _RMSNorm.apply(x, weight, dtype)  # pyright: ignore[reportReturnType]


class _RMSNorm(torch.autograd.Function):
    """Keeps its input and rstd. F.rms_norm has a kernel that does so on CUDA alone; elsewhere it falls apart
    into ops that keep two tensors of the input's size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, dtype: torch.dtype) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        rstd = (norm.square_() / x.shape[-1] + NORM_EPS).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        y = x * rstd
        return (y if weight is None else y.mul_(weight)).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, rstd = ctx.saved_tensors
        normed = x * rstd
        grad_weight = None
        if weight is not None:
            grad_weight = (grad * normed).sum(dim=tuple(range(x.dim() - 1))).to(weight.dtype)
            grad = grad * weight
        along = (grad * normed).mean(-1, keepdim=True)
        return normed.mul_(along).neg_().add_(grad).mul_(rstd).to(x.dtype), grad_weight, None


def as_it_is(x: Tensor) -> Tensor:
    return x


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, which keeps gate and up alone."""
    return _SwiGLU.apply(gate, up)  # pyright: ignore[reportReturnType]


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gate, up = ctx.saved_tensors
        grad_up = F.silu(gate).mul_(grad)
        return torch.ops.aten.silu_backward(grad * up, gate), grad_up
