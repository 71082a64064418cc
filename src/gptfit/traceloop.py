"""The training loop around what a user's factory made, for the tracer: forward, backward, clipping, the optimizer.

A module with a batch gets the loop that people write; a callable is called, and what it leaves to the loop is done
for it: backward where it returns a loss, the optimizer's step where it takes none itself.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode

from gptfit.compiled_parts import InOrder, named_parts, norms_in_parts, plan_part, planned_parts, settle
from gptfit.config import RunConfig
from gptfit.errors import GptfitError
from gptfit.factory import Made, modules_of
from gptfit.inductor_plan import plan_module
from gptfit.optim import build_optimizer
from gptfit.recorder import Recorder, tensors_in
from gptfit.surroundings import autocast_on_cpu, movable_modules, no_draws, quiet, taken_for_real
from gptfit.trace import MAX_MICRO_STEPS, FakeScaler, Job, autocast_of, find_loss

# Names under which a batch holds its targets, as Hugging Face and others have it.
TARGETS = ("labels", "targets", "target", "y")


class Loop:
    """Steps of what `make` makes, as `run` says where the factory left it open.

    `starts` are the numbers of notes that the recorder had when each step began, `stop` when the last one ended.
    """

    def __init__(self, make: Callable[[], Made], run: RunConfig) -> None:
        self.make = make
        self.run = run
        self.starts: list[int] = []
        self.stop = 0
        self.recorder = Recorder()
        self.on_cpu = OnCpu(self)
        self.autocast = autocast_of(run)
        self.scaler = FakeScaler("cpu", enabled=run.dtype == "float16")
        self.made: Made = Made(nn.Module())
        self.optimizers: tuple[Any, ...] = ()
        self.inputs: tuple[Tensor, ...] = ()
        self.held: Any = None
        self.steps_itself = self.is_stepping = False
        self.stack = ExitStack()
        self.vocab_size = self.n_backwards = 0
        self.notes: list[str] = []
        self.is_compiled = run.compile

    def job(self, recorder: Recorder) -> Job:
        """Calls the factory, and says what the tracer is to run."""
        self.recorder = recorder
        with planned_parts(recorder, self.notes) as compiled:
            self.made = made = self.make()
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and importing it takes a second
            self.stack.enter_context(torch.compiler.set_stance("force_eager"))
        self.stack.enter_context(taken_for_real(recorder))
        for part in compiled:
            if made.batch is None or part is not made.model:
                plan_part(part, recorder)
                planned = "the modules that the callable compiles run by inductor's plan"
                self.notes += [planned] if planned not in self.notes else []
        inner = getattr(made.model, "_orig_mod", None)  # torch.compile's wrapper
        if isinstance(inner, nn.Module):
            made.model, self.is_compiled = inner, made.batch is not None
        model = made.model
        check_parameters(model)
        if made.batch is not None:
            named = named_parts(made.batch)
            for name, value in named.items():
                for tensor in tensors_in(value):
                    recorder.label(tensor, f"input {name}", "buffer")
            self.inputs = targets_last(named)
        self.vocab_size = vocabulary_of(model)
        if self.is_compiled:
            self.plan(model)
        self.optimizers = made.optimizers
        for other in modules_of(made.micro_step) if made.micro_step else ():  # one that is not trained, as a reference
            for name, tensor in (*other.named_parameters(), *other.named_buffers()):
                found = recorder.alive.get(recorder.key(tensor))
                if found is not None and found.category == "temporary":
                    found.name, found.category = f"{type(other).__name__}: {name}", "parameter"
        return Job(model, self.step, self.forward, self.forward, lambda: self.inputs, self.segment)

    def segment(self) -> int:
        """The number of backwards that have run; -1 inside one, where checkpoints save again."""
        return self.n_backwards if self.recorder.phase in ("forward", "loss", "optimizer") else -1

    def plan(self, model: nn.Module) -> None:
        """Takes the module as inductor would run it.

        Raises GptfitError for a callable: what of it would be compiled is not known.
        """
        batch = self.made.batch
        if batch is None:
            raise GptfitError(
                "compile=True is for a module with a batch, not for a callable", "return (module, batch) instead"
            )
        self.stack.enter_context(norms_in_parts())
        with self.autocast:
            settle(model, self.recorder, self.call)
        in_order = InOrder(model, batch)
        plan_module(in_order, self.recorder)
        self.call = lambda: in_order(*in_order.tensors)

    def call(self) -> Any:
        """Runs the module on its batch."""
        batch = self.made.batch or ()
        return self.made.model(**batch) if isinstance(batch, Mapping) else self.made.model(*batch)

    def step(self) -> None:
        """One optimizer step."""
        recorder, made = self.recorder, self.made
        self.starts.append(len(recorder.notes))
        for _ in range(min(self.run.micro_steps, MAX_MICRO_STEPS)):
            loss = self.loss_of(self.forward())
            if loss is not None:
                loss = self.held[1] = loss / self.run.micro_steps
                self.scaler.scale(loss).backward()
        recorder.label_gradients(made.model)
        if not self.steps_itself:
            self.take_step()
        self.label_kept()
        self.stop = len(recorder.notes)

    def label_kept(self) -> None:
        """What an optimizer of the user's own keeps: of a parameter's shape, and alive when a step has ended."""
        names = {tuple(parameter.shape): name for name, parameter in self.made.model.named_parameters()}
        for allocation in self.recorder.alive.values():
            if allocation.category == "temporary" and allocation.shape in names and allocation.shape:
                allocation.name, allocation.category = f"{names[allocation.shape]} state", "optimizer state"

    def take_step(self) -> None:
        if not self.optimizers:
            self.optimizers = (build_optimizer(self.made.model, self.run),)
        self.recorder.phase = "optimizer"
        if self.run.grad_clip and self.made.batch is not None:
            nn.utils.clip_grad_norm_(self.made.model.parameters(), self.run.grad_clip, foreach=True)
        self.is_stepping = True
        for optimizer in self.optimizers:
            optimizer.step()
            self.recorder.label_state(self.made.model, optimizer)
        self.is_stepping = False
        for parameter in self.made.model.parameters():
            parameter.grad = None

    def forward(self) -> Any:
        """The part of a micro-step that saves for backward; a callable may do more. What it returns is alive until
        the next one returns, as in a loop that assigns it to a variable."""
        self.recorder.begin_forward(self.inputs)
        with self.autocast:
            output = self.made.micro_step() if self.made.micro_step is not None else self.call()
        self.held = [output, None]
        return output

    def loss_of(self, output: Any) -> Tensor | None:
        """The loss that is still to be differentiated; None where a callable has done so itself."""
        if self.made.micro_step is not None:
            first = output[0] if isinstance(output, tuple) and output else output
            return first if isinstance(first, Tensor) and first.requires_grad and not self.was_backward else None
        try:
            return find_loss(output)
        except GptfitError:
            name = type(self.made.model).__name__
            raise GptfitError(
                f"the output of {name} has no loss: no single number that can be differentiated",
                "let the batch hold the targets, or return a callable that makes the loss, and the module",
            ) from None

    @property
    def was_backward(self) -> bool:
        """Whether a backward has run since the last forward began."""
        return self.recorder.phase == "optimizer"

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Follows code that runs backward and optimizers by itself, and puts what it puts on a GPU here."""

        def forward_begins(module: nn.Module, inputs: Any) -> None:
            if isinstance(module, nn.Embedding) and module.num_embeddings == self.vocab_size and inputs:
                self.recorder.logits = (self.vocab_size, inputs[0].numel() * self.vocab_size)
            if module is self.made.model and self.recorder.phase == "optimizer":
                self.recorder.begin_forward(self.inputs)

        def step_begins(optimizer: Any, *_: Any) -> None:
            self.steps_itself = self.steps_itself or not self.is_stepping
            self.recorder.phase = "optimizer"
            as_on_cuda(optimizer)

        def step_ends(optimizer: Any, *_: Any) -> None:
            self.recorder.label_state(self.made.model, optimizer)

        autograd: Any = torch.autograd
        engine = autograd._engine_run_backward

        def backward(*args: Any, **kwargs: Any) -> Any:
            if self.recorder.phase in ("backward", "loss backward"):  # a checkpoint's, inside another one
                return engine(*args, **kwargs)
            self.recorder.phase = "backward"
            with self.on_cpu:
                result = engine(*args, **kwargs)
            self.recorder.label_gradients(self.made.model)
            self.n_backwards += 1
            self.recorder.phase = "optimizer"  # what follows a backward, until a forward begins
            return result

        handles = [
            register_module_forward_pre_hook(forward_begins),
            register_optimizer_step_pre_hook(step_begins),
            register_optimizer_step_post_hook(step_ends),
        ]
        autograd._engine_run_backward = backward
        try:
            with self.stack, self.on_cpu, movable_modules(), autocast_on_cpu(), no_draws(), quiet():
                yield
        finally:
            autograd._engine_run_backward = engine
            for handle in handles:
                handle.remove()


