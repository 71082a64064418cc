"""What torch.autocast casts on CUDA, for code that runs under the CPU's autocast.

The CPU's autocast has other op lists than CUDA's (layer_norm and cross_entropy do not go to fp32 there), so a
step that is traced without a GPU needs CUDA's. Whether autocast is on, and to which dtype, is the CPU's
`torch.autocast("cpu", dtype)`: everything that deals with it, checkpoints too, then works as on CUDA. Only the
casts are made here, from the names of functions. What C++ code calls inside an op is not seen, and needs
not be: its arguments have been cast by then.

Lists: aten/src/ATen/autocast_mode.h of torch 2.13 (AT_FORALL_LOWER_PRECISION_FP, AT_FORALL_FP32,
AT_FORALL_FP32_SET_OPT_DTYPE, AT_FORALL_PROMOTE); Python's names are added where they differ.
"""

from typing import Any

import torch
from torch import Tensor


def names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Lower precision on both devices, so the CPU's own autocast casts for them, and caches the casts of parameters.
LOWER_ON_BOTH = names(
    """conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d conv_transpose3d convolution _convolution
    addmm matmul __matmul__ __rmatmul__ mm linear addbmm baddbmm bmm linalg_vecdot vecdot"""
)
LOWER = names(
    """prelu addmv addr einsum mv chain_matmul linalg_multi_dot multi_dot lstm_cell gru_cell rnn_tanh_cell
    rnn_relu_cell scaled_dot_product_attention"""
)
SINGLE = names(
    """acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow __pow__ __rpow__ softplus
    layer_norm native_layer_norm rms_norm group_norm cosine_similarity poisson_nll_loss cosine_embedding_loss
    nll_loss nll_loss_nd nll_loss2d cross_entropy cross_entropy_loss hinge_embedding_loss kl_div l1_loss
    smooth_l1_loss huber_loss mse_loss margin_ranking_loss multilabel_margin_loss soft_margin_loss
    triplet_margin_loss multi_margin_loss binary_cross_entropy_with_logits dist pdist cdist renorm logsumexp
    interpolate norm nuclear_norm frobenius_norm"""
)
SINGLE_UNLESS_TOLD = names(
    """prod softmax log_softmax cumprod cumsum vector_norm linalg_vector_norm matrix_norm linalg_matrix_norm
    sum"""
)
WIDEST = names("addcdiv addcmul atan2 bilinear cross dot vdot grid_sample grid_sampler index_put tensordot scatter_add")


def target(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.dtype | None:
    """The dtype that arguments of the function `name` are cast to, or None where they stay as they are."""
    if name in LOWER:
        return torch.get_autocast_dtype("cpu")
    if name in SINGLE:
        return torch.float32
    if name in SINGLE_UNLESS_TOLD:
        return torch.float32 if kwargs.get("dtype") is None else None
    if name in WIDEST:
        single = any(is_eligible(arg) and arg.dtype == torch.float32 for arg in (*args, *kwargs.values()))
        return torch.float32 if single else None
    return None


def cast(value: Any, dtype: torch.dtype, copies: dict[Tensor, Tensor]) -> Any:
    """`value`, and what is in it if it is a list or a tuple, in `dtype`. Differentiable. `copies` are those of
    parameters, which autocast keeps until its region ends, without gradients too (autocast_mode.cpp, cached_cast)."""
    if type(value) in (list, tuple):
        return type(value)(cast(part, dtype, copies) for part in value)
    if not is_eligible(value) or value.dtype == dtype:
        return value
    is_kept = value.dtype == torch.float32 and value.requires_grad and value.is_leaf and not value._is_view()
    if not (is_kept and torch.is_autocast_cache_enabled()):
        return value.to(dtype)
    if value not in copies:
        copies[value] = value.to(dtype)
    return copies[value]


def is_eligible(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
