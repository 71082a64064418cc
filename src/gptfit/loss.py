"""The chunked loss: cross entropy of a language model's head without a [tokens, vocabulary] tensor.

Shapes: N tokens, n tokens of one chunk, C n_embd, V vocabulary.

Forward makes the gradients too, chunk by chunk, so that nothing of a chunk outlives it. Alive in the
forward, beyond the arguments: the head's weight in the compute dtype [V, C] where that is not the
weight's own, grad_x [N, C] in the dtype of x, grad_w [V, C] fp32, and of one chunk the logits [n, V] in
the compute dtype. Of the softmax there are two forms. `eager_chunk` takes one fp32 copy of the logits more,
unless they are fp32, and a soft-cap two. `fused_chunk` is for torch.compile: no tensor of that size, and
8 bytes moved for a bf16 logit instead of 26. Alive from forward to backward: grad_x, grad_w and one scalar.

Why grad_w is fp32: it is a sum over all chunks, so a half-precision accumulator would round once a
chunk; and for an fp32 weight it costs nothing, as backward scales it in place and hands it over as the
parameter's gradient. In half precision each chunk's product is one [V, C] temporary in the compute dtype
before it is added (torch 2.13 has addmm with an out_dtype of fp32 for CUDA, and nothing for the CPU); in fp32 it is
added in place.

Why the gradients are kept unscaled: the 1/count of the mean and the scale of a GradScaler come in
with backward, in one multiplication. p - 1 and p fit float16; divided by the number of tokens they
would vanish in it.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -1

# Of logits [n, V], targets and whether they count [n, 1], soft-cap, and whether gradients are wanted: the losses
# [n, 1], fp32, 0 where ignored. With gradients, that of the losses' sum is written over the logits; without, the logits
# are of no more use.
Chunk = Callable[[Tensor, Tensor, Tensor, float, bool], Tensor]


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """cap·tanh(logits / cap) in fp32; the logits as they are where `cap` is 0."""
    return torch.tanh(logits.float() / cap) * cap if cap else logits


def eager_chunk(logits_nV: Tensor, targets_n1: Tensor, valid_n1: Tensor, softcap: float, with_grad: bool) -> Tensor:
    """Works on one fp32 buffer z in place: exp(logit - largest), never a second one of that size."""
    targets_n1 = targets_n1.clamp(min=0)
    if softcap:
        tanh_nV = torch.tanh(logits_nV.float() / softcap)
        capped_nV = tanh_nV * softcap
    else:
        tanh_nV, capped_nV = None, logits_nV
    largest_n1 = capped_nV.amax(1, keepdim=True).float()
    target_n1 = capped_nV.gather(1, targets_n1).float()
    # Half precision minus fp32 makes the fp32 buffer in the same pass; an fp32 buffer is used as it is.
    z_nV = capped_nV.sub_(largest_n1) if capped_nV.dtype == torch.float32 else torch.sub(capped_nV, largest_n1)
    z_nV.exp_()
    sum_n1 = z_nV.sum(1, keepdim=True)
    loss_n1 = (sum_n1.log() + largest_n1 - target_n1) * valid_n1
    if with_grad:
        # p - 1 at the target, taken in fp32: in bf16 the difference of two numbers near 1 keeps no digits.
        z_nV.scatter_add_(1, targets_n1, -sum_n1)
        if tanh_nV is not None:
            z_nV.mul_(tanh_nV.square_().neg_().add_(1.0))
        torch.mul(z_nV, valid_n1 / sum_n1, out=logits_nV)
    return loss_n1


def fused_chunk(logits_nV: Tensor, targets_n1: Tensor, valid_n1: Tensor, softcap: float, with_grad: bool) -> Tensor:
    """The same as expressions alone, which inductor makes three passes over the logits of: largest, sum, gradient.

    Each pass begins at the logits: what two of them share, inductor may write out, in fp32. Not for eager use.
    """
    targets_n1 = targets_n1.clamp(min=0)
    largest_n1 = soft_cap(logits_nV.float(), softcap).amax(1, keepdim=True)
    target_n1 = soft_cap(logits_nV.gather(1, targets_n1).float(), softcap)
    sum_n1 = (soft_cap(logits_nV.float(), softcap) - largest_n1).exp().sum(1, keepdim=True)
    loss_n1 = (sum_n1.log() + largest_n1 - target_n1) * valid_n1
    if with_grad:
        exp_nV = (soft_cap(logits_nV.float(), softcap) - largest_n1).exp()
        columns_V = torch.arange(logits_nV.shape[1], device=logits_nV.device)
        grad_nV = torch.where(columns_V == targets_n1, exp_nV - sum_n1, exp_nV)  # in fp32, as above
        if softcap:
            grad_nV = grad_nV * (1.0 - torch.tanh(logits_nV.float() / softcap).square())
        logits_nV.copy_(grad_nV * (valid_n1 / sum_n1))
    return loss_n1


def chunked_cross_entropy(
    x_NC: Tensor,
    weight_VC: Tensor,
    targets_N: Tensor,
    chunk_size: int = 1024,
    compute_dtype: torch.dtype | None = None,
    softcap: float = 0.0,
    chunk: Chunk = eager_chunk,
) -> Tensor:
    """Mean cross entropy (fp32 scalar) of `x_NC @ weight_VC.T` against int64 targets; -1 is ignored.

    Matmuls run in `compute_dtype` (default: that of x), softmax and loss in fp32. With `softcap` c the
    logits are c·tanh(logits / c). Where all targets are ignored, loss and gradients are 0 (not nan, as
    F.cross_entropy has it), so that such a micro-batch adds nothing to its step. Without gradients
    (evaluation) only one chunk's logits are ever alive. Backward runs once: it scales in place. `chunk` is eager_chunk,
    or fused_chunk compiled.
    """
    dtype = compute_dtype or x_NC.dtype
    with_grad = torch.is_grad_enabled()
    return _ChunkedCrossEntropy.apply(x_NC, weight_VC, targets_N, chunk_size, dtype, softcap, with_grad, chunk)  # pyright: ignore[reportReturnType]


def full_cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """The plain loss on logits that exist: fp32 mean; -1 is ignored."""
    logits_NV = logits_NV.float()  # the name moves on, so that those in low precision are let go before the loss
    return F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORE_INDEX)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        x_NC: Tensor,
        weight_VC: Tensor,
        targets_N: Tensor,
        chunk_size: int,
        dtype: torch.dtype,
        softcap: float,
        with_grad: bool,
        chunk: Chunk,
    ) -> Tensor:
        w_VC = weight_VC.to(dtype)
        valid_N = targets_N != IGNORE_INDEX
        scale = 1.0 / valid_N.sum().clamp(min=1).to(torch.float32)
        total = torch.zeros((), dtype=torch.float32, device=x_NC.device)
        grad_x_NC = torch.empty_like(x_NC) if with_grad else None
        grad_w_VC = torch.zeros_like(weight_VC, dtype=torch.float32) if with_grad else None
        for start in range(0, len(x_NC), chunk_size):
            rows = slice(start, start + chunk_size)
            x_nC, valid_n1 = x_NC[rows].to(dtype), valid_N[rows].unsqueeze(1)
            grad_nV = x_nC @ w_VC.T  # the logits, until `chunk` has written over them
            loss_n1 = chunk(grad_nV, targets_N[rows].unsqueeze(1), valid_n1, softcap, with_grad)
            total += loss_n1.sum()
            if grad_x_NC is not None and grad_w_VC is not None:
                _add_product(grad_w_VC, grad_nV.T, x_nC)
                grad_x_NC[rows] = grad_nV @ w_VC
            del loss_n1, grad_nV  # or they would live on beside the next chunk's logits
        if grad_x_NC is not None and grad_w_VC is not None:
            ctx.save_for_backward(grad_x_NC, grad_w_VC, scale)
            ctx.weight_dtype = weight_VC.dtype
        return total * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_x_NC, grad_w_VC, scale = ctx.saved_tensors
        factor = grad * scale
        # In place: what is scaled here is the gradient itself, not a second copy of it. A second backward
        # through the same graph finds the saved tensors changed and raises.
        grad_x_NC.mul_(factor)
        grad_w_VC.mul_(factor)
        return grad_x_NC, grad_w_VC.to(ctx.weight_dtype), None, None, None, None, None, None


def _add_product(sum_VC: Tensor, grad_Vn: Tensor, x_nC: Tensor) -> None:
    """sum += grad @ x, in place where the dtypes allow it."""
    if x_nC.dtype == sum_VC.dtype:
        sum_VC.addmm_(grad_Vn, x_nC)
    else:
        sum_VC.add_(grad_Vn @ x_nC)
