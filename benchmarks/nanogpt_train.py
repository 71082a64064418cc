"""nanoGPT's training loop, written from torch's parts as its train.py has it, around nanogpt_reference.py's model.

One gift: the fused AdamW, which nanoGPT takes on CUDA alone, so that no optimizer decides a comparison.
nanoGPT: https://github.com/karpathy/nanoGPT (MIT). Shapes: B batch, T time.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from gptfit.config import RunConfig
from gptfit.data import Tokens
from gptfit.device import DTYPES
from gptfit.nanogpt_reference import NanoGPT


class NanoGPTTrainer:
    """Model, optimizer and data of one run; `step` is one optimizer step."""

    def __init__(self, run: RunConfig, tokens: Tokens, device: torch.device) -> None:
        self.run, self.tokens, self.device = run, tokens, device
        self.model = NanoGPT(run)
        initialise(self.model, run.n_layer)
        self.model.to(device)
        matrices = [p for p in self.model.parameters() if p.dim() >= 2]
        vectors = [p for p in self.model.parameters() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": run.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=run.learning_rate, betas=(run.beta1, run.beta2), fused=True)
        self.scaler: Any = torch.amp.GradScaler(device.type, enabled=run.dtype == "float16")
        self.autocast = torch.autocast(device.type, DTYPES[run.dtype], enabled=run.dtype != "float32")
        self.call: Any = torch.compile(self.model) if run.compile else self.model
        self.batch = self.get_batch()
        self.n_steps = 0

    def get_batch(self) -> tuple[Tensor, Tensor]:
        run, tokens = self.run, self.tokens
        starts = torch.randint(len(tokens) - run.block_size, (run.batch_size,)).tolist()
        x = torch.stack([torch.from_numpy(tokens[i : i + run.block_size].astype("int64")) for i in starts])
        y = torch.stack([torch.from_numpy(tokens[i + 1 : i + 1 + run.block_size].astype("int64")) for i in starts])
        return x.to(self.device), y.to(self.device)

    def step(self) -> float:
        """Returns the loss that train.py logs: that of the last micro-batch."""
        run = self.run
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.n_steps, run) if run.decay_lr else run.learning_rate
        loss = torch.zeros(())
        for _ in range(run.micro_steps):
            with self.autocast:
                _logits, loss = self.call(*self.batch)
                loss = loss / run.micro_steps
            self.batch = self.get_batch()
            self.scaler.scale(loss).backward()
        if run.grad_clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), run.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.n_steps += 1
        return loss.item() * run.micro_steps


def initialise(model: nn.Module, n_layer: int) -> None:
    """As nanoGPT's model.py: normal(0, 0.02), projections into the residual stream by 1/sqrt(2·n_layer) less."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.dim() < 2:
            nn.init.ones_(parameter)
        else:
            nn.init.normal_(parameter, 0.0, 0.02 / math.sqrt(2 * n_layer) if "c_proj" in name else 0.02)


def learning_rate(step: int, run: RunConfig) -> float:
    """train.py's get_lr: linear warm-up, then a cosine down to min_lr."""
    if step < run.warmup_iters:
        return run.learning_rate * (step + 1) / (run.warmup_iters + 1)
    if step > run.lr_decay_iters:
        return run.min_lr
    ratio = (step - run.warmup_iters) / (run.lr_decay_iters - run.warmup_iters)
    return run.min_lr + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (run.learning_rate - run.min_lr)
