"""What several of these programs have alike."""

import torch
import torch.nn.functional as F
from torch import Tensor


def norm(x: Tensor) -> Tensor:
    """As it was up to torch 2.11: autocast leaves it in bf16. 2.12 has it in fp32 (pytorch/pytorch#174824)."""
    with torch.autocast("cuda", enabled=False):
        return F.rms_norm(x, (x.size(-1),))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[3] // 2
    one, two = x[..., :half], x[..., half:]
    return torch.cat([one * cos + two * sin, one * (-sin) + two * cos], 3).to(x.dtype)
