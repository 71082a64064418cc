"""Ops as CUDA's kernels and the autograd engine on real tensors have them, where fake tensors of the CPU differ."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

# Formulas of gradients that write into zeros, and make a copy instead for tensors that run Python, as fake ones do
# (areAnyTensorSubclassLike in TensorAdvancedIndexing.cpp, ReduceOpsUtils and FunctionsManual.cpp).
INTO_ZEROS = {
    aten.scatter.src: aten.scatter_.src,
    aten.scatter_add.default: aten.scatter_add_.default,
    aten.index_put.default: aten.index_put_.default,
}


def as_cuda_gives(func: Any, out: Any) -> Any:
    """`out` in the dtypes that CUDA's kernel has, where they differ: layer_norm's statistics are in fp32 there."""
    if func is aten.native_layer_norm.default and out[1].dtype in (torch.bfloat16, torch.float16):
        return out[0], out[1].float(), out[2].float()
    return out


def accumulates(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether this op, called by the autograd engine, is its own sum of two gradients that arrived for one tensor."""
    return func is aten.add.Tensor and len(args) == 2 and isinstance(args[1], Tensor)


def called_by_engine() -> bool:
    """Whether C++ code calls the op that is dispatched: it calls no Python in between, while a backward written in
    Python would be the nearest frame."""
    return sys._getframe(2).f_code.co_filename.endswith("torch/autograd/graph.py")


def holders(tensor: Tensor) -> tuple[int, int, int]:
    """References to the tensor in C++ and in Python, and to its storage."""
    storage_uses = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)  # pyright: ignore[reportAttributeAccessIssue]
    return tensor._use_count(), sys.getrefcount(tensor), storage_uses  # pyright: ignore[reportAttributeAccessIssue]


def is_dense(tensor: Tensor) -> bool:
    """Non-overlapping and dense: its elements fill its storage's stretch once."""
    expected = 1
    for stride, size in sorted(
        (stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1
    ):
        if stride != expected:
            return False
        expected *= size
    return True


def grouped_product(
    a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """at::_grouped_mm on CUDA, which takes fp32 and fp16, too (ATen/native/GroupedMMUtils.h, its output; rows are
    padded to 16 bytes), while the fake kernel knows bfloat16 alone."""
    if a.dim() != b.dim():
        shape = (a.shape[-2], b.shape[-1])
    else:
        shape = (a.shape[0] if offs is None else offs.shape[0], a.shape[-2], b.shape[-1])
    alignment = 16 // a.element_size()
    row = -(-shape[-1] // alignment) * alignment
    strides = (row, 1) if len(shape) == 2 else (shape[1] * row, row, 1)
    return torch.empty_strided(shape, strides, dtype=a.dtype)


# Ops whose fake kernel refuses what CUDA's takes.
KERNELS: dict[Any, Callable[..., Any]] = {aten._grouped_mm.default: grouped_product}
