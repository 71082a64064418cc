"""An optimizer step as a tape: micro-steps, clipping, the optimizer; the first step of a run and the steady one."""

import math
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import NamedTuple

from gptfit.config import RunConfig, derive
from gptfit.memory import ops, optimizers, sharding
from gptfit.memory.autograd import THREADS, Parameter, Writer
from gptfit.memory.compiled_budget import compiled_twin
from gptfit.memory.nanogpt import NanoGPT
from gptfit.memory.ours import Ours
from gptfit.memory.programs import Program
from gptfit.memory.tape import Buffer, Event, Item, Loop, Mark, Tape, make_buffer, without

PROGRAMS: dict[str, type[Program]] = {"nanogpt": NanoGPT, "gptfit": Ours}
LOSS = make_buffer("loss", "activation", (), "float32")


@dataclass(frozen=True, slots=True)
class Pieces:
    """The stretches of tape that a run consists of, and what the same lines count beside memory."""

    parameters: tuple[Parameter, ...]
    batch: list[Item]
    first_micro: list[Item]  # of the whole run: nothing is left from before, gradients are created
    fresh_micro: list[Item]  # of a later step: gradients are created
    next_micro: list[Item]  # gradients are there and accumulated into
    clip: list[Item]
    states: list[Item]
    step: list[Item]
    zero_grad: list[Item]
    parameter_items: list[Item]
    kept: list[Item]  # what the loop's variables hold between micro-steps
    evaluation: list[Item]
    evaluates_first: bool  # nanoGPT's train.py does, before its first step; gptfit's trainer does not
    flops_per_token: int
    saved_bytes: int
    n_params: int


def micro_step(w: Writer, program: Program) -> tuple[list[Item], slice, int]:
    """Writes one micro-step as train loops run it: forward, the next batch fetched, backward.

    Returns what the loop's variables hold at its end, as allocations; where what they held from the micro-step before
    is freed; and the bytes kept for backward.
    """
    run = program.run
    w.items, w.flops = [], 0
    held = [w.take_over(buffer, None) for buffer in (*program.kept_buffers(), LOSS)]
    x, y = (w.take_over(buffer, None) for buffer in batch_buffers(run))
    loss, returned = program.forward(x, y)
    start = len(w.items)
    held.clear()
    freed = slice(start, len(w.items))
    saved_bytes = program.saved_bytes()
    loss = ops.scale(w, loss, LOSS.name)
    x, y = (w.empty(*buffer[:4]) for buffer in batch_buffers(run))
    w.thread = THREADS[1]
    program.backward(loss)  # GradScaler's scale, its tracker and the scaled loss are left out: three scalars, 1.5 KiB
    w.thread = THREADS[0]
    for tensor in (*returned, loss, x, y):
        tensor.storage.forget()
    return [Event(1, tensor.storage.buffer) for tensor in (*returned, loss)], freed, saved_bytes


class MicroSteps(NamedTuple):
    """The first micro-step of a run, that of a later step, and one that finds gradients; `kept` and the bytes kept for
    backward as `micro_step` returns them. What is not asked for is empty."""

    first: list[Item]
    fresh: list[Item]
    later: list[Item]
    kept: list[Item]
    saved_bytes: int


def micro_steps(w: Writer, twin: Program, program: str, whole: bool, fresh: bool) -> MicroSteps:
    """Written once where they are alike. The first finds nothing that was held, and no cuBLAS workspaces."""
    run = twin.run
    _, in_fresh, in_later = sharding.gradients_exist(run, program)
    alike = in_fresh == in_later or run.micro_steps == 1
    first: list[Item] = []
    new: list[Item] = []
    later: list[Item] = []
    w.set_gradients(in_fresh)
    if run.optimizer_in_backward:
        if whole:
            w.step_in_backward = partial(optimizers.items_in_backward, run=run, first=not run.creates_states_first)
            _, held, _ = micro_step(w, twin)
            first = [*w.items[: held.start], *w.items[held.stop :]]
        w.step_in_backward = partial(optimizers.items_in_backward, run=run, first=False)
    kept: list[Item] = []
    saved_bytes = 0
    if fresh or alike:
        kept, held, saved_bytes = micro_step(w, twin)
        new = w.items
        if whole and not first:
            first = [*new[: held.start], *new[held.stop :]]
            new = without(new, is_place)
    if not alike:
        w.set_gradients(in_later)
        kept, _, saved_bytes = micro_step(w, twin)
        later = w.items
        new = new or optimizers.gradient_items(w.parameters.values(), run.n_layer, 1)
    elif run.micro_steps > 1:
        later = new
    return MicroSteps(first, new, later, kept, saved_bytes)


