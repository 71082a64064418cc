"""Whose code runs the step. A program writes one micro-step: forward, loss, backward.

Blocks are written once for each loop body: all of them where they are alike, or a group where every
k-th one is checkpointed. A body is a `Segment`, whose nodes backward runs in a loop downwards.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from gptfit.config import RunConfig
from gptfit.memory import ops
from gptfit.memory.autograd import Node, Storage, Tensor, Writer
from gptfit.memory.tape import Buffer, make_buffer


def call(module: Callable[..., Tensor], *args: Any) -> Tensor:
    """nn.Module's __call__ holds the arguments until forward returns, whatever forward does with its names."""
    return module(*args)


@dataclass(slots=True)
class Segment:
    """`n` rounds of a body of `stride` blocks from block `start` on, and the nodes of one round."""

    n: int
    start: int
    stride: int
    entry: Node = field(default_factory=ops.placeholder)
    exit: Node | None = None
    nodes: list[Node] = field(default_factory=list)


class Program(ABC):
    """What a step asks of a program."""

    name = ""

    def __init__(self, w: Writer, run: RunConfig) -> None:
        self.w = w
        self.run = run

    def buffers(self) -> list[Buffer]:
        """Tables that live as long as the model and are no parameters."""
        return []

    def kept_buffers(self) -> list[Buffer]:
        """What the training loop's variables hold when the next micro-step begins, the loss excepted."""
        return []

    @abstractmethod
    def forward(self, idx: Tensor, targets: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """The loss and what is returned beside it; without targets the logits of the next token, for sampling."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None: ...

    @abstractmethod
    def saved_bytes(self) -> int:
        """Kept for backward by this micro-batch: each storage once; inputs and parameters left out."""


class Eager(Program):
    """What eager programs share: the loop over blocks, forwards and backwards."""

    def __init__(self, w: Writer, run: RunConfig) -> None:
        super().__init__(w, run)
        shape = (run.batch_size, run.block_size, run.n_embd)
        self.stream = make_buffer("h.*.x", "activation", shape, run.param_dtype)
        self.head_nodes: list[Node] = []
        self.embedding_nodes: list[Node] = []
        self.segments: list[Segment] = []

    @abstractmethod
    def embed(self, idx: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The stream into the first block, and locals that live as long as forward."""

    @abstractmethod
    def block(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def head(self, x: Tensor, targets: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The loss, and what forward returns beside it."""

    @abstractmethod
    def last_logits(self, x: Tensor) -> Tensor:
        """Logits of the token after the last one, for sampling."""

    def forward(self, idx: Tensor, targets: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        w, run = self.w, self.run
        w.offload = run.activation_offload and w.grad_enabled
        w.mark("embedding", "forward" if w.training else "evaluation")
        x, local = self.embed(idx)
        node = x.node
        x.storage.forget()
        self.embedding_nodes = collect(w)
        every = run.checkpoint_every if run.activation_checkpointing != "none" and w.grad_enabled else 1
        rounds, rest = divmod(run.n_layer, every)
        self.segments = [Segment(rounds, 0, every)] if rounds else []
        if rest:
            self.segments.append(Segment(1, rounds * every, rest))
        for segment in self.segments:
            with w.loop(segment.n, start=segment.start, stride=segment.stride):
                node = self.forward_body(segment)
        x = w.take_over(self.stream, node, shift=run.n_layer)
        w.mark("head")
        last = [x]
        del x
        # The head alone holds it, and lets go of it.
        loss, returned = (self.last_logits(last.pop()), []) if targets is None else self.head(last.pop(), targets)
        self.head_nodes = collect(w)
        w.offload = False
        del local
        return loss, returned

    def forward_body(self, segment: Segment) -> Node | None:
        w, run = self.w, self.run
        w.mark("block")
        x = w.take_over(self.stream, segment.entry if w.grad_enabled else None)
        for position in range(segment.stride):
            w.shift = position
            recompute = run.activation_checkpointing == "block" and w.grad_enabled and self.is_checkpoint
            x = self.checkpointed(x, self.block) if recompute else self.block(x)
        w.shift = 0
        x.storage.forget()
        segment.exit = x.node
        segment.nodes = collect(w)
        return x.node

    @property
    def is_checkpoint(self) -> bool:
        """Whether the block that is being written is the one of its round that keeps less."""
        return self.w.shift == 0

    def checkpointed(self, x: Tensor, body: Callable[[Tensor], Tensor]) -> Tensor:
        """torch.utils.checkpoint, not re-entrant: forward keeps the input alone; when backward first asks for
        a saved tensor, `body` is run again. What asks for none has run before."""
        w = self.w
        w.grad_enabled = False
        y = body(x)
        w.grad_enabled = True
        buffer = x.storage.buffer

        def backward(grad: Tensor, saved: tuple[Storage, ...]) -> list[Tensor]:
            outer, w.nodes, position, flops = w.nodes, [], w.shift, w.flops
            before, w.items = w.items, []
            entry = ops.placeholder()
            again = body(Tensor(saved[0], buffer.shape, buffer.dtype, entry))
            assert again.node is not None
            grads = {again.node: grad}
            del again, grad
            rerun, w.items = w.items, before
            w.backward(w.nodes, grads, to_saved=True)
            w.items += rerun
            w.backward(w.nodes, grads)
            # The model's FLOPs do not count what is computed twice.
            w.nodes, w.shift, w.flops = outer, position, flops
            return [grads.pop(entry)]

        y.node = w.record("checkpoint", (x.node,), (x.storage,), backward)
        return y

    def backward(self, loss: Tensor) -> None:
        """Head, then the blocks downwards, then the embedding. The stream's gradient is handed through."""
        w = self.w
        w.mark("loss", "loss backward")
        root, loss.node = loss.node, None
        assert root is not None
        self.head_nodes += collect(w)
        grads = {root: w.empty("loss gradient", "temporary", (), "float32")}
        del root
        w.backward(self.head_nodes, grads)
        last = self.segments[-1].exit
        assert last is not None
        buffer = self.let_go(grads, last)
        for segment in reversed(self.segments):
            assert segment.exit is not None
            with w.loop(segment.n, reverse=True, start=segment.start, stride=segment.stride):
                w.mark("block", "backward")
                grads[segment.exit] = w.take_over(buffer, None)
                w.backward(segment.nodes, grads)
                self.let_go(grads, segment.entry)
        w.mark("embedding")
        first = self.first_node
        if first is not None:
            grads[first] = w.take_over(buffer, None)
        w.backward(self.embedding_nodes, grads)
        grads.clear()

    @property
    def first_node(self) -> Node | None:
        return self.embedding_nodes[-1] if self.embedding_nodes else None

    @staticmethod
    def let_go(grads: dict[Node, Tensor], node: Node) -> Buffer:
        storage = grads.pop(node).storage
        storage.forget()
        return storage.buffer

    def saved_bytes(self) -> int:
        total = 0
        stretches = [(self.embedding_nodes, 1), *((s.nodes, s.n) for s in self.segments), (self.head_nodes, 1)]
        seen: set[int] = set()
        for nodes, times in stretches:
            for storage in (storage.base or storage for node in nodes for storage in node.saved):
                if storage.writer is not None and storage.buffer.category != "buffer" and id(storage) not in seen:
                    seen.add(id(storage))
                    total += storage.buffer.n_bytes * times
        return total


def collect(w: Writer) -> list[Node]:
    """The nodes recorded since the last time."""
    nodes, w.nodes = w.nodes, []
    return nodes
