"""Watches torch run on fake tensors and writes down every storage that comes and goes.

A dispatch mode sees the outputs of each op. The first time a storage is seen it is an allocation; a weak
reference on it gives the free, at the instant at which CPython and torch's reference counts let go of it.
Views and in-place ops bring no new storage, so they write nothing.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from gptfit.cuda_dispatch import INTO_ZEROS, KERNELS, accumulates, as_cuda_gives, called_by_engine, holders, is_dense
from gptfit.errors import GptfitError
from gptfit.knownvalues import KnownValues
from gptfit.memory.tape import Buffer, Event, Item, Mark, rounded
from gptfit.unknownnumber import UnknownNumber, no_value
from gptfit.valueread import reader

aten = torch.ops.aten


@dataclass(slots=True, eq=False)
class Allocation:
    """One storage. What it is for is often known only later, so this is changed until the tape is made."""

    name: str
    category: str
    shape: tuple[int, ...]
    dtype: str
    n_bytes: int


@dataclass(slots=True)
class Note:
    """`sign` +1: `allocation` begins, -1: it ends, 0: `mark` holds from here on."""

    sign: int
    allocation: Allocation | None = None
    mark: Mark | None = None


class Recorder(TorchDispatchMode):
    """Records allocations and frees while it is entered. Enter it inside a FakeTensorMode.

    `logits` is (vocab_size, number of elements) of the tensors to be called logits, if any.
    """

    def __init__(self, logits: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.logits = logits
        self.notes: list[Note] = []
        self.values = KnownValues()
        self.readers: set[str] = set()  # code that read a value that is not known
        self.alive: dict[int, Allocation] = {}  # by the address of the storage
        self.phase = "setup"
        self.path: list[str] = []
        self.module_names: dict[int, str] = {}
        self.parameter_names: dict[int, str] = {}
        self.targets: int | None = None
        self.places: dict[int, tuple[str, str]] = {}  # by autograd sequence number: path and phase of the forward op
        self.making_on_host = False
        self.is_paused = False
        self.kernel = ""
        self.host: set[int] = set()  # addresses of storages that code for a GPU has on the host
        self.sole_holders: tuple[int, int, int] | None = None
        self.zeros = 0  # the address of the last storage that was made of zeros for a gradient
        self._references: dict[int, weakref.ref[Any]] = {}
        self._mark: Mark | None = None

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled while recording: spares two Python frames for each op."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default or self.is_paused:
            return func(*args, **(kwargs or {}))
        if isinstance(func, HigherOrderOperator):
            return self.higher_order(func, args, kwargs or {})
        if func is aten._local_scalar_dense.default:
            return self.scalar(args[0])
        kwargs = kwargs or {}
        node = torch._C._current_autograd_node()
        self.place(func, args, node)
        if node is not None and called_by_engine():
            if accumulates(func, args) and self.held_alone(args[0], args[1]):
                return aten.add_.Tensor(*args)
            if func in INTO_ZEROS and self.key(args[0]) == self.zeros:
                return INTO_ZEROS[func](*args, **kwargs)
        out = as_cuda_gives(func, self.call(func, args, kwargs))
        self.values.follow(func, args, kwargs, out)
        if func is aten.new_zeros.default:
            self.zeros = self.key(out)
        on_host = self.making_on_host or (bool(self.host) and self.all_on_host(args))
        for tensor in tensors_in(out):
            self.see(tensor, on_host)
        return out

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What `func` returns, also where that hangs on values, if they are known."""
        try:
            kernel: Any = KERNELS.get(func, func)
            return kernel(*args, **kwargs)
        except DataDependentOutputException:
            if not self.values.all_of(args):
                raise
            return self.values.run(func, args, kwargs)
        except DynamicOutputShapeException:
            if func is aten.masked_select.default:
                shape = torch.broadcast_shapes(*(tensor.shape for tensor in args))
                x, mask = (self.__torch_dispatch__(aten.expand.default, (), (tensor, shape)) for tensor in args)
                func, args = aten.index.Tensor, (x, [mask])
            if func is aten.index.Tensor:
                return func(args[0], self.selected(args[1]))
            if not self.values.all_of(args):
                raise
            made = self.values.run(func, args, kwargs)
            return tuple(map(torch.empty_like, made)) if isinstance(made, tuple) else torch.empty_like(made)

    def selected(self, indices: list[Any]) -> list[Any]:
        """Masks among the indices as the positions that they select, as CUDA's kernel does it."""
        numbers: list[Any] = []
        for index in indices:
            if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
                numbers += self.__torch_dispatch__(aten.nonzero.default, (), (index,)).unbind(1)
            else:
                numbers.append(index)
        return numbers

    def held_alone(self, old: Tensor, new: Tensor) -> bool:
        """Whether the engine would add `new` into `old`: it does so into a dense gradient that nobody else holds
        (autograd/input_buffer.cpp, can_accumulate_inplace), but never for fake tensors, so it is done here."""
        if self.sole_holders is None:  # the calibrating backward: this one is held by the engine alone
            self.sole_holders = holders(old)
        return is_dense(old) and old.dtype == new.dtype and holders(old) == self.sole_holders

    def calibrate(self) -> None:
        """Learns how many references a gradient has that the engine alone holds; it depends on the version."""
        x = torch.empty(1, requires_grad=True) * 1.0
        (x * 1.0 + x * 1.0).backward()
        del x
        self.phase, self._mark = "setup", None
        self.notes.clear()
        self.places.clear()

    def higher_order(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An operator that runs another one. A saved state of the random generator is on the host."""
        out = func(*args, **kwargs)
        for tensor in tensors_in(out):
            self.see(tensor, on_host=tensor.dtype == torch.uint8 and tensor.dim() == 1)
        return out

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is recorded inside."""
        self.is_paused = True
        try:
            yield
        finally:
            self.is_paused = False

    @contextmanager
    def within(self, kernel: str) -> Iterator[None]:
        """What happens inside belongs to `kernel`, not to the op or the module that runs."""
        self.kernel = kernel
        try:
            yield
        finally:
            self.kernel = ""

    def begin_forward(self, inputs: tuple[Tensor, ...]) -> None:
        """A forward starts. The loss begins where the last of several inputs, the targets, is first read."""
        self.phase = "forward"
        self.targets = self.key(inputs[-1]) if len(inputs) > 1 else None

    def scalar(self, tensor: Tensor) -> float | int:
        """Stands for `.item()`: the value if it is known. Behind a backward, where code reads what it prints, 1.
        Raises GptfitError before: a branch or a shape of the step would depend on it."""
        if self.values.of(tensor) is not None:
            return self.values.run(aten._local_scalar_dense.default, (tensor,), {})
        if self.phase != "optimizer":
            raise no_value(self.here())
        self.readers.add(reader())
        return 1.0 if tensor.is_floating_point() else 1

    def number(self, tensor: Tensor) -> float | int:
        """`tensor.item()` where it is called by name: before a backward a number that nothing may be decided on."""
        if self.phase == "optimizer" or not tensor.is_floating_point() or self.values.of(tensor) is not None:
            return tensor.item()
        return UnknownNumber(self.here())

    def here(self) -> str:
        return f" in {self.path[-1]}" if self.path and self.path[-1] else ""

    def place(self, func: Any, args: tuple[Any, ...], node: Any) -> None:
        """Works out where in the model this op is, and writes a mark if that is another place than before."""
        op = func.name().split("::")[1].split(".")[0]
        if node is not None and not self.path:  # with a module running it is a checkpoint's forward, run again
            path, phase = self.places.get(node._sequence_nr(), ("", ""))
            if phase:
                self.phase = "loss backward" if phase == "loss" else "backward"
            name = node.name().rsplit("::", 1)[-1]
            op = f"{path}: {name}" if path else name
        else:
            if (
                self.phase == "forward"
                and self.targets is not None
                and any(self.key(arg) == self.targets for arg in args if isinstance(arg, Tensor))
            ):
                self.phase = "loss"
            path = next((name for name in reversed(self.path) if name), "")
            number = torch._C._autograd._get_sequence_nr()  # pyright: ignore[reportAttributeAccessIssue]
            self.places.setdefault(number - 1, (path, self.phase))  # what follows without a node has its number too
            op = f"{path}: {op}" if path else op
        mark = Mark(self.phase, self.kernel or op)
        if mark != self._mark:
            self._mark = mark
            self.notes.append(Note(0, mark=mark))

    @staticmethod
    def key(tensor: Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def all_on_host(self, args: tuple[Any, ...]) -> bool:
        """Whether an op reads host tensors alone, so that its result is one, too."""
        inputs = list(tensors_in(args))
        return bool(inputs) and all(self.key(tensor) in self.host for tensor in inputs)

    def see(self, tensor: Tensor, on_host: bool = False) -> Allocation | None:
        """Takes note of the storage of `tensor` if it is new, and returns what is known about it."""
        if tensor.device.type == "meta":  # has no memory on a GPU either
            return None
        if tensor.device.type != "cpu":
            raise GptfitError(
                f"cannot trace a tensor made on {tensor.device}{self.here()}: a trace runs on the device of its inputs",
                "make tensors on the device of another one: device=x.device",
            )
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.alive:
            return self.alive[key]
        if key in self.host:
            return None
        if on_host:
            self.host.add(key)
            self._references[key] = weakref.ref(storage, lambda _: self.host.discard(key))
            return None
        n_bytes = rounded(storage.nbytes())
        if n_bytes == 0:
            return None
        mark = self._mark or Mark(self.phase, "")
        allocation = Allocation(
            name=mark.op,
            category=self.category(tensor),
            shape=tuple(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            n_bytes=n_bytes,
        )
        self.alive[key] = allocation
        self._references[key] = weakref.ref(storage, lambda _: self.gone(key))
        self.notes.append(Note(1, allocation))
        return allocation

    def gone(self, key: int) -> None:
        allocation = self.alive.pop(key)
        self._references.pop(key, None)
        self.notes.append(Note(-1, allocation))

    def category(self, tensor: Tensor) -> str:
        if tensor.shape and (tensor.shape[-1], tensor.numel()) == self.logits:
            return "logits"
        return "activation" if self.phase in ("forward", "loss") else "temporary"

    def label(self, tensor: Tensor, name: str, category: str) -> None:
        """Says what `tensor` is, now that it is known."""
        allocation = self.see(tensor)
        if allocation is not None:
            allocation.name, allocation.category = name, category

    def label_model(self, model: nn.Module) -> None:
        """Parameters and buffers of `model` are from here on known by name."""
        self.module_names = {id(module): name for name, module in model.named_modules()}
        for name, parameter in model.named_parameters():
            self.label(parameter, name, "parameter")
        for name, buffer in model.named_buffers():
            self.label(buffer, name, "buffer")

    def label_gradients(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                self.label(parameter.grad, f"{name}.grad", "gradient")

    def label_state(self, model: nn.Module, optimizer: Any) -> None:
        """Optimizer state of each parameter; steps that are kept on the host are none of it."""
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for part in getattr(optimizer, "parts", (optimizer,)):
            for parameter, state in getattr(part, "state", {}).items():
                for key, value in state.items() if isinstance(state, dict) else ():
                    for tensor in tensors_in(value):
                        self.label(tensor, f"{names.get(id(parameter), '')} {key}", "optimizer state")

    @contextmanager
    def modules(self) -> Iterator[None]:
        """Keeps track of which module runs, by torch's global module hooks."""

        def enter(module: nn.Module, _: Any) -> None:
            name = self.module_names.get(id(module), "")
            self.path.append(name)

        def leave(module: nn.Module, _: Any, __: Any) -> None:
            if self.path:
                self.path.pop()

        handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def items(self, start: int = 0, stop: int | None = None) -> list[Item]:
        """The notes from `start` to `stop` as a flat tape; storages alive at `start` are allocated first."""
        stop = len(self.notes) if stop is None else stop
        before: dict[int, Allocation] = {}
        for note in self.notes[:start]:
            if note.allocation is not None and note.sign > 0:
                before[id(note.allocation)] = note.allocation
            elif note.allocation is not None:
                before.pop(id(note.allocation), None)
        namer = Namer()
        items: list[Item] = [Mark("setup", "alive before")]
        items += [Event(1, namer.begin(allocation)) for allocation in before.values()]
        ends: list[Event] = []
        mark: Mark | None = None
        for note in [*self.notes[start:stop], Note(0)]:
            if note.sign < 0 and note.allocation is not None:
                ends.append(Event(-1, namer.end(note.allocation)))
                continue
            if mark is not None and (ends or note.sign > 0):  # a place where nothing happens is left out
                items.append(mark)
                mark = None
            # What is let go at one place goes in the order in which it came: torch's own order is at times that
            # of a hash of addresses, another one in each run.
            items += sorted(ends, key=lambda event: namer.order[event.buffer.name])
            ends = []
            if note.allocation is not None:
                items.append(Event(1, namer.begin(note.allocation)))
            else:
                mark = note.mark
        return items


class Namer:
    """Gives each allocation a buffer whose name no other living one has, as a tape pairs frees by name."""

    def __init__(self) -> None:
        self.taken: set[str] = set()
        self.buffers: dict[int, Buffer] = {}
        self.order: dict[str, int] = {}  # of the last allocation of that name
        self.count = 0

    def begin(self, allocation: Allocation) -> Buffer:
        name, n = allocation.name.replace("*", ""), 1
        while name in self.taken:
            n += 1
            name = f"{allocation.name} #{n}"
        self.taken.add(name)
        self.count += 1
        self.order[name] = self.count
        buffer = Buffer(name, allocation.category, allocation.shape, allocation.dtype, allocation.n_bytes)
        self.buffers[id(allocation)] = buffer
        return buffer

    def end(self, allocation: Allocation) -> Buffer:
        buffer = self.buffers.pop(id(allocation))
        self.taken.discard(buffer.name)
        return buffer


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(value, dict):
        yield from tensors_in([*value.values()])
