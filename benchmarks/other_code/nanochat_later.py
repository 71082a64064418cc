"""karpathy/nanochat as it was from March 2026 on (a825e63 to 92d63d4: nanochat/gpt.py, nanochat/optim.py), written
anew: the same operations in the same order, so that the same tensors live. No autocast: a product casts its weight.

Its optimizer is autoresearch's but for norms of a matrix more, which are not where the peak is."""

from typing import Any

import torch
import torch.nn.functional as F
from autoresearch import MuonAdamW
from common import rotated
from torch import Tensor, nn

VOCAB_SIZE, BLOCK_SIZE, HEAD_SIZE = 32_768, 2048, 128
GATE_CHANNELS, SMEAR_CHANNELS = 12, 24


class Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(dtype=input.dtype))


def linear(n_in: int, n_out: int) -> Linear:
    return Linear(n_in, n_out, bias=False)


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class Attention(nn.Module):
    def __init__(self, n_embd: int, gated: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (linear(n_embd, n_embd) for _ in range(4))
        self.gate = linear(GATE_CHANNELS, n_embd // HEAD_SIZE) if gated else None

    def forward(self, x: Tensor, value: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        shape = (*x.shape[:2], -1, HEAD_SIZE)
        q, k, v = self.q(x).view(shape), self.k(x).view(shape), self.v(x).view(shape)
        if value is not None and self.gate is not None:
            gate = 3 * torch.sigmoid(self.gate(x[..., :GATE_CHANNELS]))
            v = v + gate.unsqueeze(-1) * value.view(shape)
        q, k = norm(rotated(q, cos, sin)) * 1.2, norm(rotated(k, cos, sin)) * 1.2
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
        return self.out(y.transpose(1, 2).contiguous().view(x.shape))


class Block(nn.Module):
    def __init__(self, n_embd: int, gated: bool) -> None:
        super().__init__()
        self.attn = Attention(n_embd, gated)
        self.up, self.down = linear(n_embd, 4 * n_embd), linear(4 * n_embd, n_embd)

    def forward(self, x: Tensor, value: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(norm(x), value, cos, sin)
        return x + self.down(F.relu(self.up(norm(x))).square())


class Model(nn.Module):
    def __init__(self, n_layer: int, n_embd: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB_SIZE, n_embd, dtype=torch.bfloat16)
        gated = [layer for layer in range(n_layer) if layer % 2 == (n_layer - 1) % 2]
        self.blocks = nn.ModuleList(Block(n_embd, layer in gated) for layer in range(n_layer))
        self.head = linear(n_embd, VOCAB_SIZE)
        self.old, self.first = nn.Parameter(torch.empty(n_layer)), nn.Parameter(torch.empty(n_layer))
        self.smear_gate, self.smear = linear(SMEAR_CHANNELS, 1), nn.Parameter(torch.empty(1))
        self.back = nn.Parameter(torch.empty(1))
        values = {str(layer): nn.Embedding(VOCAB_SIZE, n_embd, dtype=torch.bfloat16) for layer in gated}
        self.values = nn.ModuleDict(values)
        for name in ("cos", "sin"):  # ten times as long as a sequence
            table = torch.empty(1, 10 * BLOCK_SIZE, 1, HEAD_SIZE // 2, dtype=torch.bfloat16)
            self.register_buffer(name, table, persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        n_tokens = tokens.shape[1]
        cos, sin = self.get_buffer("cos")[:, :n_tokens], self.get_buffer("sin")[:, :n_tokens]
        x = norm(self.embedding(tokens))
        gate = self.smear.to(x.dtype) * torch.sigmoid(self.smear_gate(x[:, 1:, :SMEAR_CHANNELS]))
        x = start = torch.cat([x[:, :1], x[:, 1:] + gate * x[:, :-1]], dim=1)
        middle = x
        for layer, block in enumerate(self.blocks):
            x = self.old[layer] * x + self.first[layer] * start
            value = self.values[str(layer)](tokens).to(x.dtype) if str(layer) in self.values else None
            x = block(x, value, cos, sin)
            if layer == len(self.blocks) // 2:
                middle = x
        x = norm(x - self.back.to(x.dtype) * middle)
        logits = self.head(x)
        logits = logits.float()
        logits = 15 * torch.tanh(logits / 15)
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


def step_of(depth: int = 12, batch_size: int = 8) -> tuple[Any, ...]:
    """Training on one GPU, bf16, gradients of several micro-steps added up."""
    raw = Model(depth, 64 * depth)
    optimizer = MuonAdamW(raw)
    model: Any = torch.compile(raw, dynamic=False)
    batch = [torch.zeros(batch_size, BLOCK_SIZE, dtype=torch.int64) for _ in range(2)]

    def step() -> None:
        for _ in range(2):
            loss = model(*batch) / 2
            loss.backward()
        optimizer.step()
        raw.zero_grad(set_to_none=True)

    return step, raw, optimizer
