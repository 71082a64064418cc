"""karpathy/nanochat as it was in October 2025 (fca2b8c: nanochat/gpt.py, nanochat/muon.py, scripts/base_train.py),
written anew: the same operations in the same order, so that the same tensors live."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from common import norm, rotated
from torch import Tensor, nn

HEAD_SIZE = 128


class Attention(nn.Module):
    def __init__(self, n_embd: int, n_head: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.q, self.k, self.v, self.out = (nn.Linear(n_embd, n_embd, bias=False) for _ in range(4))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shape = (*x.shape[:2], self.n_head, -1)
        q, k, v = self.q(x).view(shape), self.k(x).view(shape), self.v(x).view(shape)
        q, k = norm(rotated(q, cos, sin)), norm(rotated(k, cos, sin))
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
        return self.out(y.transpose(1, 2).contiguous().view(x.shape))


class Block(nn.Module):
    def __init__(self, n_embd: int, n_head: int) -> None:
        super().__init__()
        self.attn = Attention(n_embd, n_head)
        self.up, self.down = nn.Linear(n_embd, 4 * n_embd, bias=False), nn.Linear(4 * n_embd, n_embd, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(norm(x), cos, sin)
        return x + self.down(F.relu(self.up(norm(x))).square())


class Model(nn.Module):
    def __init__(self, n_layer: int, n_head: int, n_embd: int, vocab_size: int, block_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, n_embd, dtype=torch.bfloat16)
        self.blocks = nn.ModuleList(Block(n_embd, n_head) for _ in range(n_layer))
        self.head = nn.Linear(n_embd, vocab_size, bias=False)
        for name in ("cos", "sin"):  # ten times as long as a sequence
            table = torch.empty(1, 10 * block_size, 1, n_embd // n_head // 2, dtype=torch.bfloat16)
            self.register_buffer(name, table, persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        n_tokens = tokens.shape[1]
        cos, sin = self.get_buffer("cos")[:, :n_tokens], self.get_buffer("sin")[:, :n_tokens]
        x = norm(self.embedding(tokens))
        for block in self.blocks:
            x = block(x, cos, sin)
        logits = self.head(norm(x))
        logits = 15 * torch.tanh(logits / 15)
        logits = logits.float()
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


def orthogonal(gradient: Tensor, steps: int) -> Tensor:
    """The Newton-Schulz iteration of Muon."""
    x = gradient.bfloat16()
    if gradient.size(-2) > gradient.size(-1):
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        middle = -4.775 * square + 2.0315 * square @ square
        x = 3.4445 * x + middle @ x
    return x.mT if gradient.size(-2) > gradient.size(-1) else x


class Muon(torch.optim.Optimizer):
    """One matrix at a time: the momentum is written into the gradient, then made orthogonal, compiled."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.02, "momentum": 0.95})
        self.orthogonal = torch.compile(orthogonal)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for p in self.param_groups[0]["params"]:
            g, state = p.grad, self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(g)
            momentum = state["momentum_buffer"]
            momentum.lerp_(g, 0.05)
            g = g.lerp_(momentum, 0.95)
            g = self.orthogonal(g, 5)
            p.add_(g, alpha=-0.02 * max(1, p.size(-2) / p.size(-1)) ** 0.5)


def step_of(depth: int = 10, batch_size: int = 8, vocab_size: int = 65_536, compile: bool = True) -> tuple[Any, ...]:
    """Training on one GPU, bf16, gradients of several micro-steps added up, clipped to 1."""
    n_embd, block_size = 64 * depth, 2048
    raw = Model(depth, n_embd // HEAD_SIZE, n_embd, vocab_size, block_size)
    model: Any = torch.compile(raw, dynamic=False) if compile else raw
    heads = [{"params": list(raw.head.parameters())}, {"params": list(raw.embedding.parameters())}]
    adamw = torch.optim.AdamW(heads, lr=0.004, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0, fused=True)
    muon = Muon(raw.blocks.parameters())
    batch: list[Tensor] = []

    def load() -> None:
        batch[:] = (torch.zeros(batch_size, block_size, dtype=torch.int64) for _ in range(2))

    def step() -> None:
        if not batch:
            load()
        for _ in range(2):
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(*batch)
            loss = loss / 2
            loss.backward()
            load()
        nn.utils.clip_grad_norm_(raw.parameters(), 1.0)
        adamw.step()
        muon.step()
        raw.zero_grad(set_to_none=True)

    return step, raw, adamw, muon


def small_step() -> tuple[Any, ...]:
    """Dicklesworthstone/model_guided_research (5a29380, nanochat/train.py), a small run: gradients are let go before
    the forward, not behind the step, and there is no clipping."""
    raw = Model(2, 4, 64, 50_304, 64)
    model: Any = torch.compile(raw)
    heads = [{"params": list(raw.head.parameters())}, {"params": list(raw.embedding.parameters())}]
    adamw = torch.optim.AdamW(heads, lr=0.004, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0, fused=True)
    muon = Muon(raw.blocks.parameters())
    batch = [torch.zeros(2, 64, dtype=torch.int64) for _ in range(2)]

    def step() -> None:
        raw.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(*batch)
        loss.backward()
        adamw.step()
        muon.step()

    return step, raw, adamw, muon
