"""Traces a training run of real PyTorch code on fake tensors: a tape without a GPU, and without the memory.

Everything runs on fake tensors of the CPU, with what differs on CUDA put in place: its autocast
(cuda_autocast.py) and the kernels that allocate other tensors (cuda_kernels.py). Scratch inside a kernel is
not a tensor and is not in the tape.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)

from gptfit.config import RunConfig
from gptfit.cuda_kernels import CudaKernels
from gptfit.device import DTYPES
from gptfit.ema import Ema
from gptfit.errors import GptfitError
from gptfit.estimate import under_program
from gptfit.inductor_plan import plan_function, plan_module
from gptfit.loss import fused_chunk
from gptfit.memory.autograd import OFFLOAD_MIN_BYTES
from gptfit.memory.tape import Buffer, Peak, Tape, rounded
from gptfit.model import GPT
from gptfit.nanogpt_reference import NanoGPT
from gptfit.offload import Offload
from gptfit.optim import build_optimizer, create_first
from gptfit.recorder import Recorder, tensors_in

# From the third micro-step of a step on nothing new happens: gradients are there, and the same tensors come and go.
MAX_MICRO_STEPS = 3


@dataclass(frozen=True, slots=True)
class Traced:
    """The steady step of a traced run. `tape` opens with everything that is alive when the step starts."""

    tape: Tape
    saved_for_backward_bytes: int
    parameters: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def n_params(self) -> int:
        return sum(math.prod(shape) for _, shape in self.parameters)

    @property
    def peak(self) -> Peak:
        return self.tape.peak()

    @property
    def live_bytes(self) -> int:
        """Tensors at the worst instant of the step, each rounded up to 512 bytes."""
        return self.tape.peak().live_bytes

    @property
    def phases(self) -> dict[str, int]:
        return {name: n_bytes for name, n_bytes in self.tape.phases().items() if name != "setup"}

    def live_set(self) -> Counter[Buffer]:
        return self.tape.live_at_peak()


@dataclass(slots=True)
class Job:
    """What to trace. `step` runs one optimizer step of `model`, `evaluate` one forward without gradients, `forward`
    alone the part of a micro-step that saves for backward; `inputs` gives the batch that it reads. `segment` counts
    the forwards of a step that runs several, and is negative in between."""

    model: nn.Module
    step: Callable[[], None]
    forward: Callable[[], Any]
    evaluate: Callable[[], Any]
    inputs: Callable[[], tuple[Tensor, ...]]
    segment: Callable[[], int] = lambda: 0


def fake_mode() -> FakeTensorMode:
    """A mode that a copied tensor shares: copy.deepcopy copies what a fake tensor refers to, its mode too, and a tensor
    of another mode is made anew by each op that reads it."""
    mode: Any = FakeTensorMode(allow_non_fake_inputs=True)
    mode.__deepcopy__ = lambda memo: mode
    return mode


@contextmanager
def as_on_cuda(recorder: Recorder) -> Iterator[None]:
    """Fake tensors, CUDA's kernels and a recorder, entered in the order in which they must see an op."""
    with ExitStack() as stack:
        stack.enter_context(fake_mode())
        stack.enter_context(recorder)
        recorder.calibrate()
        kernels = stack.enter_context(CudaKernels(recorder))
        stack.enter_context(kernels.in_backward())
        stack.enter_context(recorder.modules())
        yield


def trace_step(
    make: Callable[[Recorder], Job], steps: int = 2, logits: tuple[int, int] | None = None, evaluation: bool = False
) -> Traced:
    """Runs `steps` optimizer steps of the job that `make` builds, and returns the tape of the last one, or, if
    `evaluation`, that of an evaluation after them.

    `make` is called on fake tensors, so that its model takes no memory. `logits` (vocab_size, number of elements)
    tells logits from other tensors.
    Raises GptfitError where the code cannot run on tensors without values.
    """
    recorder = Recorder(logits)
    with as_on_cuda(recorder), explained():
        job = make(recorder)
        recorder.label_model(job.model)
        start = 0
        for _ in range(steps):
            start = len(recorder.notes)
            job.step()
        if evaluation:
            start = len(recorder.notes)
            job.evaluate()
        stop = len(recorder.notes)
        saved_bytes = saved_for_backward(job)
        parameters = tuple((name, tuple(parameter.shape)) for name, parameter in job.model.named_parameters())
    return Traced(Tape(recorder.items(start, stop)), saved_bytes, parameters)


