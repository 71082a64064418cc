"""A miniature of torch's autograd that moves no numbers: running a program on it writes a tape.

A twin is ordinary Python that has the structure of the code it mirrors. A tensor's storage is freed
when the last reference to it goes, which CPython does at once, as it does for torch itself; so the
lifetimes of local variables, arguments and saved tensors are those of the real code, and nobody
counts them by hand. Only the order in which things are dropped matters, and that is the code's.

One block of a GPT is run once and recorded as the body of a loop over all of them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from gptfit.memory.tape import Buffer, Event, Item, Loop, Mark, Tape, make_buffer

Shape = tuple[int, ...]

# Activation offload leaves what is smaller where it is: below this a transfer takes as long as its start, some 10 µs at
# 25 GB/s.
OFFLOAD_MIN_BYTES = 256 << 10

THREADS = ("main", "autograd")  # each has a cuBLAS handle of its own


class Storage:
    """Memory on the tape. Dropping the last reference writes the free: in a loop that of this round, after
    the loop in which it was made those of all rounds."""

    __slots__ = ("base", "buffer", "is_on_host", "rounds", "shift", "writer")

    def __init__(self, writer: "Writer", buffer: Buffer, shift: int = 0) -> None:
        self.writer: Writer | None = writer
        self.buffer = buffer
        self.shift = shift
        self.is_on_host = False
        self.base: Storage | None = None  # of a saved part that stays where it is: what it keeps alive
        self.rounds = writer.rounds

    def __del__(self) -> None:
        if self.writer is not None:
            free = Event(-1, self.buffer, self.shift)
            outlived = self.rounds is not None and self.writer.rounds is None
            self.writer.items.append(self.rounds._replace(body=[free]) if outlived and self.rounds else free)

    def forget(self) -> None:
        """Lets go without a free: another round, or the next step, frees it."""
        self.writer = None


class Node:
    """One step of backward. `backward` turns the gradient of the output into those of `inputs`."""

    __slots__ = ("awaited", "backward", "inputs", "joins", "name", "param", "phase", "saved", "shift")

    def __init__(
        self,
        name: str,
        inputs: "Sequence[Node | None]",
        saved: "tuple[Storage, ...]",
        backward: "Callable[[Tensor, tuple[Storage, ...]], Sequence[Tensor | None]] | None",
        param: "Parameter | None" = None,
    ) -> None:
        self.name = name
        self.inputs = inputs
        self.saved = saved
        self.backward = backward
        self.param = param
        self.shift = 0
        self.phase = ""  # of the forward op
        self.joins = False  # whether gradients of several outputs arrive, side by side, as a Bundle
        self.awaited = 0  # of a parameter: gradients still to come, more than one where it is shared


class Tensor:
    """A shape and a dtype on a storage; views share the storage. `node` is its place in the graph.
    `is_view` is set on gradients that are views, whose base holds their storage as well."""

    __slots__ = ("dtype", "is_view", "node", "shape", "storage")

    def __init__(self, storage: Storage, shape: Shape, dtype: str, node: Node | None = None) -> None:
        self.is_view = False
        self.storage = storage
        self.shape = shape
        self.dtype = dtype
        self.node = node


class Bundle(Tensor):
    """Gradients of the several outputs of one node."""

    __slots__ = ("parts",)

    def __init__(self) -> None:
        self.parts: list[Tensor] = []


class Parameter:
    """A parameter of the model: counted once, alive for the whole run."""

    __slots__ = (
        "accumulate",
        "awaited",
        "buffer",
        "count",
        "dtype",
        "gradient",
        "has_gradient",
        "name",
        "shape",
        "storage",
    )

    def __init__(self, name: str, shape: Shape, dtype: str, count: int) -> None:
        self.name = name
        self.shape = shape
        self.dtype = dtype
        self.count = count
        self.buffer = make_buffer(name, "parameter", shape, dtype)
        self.gradient = make_buffer(name + ".grad", "gradient", shape, dtype)
        self.storage: Storage | None = None
        self.has_gradient = False
        self.accumulate: dict[int, Node] = {}  # by the block it stands for first


class Writer:
    """Writes the tape of a program: allocations through `empty`, frees through reference counts."""

    def __init__(self, n_layer: int, kernels: bool = False) -> None:
        self.n_layer = n_layer
        self.kernels = kernels  # whether scratch that kernels take from the allocator is written too
        self.items: list[Item] = []
        self.phase = ""
        self.parameters: dict[str, Parameter] = {}
        self.has_gradients = False  # whether those of parameters are there already: of parameters to come, too
        self.nodes: list[Node] = []
        self.repeat = 1  # how often what is written now happens: rounds of the enclosing loops
        self.flops = 0
        self.shift = 0  # position within a loop body of several blocks
        self.rounds: Loop | None = None  # the loop over blocks that is being written, its body left out
        self.grad_enabled = True
        self.training = True
        self.step_in_backward: Callable[[Parameter], list[Item]] | None = None  # the optimizer's, of one parameter
        self.offload = False  # whether what is saved for backward goes to the host
        self.thread = THREADS[0]  # that launches what is written: autograd runs backward in one of its own
        self.handles: set[str] = set()  # the threads that have multiplied

    def mark(self, op: str, phase: str | None = None) -> None:
        self.phase = phase if phase is not None else self.phase
        self.items.append(Mark(self.phase, op))

    def empty(self, name: str, category: str, shape: Shape, dtype: str, shift: int = 0) -> Tensor:
        """A new tensor: the allocation is written now."""
        buffer = make_buffer(name, category, shape, dtype)
        shift += self.shift
        self.items.append(Event(1, buffer, shift))
        return Tensor(Storage(self, buffer, shift), shape, dtype)

    def multiplies(self) -> None:
        """A matrix product, its output made: the first one of a thread takes cuBLAS's workspace of that thread.

        How large that is depends on the GPU: the place alone is written (reserve.with_workspaces). Output, then
        workspace is the order of every recording that has both (tests/data/snapshots)."""
        if self.kernels and self.thread not in self.handles:
            self.handles.add(self.thread)
            self.items.append(Event(1, workspace_of(self.thread)))

    def take_over(self, buffer: Buffer, node: Node | None, shift: int = 0) -> Tensor:
        """A tensor that was made elsewhere on the tape: freeing it is ours from here on."""
        return Tensor(Storage(self, buffer, shift + self.shift), buffer.shape, buffer.dtype, node)

    def parameter(self, name: str, shape: Shape, dtype: str) -> Parameter:
        """The parameter of that name, made when first asked for; with a `*` it stands for those of all blocks."""
        if name not in self.parameters:
            self.parameters[name] = Parameter(name, shape, dtype, self.n_layer if "*" in name else 1)
            self.parameters[name].has_gradient = self.has_gradients
        return self.parameters[name]

    def set_gradients(self, exist: bool) -> None:
        """Whether the gradients of all parameters are there, those not yet named included."""
        self.has_gradients = exist
        for param in self.parameters.values():
            param.has_gradient = exist

    def record(
        self,
        name: str,
        inputs: Sequence[Node | None],
        saved: tuple[Storage, ...],
        backward: Callable[[Tensor, tuple[Storage, ...]], Sequence[Tensor | None]],
    ) -> Node | None:
        """A node for backward, which keeps `saved`; nothing where gradients are off."""
        if not self.grad_enabled or all(node is None for node in inputs):
            return None
        node = Node(name, inputs, tuple(map(self.to_host, saved)) if self.offload else saved, backward)
        node.shift, node.phase = self.shift, self.phase
        self.nodes.append(node)
        for edge in inputs:
            if edge is not None and edge.param is not None:
                edge.awaited += 1
        return node

    def saving(self, tensor: Tensor) -> Storage:
        """What is saved of `tensor`: its storage. Offload lays out a part of a storage anew, and keeps that alone."""
        part = make_buffer(f"{tensor.storage.buffer.name} part", "activation", tensor.shape, tensor.dtype)
        if not self.offload or tensor.storage.writer is None or part.n_bytes >= tensor.storage.buffer.n_bytes:
            return tensor.storage
        kept = Storage(self, part, self.shift)
        kept.forget()
        if part.n_bytes < OFFLOAD_MIN_BYTES:
            kept.base = tensor.storage
        else:
            self.items += [Event(1, part, self.shift), Event(-1, part, self.shift)]
            kept.is_on_host = True
        return kept

    def to_host(self, storage: Storage) -> Storage:
        """Where activation offload keeps a saved tensor: what it takes when it is back, and nothing until then."""
        buffer = storage.buffer
        if (
            storage.writer is None
            or storage.is_on_host
            or buffer.category == "buffer"
            or buffer.n_bytes < OFFLOAD_MIN_BYTES
        ):
            return storage
        host = Storage(self, buffer._replace(name=f"{buffer.name} back"), storage.shift)
        host.forget()
        host.is_on_host = True
        return host

    def back(self, storage: Storage) -> Storage:
        """A saved tensor when backward asks for it."""
        if not storage.is_on_host:
            return storage
        buffer = storage.buffer
        return self.empty(buffer.name, buffer.category, buffer.shape, buffer.dtype).storage

    @contextmanager
    def loop(self, n: int, reverse: bool = False, start: int = 0, stride: int = 1) -> Iterator[None]:
        """What is written inside is the body of a loop of `n` rounds."""
        outer, self.items = self.items, []
        self.repeat *= n
        self.rounds = Loop(n, [], reverse, True, start, stride)
        yield
        self.repeat //= n
        body, self.items = self.items, outer
        self.items.append(self.rounds._replace(body=body))
        self.rounds = None

    @contextmanager
    def repeated(self, n: int) -> Iterator[None]:
        """What is written inside happens `n` times, leaving nothing."""
        outer, self.items = self.items, []
        yield
        body, self.items = self.items, outer
        self.items.append(Loop(n, body, numbered=False))

    def backward(self, nodes: list[Node], grads: dict[Node, Tensor], to_saved: bool = False) -> None:
        """Runs `nodes` from the last to the first, as torch's engine does: a node's saved tensors go
        when it has run, gradients of parameters are accumulated as soon as they are complete. `to_saved`: up to the
        first that has saved any.

        `grads` holds the gradients that have arrived, and afterwards those for nodes that have not run.
        """
        while nodes and not (to_saved and nodes[-1].saved):
            node = nodes.pop()
            if node not in grads or node.backward is None:
                grads.pop(node, None)
                node.saved = ()
                continue
            self.mark(node.name, "loss backward" if node.phase == "loss" else "backward")
            self.shift = node.shift
            saved = tuple(map(self.back, node.saved))
            results: list[Any] = list(node.backward(grads.pop(node), saved))[::-1]  # it alone holds the gradient
            del saved
            node.backward = None
            node.saved = ()
            for target in node.inputs:
                if target is not None and results[-1] is not None:
                    self.deliver(target, results.pop(), grads)
                else:
                    results.pop()
            del results
        self.shift = 0

    def deliver(self, target: Node, result: Tensor, grads: dict[Node, Tensor]) -> None:
        """Adds `result` to what has arrived for `target`: in place where the engine holds the only reference
        (autograd/input_buffer.cpp, can_accumulate_inplace), else into a new tensor."""
        if target.joins:
            bundle = grads.setdefault(target, Bundle())
            assert isinstance(bundle, Bundle)
            bundle.parts.append(result)
        elif target in grads:
            if grads[target].is_view:
                grads[target] = self.empty("gradient sum", "temporary", result.shape, result.dtype)
        else:
            grads[target] = result
        del result
        if target.param is not None:
            target.awaited -= 1
            if target.awaited == 0:
                self._accumulate(target.param, grads.pop(target))

    def _accumulate(self, param: Parameter, grad: Tensor) -> None:
        """AccumulateGrad: the first gradient is taken over without a copy, later ones are added in place."""
        if not param.has_gradient:
            shift = rename_last(self.items, grad.storage.buffer, param.gradient)
            grad.storage.forget()
            if self.step_in_backward is not None:
                self.items += [*self.step_in_backward(param), Event(-1, param.gradient, shift)]

    def tape(self) -> Tape:
        return Tape(self.items)


def workspace_of(thread: str, n_bytes: int = 0) -> Buffer:
    """cuBLAS's workspace of a thread: kept for good once it is there."""
    return Buffer(f"cuBLAS workspace of the {thread} thread", "workspace", (n_bytes,), "uint8", n_bytes)


def rename_last(items: list[Item], old: Buffer, new: Buffer) -> int:
    """The last allocation of `old` becomes one of `new`: the gradient was made as a temporary of another name.

    Returns its shift. Raises ValueError if there is none: the writer made it elsewhere.
    """
    for index in range(len(items) - 1, -1, -1):
        item = items[index]
        if isinstance(item, Event) and item.sign > 0 and item.buffer == old:
            items[index] = item._replace(buffer=new)
            return item.shift
    raise ValueError(f"the gradient {new.name} is not made where it is accumulated")