class OnCpu(TorchFunctionMode):
    """Takes every CUDA device that code names for the CPU, where fake tensors are.

    Raises GptfitError where a step asks for the address of a tensor, as code that launches a kernel does.
    """

    def __init__(self, loop: Loop) -> None:
        super().__init__()
        self.loop = loop

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.cuda:
            return args[0]
        if func is Tensor.pin_memory:
            return args[0]
        if func is Tensor.__format__ and args[0].dim() == 0:  # as torch does, but for fake tensors
            return format(self.loop.recorder.number(args[0]), args[1])
        if func is Tensor.item:
            return self.loop.recorder.number(args[0])
        if func is Tensor.data_ptr and self.loop.recorder.phase != "setup" and not self.loop.recorder.is_paused:
            where = self.loop.recorder.here()
            raise GptfitError(
                f"cannot trace a kernel that is launched by hand{where}: it asks for a tensor's memory (data_ptr)",
                "make it an op with torch.library.custom_op and give it a fake form with register_fake",
            )
        if func is Tensor.to and len(args) > 1 and type(args[1]) is int:
            args = (args[0], "cpu", *args[2:])
        return func(*map(here, args), **{key: here(value) for key, value in (kwargs or {}).items()})


def here(value: Any) -> Any:
    """`cpu` for a CUDA device, anything else as it is."""
    if isinstance(value, str):
        return "cpu" if value == "cuda" or value.startswith("cuda:") else value
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == "cuda" else value


