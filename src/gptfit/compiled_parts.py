"""What a callable compiles itself: modules and functions that it gives to torch.compile run by inductor's plan."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptfit.cuda_kernels import KERNELS
from gptfit.errors import GptfitError
from gptfit.inductor_plan import plan_function, plan_module
from gptfit.recorder import Recorder, tensors_in


@contextmanager
def planned_parts(recorder: Recorder, notes: list[str]) -> Iterator[list[nn.Module]]:
    """`torch.compile` marks modules, which are listed and run as they are until `plan_part` is called, and gives
    functions that run without gradients, by inductor's plan. One with gradients runs as it is, and so does one that
    inductor makes no plan of here, which `notes` tell."""
    marked: list[nn.Module] = []
    original: Any = torch.compile

    def compile(model: Any = None, **settings: Any) -> Any:
        if model is None:
            return lambda function: compile(function, **settings)
        if isinstance(model, nn.Module):
            compiled: Any = original(model, **settings)
            marked.append(compiled)
            return compiled
        return compiled_function(model, recorder, notes)

    def compile_in_place(self: nn.Module, **settings: Any) -> None:
        """`module.compile()`: whoever calls the module runs what is compiled, which runs the module as it is."""
        compiled = compile(self, **settings)
        plain: Any = self._call_impl
        is_running = False

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal is_running
            if is_running:
                return plain(*args, **kwargs)
            is_running = True
            try:
                return compiled.forward(*args, **kwargs)
            finally:
                is_running = False

        self._compiled_call_impl = call

    kind: Any = nn.Module
    in_place = kind.compile
    torch.compile, kind.compile = compile, compile_in_place
    try:
        yield marked
    finally:
        torch.compile, kind.compile = original, in_place


def compiled_function(function: Callable[..., Any], recorder: Recorder, notes: list[str]) -> Callable[..., Any]:
    planned = plan_function(function, recorder)
    name = getattr(function, "__name__", type(function).__name__)
    is_plain = False

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal is_plain
        given = list(tensors_in([args, kwargs]))
        if is_plain or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)):
            return function(*args, **kwargs)
        try:
            bound = inspect.signature(function).bind(*args, **kwargs)
            if bound.kwargs or len(given) != sum(isinstance(arg, Tensor) for arg in bound.args):
                raise TypeError("a plan is of positional arguments, and of tensors among them")
            return planned(*bound.args)
        except GptfitError:
            raise
        except Exception:  # whatever inductor finds: the function itself is still there
            is_plain = True
            notes.append(f"{name} is compiled, and is traced as it runs without that")
            return function(*args, **kwargs)

    return call


def settle(model: nn.Module, recorder: Recorder, run: Callable[[], Any]) -> None:
    """Runs `model` once, unrecorded, so that what it caches is there, and makes buffers of tensors that are plain
    attributes: torch.compile takes both for inputs, while a traced graph would hold them as constants."""
    with recorder.paused(), torch.no_grad(), suppress(Exception):  # what is wrong with it, the step itself will say
        run()
    for path, module in model.named_modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, Tensor):
                delattr(module, name)
                module.register_buffer(name, value, persistent=False)
                recorder.label(value, f"{path}.{name}" if path else name, "buffer")


def plan_part(compiled: nn.Module, recorder: Recorder) -> None:
    """Lets a module that torch.compile made run by inductor's plan, one for each kind of call."""
    model: Any = compiled._orig_mod
    signature = inspect.signature(model.forward)
    ready: dict[tuple[object, ...], InOrder] = {}

    def call(*args: Any, **kwargs: Any) -> Any:
        named = signature.bind(*args, **kwargs).arguments
        key = tuple(
            (name, value.shape, value.dtype) if isinstance(value, Tensor) else (name, value)
            for name, value in named.items()
        )
        if key not in ready:
            settle(model, recorder, partial(model, *args, **kwargs))
            ready[key] = InOrder(model, named)
            plan_module(ready[key], recorder)
        ready[key].named = named
        tensors = ready[key].tensors
        ready[key].named = {name: None if isinstance(value, Tensor) else value for name, value in named.items()}
        del named, args, kwargs  # or a batch that the caller lets go would live on here
        if recorder.phase == "optimizer":  # what is inside calls no hooks
            recorder.begin_forward(())
        with norms_in_parts():
            return ready[key].as_returned(ready[key](*tensors))

    compiled.forward = call


class InOrder(nn.Module):
    """A module as inductor's plan takes it: the tensors of its batch in order, those of its output as a tuple.

    Raises GptfitError where its output holds what is neither a tensor nor nothing.
    """

    def __init__(self, model: nn.Module, batch: "Sequence[Any] | Mapping[str, Any]") -> None:
        super().__init__()
        self.model = model
        self.named: dict[Any, Any] = named_parts(batch)
        self.by_name = isinstance(batch, Mapping)
        self.form: Callable[[list[Any]], Any] = tuple
        self.is_tensor: list[bool] = []
        self.names = [name for name, value in self.named.items() if isinstance(value, Tensor)]

    @property
    def tensors(self) -> list[Tensor]:
        return [self.named[name] for name in self.names]

    def forward(self, *tensors: Tensor) -> Any:
        named = {**self.named, **dict(zip(self.names, tensors, strict=True))}
        with told_that_it_compiles():
            output = self.model(**named) if self.by_name else self.model(*named.values())
        if isinstance(output, Tensor):
            return output
        values = tuple(output.values() if isinstance(output, Mapping) else output)
        self.form = form_of(output)
        self.is_tensor = [isinstance(value, Tensor) for value in values]
        for value in values:
            if not isinstance(value, Tensor | None):
                raise GptfitError(
                    f"a compiled module has to return tensors, and {type(self.model).__name__} returns a "
                    f"{type(value).__name__} with them",
                    "take it out of the output (Hugging Face's models: config.use_cache = False)",
                )
        return tuple(value for value in values if isinstance(value, Tensor))

    def as_returned(self, output: Any) -> Any:
        """What the plan gives as the module's own forward gives it: by name, and with nothing where it has nothing."""
        if isinstance(output, Tensor):
            return output
        tensors = iter(output)
        return self.form([next(tensors) if there else None for there in self.is_tensor])


def form_of(output: Any) -> Callable[[list[Any]], Any]:
    """Makes another one like `output` of values in its order; it holds no tensor."""
    kind = type(output)
    if isinstance(output, Mapping):
        names = tuple(output)
        return lambda values: kind(**dict(zip(names, values, strict=True)))
    return (lambda values: kind(*values)) if hasattr(kind, "_fields") else kind


@contextmanager
def told_that_it_compiles() -> Iterator[None]:
    """Code that asks torch.compiler.is_compiling(), to leave out branches on values, hears what torch.compile says."""
    compiler: Any = torch.compiler
    before = compiler._is_compiling_flag
    compiler._is_compiling_flag = True
    try:
        yield
    finally:
        compiler._is_compiling_flag = before


@contextmanager
def norms_in_parts() -> Iterator[None]:
    """rms_norm as what it consists of. Inductor makes a kernel of its own of that, while the eager kernel's stand-in
    computes nothing, so that everything before it would be left out of inductor's graph as unused."""
    taken: dict[Callable[..., Any], Any] = {
        function: KERNELS.pop(function) for function in (F.rms_norm, torch.rms_norm) if function in KERNELS
    }
    try:
        yield
    finally:
        KERNELS.update(taken)


def named_parts(batch: "Sequence[Any] | Mapping[str, Any]") -> dict[Any, Any]:
    """A batch by name, or by number where it has an order."""
    return dict(batch) if isinstance(batch, Mapping) else dict(enumerate(batch))
