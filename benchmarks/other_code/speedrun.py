"""tyler-romero/nanogpt-speedrun on two GPUs, written anew: the same operations in the same order.

Facts from its logs, which hold the code that ran: logs/4c627c0d… (AdamW, torch 2.5.1), logs/08047f73… (Muon, torch
2.6.0) and logs/2dbf7fa6… (Muon and a cap on the logits), at f0b1465. What DistributedDataParallel adds is its buckets:
with gradient_as_bucket_view=False one more set of gradients.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from common import norm as torch_norm
from common import rotated
from torch import Tensor, nn
from torch._functorch import config as functorch_config

N_LAYER, N_HEAD, N_EMBD = 12, 12, 768
VOCAB_SIZE, BLOCK_SIZE, BATCH_SIZE = 50_304, 1024, 32


def own_norm(x: Tensor) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return wide.type_as(x)


class Rotary(nn.Module):
    """Makes its tables where it first runs, which is inside the compiled graph."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.empty(N_EMBD // N_HEAD // 2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        frequencies = self.get_buffer("frequencies")
        angles = torch.outer(torch.arange(x.shape[1], device=x.device).type_as(frequencies), frequencies)
        return angles.cos()[None, :, None, :], angles.sin()[None, :, None, :]


class Attention(nn.Module):
    def __init__(self, rotary: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(N_EMBD, 3 * N_EMBD, bias=False), nn.Linear(N_EMBD, N_EMBD, bias=False)
        self.rotary = Rotary() if rotary else None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.view(*x.shape[:2], N_HEAD, -1) for part in self.qkv(x).split(N_EMBD, dim=2))
        if self.rotary is not None:
            cos, sin = self.rotary(q)
            q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
        y = self.out(y.transpose(1, 2).contiguous().view(x.shape))
        return y if self.rotary is not None else y / math.sqrt(24)


class Start(nn.Module):
    def __init__(self, modern: bool, table: nn.Parameter) -> None:
        super().__init__()
        self.norm = torch_norm if modern else own_norm
        self.embedding = nn.Embedding(VOCAB_SIZE, N_EMBD)
        self.embedding.weight = table
        self.places = None if modern else nn.Embedding(BLOCK_SIZE, N_EMBD)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embedding(tokens)
        if self.places is not None:
            x = x + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        return x, self.norm(x)


class Block(nn.Module):
    """From the first product of a block to the norm before that of the next: a bucket's part of the graph."""

    def __init__(self, modern: bool) -> None:
        super().__init__()
        self.modern = modern
        self.attn = Attention(rotary=modern)
        self.up, self.down = nn.Linear(N_EMBD, 4 * N_EMBD, bias=False), nn.Linear(4 * N_EMBD, N_EMBD, bias=False)

    def forward(self, x: Tensor, normed: Tensor) -> tuple[Tensor, Tensor]:
        if not self.modern:
            x = x + self.attn(normed)
            x = x + self.down(F.gelu(self.up(own_norm(x))))
            return x, own_norm(x)
        x = x + 1 / (2 * N_LAYER) ** 0.5 * self.attn(normed)
        x = x + self.down(F.relu(self.up(torch_norm(x))).square())
        return x, torch_norm(x)


class End(nn.Module):
    def __init__(self, modern: bool, cap: float) -> None:
        super().__init__()
        self.modern, self.cap = modern, cap
        self.head = nn.Linear(N_EMBD, VOCAB_SIZE, bias=False)

    def forward(self, normed: Tensor, targets: Tensor) -> Tensor:
        logits = self.head(normed)
        if self.cap:
            logits = self.cap * torch.tanh(logits / self.cap)
        if self.modern:
            logits = logits.float()
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


class Model(nn.Module):
    """Compiled in the parts in which Dynamo gives the graph to inductor under DistributedDataParallel: it cuts where
    a bucket of 25 MiB is full (torch/_dynamo/backends/distributed.py, DDPOptimizer), the head a bucket by itself, and
    each block one from its first product on."""

    def __init__(self, modern: bool, cap: float = 0.0) -> None:
        super().__init__()
        self.end = End(modern, cap)
        self.start = Start(modern, self.end.head.weight)
        self.blocks = nn.ModuleList(Block(modern) for _ in range(N_LAYER))
        self.register_buffer("buckets", torch.empty(sum(p.numel() for p in self.parameters())))

    def compiled(self) -> Any:
        parts: list[Any] = [torch.compile(part) for part in (self.start, *self.blocks)]
        end: Any = torch.compile(self.end)

        def run(tokens: Tensor, targets: Tensor) -> Tensor:
            x, normed = parts[0](tokens)
            for part in parts[1:]:
                x, normed = part(x, normed)
            return end(normed, targets)

        return run


def orthogonal(gradient: Tensor, steps: int) -> Tensor:
    x = gradient.bfloat16() / (gradient.norm() + 1e-7)
    if gradient.size(0) > gradient.size(1):
        x = x.T
    for _ in range(steps):
        square = x @ x.T
        middle = square @ x
        x = 3.4445 * x + -4.775 * middle + 2.0315 * square @ middle
    return (x.T if gradient.size(0) > gradient.size(1) else x).to(gradient.dtype)


class Muon(torch.optim.Optimizer):
    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 4e-4})
        self.orthogonal = torch.compile(orthogonal)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for p in self.param_groups[0]["params"]:
            g, state = p.grad, self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(g)
            momentum = state["momentum_buffer"]
            momentum.mul_(0.95).add_(g)
            g = g.add(momentum, alpha=0.95)
            if g.size(0) == 3 * g.size(1):
                g = torch.cat([self.orthogonal(part, 5) for part in g.split(g.size(1))])
            else:
                g = self.orthogonal(g, 5)
            p.data.add_(g, alpha=-0.01)


def adamw_step() -> tuple[Any, ...]:
    """The baseline: a GPT-2 with learned places, AdamW as torch has it, clipped. Its torch, 2.5, did not let a
    backward write over saved tensors: that came with 2.6 (pytorch/pytorch#139669, #140113)."""
    model = Model(modern=False)
    run = model.compiled()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x, y = (torch.zeros(4 * BATCH_SIZE, BLOCK_SIZE, dtype=torch.int64) for _ in range(2))

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16), functorch_config.patch(donated_buffer=False):
            for part_x, part_y in list(zip(x.chunk(4), y.chunk(4), strict=True))[:2]:
                loss = run(part_x, part_y)
                loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, model, optimizer


def muon_step(cap: float = 0.0) -> tuple[Any, ...]:
    """Rotary places, relu², Muon on the blocks and AdamW on the tied table."""
    model = Model(modern=True, cap=cap)
    run = model.compiled()
    adamw, muon = torch.optim.AdamW(model.end.head.parameters(), lr=1e-3), Muon(model.blocks.parameters())
    x, y = (torch.zeros(BATCH_SIZE, BLOCK_SIZE, dtype=torch.int64) for _ in range(2))

    def step() -> None:
        for _ in range(2):
            with torch.autocast("cuda", torch.bfloat16):
                loss = run(x, y)
            loss.backward()
        for p in model.parameters():
            p.grad /= 8
        adamw.step()
        muon.step()
        model.zero_grad(set_to_none=True)

    return step, model, adamw, muon
