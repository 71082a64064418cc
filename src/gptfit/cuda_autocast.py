"""torch.autocast as CUDA does it, on any device.

The CPU's autocast has other op lists than CUDA's (layer_norm and cross_entropy do not go to fp32 there), so a
step that is traced without a GPU needs CUDA's. This is a function mode: it casts the arguments of functions
by name, before they are dispatched. What C++ code calls inside an op is not seen, and needs not be: its
arguments have been cast already.

Lists: aten/src/ATen/autocast_mode.h of torch 2.13 (AT_FORALL_LOWER_PRECISION_FP, AT_FORALL_FP32,
AT_FORALL_FP32_SET_OPT_DTYPE, AT_FORALL_PROMOTE); torch.nn.functional's names are added where they differ.
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def names(text: str) -> frozenset[str]:
    return frozenset(text.split())


LOWER = names(
    """_convolution conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d conv_transpose3d convolution
    prelu addmm addmv addr matmul __matmul__ __rmatmul__ einsum mm mv linalg_vecdot vecdot linear addbmm baddbmm bmm
    chain_matmul linalg_multi_dot multi_dot scaled_dot_product_attention bilinear_linear"""
)
SINGLE = names(
    """acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow __pow__ __rpow__ softplus
    layer_norm native_layer_norm rms_norm group_norm cosine_similarity poisson_nll_loss cosine_embedding_loss
    nll_loss nll_loss_nd nll_loss2d cross_entropy cross_entropy_loss hinge_embedding_loss kl_div l1_loss
    smooth_l1_loss huber_loss mse_loss margin_ranking_loss multilabel_margin_loss soft_margin_loss
    triplet_margin_loss multi_margin_loss binary_cross_entropy_with_logits dist pdist cdist renorm logsumexp
    interpolate upsample norm nuclear_norm frobenius_norm"""
)
SINGLE_UNLESS_TOLD = names(
    """prod softmax log_softmax cumprod cumsum vector_norm linalg_vector_norm matrix_norm linalg_matrix_norm
    sum"""
)
WIDEST = names("addcdiv addcmul atan2 bilinear cross dot vdot grid_sample index_put tensordot scatter_add")


class CudaAutocast(TorchFunctionMode):
    """Casts as `torch.autocast("cuda", dtype)` does. Parameters are cast once while it is entered."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.cache: dict[int, Tensor] = {}
        self.depth = 0

    def __enter__(self) -> "CudaAutocast":
        self.depth += 1
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.depth -= 1
        if self.depth == 0:
            self.cache.clear()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        target = self.target(name, args, kwargs)
        if target is None:
            return func(*args, **kwargs)
        # The list, not this frame's variables, holds the casts: they live as long as in C++.
        return func(*(self.cast(arg, target) for arg in args), **{k: self.cast(v, target) for k, v in kwargs.items()})

    def target(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.dtype | None:
        if name in LOWER:
            return self.dtype
        if name in SINGLE:
            return torch.float32
        if name in SINGLE_UNLESS_TOLD:
            return torch.float32 if kwargs.get("dtype") is None else None
        if name in WIDEST:
            dtypes = [arg.dtype for arg in (*args, *kwargs.values()) if is_eligible(arg)]
            return torch.float32 if torch.float32 in dtypes else None
        return None

    def cast(self, value: Any, dtype: torch.dtype) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(self.cast(part, dtype) for part in value) if type(value) in (list, tuple) else value
        if not is_eligible(value) or value.dtype == dtype:
            return value
        # cached_cast: leaf fp32 tensors that require a gradient, to the lower precision only.
        if dtype == self.dtype and value.dtype == torch.float32 and value.is_leaf and value.requires_grad:
            if id(value) not in self.cache:
                self.cache[id(value)] = value.to(dtype)
            return self.cache[id(value)]
        return value.to(dtype)


def is_eligible(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
