"""What several GPUs change in the memory of one of them: a rewriting of the pieces that a run's tape consists of.

ddp (torch/csrc/distributed/c10d/reducer.cpp): gradients live in buckets. One is closed by the gradient that reaches
its limit, 1 MiB for the first and 25 MiB for the others, in the order in which gradients arrive (initialize_buckets,
compute_bucket_assignment_by_size). They are there before the first step and stay: our trainer's gradients are views
of them, which zero_grad fills with zeros; nanoGPT's are tensors beside them.

fsdp (torch/distributed/fsdp/_fully_shard): each rank keeps rows of every parameter, ceil(rows / n), gradient and state.
A group is a block, or the root: embeddings, final norm and head. In forward a group is gathered into one flat buffer,
copied out into whole parameters, and the flat one kept until the next group's is there (wait_for_unshard). The root
stays whole until the end of backward; while a block computes its backward, the next one's flat buffer is gathered ahead
(_backward_prefetch). After a block's backward its whole gradients are copied into a flat buffer, scattered into a
flat part of 1/n, which the gradients are views of, and the flat one kept until the next block's (post_backward).

hsdp: the same, with the n of one node. Parts are added up over the micro-batches of a step, and over the nodes in place
(foreach_reduce).
"""

import math
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import TypeGuard

from gptfit.config import RunConfig
from gptfit.memory.autograd import Parameter
from gptfit.memory.tape import DTYPE_BYTES, Buffer, Event, Item, Loop, Mark, make_buffer

FIRST_BUCKET_BYTES = 1 << 20
BUCKET_BYTES = 25 << 20


def strategy_of(run: RunConfig) -> str:
    return run.strategy if run.n_gpus > 1 else "single"


def gradients_exist(run: RunConfig, program: str) -> tuple[bool, bool, bool]:
    """Whether .grad is there before the first micro-step of a run, the first of a step, and a later one."""
    own = {"ddp": (True, True, True), "fsdp": (False, False, False), "hsdp": (False, False, False)}
    return own.get(strategy_of(run) if program == "gptfit" else "single", (False, False, True))


def bucket_items(params: Iterable[Parameter], n_layer: int) -> list[Item]:
    """DDP's buckets, as allocations. Gradients arrive from the last parameter to the first, block by block."""
    params = list(params)
    at = next((i for i, param in enumerate(params) if "*" in param.name), len(params))
    blocks = [param for param in params if "*" in param.name]
    outer = [param for param in params if "*" not in param.name]
    order = [*outer[at:][::-1], *blocks[::-1] * n_layer, *outer[:at][::-1]]
    items: list[Item] = []
    filled, limit = 0, FIRST_BUCKET_BYTES
    for i, param in enumerate(order):
        filled += math.prod(param.shape)
        size = DTYPE_BYTES[param.dtype]
        if filled * size >= limit or i == len(order) - 1:
            items.append(
                Event(1, make_buffer(f"gradient bucket {len(items)} (ddp)", "gradient", (filled,), param.dtype))
            )
            filled, limit = 0, BUCKET_BYTES
    return items


