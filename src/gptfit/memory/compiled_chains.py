"""What the partitioner will not compute again, as it ends a long chain of operations that could be one kernel.

torch/_functorch/partitioners.py (torch 2.13), ban_if_long_fusible_chains: from each operation of forward it walks on
through all that can be fused, in their order; where a hundred operations and more lie behind and one alone is left to
walk to, that one is kept instead, unless a checkpoint has it run again.
"""

from collections import defaultdict
from functools import lru_cache
from heapq import heappop, heappush

from gptfit.config import RunConfig
from gptfit.memory.compiled_blocks import Blocks
from gptfit.memory.compiled_graph import ATTENTION, CALLS, CAT, INPUT, ITEM, MOMENTS, RANDOM, SUM, UNSEEN, VIEW, Op

CHAIN = 100


class Chains:
    """Forward of all blocks, and which of its operations are run again or kept anyway."""

    def __init__(self, run: RunConfig) -> None:
        joint = self.joint = Blocks(run)
        shape = (run.batch_size, run.block_size, run.n_embd)
        x = joint.input("embedding", shape, run.param_dtype)
        if run.position == "learned":
            x = joint.point(x, joint.given("positions", shape[1:], run.param_dtype))
        joint.unseen(bool(run.dropout))  # all seeds
        x = joint.dropped(x, "embedding")
        self.again: set[int] = set()
        self.kept: set[int] = set()
        for index in range(run.n_layer):
            joint.at = f"{index}/"
            start = len(joint.ops)
            runs_again = index % run.checkpoint_every == 0
            if runs_again and index:
                self.kept.add(x.index)  # the input of a checkpoint
            made, x = joint.block(x)
            if runs_again:
                self.again |= set(range(start, len(joint.ops)))
            else:
                self.kept |= {x.index, made.between.index}  # used near and far
        joint.at = "end/"
        output = joint.norm(x, "ln_f").output
        self.kept |= {op.index for op in joint.ops if op.kind in (SUM, MOMENTS)} - self.again
        self.needed: set[int] = set()
        stack = [output]
        while stack:
            op = stack.pop()
            if op.index not in self.needed:
                self.needed.add(op.index)
                stack += op.args


@lru_cache(maxsize=256)
def banned(run: RunConfig) -> frozenset[str]:
    """Labels of operations that are kept so."""
    chains = Chains(run)
    joint, needed = chains.joint, chains.needed
    order: dict[int, int] = {}
    users: defaultdict[int, list[Op]] = defaultdict(list)
    for op in joint.ops:
        if op.kind == UNSEEN or (op.index in needed and op.kind != INPUT):
            order[op.index] = len(order)
            for index in dict.fromkeys(arg.index for arg in op.args):
                users[index].append(op)
    found: set[int] = set()
    seen: set[int] = set()
    for start in joint.ops:
        if start.index not in order or start.kind == UNSEEN:
            continue
        heap = [(order[start.index], start.index)]
        while heap:
            now, index = heappop(heap)
            if index in seen:
                continue
            seen.add(index)
            if now > order[start.index] + CHAIN and not heap:
                if joint.ops[index].kind != VIEW and index not in chains.again:
                    found.add(index)
                break
            for user in users[index]:
                if fusible(joint.ops[index], user) and user.index not in found | chains.kept:
                    heappush(heap, (order[user.index], user.index))
    return frozenset(joint.ops[index].label for index in found)


def fusible(one: Op, other: Op) -> bool:
    return other.kind == CAT or (may_fuse(one) and may_fuse(other))


def may_fuse(op: Op) -> bool:
    return op.kind not in (*CALLS, INPUT, RANDOM, CAT) and not (op.kind == ITEM and op.args[0].kind == ATTENTION)
