"""A module with a training_step, as Lightning's users write it, for `gptfit trace`.

Here it is a plain nn.Module; in your code it is a lightning.LightningModule, which is one, too.
"""

import torch
from torch import nn


class LitModel(nn.Module):
    def __init__(self, width: int = 512) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return nn.functional.mse_loss(self.net(batch), batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def make(batch_size: int = 64):
    """One micro-step, and the optimizer behind it. What the Trainer logs and moves is not in it."""
    module, batch = LitModel(), torch.zeros(batch_size, 512)
    optimizer = module.configure_optimizers()

    def micro_step() -> None:
        module.training_step(batch, 0).backward()

    return micro_step, optimizer