def as_on_cuda(optimizer: Any) -> None:
    """Settings that torch takes from the device: on CUDA an optimizer that is told nothing takes foreach kernels
    (torch/optim/optimizer.py, _default_to_fused_or_foreach)."""
    for group in getattr(optimizer, "param_groups", ()):
        if group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = not group.get("differentiable", False)


def check_parameters(model: nn.Module) -> None:
    """Raises GptfitError for a model that no step can be made with."""
    kind, parameters = type(model).__name__, list(model.named_parameters())
    for name, parameter in parameters:
        if parameter.device.type == "meta":
            raise GptfitError(
                f"{name} of {kind} is on the meta device, where a step cannot run",
                'build the module without torch.device("meta"), as a trace takes no memory; or module.to_empty(…)',
            )
    if parameters and not any(parameter.requires_grad for _, parameter in parameters):
        raise GptfitError(f"no parameter of {kind} requires a gradient", "leave requires_grad on where it is trained")


def targets_last(named: Mapping[Any, Any]) -> tuple[Tensor, ...]:
    """The tensors of a batch, its targets last; the first alone where the targets are no tensor of their own."""
    target = next((key for key in TARGETS if key in named), None)
    last = list(tensors_in(named.get(target)))
    rest = list(tensors_in([value for key, value in named.items() if key != target]))
    if target is None and 0 in named:
        return tuple(rest)
    is_own = last and Recorder.key(last[0]) not in map(Recorder.key, rest)
    return (*rest, *last) if is_own else tuple(rest[:1])


def vocabulary_of(model: nn.Module) -> int:
    """vocab_size of a language model: the largest embedding that a linear layer matches; 0 where there is none."""
    heads = {module.out_features for module in model.modules() if isinstance(module, nn.Linear)}
    tables = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
    return max((size for size in tables if size in heads), default=0)
