"""Functions as CUDA runs them, on any device: what autocast casts, and which tensors the kernels allocate.

A function mode stands between Python and torch while a step is traced on fake CPU tensors. The ops it puts
in place are those that torch dispatches to on CUDA, with torch's own derivatives; only a fake tensor can run
them on a CPU.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from gptfit.cuda_autocast import LOWER_ON_BOTH, cast, target
from gptfit.recorder import Recorder

aten = torch.ops.aten
ExcludeDispatchKeys: Any = torch._C._ExcludeDispatchKeyGuard
AUTOCAST_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)


class CudaKernels(TorchFunctionMode):
    """Runs functions as on CUDA.

    It also tells `recorder` of tensors that such code has on the host: those that torch.tensor makes, unless
    it is given another tensor's device. Step counters of optimizers are such.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder
        self.copies: dict[Tensor, Tensor] = {}  # casts that autocast keeps

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self, unchecked():
                return func(*args, **kwargs)
        call: Any = KERNELS.get(func, func)
        name = getattr(func, "__name__", "")
        if not torch.is_autocast_enabled("cpu") or name in LOWER_ON_BOTH:
            if func is torch.tensor and kwargs.get("device") in (None, "cpu"):
                return self.make_on_host(*args, **kwargs)
            return call(*args, **kwargs)
        dtype = target(name, args, kwargs)
        if dtype is None and isinstance(func, FunctionType) and call is func:
            return func(*args, **kwargs)  # made of other functions in Python: the CPU's autocast is the best there is
        with ExcludeDispatchKeys(AUTOCAST_CPU):
            if dtype is None:
                return call(*args, **kwargs)
            named = {key: cast(arg, dtype, self.copies) for key, arg in kwargs.items()}
            return call(*(cast(arg, dtype, self.copies) for arg in args), **named)

    def make_on_host(self, *args: Any, **kwargs: Any) -> Tensor:
        self.recorder.making_on_host = True
        try:
            return torch.tensor(*args, **kwargs)
        finally:
            self.recorder.making_on_host = False

    @contextmanager
    def in_backward(self) -> Iterator[None]:
        """Keeps the mode on inside backward, where checkpoints run their forward again: torch takes a function
        mode off while it calls a function for it, and `Tensor.backward` is such a function."""
        autograd: Any = torch.autograd
        original = autograd._engine_run_backward
        clear = torch.clear_autocast_cache

        def run(*args: Any, **kwargs: Any) -> Any:
            with self:
                return original(*args, **kwargs)

        def clear_all() -> None:  # what the outermost autocast calls where it ends
            clear()
            self.copies.clear()

        autograd._engine_run_backward, torch.clear_autocast_cache = run, clear_all
        try:
            yield
        finally:
            autograd._engine_run_backward, torch.clear_autocast_cache = original, clear


@contextmanager
def unchecked() -> Iterator[None]:
    """A Python function of torch.nn.functional runs under a mode what it consists of, where it would hand itself to
    the mode: nn.MultiheadAttention's is one call, and the attention in it another."""
    module: Any = F
    original = module.has_torch_function
    module.has_torch_function = lambda _: False
    try:
        yield
    finally:
        module.has_torch_function = original


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


def rms_norm(input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """at::rms_norm on CUDA is one kernel, unless dtypes differ (aten/src/ATen/native/layer_norm.cpp)."""
    if weight is not None and weight.dtype != input.dtype:
        return F.rms_norm(input, normalized_shape, weight, eps)
    return FusedRMSNorm.apply(input, weight, len(normalized_shape))  # pyright: ignore[reportReturnType]


class FusedRMSNorm(torch.autograd.Function):
    """Allocates what CUDA's _fused_rms_norm and its backward do, and computes nothing. Keeps input and fp32 rstd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, n_dims: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        y = torch.empty_like(x)
        rstd = x.new_empty((*x.shape[: x.dim() - n_dims], *(1,) * n_dims), dtype=torch.float32)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None if weight is None else torch.empty_like(weight), None


KERNELS: dict[Any, Callable[..., Tensor]] = {
    F.scaled_dot_product_attention: attention,
    F.dropout: dropout,
    torch.dropout: dropout,
    F.rms_norm: rms_norm,
    torch.rms_norm: rms_norm,
}