@contextmanager
def explained() -> Iterator[None]:
    """Turns what fake tensors refuse into one line that says which op it is, and what to do."""
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise GptfitError(
            f"cannot trace {error.func}: its result depends on the values of tensors, and a trace has none",
            "write the step so that shapes and branches do not depend on tensor values"
            + ("; where tokens are routed, let each expert take as many" if "nonzero" in str(error.func) else ""),
        ) from error
    except UnsupportedOperatorException as error:
        raise GptfitError(
            f"cannot trace {error.func}: it has no fake kernel", "register one with torch.library.register_fake"
        ) from error


def saved_for_backward(job: Job) -> int:
    """Bytes that one forward keeps for backward: each storage once, rounded up to 512; inputs and parameters,
    which are alive anyway, left out."""
    known = {Recorder.key(tensor) for tensor in (*job.model.parameters(), *job.model.buffers(), *job.inputs())}
    sizes: dict[int, dict[int, int]] = {}
    saving = getattr(job.model, "saving", None)
    offloads = isinstance(saving, Offload)

    def pack(tensor: Tensor) -> Tensor:
        if not offloads or tensor.numel() * tensor.element_size() < OFFLOAD_MIN_BYTES:
            sizes.setdefault(job.segment(), {})[Recorder.key(tensor)] = rounded(tensor.untyped_storage().nbytes())
        return tensor

    if offloads:
        setattr(job.model, "saving", nullcontext())  # its hooks would come before these  # noqa: B010
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = job.forward()
    del result
    return max(
        (
            sum(n_bytes for key, n_bytes in saved.items() if key not in known)
            for segment, saved in sizes.items()
            if segment >= 0
        ),
        default=0,
    )


def trace_program(run: RunConfig, program: str = "gptfit", steps: int = 2, evaluation: bool = False) -> Traced:
    """The steady step of `run`, or an evaluation between steps, as that program's code runs it: the ground truth for
    its estimate. With `run.compile` it takes some seconds: inductor's lowering runs, its kernels are not built.

    Raises GptfitError for an unknown program, and for a key that asks for what its code has not.
    """
    run = under_program(run, program)
    batch_size = run.eval_batch_size if evaluation else run.batch_size
    logits = (run.vocab_size, batch_size * run.block_size * run.vocab_size)
    return trace_step(lambda recorder: JOBS[program](run, recorder), steps, logits, evaluation)


def trace_module(
    make: Callable[[], nn.Module],
    batch: Callable[[], tuple[Tensor, ...]],
    run: RunConfig,
    loss_of: Callable[[Any], Tensor] | None = None,
    steps: int = 2,
) -> Traced:
    """The steady step of any module: `make` builds it, `batch` its inputs; `run` says the autocast dtype, the
    optimizer, clipping, accumulation and whether it is compiled (its model keys are not read).

    `loss_of` takes the module's output; by default the loss is the output itself, its `loss`, or the scalar in it.
    The output stays alive until the next micro-step's is there, as in a loop that assigns it to a variable.
    Raises GptfitError where the module cannot run on tensors without values.
    """
    take = loss_of or find_loss

    def forward(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Any, Tensor]:
        output = model(*inputs)
        return output, take(output)

    def job(recorder: Recorder) -> Job:
        def labelled() -> tuple[Tensor, ...]:
            inputs = batch()
            for index, tensor in enumerate(inputs):
                recorder.label(tensor, f"input {index}", "buffer")
            return inputs

        model = make()
        if run.compile:
            plan_module(model, recorder, budget=run.activation_memory_budget)
        return training_job(run, recorder, model, forward, labelled, autocast_of(run))

    return trace_step(job, steps)


def find_loss(output: Any) -> Tensor:
    """The scalar tensor in a module's output.

    Raises GptfitError if there is none.
    """
    if hasattr(output, "loss"):
        output = output.loss
    for tensor in tensors_in(list(output.values()) if isinstance(output, dict) else output):
        if tensor.numel() == 1 and tensor.requires_grad:
            return tensor
    raise GptfitError("the module returns no scalar to differentiate", "give loss_of, which makes a loss of its output")


class FakeScaler(torch.amp.GradScaler):
    """A GradScaler whose check for infinities needs no values: the step is always taken."""

    def _maybe_opt_step(self, optimizer: Any, optimizer_state: Any, *args: Any, **kwargs: Any) -> None:
        optimizer.step(*args, **kwargs)


