"""A training script as people have it, with one function more: `make`, for `gptfit trace my_train.py:make`."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

device = "cuda" if torch.cuda.is_available() else "cpu"  # traced as with a GPU, whatever this machine has


class Model(nn.Module):
    def __init__(self, width: int = 256, n_layer: int = 4, vocab_size: int = 4096) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 8, 4 * width, batch_first=True, norm_first=True) for _ in range(n_layer)
        )
        self.head = nn.Linear(width, vocab_size, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def train_step(model: nn.Module, batch: torch.Tensor, optimizer: torch.optim.Optimizer) -> float:
    x, y = batch[:, :-1].to(device), batch[:, 1:].to(device)
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def make(batch_size: int = 16, block_size: int = 256):
    """What gptfit runs, three times: the step above. The model and its optimizer follow, so that they are named."""
    model = Model().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    batch = torch.zeros(batch_size, block_size + 1, dtype=torch.int64)
    return lambda: train_step(model, batch, optimizer), model, optimizer


def main() -> None:
    model = Model().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    data = TensorDataset(torch.randint(4096, (1024, 257)))
    for (batch,) in DataLoader(data, batch_size=16, shuffle=True):
        print(f"loss {train_step(model, batch, optimizer):.3f}")


if __name__ == "__main__":
    main()