def shards(params: Iterable[Parameter], n: int) -> list[Parameter]:
    """The part of each parameter that the first rank keeps: it has the most rows."""
    return [Parameter(p.name, (-(-p.shape[0] // n), *p.shape[1:]), p.dtype, p.count) for p in params]


class Group:
    """Parameters that are gathered and scattered together: the root's, or those of one block."""

    def __init__(self, name: str, params: list[Parameter], n: int) -> None:
        self.params = params
        dtype = params[0].dtype
        parts = shards(params, n)
        n_part = sum(math.prod(part.shape) for part in parts)
        self.gathered = make_buffer(f"{name} gathered (fsdp)", "temporary", (n * n_part,), dtype)
        self.scattered = make_buffer(f"{name} to be scattered (fsdp)", "temporary", (n * n_part,), dtype)
        star = ".*" if "*" in params[0].name else ""
        self.gradient = make_buffer(f"{name}{star} gradient shard", "gradient", (n_part,), dtype)
        self.whole = [
            make_buffer(f"{param.name} whole", "parameter", (n * part.shape[0], *part.shape[1:]), dtype)
            for param, part in zip(params, parts, strict=True)
        ]

    def allocate(self, *buffers: Buffer) -> list[Item]:
        return [Event(1, buffer) for buffer in buffers]

    def free(self, *buffers: Buffer) -> list[Item]:
        return [Event(-1, buffer) for buffer in buffers]


class Sharded:
    """Rewrites micro-steps and evaluations that were written for whole parameters."""

    def __init__(self, params: list[Parameter], run: RunConfig) -> None:
        n = run.shards
        self.n_layer = run.n_layer
        self.root = Group("root", [p for p in params if "*" not in p.name], n)
        self.block = Group("block", [p for p in params if "*" in p.name], n)

    def micro_step(self, items: list[Item], accumulates: bool) -> list[Item]:
        """`items` of a micro-step whose gradients are new; with `accumulates` the shards' are there already."""
        root, block = self.root, self.block
        backward = [item for item in items if is_blocks(item) and item.reverse]
        out: list[Item] = [*root.allocate(root.gathered, *root.whole)]
        in_backward = seen_forward = False
        for item in items:
            if isinstance(item, Mark) and item.phase == "loss backward" and not in_backward:
                in_backward = True
                out += [*block.free(block.gathered), item, *block.allocate(block.gathered)]  # the last block, ahead
            elif is_blocks(item) and item.reverse:
                first, last = item is backward[0], item is backward[-1]
                out += self.backward_loops(item, first, last, accumulates)
            elif is_blocks(item):
                out += self.forward_loop(item, not seen_forward)
                seen_forward = True
            else:
                out.append(item)
        return [
            *out,
            *root.free(*root.whole),
            *self.reduce(root, block.scattered, accumulates),
            *root.free(root.scattered),
        ]

    def evaluation(self, items: list[Item]) -> list[Item]:
        root, block = self.root, self.block
        out: list[Item] = [*root.allocate(root.gathered, *root.whole)]
        seen = False
        for item in items:
            if is_blocks(item):
                out += self.forward_loop(item, not seen)
                seen = True
            else:
                out.append(item)
        return [*out, *block.free(block.gathered), *root.free(*root.whole)]

    def forward_loop(self, loop: Loop, first: bool) -> list[Item]:
        """The flat buffer of the group before goes when that of the next is there; before the first block it is
        the root's, beside which one of a block stands in for the one that later rounds find."""
        root, block = self.root, self.block
        before = [*block.allocate(block.gathered), *root.free(root.gathered)] if first else []
        gather = [*block.allocate(block.gathered), *block.free(block.gathered), *block.allocate(*block.whole)]
        return [*before, loop._replace(body=[*gather, *loop.body, *block.free(*block.whole)])]

    def backward_loops(self, loop: Loop, first: bool, last: bool, accumulates: bool) -> Iterator[Item]:
        """The same loop, its first round and its last one parted from the rest where they differ."""
        n, start, stride = loop.n, loop.start, loop.stride
        cuts = sorted({0, n, n - 1 if first else n, 1 if last else 0}, reverse=True)
        for above, below in pairwise(cuts):
            body = self.backward_body(loop, first and above == n, last and below == 0, accumulates)
            yield loop._replace(n=above - below, body=body, start=start + below * stride)

    def backward_body(self, loop: Loop, first: bool, last: bool, accumulates: bool) -> list[Item]:
        block = self.block
        gather = [*block.allocate(*block.whole), *block.free(block.gathered)]
        ahead = [] if last else block.allocate(block.gathered)
        done = self.reduce(block, None if first else block.scattered, accumulates, loop.stride)
        return [*gather, *ahead, *loop.body, *block.free(*block.whole), *done]

    def reduce(self, group: Group, before: Buffer | None, accumulates: bool, stride: int = 1) -> list[Item]:
        """Whole gradients into this rank's part of the sum. `before`: what the group before still holds."""
        shifts = range(stride)
        kept = [Event(1, group.gradient, shift) for shift in shifts]
        return [
            *(group.free(before) if before else []),
            *group.allocate(group.scattered),
            *(Event(-1, p.gradient, shift) for shift in shifts for p in group.params),
            *kept,
            *([event._replace(sign=-1) for event in kept] if accumulates else []),
        ]

    def zero_grad(self) -> list[Item]:
        free_block = self.block.free(self.block.gradient)
        return [*self.root.free(self.root.gradient), Loop(self.n_layer, free_block)]


def is_blocks(item: Item) -> TypeGuard[Loop]:
    """Whether this is the loop over blocks, of a forward or a backward (memory/programs.py)."""
    return isinstance(item, Loop) and bool(item.body) and isinstance(mark := item.body[0], Mark) and mark.op == "block"


def assumptions(run: RunConfig) -> tuple[str, ...]:
    """What the figures for one of several GPUs rest on."""
    strategy = strategy_of(run)
    if strategy == "single":
        return ()
    lines = [
        f"these are figures of one of {run.n_gpus} GPUs, strategy {strategy}; NCCL's own buffers, "
        "outside the allocator, are not counted"
    ]
    if run.shards > 1 and run.compile:
        lines.append("a compiled block is counted as an eager one, which keeps more")
    if run.shards > 1 and run.optimizer == "muon":
        lines.append("muon gathers each matrix to orthogonalise it, which is not counted")
    return tuple(lines)