def training_job(
    run: RunConfig,
    recorder: Recorder,
    model: nn.Module,
    forward: Callable[[nn.Module, tuple[Tensor, ...]], tuple[Any, Tensor]],
    batch: Callable[[], tuple[Tensor, ...]],
    autocast: AbstractContextManager[Any],
) -> Job:
    """The loop of nanoGPT's train.py: the next batch is fetched between forward and backward; what `forward` returns
    beside the loss lives on until the next micro-step assigns it."""
    optimizer: Any = build_optimizer(model, run)
    if run.optimizer_in_backward:
        note_steps(recorder, optimizer)
    scaler = FakeScaler("cpu", enabled=run.dtype == "float16")
    ema = averaging(run, recorder, model)
    create_first(model, optimizer, run)
    recorder.label_state(model, optimizer)
    inputs = batch()
    held = loss = None

    def run_forward() -> tuple[Any, Tensor]:
        recorder.begin_forward(inputs)
        with autocast:
            return forward(model, inputs)

    def step() -> None:
        nonlocal inputs, held, loss
        for _ in range(min(run.micro_steps, MAX_MICRO_STEPS)):
            recorder.begin_forward(inputs)
            with autocast:
                held, loss = forward(model, inputs)
                loss = loss / run.micro_steps
            inputs = batch()
            recorder.phase = "loss backward" if recorder.phase == "loss" else "backward"
            scaler.scale(loss).backward()
            recorder.label_gradients(model)
        recorder.phase = "optimizer"
        if run.grad_clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), run.grad_clip, foreach=True)
        scaler.step(optimizer)
        scaler.update()
        if ema is not None:
            ema.update(0)
        recorder.label_state(model, optimizer)
        optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def evaluate() -> None:
        nonlocal held, loss
        recorder.phase = "evaluation"
        model.eval()
        with autocast:
            held, loss = forward(model, batch())
        model.train()

    return Job(model, step, run_forward, evaluate, lambda: inputs)


def averaging(run: RunConfig, recorder: Recorder, model: nn.Module) -> Ema | None:
    """The average of the weights that `run` keeps."""
    if not run.ema_decay:
        return None
    ema = Ema(model, run.ema_decay)
    for (name, _), average in zip(model.named_parameters(), ema.averages, strict=True):
        recorder.label(average, f"{name} ema", "optimizer state")
    return ema


def note_steps(recorder: Recorder, optimizer: Any) -> None:
    """Each step is of the phase "optimizer", though backward runs it."""
    phases: list[str] = []

    def begin(*_: Any) -> None:
        phases.append(recorder.phase)
        recorder.phase = "optimizer"

    def end(*_: Any) -> None:
        recorder.phase = phases.pop()

    for part in getattr(optimizer, "parts", (optimizer,)):
        part.register_step_pre_hook(begin)
        part.register_step_post_hook(end)


def autocast_of(run: RunConfig) -> AbstractContextManager[Any]:
    """Autocast to the run's dtype; the CPU's, which cuda_kernels.py makes CUDA's."""
    return torch.autocast("cpu", DTYPES[run.dtype]) if run.dtype != "float32" else nullcontext()


def get_batch(run: RunConfig, recorder: Recorder) -> tuple[Tensor, Tensor]:
    """Inputs and targets [B, T] int64, as they arrive on the device."""
    size = run.eval_batch_size if recorder.phase == "evaluation" else run.batch_size
    x, y = (torch.empty(size, run.block_size, dtype=torch.int64) for _ in range(2))
    recorder.label(x, "X", "buffer")
    recorder.label(y, "Y", "buffer")
    return x, y


def nanogpt_job(run: RunConfig, recorder: Recorder) -> Job:
    """nanoGPT's model returns logits and loss, and its loop holds on to both."""
    model = NanoGPT(run)
    if run.compile:
        plan_module(model, recorder, budget=run.activation_memory_budget)
    return training_job(
        run,
        recorder,
        model,
        lambda model, inputs: model(*inputs),
        lambda: get_batch(run, recorder),
        autocast_of(run),
    )


class TracedOffload(Offload):
    """Activation offload on fake tensors: what it keeps in host memory is not on the tape."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def empty_on_host(self, tensor: Tensor) -> Tensor:
        self.recorder.making_on_host = True
        try:
            return super().empty_on_host(tensor)
        finally:
            self.recorder.making_on_host = False


def gptfit_job(run: RunConfig, recorder: Recorder) -> Job:
    """gptfit's model returns the loss alone, and casts by itself. Compiled is what model.compile_model compiles."""
    model = GPT(run)
    if run.activation_offload:
        model.saving = TracedOffload(recorder)
    if run.compile:
        method = "hidden" if run.loss == "chunked" else "forward"
        plan_module(model, recorder, method, run.activation_memory_budget)
        model.chunk = plan_function(fused_chunk, recorder)
    return training_job(
        run,
        recorder,
        model,
        lambda model, inputs: (None, model(*inputs)),
        lambda: get_batch(run, recorder),
        nullcontext(),
    )


JOBS: dict[str, Callable[[RunConfig, Recorder], Job]] = {"nanogpt": nanogpt_job, "gptfit": gptfit_job}
