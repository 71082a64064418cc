"""A plan for several equal cards: the same tokens a step, shared, with a whole model on each (ddp) or parts (fsdp)."""

from collections.abc import Sequence
from dataclasses import replace

from gptfit.config import derive
from gptfit.door import ConfigSource
from gptfit.gpus import GpuProfile
from gptfit.plan import LAST_RESORT, Plan, plan

# What fsdp has to be predicted faster by. The prediction does not count what goes between the cards, and fsdp sends
# three parameters' worth for each micro-batch (two gathers, one scatter), ddp two for each step (arXiv 2304.11277).
FSDP_MARGIN = 0.15


def plan_on_gpus(
    source: ConfigSource,
    n_gpus: int,
    profile: GpuProfile,
    reserve_bytes: int = 0,
    tokens_per_step: int | None = None,
    allow: Sequence[str] = (),
    keep: Sequence[str] = (),
    risk: float | None = None,
) -> Plan:
    """The best run on `n_gpus` cards of `profile`: ddp, unless it does not fit, or fsdp needs a so much cheaper run
    that it is faster. A strategy that the user set is kept. Raises as `plan` does."""
    tokens = tokens_per_step or source.run.tokens_per_step
    strategies = [source.run.strategy] if "strategy" in source.user_keys else ["ddp", "fsdp"]
    plans: dict[str, Plan] = {}
    for strategy in strategies if n_gpus > 1 else ["single"]:
        steps = -(-source.run.gradient_accumulation_steps // n_gpus) * n_gpus
        run = derive(source.run, n_gpus=n_gpus, strategy=strategy, gradient_accumulation_steps=steps)
        own = replace(source, run=run, user_keys=source.user_keys | {"n_gpus", "strategy"})
        plans[strategy] = plan(own, profile, reserve_bytes, tokens, allow, keep, risk)
    chosen = better(plans)
    return replace(plans[chosen], notes=(*plans[chosen].notes, *notes(plans, chosen, n_gpus)))


def better(plans: dict[str, Plan]) -> str:
    """The strategy to take: one that fits, that leaves the numbers of training as they are, that is faster."""

    def merit(name: str) -> tuple[bool, bool, float]:
        chosen = plans[name]
        if chosen.run is None or chosen.speed is None:
            return False, False, 0.0
        was = chosen.as_given.config if chosen.as_given else {}
        same = all(getattr(chosen.run, key) == was.get(key) for key in LAST_RESORT)
        handicap = 1.0 + FSDP_MARGIN if name == "fsdp" else 1.0
        return True, same, chosen.speed.tokens_per_second / handicap

    return max(plans, key=merit)


def notes(plans: dict[str, Plan], chosen: str, n_gpus: int) -> list[str]:
    if n_gpus == 1:
        return []
    lines = [
        f"memory is that of one of {n_gpus} cards; the speed is that of all, without what goes between them",
        "gptfit train … --print torchrun (or slurm) says how to start it",
    ]
    for strategy, other in plans.items():
        if strategy != chosen:
            speed = other.speed
            how = f"{speed.tokens_per_second:,.0f} tokens/s predicted" if speed else "does not fit"
            lines.append(f"strategy={chosen}; {strategy}: {how}")
    return lines
