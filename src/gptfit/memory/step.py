"""An optimizer step as a tape: micro-steps, clipping, the optimizer; the first step of a run and the steady one."""

from dataclasses import dataclass

from gptfit.config import RunConfig
from gptfit.memory import ops, optimizers
from gptfit.memory.autograd import Node, Parameter, Tensor, Writer
from gptfit.memory.nanogpt import NanoGPT, take_over
from gptfit.memory.tape import Event, Item, Loop, Mark, Tape, make_buffer

PROGRAMS = {"nanogpt": NanoGPT}


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
    flops_per_token: int
    saved_bytes: int
    n_params: int


def micro_step(w: Writer, program: NanoGPT, kept: bool) -> list[Item]:
    """Writes one micro-step and returns what its variables hold at its end, as allocations."""
    run = program.run
    w.items = []
    batch = make_buffer("X", "buffer", (run.batch_size, run.block_size), "int64")
    targets = make_buffer("Y", "buffer", (run.batch_size, run.block_size), "int64")
    held = [take_over(w, buffer, None) for buffer in (program.kept_buffers() if kept else [])]
    x, y = take_over(w, batch, None), take_over(w, targets, None)
    logits, loss, stages = program.forward(x, y)
    held.clear()
    w.nodes = stages[2]
    loss = ops.scale(w, loss, "scaled loss")
    x, y = w.empty("X", "buffer", batch.shape, "int64"), w.empty("Y", "buffer", targets.shape, "int64")
    w.mark("loss", "loss backward")
    root = loss.node
    grads = {root: w.empty("loss gradient", "temporary", (), "float32")} if root is not None else {}
    del root
    backward(w, program, stages, grads)
    kept_items: list[Item] = []
    for tensor in (logits, loss, x, y):
        tensor.storage.forget()
    for tensor in (logits, loss):
        kept_items.append(Event(1, tensor.storage.buffer))
    return kept_items


def backward(w: Writer, program: NanoGPT, stages: list[list[Node]], grads: dict[Node, Tensor]) -> None:
    """Head, then the blocks as a loop downwards, then the embedding."""
    embed, block, head = stages
    w.backward(head, grads)
    grad = grads.pop(program.last_node)
    buffer = grad.storage.buffer
    grad.storage.forget()
    del grad
    with w.loop(program.run.n_layer, reverse=True):
        w.mark("block", "backward")
        grads[program.last_node] = take_over(w, buffer, None)
        w.backward(block, grads)
        grads.pop(program.entry).storage.forget()
    w.mark("embedding")
    grads[program.first_node] = take_over(w, buffer, None)
    w.backward(embed, grads)
    grads.clear()


def pieces(run: RunConfig, program: str) -> Pieces:
    w = Writer()
    twin = PROGRAMS[program](w, run)
    micro = []
    kept: list[Item] = []
    flops = saved = 0
    for has_kept, has_gradient in ((False, False), (True, False), (True, True)):
        for param in w.parameters.values():
            param.has_gradient = has_gradient
        w.flops = w.saved_bytes = 0
        w._counted.clear()
        kept = micro_step(w, twin, has_kept)
        micro.append(w.items)
        flops, saved = w.flops, w.saved_bytes
    params = list(w.parameters.values())
    n_layer = run.n_layer
    shape = (run.batch_size, run.block_size)
    return Pieces(
        parameters=tuple(params),
        batch=[Event(1, make_buffer(name, "buffer", shape, "int64")) for name in ("X", "Y")],
        first_micro=micro[0],
        fresh_micro=micro[1],
        next_micro=micro[2],
        clip=optimizers.clip_items(params, n_layer) if run.grad_clip else [],
        states=optimizers.state_items(params, n_layer, run.optimizer, run.optimizer_impl),
        step=optimizers.step_items(params, n_layer, run.optimizer, run.optimizer_impl),
        zero_grad=optimizers.gradient_items(params, n_layer, -1),
        parameter_items=optimizers.parameter_items(params, n_layer),
        kept=kept,
        flops_per_token=3 * flops // (run.batch_size * run.block_size),
        saved_bytes=saved,
        n_params=sum(_numel(p.shape) * p.count for p in params),
    )


def steady_step(run: RunConfig, p: Pieces) -> Tape:
    """The second step: parameters and optimizer state are there, and what the step before left."""
    items: list[Item] = [Mark("setup", "parameters"), *p.parameter_items, *p.states, *p.batch, *p.kept]
    items += p.fresh_micro
    if run.micro_steps > 1:
        items.append(Loop(run.micro_steps - 1, p.next_micro, numbered=False))
    items += [Mark("optimizer", "clip_grad_norm_"), *p.clip, Mark("optimizer", "step"), *p.step, *p.zero_grad]
    return Tape(items)


def _numel(shape: tuple[int, ...]) -> int:
    n = 1
    for size in shape:
        n *= size
    return n
