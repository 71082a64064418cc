"""When states and gradients are created (created_first): in torch's order, or as the allocator fragments least.

In torch's order gradients and states are cut out of blocks that activations and logits have left, and these no longer
fit there in the next step. Or they fit better so: it is chaotic, so there is no rule. Each choice is replayed.
"""

import operator
from typing import get_args

from gptfit.config import RunConfig, derive
from gptfit.estimate import Estimate, replay
from gptfit.memory.overhead import cublas_workspace_bytes

CREATED = get_args(RunConfig.model_fields["created_first"].annotation)

# What is reserved and not handed out, as a share of what is, from which on the choices are replayed: below it hardly
# any of 32 drawn runs had something to gain. And the share of what is reserved that another order has to save.
FRAGMENTED = 0.04
WORTH_IT = 0.01


def is_fragmented(estimate: Estimate) -> bool:
    return estimate.reserved_bytes - estimate.allocated_bytes > FRAGMENTED * estimate.allocated_bytes


def created_least(run: RunConfig, workspace_bytes: int) -> RunConfig:
    """`run` with the choice that holds least and, whether it begins with an evaluation or not, no more than as it is;
    `run` itself where no choice saves enough."""
    if run.n_gpus > 1 or run.optimizer == "adamw8bit":
        return run
    usual = held_bytes(run, workspace_bytes)
    best, least = run, (1 - WORTH_IT) * max(usual)
    for choice in (choice for choice in CREATED if choice != run.created_first):
        other = derive(run, created_first=choice)
        held = held_bytes(other, workspace_bytes)
        if max(held) < least and all(map(operator.le, held, usual)):
            best, least = other, max(held)
    return best


def held_bytes(run: RunConfig, workspace_bytes: int) -> tuple[int, ...]:
    """What the allocator holds at most, after each start that `estimate` takes into account."""
    others = (False,) if run.expandable_segments else (False, True)
    return tuple(replay(run, "gptfit", workspace_bytes, other).reserved_bytes for other in others)


def saved_bytes(run: RunConfig, compute_capability: str | None) -> int:
    """What the allocator holds less than in torch's order."""
    workspace_bytes = cublas_workspace_bytes(compute_capability)
    usual = derive(run, created_first="nothing")
    return max(held_bytes(usual, workspace_bytes)) - max(held_bytes(run, workspace_bytes))


def as_resumed(run: RunConfig) -> RunConfig:
    """`run` as it goes on from a checkpoint, whose states are there before the first forward."""
    if run.n_gpus > 1 or run.optimizer == "adamw8bit" or run.creates_states_first:
        return run
    return derive(run, created_first="both" if run.creates_gradients_first else "states")
