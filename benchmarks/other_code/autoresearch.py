"""karpathy/autoresearch (228791f, train.py), written anew: the same operations in the same order, so that the same
tensors live. The published peaks are of a fork whose attention is flash-attn's, of the same tensors as torch's."""

from typing import Any

import torch
import torch.nn.functional as F
from common import norm, rotated
from torch import Tensor, nn

N_LAYER, N_HEAD, N_EMBD, VOCAB_SIZE, BLOCK_SIZE = 8, 4, 512, 8192, 2048
HEAD_SIZE = N_EMBD // N_HEAD
GATE_CHANNELS = 32
COEFFICIENTS = (
    (8.16, -22.48, 15.88),
    (4.04, -2.81, 0.50),
    (3.89, -2.77, 0.51),
    (3.29, -2.37, 0.46),
    (2.35, -1.71, 0.42),
)


class Attention(nn.Module):
    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(N_EMBD, N_EMBD, bias=False) for _ in range(4))
        self.gate = nn.Linear(GATE_CHANNELS, N_HEAD, bias=False) if gated else None

    def forward(self, x: Tensor, value: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        shape = (*x.shape[:2], N_HEAD, HEAD_SIZE)
        q, k, v = self.q(x).view(shape), self.k(x).view(shape), self.v(x).view(shape)
        if value is not None and self.gate is not None:
            gate = 2 * torch.sigmoid(self.gate(x[..., :GATE_CHANNELS]))
            v = v + gate.unsqueeze(-1) * value.view(shape)
        q, k = norm(rotated(q, cos, sin)), norm(rotated(k, cos, sin))
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
        return self.out(y.transpose(1, 2).contiguous().view(x.shape))


class Block(nn.Module):
    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.attn = Attention(gated)
        self.up, self.down = nn.Linear(N_EMBD, 4 * N_EMBD, bias=False), nn.Linear(4 * N_EMBD, N_EMBD, bias=False)

    def forward(self, x: Tensor, value: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(norm(x), value, cos, sin)
        return x + self.down(F.relu(self.up(norm(x))).square())


class Model(nn.Module):
    """Every second layer adds an embedding of its own to the values; each mixes the first residual in."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB_SIZE, N_EMBD, dtype=torch.bfloat16)
        gated = [layer for layer in range(N_LAYER) if layer % 2 == (N_LAYER - 1) % 2]
        self.blocks = nn.ModuleList(Block(layer in gated) for layer in range(N_LAYER))
        self.head = nn.Linear(N_EMBD, VOCAB_SIZE, bias=False)
        self.old, self.first = nn.Parameter(torch.empty(N_LAYER)), nn.Parameter(torch.empty(N_LAYER))
        values = {str(layer): nn.Embedding(VOCAB_SIZE, N_EMBD, dtype=torch.bfloat16) for layer in gated}
        self.values = nn.ModuleDict(values)
        for name in ("cos", "sin"):  # ten times as long as a sequence
            table = torch.empty(1, 10 * BLOCK_SIZE, 1, HEAD_SIZE // 2, dtype=torch.bfloat16)
            self.register_buffer(name, table, persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        n_tokens = tokens.shape[1]
        cos, sin = self.get_buffer("cos")[:, :n_tokens], self.get_buffer("sin")[:, :n_tokens]
        x = start = norm(self.embedding(tokens))
        for layer, block in enumerate(self.blocks):
            x = self.old[layer] * x + self.first[layer] * start
            value = self.values[str(layer)](tokens) if str(layer) in self.values else None
            x = block(x, value, cos, sin)
        logits = self.head(norm(x))
        logits = logits.float()
        logits = 15 * torch.tanh(logits / 15)
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


def adamw(p: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: Tensor, lr: Tensor, beta: Tensor) -> None:
    p.mul_(1 - lr * lr)
    m.lerp_(grad, 1 - beta)
    v.lerp_(grad.square(), 1 - beta)
    denominator = (v / (1 - beta**step)).sqrt() + lr
    p.add_(m / denominator, alpha=-(lr / (1 - beta**step)))


def muon(grads: Tensor, params: Tensor, first: Tensor, second: Tensor, momentum: Tensor, lr: Tensor, dim: int) -> None:
    rate = momentum.to(grads.dtype)
    first.lerp_(grads, 1 - rate)
    g = grads.lerp_(first, rate)
    x = g.bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    for a, b, c in COEFFICIENTS:
        if g.size(-2) > g.size(-1):
            square = x.mT @ x
            x = a * x + x @ (b * square + c * (square @ square))
        else:
            square = x @ x.mT
            x = a * x + (b * square + c * (square @ square)) @ x
    g = x
    mean = g.float().square().mean(dim=dim, keepdim=True)
    size = g.size(dim)
    length = (mean.sum(dim=(-2, -1), keepdim=True) * size).sqrt()
    second.lerp_(mean.to(dtype=second.dtype), 1 - rate.to(g.dtype))
    scale = second.clamp_min(1e-10).rsqrt()
    scaled = (mean * size) * scale.float().square()
    scale = scale * (length / scaled.sum(dim=(-2, -1), keepdim=True).sqrt().clamp_min(1e-10))
    g = g * scale.to(g.dtype)
    rate = lr.to(g.dtype)
    mask = (g * params) >= 0
    params.sub_(rate * g + rate * rate * params * mask)


class MuonAdamW(torch.optim.Optimizer):
    """AdamW one parameter at a time, Muon on all matrices of a shape, stacked."""

    def __init__(self, model: Any) -> None:
        matrices = list(model.blocks.parameters())
        others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
        shapes = sorted({p.shape for p in matrices})
        groups = [{"params": [p for p in matrices if p.shape == shape], "stacked": True} for shape in shapes]
        super().__init__([{"params": others, "stacked": False}, *groups], {})
        self.number = torch.tensor(0.0, device="cpu")
        self.adamw: Any = torch.compile(adamw, dynamic=False)
        self.muon: Any = torch.compile(muon, dynamic=False)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            if group["stacked"]:
                self.step_stacked(group["params"])
                continue
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                self.adamw(p, p.grad, state["exp_avg"], state["exp_avg_sq"], self.number, self.number, self.number)

    def step_stacked(self, params: list[Tensor]) -> None:
        state, shape = self.state[params[0]], params[0].shape
        tall = shape[-2] >= shape[-1]
        if not state:
            state["momentum_buffer"] = torch.zeros(len(params), *shape)
            state["second"] = torch.zeros((len(params), shape[-2], 1) if tall else (len(params), 1, shape[-1]))
        grads = torch.stack([p.grad for p in params if p.grad is not None])
        stacked = torch.stack(params)
        self.muon(
            grads, stacked, state["momentum_buffer"], state["second"], self.number, self.number, -1 if tall else -2
        )
        torch._foreach_copy_(params, list(stacked.unbind(0)))


def step_of(batch_size: int = 4) -> tuple[Any, ...]:
    """Training on one GPU, bf16, one micro-step."""
    raw = Model()
    optimizer = MuonAdamW(raw)
    model: Any = torch.compile(raw, dynamic=False)
    batch = [torch.zeros(batch_size, BLOCK_SIZE, dtype=torch.int64) for _ in range(2)]

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(*batch)
        loss.backward()
        optimizer.step()
        raw.zero_grad(set_to_none=True)

    return step, raw, optimizer
