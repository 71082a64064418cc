"""A plan for several equal cards: the same tokens a step, shared, with a whole model on each (ddp), parts of it (fsdp),
or parts within each of several nodes (hsdp)."""

from collections.abc import Sequence
from dataclasses import replace

from gptfit.config import RunConfig, derive
from gptfit.door import ConfigSource
from gptfit.gpus import GpuProfile
from gptfit.plan import Plan, changes_numerics, plan

# What a strategy has to be predicted faster by than ddp, as the speed of the links between the cards is assumed, not
# measured (speed.between_cards), and fsdp sends three parameters' worth for each micro-batch (two gathers, a scatter),
# ddp two for each step (arXiv 2304.11277). hsdp sends those within a node; fsdp between the nodes, too, which the
# prediction does not count as slower: once more the margin.
SHARDING_MARGIN = 0.15
MARGINS = {"ddp": 0.0, "hsdp": SHARDING_MARGIN, "fsdp": SHARDING_MARGIN}


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
    """The best run on `n_gpus` cards of `profile`: ddp, unless it does not fit, or parts on each need a so much cheaper
    run that it is faster. A strategy that the user set is kept. Raises as `plan` does."""
    tokens = tokens_per_step or source.run.tokens_per_step
    plans: dict[str, Plan] = {}
    for strategy in strategies(source, n_gpus):
        run = shared(source.run, n_gpus, strategy)
        own = replace(source, run=run, user_keys=source.user_keys | {"n_gpus", "strategy"})
        plans[strategy] = plan(own, profile, reserve_bytes, tokens, allow, keep, risk)
    chosen = better(plans, source.run)
    return replace(plans[chosen], notes=(*plans[chosen].notes, *notes(plans, chosen, n_gpus)))


def strategies(source: ConfigSource, n_gpus: int) -> list[str]:
    """Those to compare, the preferred one first; hsdp where the cards are whole nodes, and more than one."""
    if n_gpus == 1:
        return ["single"]
    if "strategy" in source.user_keys:
        return [source.run.strategy]
    run = shared(source.run, n_gpus, "ddp")
    in_nodes = 1 < run.shard_gpus < n_gpus and n_gpus % run.shard_gpus == 0
    return ["ddp", "hsdp", "fsdp"] if in_nodes else ["ddp", "fsdp"]


def shared(run: RunConfig, n_gpus: int, strategy: str) -> RunConfig:
    """`run` on `n_gpus` GPUs, each with a whole number of micro-batches."""
    steps = -(-run.gradient_accumulation_steps // n_gpus) * n_gpus
    return derive(run, n_gpus=n_gpus, strategy=strategy, gradient_accumulation_steps=steps)


def better(plans: dict[str, Plan], run: RunConfig) -> str:
    """The strategy to take: one that fits, that leaves the numbers of training as they are, that is faster."""

    def merit(name: str) -> tuple[bool, bool, float]:
        chosen = plans[name]
        if chosen.speed is None:
            return False, False, 0.0
        margin = MARGINS.get(name, 0.0)
        if name == "fsdp" and "hsdp" in plans:
            margin += SHARDING_MARGIN
        return True, not changes_numerics(run, chosen.choice), chosen.speed.tokens_per_second / (1 + margin)

    return max(plans, key=merit)


def notes(plans: dict[str, Plan], chosen: str, n_gpus: int) -> list[str]:
    if n_gpus == 1:
        return []
    lines = [
        f"memory is that of one of {n_gpus} cards; the speed is that of all, over links as fast as assumed",
        "gptfit train … --print torchrun (or slurm) says how to start it",
    ]
    for strategy, other in plans.items():
        if strategy != chosen:
            speed = other.speed
            how = f"{speed.tokens_per_second:,.0f} tokens/s predicted" if speed else "does not fit"
            lines.append(f"strategy={chosen}; {strategy}: {how}")
    return lines
