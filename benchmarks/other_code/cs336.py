"""The model that Stanford's course CS336 hands out for its assignment on systems, and the steps that three of its
students measured, written anew: the same operations in the same order, so that the same tensors live.

Facts from stanford-cs336/assignment2-systems, cs336-basics (9d95f3b), duoan/cs336-assignment2-systems,
cs336_systems/benchmarking.py (6a738ab), EnzoDing-rgb/cs336-assignment2-systems,
cs336_systems/gradient_checkpointing/forward.py (9cb4efb), and LINYUNLinYun/CS336-assignment2-systems,
cs336_systems/benchmark_nvtx.py (d7b9b89).
"""

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

VOCAB_SIZE = 10_000
BATCH_SIZE = 4

# n_layer, n_head, n_embd; the hidden layer has four times n_embd.
SIZES = {"small": (12, 12, 768), "large": (36, 20, 1280), "xl": (32, 32, 2560)}


def matrix(n_out: int, n_in: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(n_out, n_in))


def times(x: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("...i,oi->...o", x, weight)


class Norm(nn.Module):
    def __init__(self, n_embd: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.to(torch.float32)
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        x = x * scale
        return (self.weight * x).to(dtype)


def softmax(x: Tensor) -> Tensor:
    shifted = x - torch.max(x, dim=-1, keepdim=True)[0]
    powers = torch.exp(shifted)
    return powers / torch.sum(powers, dim=-1, keepdim=True)


class Attention(nn.Module):
    def __init__(self, n_embd: int, n_head: int, rotation: nn.Module) -> None:
        super().__init__()
        self.n_head = n_head
        self.q, self.k, self.v, self.out = (matrix(n_embd, n_embd) for _ in range(4))
        self.rotation = rotation

    def forward(self, x: Tensor) -> Tensor:
        n_tokens = x.shape[1]
        q, k, v = times(x, self.q), times(x, self.k), times(x, self.v)
        q, k, v = (part.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for part in (q, k, v))
        q, k = self.rotation(q), self.rotation(k)
        places = torch.arange(n_tokens, device=x.device)
        mask = (places[:, None] >= places[None])[None]
        mixed = self.mixed(q, k, v, mask)
        return times(mixed.transpose(1, 2).flatten(2).contiguous(), self.out)

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """A function of its own: what it names is let go when it returns."""
        scores = torch.einsum("...qd,...kd->...qk", q, k) / math.sqrt(k.shape[-1])
        scores = torch.where(mask, scores, float("-inf"))
        weights = softmax(scores)
        return torch.einsum("...qk,...kd->...qd", weights, v)


class Rotation(nn.Module):
    """Rotary embeddings of pairs of neighbours, laid out as halves. One for all layers."""

    def __init__(self, block_size: int, head_size: int) -> None:
        super().__init__()
        self.register_buffer("table", torch.empty(2, block_size, head_size // 2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        one, two = x.unflatten(-1, (-1, 2)).permute(4, 0, 1, 2, 3).unbind(0)
        cos, sin = self.table[:, : x.shape[-2], :].unbind(0)
        first = cos * one - sin * two
        second = sin * one + cos * two
        return torch.concat((first, second), dim=-1)


class Gated(nn.Module):
    def __init__(self, n_embd: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = (
            matrix(4 * n_embd, n_embd),
            matrix(4 * n_embd, n_embd),
            matrix(n_embd, 4 * n_embd),
        )

    def forward(self, x: Tensor) -> Tensor:
        return times(self.silu(times(x, self.gate)) * times(x, self.up), self.down)

    def silu(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class Block(nn.Module):
    def __init__(self, n_embd: int, n_head: int, rotation: nn.Module) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(n_embd, n_head, rotation), Gated(n_embd)
        self.norm_1, self.norm_2 = Norm(n_embd), Norm(n_embd)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.attn(self.norm_1(x))
        middle = x + mixed
        added = self.mlp(self.norm_2(middle))
        return middle + added


class Model(nn.Module):
    def __init__(self, size: str, block_size: int, group: int = 0) -> None:
        super().__init__()
        self.group = group  # blocks of a checkpoint; 0 for none
        n_layer, n_head, n_embd = SIZES[size]
        rotation = Rotation(block_size, n_embd // n_head)
        self.embedding = matrix(VOCAB_SIZE, n_embd)
        self.blocks = nn.ModuleList(Block(n_embd, n_head, rotation) for _ in range(n_layer))
        self.norm, self.head = Norm(n_embd), matrix(VOCAB_SIZE, n_embd)

    def forward(self, tokens: Tensor) -> Tensor:
        embedded = self.embedding[tokens, :]  # alive as long as the forward runs
        x = embedded
        if self.group:
            for first in range(0, len(self.blocks), self.group):
                x = checkpoint(self.run, x, first, use_reentrant=False)
        else:
            for block in self.blocks:
                x = block(x)
        x = self.norm(x)
        return times(x, self.head)

    def run(self, x: Tensor, first: int) -> Tensor:
        for block in self.blocks[first : first + self.group]:
            x = block(x)
        return x


def log_softmax(x: Tensor) -> Tensor:
    largest = torch.max(x, dim=-1, keepdim=True)[0]
    x = x - largest
    return x - torch.log(torch.sum(torch.exp(x), dim=-1, keepdim=True))


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    negative = -log_softmax(logits)
    return torch.mean(torch.gather(negative, -1, targets.unsqueeze(-1)))


class PlainAdamW(torch.optim.Optimizer):
    """AdamW in plain operations, one parameter at a time; its moments are new tensors in every step."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 1e-3})

    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            grad, state = parameter.grad.data, self.state[parameter]
            parameter.data -= 1e-5 * parameter.data
            old_m = state.get("m", torch.zeros_like(grad))
            old_v = state.get("v", torch.zeros_like(grad))
            m = 0.9 * old_m + (0.1 * grad)
            v = 0.999 * old_v + (0.001 * torch.square(grad))
            parameter.data -= 1e-3 * m / (torch.sqrt(v) + 1e-8)
            state["m"], state["v"] = m, v


def course_step(size: str = "small", block_size: int = 512, compile: bool = False, group: int = 0) -> tuple[Any, ...]:
    """duoan's and EnzoDing-rgb's step: the course's loss and optimizer, fp32. `compile` compiles the model alone,
    `group` is the number of blocks of a checkpoint."""
    tokens = torch.zeros(BATCH_SIZE, block_size + 1, dtype=torch.int64)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    model: Any = Model(size, block_size, group)
    optimizer = PlainAdamW(model.parameters())
    run: Any = torch.compile(model) if compile else model
    kept: dict[str, Tensor] = {}

    def step() -> None:
        kept["logits"] = run(inputs)
        kept["loss"] = cross_entropy(kept["logits"], targets)
        kept["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, model, optimizer


def torch_step(size: str = "xl", block_size: int = 512, bfloat16: bool = False) -> tuple[Any, ...]:
    """LINYUNLinYun's step: torch's loss in fp32 and AdamW as torch has it by default."""
    inputs = torch.zeros(BATCH_SIZE, block_size, dtype=torch.int64)
    targets = torch.zeros(BATCH_SIZE, block_size, dtype=torch.int64)
    model = Model(size, block_size)
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16) if bfloat16 else nullcontext():
            logits = model(inputs)
        loss = F.cross_entropy(logits.float().reshape(-1, VOCAB_SIZE), targets.reshape(-1))
        loss.backward()
        optimizer.step()

    return step, model, optimizer


def forward_only(
    size: str = "xl", block_size: int = 512, bfloat16: bool = False
) -> tuple[Callable[[], None], nn.Module]:
    """LINYUNLinYun's forward without gradients."""
    inputs = torch.zeros(BATCH_SIZE, block_size, dtype=torch.int64)
    targets = torch.zeros(BATCH_SIZE, block_size, dtype=torch.int64)
    model = Model(size, block_size)

    def step(targets: Tensor = targets) -> None:
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16) if bfloat16 else nullcontext():
            model(inputs)

    return step, model
