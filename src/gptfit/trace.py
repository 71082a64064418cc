"""Traces a training run of real PyTorch code on fake tensors: a tape without a GPU, and without the memory.

Everything runs on fake tensors of the CPU, with what differs on CUDA put in place: its autocast
(cuda_autocast.py) and the kernels that allocate other tensors (cuda_kernels.py). Scratch inside a kernel is
not a tensor and is not in the tape.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gptfit.config import RunConfig
from gptfit.cuda_autocast import CudaAutocast
from gptfit.cuda_kernels import CudaKernels
from gptfit.device import DTYPES
from gptfit.errors import GptfitError
from gptfit.memory.tape import Buffer, Peak, Tape, rounded
from gptfit.model import GPT
from gptfit.nanogpt_reference import NanoGPT
from gptfit.optim import Stepper, build_optimizer
from gptfit.recorder import Recorder

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
    """What to trace: `step` runs one optimizer step of `model`, `forward` alone the part that saves for backward."""

    model: nn.Module
    optimizer: Stepper | None
    step: Callable[[], None]
    forward: Callable[[], Any]
    inputs: Callable[[], tuple[Tensor, ...]] = field(default=tuple)


@contextmanager
def as_on_cuda(recorder: Recorder) -> Iterator[None]:
    """Fake tensors, CUDA's kernels and a recorder, entered in the order in which they must see an op."""
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(recorder)
        recorder.calibrate()
        kernels = stack.enter_context(CudaKernels(recorder))
        stack.enter_context(kernels.in_backward())
        stack.enter_context(recorder.modules())
        yield


def trace_step(make: Callable[[Recorder], Job], steps: int = 2, logits: tuple[int, int] | None = None) -> Traced:
    """Runs `steps` optimizer steps of the job that `make` builds, and returns the tape of the last one.

    `make` is called on fake tensors, so that its model takes no memory. `logits` (vocab_size, number of elements)
    tells logits-sized tensors from other ones.
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
        stop = len(recorder.notes)
        saved_bytes = saved_for_backward(job)
    parameters = tuple((name, tuple(parameter.shape)) for name, parameter in job.model.named_parameters())
    return Traced(Tape(recorder.items(start, stop)), saved_bytes, parameters)


@contextmanager
def explained() -> Iterator[None]:
    """Turns what fake tensors refuse into one line that says which op it is, and what to do."""
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        UnsupportedOperatorException,
    )

    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise GptfitError(
            f"cannot trace {error.func}: its result depends on the values of tensors, and a trace has none",
            "write the step so that shapes and branches do not depend on tensor values",
        ) from error
    except UnsupportedOperatorException as error:
        raise GptfitError(
            f"cannot trace {error.func}: it has no fake kernel", "register one with torch.library.register_fake"
        ) from error


def saved_for_backward(job: Job) -> int:
    """Bytes that one forward keeps for backward: each storage once, rounded up to 512; inputs and parameters,
    which are alive anyway, left out."""
    known = {Recorder.key(tensor) for tensor in (*job.model.parameters(), *job.model.buffers(), *job.inputs())}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes[Recorder.key(tensor)] = rounded(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = job.forward()
    del result
    return sum(n_bytes for key, n_bytes in sizes.items() if key not in known)


def trace_program(run: RunConfig, program: str = "gptfit", steps: int = 2) -> Traced:
    """The steady step of `run` as that program's code runs it: the ground truth for its estimate.

    Raises GptfitError for an unknown program.
    """
    if program not in JOBS:
        raise GptfitError(f'unknown program "{program}"', f"programs are {', '.join(JOBS)}")
    logits = (run.vocab_size, run.batch_size * run.block_size * run.vocab_size)
    return trace_step(lambda recorder: JOBS[program](run, recorder), steps, logits)


class FakeScaler(torch.amp.GradScaler):
    """A GradScaler whose check for infinities needs no values: the step is always taken."""

    def _maybe_opt_step(self, optimizer: Any, optimizer_state: Any, *args: Any, **kwargs: Any) -> None:
        optimizer.step(*args, **kwargs)


def nanogpt_job(run: RunConfig, recorder: Recorder) -> Job:
    """nanoGPT's train.py: the next batch is fetched between forward and backward; `logits` and `loss` live on
    until the next micro-step assigns them."""
    model = NanoGPT(run)
    optimizer = build_optimizer(model, run)
    scaler = FakeScaler("cpu", enabled=run.dtype == "float16")
    autocast = CudaAutocast(DTYPES[run.dtype]) if run.dtype != "float32" else nullcontext()
    micro_steps = min(run.micro_steps, MAX_MICRO_STEPS)
    X, Y = get_batch(run, recorder)
    logits = loss = None

    def step() -> None:
        nonlocal X, Y, logits, loss
        for _ in range(micro_steps):
            recorder.begin_forward(Y)
            with autocast:
                logits, loss = model(X, Y)
                loss = loss / run.micro_steps
            X, Y = get_batch(run, recorder)
            recorder.phase = "backward"
            scaler.scale(loss).backward()
            recorder.label_gradients(model)
        recorder.phase = "optimizer"
        if run.grad_clip:
            scaler.unscale_(optimizer)  # pyright: ignore[reportArgumentType]
            nn.utils.clip_grad_norm_(model.parameters(), run.grad_clip, foreach=True)
        scaler.step(optimizer)  # pyright: ignore[reportArgumentType]
        scaler.update()
        recorder.label_state(model, optimizer)
        optimizer.zero_grad(set_to_none=True)

    def forward() -> Any:
        recorder.begin_forward(Y)
        with autocast:
            return model(X, Y)

    return Job(model, optimizer, step, forward, lambda: (X, Y))


def gptfit_job(run: RunConfig, recorder: Recorder) -> Job:
    """gptfit's own step: the loss alone is returned."""
    model = GPT(run)
    optimizer = build_optimizer(model, run)
    scaler = FakeScaler("cpu", enabled=run.dtype == "float16")
    micro_steps = min(run.micro_steps, MAX_MICRO_STEPS)
    X, Y = get_batch(run, recorder)

    def step() -> None:
        nonlocal X, Y
        for _ in range(micro_steps):
            recorder.begin_forward(Y)
            loss = model(X, Y) / run.micro_steps
            X, Y = get_batch(run, recorder)
            recorder.phase = "backward"
            scaler.scale(loss).backward()
            recorder.label_gradients(model)
        recorder.phase = "optimizer"
        if run.grad_clip:
            scaler.unscale_(optimizer)  # pyright: ignore[reportArgumentType]
            nn.utils.clip_grad_norm_(model.parameters(), run.grad_clip, foreach=True)
        scaler.step(optimizer)  # pyright: ignore[reportArgumentType]
        scaler.update()
        recorder.label_state(model, optimizer)
        optimizer.zero_grad(set_to_none=True)

    def forward() -> Any:
        recorder.begin_forward(Y)
        return model(X, Y)

    return Job(model, optimizer, step, forward, lambda: (X, Y))


def get_batch(run: RunConfig, recorder: Recorder) -> tuple[Tensor, Tensor]:
    """Inputs and targets [B, T] int64, as they arrive on the device."""
    shape = (run.batch_size, run.block_size)
    x, y = (torch.empty(shape, dtype=torch.int64, device="cpu") for _ in range(2))
    recorder.label(x, "X", "buffer")
    recorder.label(y, "Y", "buffer")
    return x, y


JOBS: dict[str, Callable[[RunConfig, Recorder], Job]] = {"nanogpt": nanogpt_job, "gptfit": gptfit_job}