def is_place(buffer: Buffer) -> bool:
    """Whether it stands for the workspace of a thread (autograd.Writer.multiplies)."""
    return buffer.category == "workspace" and not buffer.n_bytes


def bare(p: Pieces) -> Pieces:
    """Pieces that were written with kernels, as they are written without."""

    def is_scratch(buffer: Buffer) -> bool:
        return buffer.category == "workspace"

    micro = [without(items, is_scratch) for items in (p.first_micro, p.fresh_micro, p.next_micro, p.evaluation)]
    return replace(p, first_micro=micro[0], fresh_micro=micro[1], next_micro=micro[2], evaluation=micro[3])


def evaluation(w: Writer, program: str, run: RunConfig) -> list[Item]:
    """One batch of the validation loss: no gradients, so each activation goes as soon as the next is there."""
    own = derive(run, batch_size=run.eval_batch_size) if run.eval_batch_size != run.batch_size else run
    if own.activation_memory_budget < 1:  # nothing is kept, whatever the budget
        own = derive(own, activation_memory_budget=1.0)
    twin = twin_of(program, w, own)
    w.grad_enabled = w.training = False
    x, y = (w.empty(*buffer[:4]) for buffer in batch_buffers(twin.run))
    loss, returned = twin.forward(x, y)
    del loss, returned, x, y
    return w.items


def batch_buffers(run: RunConfig) -> tuple[Buffer, Buffer]:
    """Inputs and targets: int64 token ids, [B, T] each."""
    shape = (run.batch_size, run.block_size)
    return make_buffer("X", "buffer", shape, "int64"), make_buffer("Y", "buffer", shape, "int64")


def twin_of(program: str, w: Writer, run: RunConfig) -> Program:
    compiled = run.compile and run.shards == 1
    return compiled_twin(program, w, run) if compiled else PROGRAMS[program](w, run)


def pieces(run: RunConfig, program: str, whole: bool = True, kernels: bool = False, fresh: bool = True) -> Pieces:
    """The pieces of `run` under `program`: for a steady step alone, or for a `whole` run with its first step and
    evaluation. With `kernels` also the scratch that kernels take from the allocator.

    Without `fresh` a step of several micro-steps creates its gradients at once. Its peak is the same: they are all
    alive in each micro-step but the first, which is another one of those otherwise.
    """
    w = Writer(run.n_layer, kernels)
    twin = twin_of(program, w, run)
    micro = micro_steps(w, twin, program, whole, fresh)
    params = list(w.parameters.values())
    left = [] if run.optimizer_in_backward else params  # to be stepped, and with a gradient, after backward
    n_layer = run.n_layer
    parts = Pieces(
        parameters=tuple(params),
        batch=[Event(1, buffer) for buffer in batch_buffers(run)],
        first_micro=micro.first,
        fresh_micro=micro.fresh,
        next_micro=micro.later,
        clip=optimizers.clip_items(params, n_layer) if run.grad_clip else [],
        states=optimizers.state_items(params, run),
        step=optimizers.step_items(left, run),
        zero_grad=optimizers.gradient_items(left, n_layer, -1),
        parameter_items=[
            *optimizers.parameter_items(params, n_layer),
            *optimizers.average_items(params, run),
            *(Event(1, table) for table in twin.buffers()),
        ],
        kept=micro.kept,
        evaluation=evaluation(Writer(run.n_layer, kernels), program, run) if whole else [],
        evaluates_first=program == "nanogpt",
        flops_per_token=3 * w.flops // (run.batch_size * run.block_size),
        saved_bytes=micro.saved_bytes,
        n_params=sum(math.prod(p.shape) * p.count for p in params),
    )
    return shared(run, program, parts)


