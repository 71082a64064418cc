"""Optimizers by name, and the learning rate of each step."""

import math
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gptfit.config import RunConfig
from gptfit.errors import GptfitError, nearest

Groups = list[dict[str, Any]]


class Stepper(Protocol):
    """What the training loop, the GradScaler and checkpoints need of an optimizer."""

    @property
    def param_groups(self) -> Groups: ...
    def step(self) -> Any: ...
    def zero_grad(self, set_to_none: bool = True) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


State = dict[str, Any]


def _lion_state(parameter: Tensor) -> State:
    return {"exp_avg": torch.zeros_like(parameter)}


def _adamw16bit_state(parameter: Tensor) -> State:
    moments = {name: torch.zeros_like(parameter, dtype=torch.bfloat16) for name in ("exp_avg", "exp_avg_sq")}
    return {"step": torch.tensor(0.0), **moments}


class Lion(torch.optim.Optimizer):
    """Lion (arXiv 2302.06675, algorithm 2): one momentum a parameter, steps of equal size in every coordinate.

    Its step makes one temporary of the size of one parameter at a time.
    """

    def __init__(self, params: Groups, lr: float, betas: tuple[float, float], weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(_lion_state(parameter))
                parameter.mul_(1 - lr * group["weight_decay"])
                # No variable holds the update: it would live on beside the next parameter's.
                parameter.add_(state["exp_avg"].lerp(parameter.grad, 1 - beta1).sign_(), alpha=-lr)
                state["exp_avg"].lerp_(parameter.grad, 1 - beta2)


class AdamW16bit(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101, algorithm 2) that keeps its two moments in bfloat16 and computes in float32.

    Its step makes two float32 temporaries of the size of one parameter at a time. Rounding is to nearest, so a second
    moment that changes by less than 1/256 a step stands still: beta2 is to be at most 0.99 (config.py).
    """

    def __init__(self, params: Groups, lr: float, betas: tuple[float, float], weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": 1e-8})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch's own turns states to the parameters' dtype."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment] = state[moment].bfloat16()

    def _update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        state = self.state[parameter]
        if not state:
            state.update(_adamw16bit_state(parameter))
        state["step"] += 1
        n_steps = state["step"].item()
        mean = state["exp_avg"].float().mul_(beta1).add_(grad, alpha=1 - beta1)
        state["exp_avg"].copy_(mean)
        root = state["exp_avg_sq"].float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        state["exp_avg_sq"].copy_(root)
        root.sqrt_().div_(math.sqrt(1 - beta2**n_steps)).add_(group["eps"])
        parameter.mul_(1 - lr * group["weight_decay"]).addcdiv_(mean, root, value=-lr / (1 - beta1**n_steps))


class Together:
    """Several optimizers that step as one. Its groups are theirs, so a learning rate set here arrives there."""

    def __init__(self, parts: Iterable[torch.optim.Optimizer]) -> None:
        self.parts = tuple(parts)

    @property
    def param_groups(self) -> Groups:
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            load_state(part, state)


def load_state(optimizer: "Stepper", state_dict: dict[str, Any]) -> None:
    """The states of `state_dict` under the settings that `optimizer` was built with.

    torch's load_state_dict alone takes over the settings too: a changed weight_decay would be undone silently.
    """
    if "param_groups" in state_dict:
        groups = zip(state_dict["param_groups"], optimizer.param_groups, strict=True)
        kept = [{**saved, **own, "params": saved["params"]} for saved, own in groups]
        state_dict = {**state_dict, "param_groups": kept}
    optimizer.load_state_dict(state_dict)


def decay_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> Groups:
    """Matrices decay, vectors (norms, biases) do not, as in nanoGPT; groups without parameters are left out."""
    parameters = [parameter for _, parameter in named]
    matrices = [p for p in parameters if p.dim() >= 2]
    vectors = [p for p in parameters if p.dim() < 2]
    groups = ({"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def _implementation(run: RunConfig) -> dict[str, bool]:
    return {"fused": run.optimizer_impl == "fused", "foreach": run.optimizer_impl == "foreach"}


def _adamw(model: nn.Module, run: RunConfig) -> Stepper:
    groups = decay_groups(model.named_parameters(), run.weight_decay)
    return torch.optim.AdamW(groups, lr=run.learning_rate, betas=(run.beta1, run.beta2), **_implementation(run))


def _sgd(model: nn.Module, run: RunConfig) -> Stepper:
    groups = decay_groups(model.named_parameters(), run.weight_decay)
    # torch has no fused form for sharded parameters.
    impl = {"foreach": True} if run.shards > 1 and run.optimizer_impl == "fused" else _implementation(run)
    return torch.optim.SGD(groups, lr=run.learning_rate, momentum=run.momentum, **impl)


def _adafactor(model: nn.Module, run: RunConfig) -> Stepper:
    groups = decay_groups(model.named_parameters(), run.weight_decay)
    # It has no fused form: foreach unless a loop is asked for.
    return torch.optim.Adafactor(groups, lr=run.learning_rate, foreach=run.optimizer_impl != "for-loop")


def _lion(model: nn.Module, run: RunConfig) -> Stepper:
    groups = decay_groups(model.named_parameters(), run.weight_decay)
    return Lion(groups, lr=run.learning_rate, betas=(run.beta1, run.beta2))


def _adamw16bit(model: nn.Module, run: RunConfig) -> Stepper:
    groups = decay_groups(model.named_parameters(), run.weight_decay)
    return AdamW16bit(groups, lr=run.learning_rate, betas=(run.beta1, run.beta2))


def _muon(model: nn.Module, run: RunConfig) -> Stepper:
    """Muon for the matrices of the blocks, AdamW for embeddings, head, norms and biases, as its author advises
    (https://kellerjordan.github.io/posts/muon/). Muon's steps are scaled to the size of AdamW's, so that one
    learning rate serves both (arXiv 2502.16982, section 2.2)."""
    named = list(model.named_parameters())
    in_blocks = [(name, p) for name, p in named if p.dim() == 2 and ".h." in name]
    names = {name for name, _ in in_blocks}
    rest = decay_groups([(name, p) for name, p in named if name not in names], run.weight_decay)
    muon = torch.optim.Muon(
        in_blocks,
        lr=run.learning_rate,
        weight_decay=run.weight_decay,
        momentum=run.momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    betas = (run.beta1, run.beta2)
    return Together((muon, torch.optim.AdamW(rest, lr=run.learning_rate, betas=betas, **_implementation(run))))


def _adamw8bit(model: nn.Module, run: RunConfig) -> Stepper:
    """AdamW whose two states take one byte an element, from torchao or bitsandbytes, whichever is there."""
    groups = decay_groups(model.named_parameters(), run.weight_decay)
    betas = (run.beta1, run.beta2)
    try:
        from torchao.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
    except ImportError:
        try:
            from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise GptfitError(
                "optimizer=adamw8bit needs the package torchao or bitsandbytes, and neither is installed",
                "pip install torchao, or optimizer=adafactor, which needs no package and keeps less state than adamw",
            ) from None
    return AdamW8bit(groups, lr=run.learning_rate, betas=betas)


OPTIMIZERS: dict[str, Callable[[nn.Module, RunConfig], Stepper]] = {
    "adamw": _adamw,
    "adamw16bit": _adamw16bit,
    "adamw8bit": _adamw8bit,
    "adafactor": _adafactor,
    "lion": _lion,
    "muon": _muon,
    "sgd": _sgd,
}


def build_optimizer(model: nn.Module, run: RunConfig) -> Stepper:
    """The optimizer of `run` over the parameters of `model`.

    Raises GptfitError for an unknown name, and for adamw8bit where no package provides it.
    """
    if run.optimizer not in OPTIMIZERS:
        raise GptfitError(f'unknown optimizer "{run.optimizer}"{nearest(run.optimizer, OPTIMIZERS)}')
    optimizer = OPTIMIZERS[run.optimizer](model, run)
    if run.optimizer_in_backward:
        _step_in_backward(model, optimizer)
    return optimizer


def _step_in_backward(model: nn.Module, optimizer: Stepper) -> None:
    """Steps each parameter as soon as its gradient is there, and drops the gradient: no two need be alive together.

    Optimizers pass over parameters without a gradient, so each call of `step` moves that one alone.
    """

    def step(parameter: Tensor) -> None:
        optimizer.step()
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)


def create_first(model: nn.Module, optimizer: Stepper, run: RunConfig) -> None:
    """What `run` wants before the first forward, parameter by parameter in the model's order: optimizer states as a
    first step would find them, and gradients, which go at once and leave their memory in the allocator's cache.

    It decides how the allocator's segments are cut up, and no number of training. States that are there are kept.
    """
    if run.creates_states_first:
        parts: Any = getattr(optimizer, "parts", (optimizer,))
        owners = {p: (part, group) for part in parts for group in part.param_groups for p in group["params"]}
        for parameter in model.parameters():
            part, group = owners[parameter]
            if not part.state.get(parameter) and (state := first_state(part, group, parameter)):
                part.state[parameter] = state
    if run.creates_gradients_first:
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        for parameter in model.parameters():
            parameter.grad = None


def first_state(optimizer: object, group: dict[str, Any], parameter: Tensor) -> State:
    """The state that the first step of `optimizer` makes for `parameter` (torch/optim/{adam,_adafactor,_muon,sgd}.py of
    torch 2.13). SGD's momentum begins as the first gradient: 0 · momentum + gradient is the same."""
    if isinstance(optimizer, Lion):
        return _lion_state(parameter)
    if isinstance(optimizer, AdamW16bit):
        return _adamw16bit_state(parameter)
    if isinstance(optimizer, torch.optim.AdamW):
        step = torch.zeros((), device=parameter.device) if group["fused"] else torch.tensor(0.0)
        return {"step": step, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
    if isinstance(optimizer, torch.optim.Adafactor):
        if parameter.dim() < 2:
            return {"step": torch.tensor(0.0), "variance": torch.zeros_like(parameter)}
        rows, columns = parameter.shape
        row_var, col_var = parameter.new_zeros(rows, 1), parameter.new_zeros(1, columns)
        return {"step": torch.tensor(0.0), "row_var": row_var, "col_var": col_var}
    has_momentum = isinstance(optimizer, torch.optim.Muon) or group["momentum"]
    return {"momentum_buffer": torch.zeros_like(parameter)} if has_momentum else {}


def learning_rate_at(step: int, run: RunConfig) -> float:
    """Learning rate of step `step` (from 0): linear warm-up, then as lr_schedule says.

    cosine: down to min_lr, as in nanoGPT. wsd: level, then over cooldown_iters down to min_lr by 1 - sqrt (arXiv
    2405.18392, section 3). constant: level. decay_lr=False is no schedule and no warm-up, as in nanoGPT.
    """
    if not run.decay_lr:
        return run.learning_rate
    if step < run.warmup_iters:
        return run.learning_rate * (step + 1) / (run.warmup_iters + 1)
    if run.lr_schedule == "constant":
        return run.learning_rate
    if step >= run.lr_decay_iters:
        return run.min_lr
    if run.lr_schedule == "wsd":
        left = (run.lr_decay_iters - step) / run.cooldown_iters if run.cooldown_iters else 1.0
        return run.min_lr + (1.0 - math.sqrt(1.0 - min(1.0, left))) * (run.learning_rate - run.min_lr)
    way = (step - run.warmup_iters) / (run.lr_decay_iters - run.warmup_iters)
    return run.min_lr + 0.5 * (1.0 + math.cos(math.pi * way)) * (run.learning_rate - run.min_lr)


def set_learning_rate(optimizer: Stepper, rate: float) -> None:
    for group in optimizer.param_groups:
        # torchao keeps its rate in a tensor, which a compiled step reads: it must stay that tensor.
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
