"""A module that gptfit has never seen, and functions that make a training step of it: for `gptfit trace`."""

import torch
from torch import nn


class TextClassifier(nn.Module):
    """An embedding, blocks and a head; it returns its loss."""

    def __init__(self, width: int, n_layer: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(8192, width)
        self.blocks = nn.Sequential(
            *(nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0.0, batch_first=True) for _ in range(n_layer))
        )
        self.head = nn.Linear(width, 10)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        hidden = self.blocks(self.embed(tokens))
        return nn.functional.cross_entropy(self.head(hidden.mean(1)), labels)


def make(batch_size: int = 16, block_size: int = 128, width: int = 256, n_layer: int = 4):
    """The module and a batch: gptfit calls module(*batch), and backward on what it returns."""
    tokens = torch.zeros(batch_size, block_size, dtype=torch.int64)
    return TextClassifier(width, n_layer), (tokens, torch.zeros(batch_size, dtype=torch.int64))


def make_loop(batch_size: int = 16):
    """A micro-step written out, and the optimizer that steps after it."""
    module, batch = make(batch_size)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)

    def micro_step() -> None:
        module(*batch).backward()

    return micro_step, optimizer