def shared(run: RunConfig, program: str, parts: Pieces) -> Pieces:
    """The pieces on one of several GPUs."""
    strategy, params, n_layer = sharding.strategy_of(run), list(parts.parameters), run.n_layer
    if strategy == "ddp":
        setup = [*parts.parameter_items, *sharding.bucket_items(params, n_layer)]
        return replace(parts, parameter_items=setup, zero_grad=[] if program == "gptfit" else parts.zero_grad)
    if run.shards > 1:
        own, rewritten = sharding.shards(params, run.shards), sharding.Sharded(params, run)
        tables = [
            item for item in parts.parameter_items if isinstance(item, Event) and item.buffer.category == "buffer"
        ]
        return replace(
            parts,
            first_micro=rewritten.micro_step(parts.first_micro, False) if parts.first_micro else [],
            fresh_micro=rewritten.micro_step(parts.fresh_micro, False),
            next_micro=rewritten.micro_step(parts.next_micro, True) if parts.next_micro else [],
            states=optimizers.state_items(own, run),
            step=optimizers.step_items(own, run),
            zero_grad=rewritten.zero_grad(),
            parameter_items=[
                *optimizers.parameter_items(own, n_layer),
                *optimizers.average_items(own, run),
                *tables,
            ],
            evaluation=rewritten.evaluation(parts.evaluation) if parts.evaluation else [],
        )
    return parts


def steady_step(run: RunConfig, p: Pieces) -> Tape:
    """The second step: parameters and optimizer state are there, and what the step before left."""
    setup = [Mark("setup", "parameters"), *p.parameter_items, *p.states, *p.batch, *p.kept]
    return Tape([*setup, *later_step_items(run, p, run.micro_steps)])


def representative(run: RunConfig) -> RunConfig:
    """A run with the same pieces, the same one for all runs that have them: micro-steps from the third of a step on are
    alike, and a chunk of the loss has no more tokens than a batch."""
    most_tokens = max(run.batch_size, run.eval_batch_size) * run.block_size
    return derive(
        run,
        gradient_accumulation_steps=min(run.micro_steps, 3) * run.n_gpus,
        loss_chunk_size=min(run.loss_chunk_size, most_tokens),
    )


def steady_peak(run: RunConfig, program: str) -> tuple[int, int]:
    """Live bytes at the peak of a steady step, and FLOPs a token. They are the same on every card: kept, as a search
    over many cards asks for the same runs again and again."""
    return _steady_peak(representative(run), program)  # pyright: ignore[reportArgumentType]  frozen models have a hash


@lru_cache(maxsize=4096)
def _steady_peak(run: RunConfig, program: str) -> tuple[int, int]:
    parts = pieces(run, program, whole=False, fresh=False)
    return steady_step(run, parts).peak().live_bytes, parts.flops_per_token


def setup_items(run: RunConfig, p: Pieces) -> list[Item]:
    """What is allocated before the first forward: parameters, what is to be created first (optim.create_first), and
    the batch. Gradients go at once: the memory that they leave is in the allocator's cache."""
    created: list[Item] = [*p.states] if run.creates_states_first else []
    if run.creates_gradients_first:
        for sign in (1, -1):
            created += optimizers.gradient_items(p.parameters, run.n_layer, sign)
    return [*p.parameter_items, *created, *p.batch]


def first_steps(run: RunConfig, p: Pieces, n_steps: int = 3, n_micro: int = 3) -> Tape:
    """A run from its start, for the allocator: the first step, and steady ones."""
    return Tape([*start_items(run, p, n_micro), *later_step_items(run, p, n_micro) * (n_steps - 1)])


def start_items(run: RunConfig, p: Pieces, n_micro: int = 3) -> list[Item]:
    """Setup, an evaluation or none, and the first step, which creates the optimizer's state where it is not there yet.
    From the third micro-step of a step on nothing new happens, so `n_micro` are enough."""
    evaluation = p.evaluation if run.eval_interval and p.evaluates_first else []
    states = [] if run.optimizer_in_backward or run.creates_states_first else p.states
    setup = [Mark("setup", "parameters"), *setup_items(run, p)]
    return [*setup, *evaluation, *step_items(run, p, p.first_micro, states, n_micro)]


def later_step_items(run: RunConfig, p: Pieces, n_micro: int = 3) -> list[Item]:
    return step_items(run, p, p.fresh_micro, [], n_micro)


def step_items(run: RunConfig, p: Pieces, micro: list[Item], states: list[Item], n_micro: int) -> list[Item]:
    """A step that begins with `micro`, and makes `states`."""
    micro_steps = min(run.micro_steps, n_micro)
    rest: list[Item] = [Loop(micro_steps - 1, p.next_micro, numbered=False)] if micro_steps > 1 else []
    update = [Mark("optimizer", "clip_grad_norm_"), *p.clip, Mark("optimizer", "step"), *states, *p.step]
    return [*micro, *rest, *update, *p.zero_grad]
