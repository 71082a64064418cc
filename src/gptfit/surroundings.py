"""What is set right in torch and in libraries while a user's code is traced, and given back after it."""

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gptfit.recorder import Recorder


@contextmanager
def movable_modules() -> Iterator[None]:
    """`module.to(…)` on fake tensors as on real ones: each parameter stays the object it is and gets new data, while
    torch would swap the objects, which fails for tensors that something refers to weakly."""

    def apply(self: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for child in self.children() if recurse else ():
            child._apply(function)
        for key, parameter in self._parameters.items():
            if parameter is None:
                continue
            with torch.no_grad():
                moved = function(parameter)
            if moved.device != parameter.device:  # from the meta device
                self._parameters[key] = nn.Parameter(moved, parameter.requires_grad)
            elif moved is not parameter:
                parameter.data = moved
        for key, buffer in self._buffers.items():
            self._buffers[key] = function(buffer) if buffer is not None else None
        return self

    kind: Any = nn.Module
    original = kind._apply
    kind._apply = apply
    try:
        yield
    finally:
        kind._apply = original


@contextmanager
def taken_for_real(recorder: Recorder) -> Iterator[None]:
    """Hugging Face's models build masks that a real step does without where they see a fake tensor (is_tracing in
    transformers/utils/import_utils.py). One whose value is known does not count as such."""
    utils: Any = sys.modules.get("transformers.utils.import_utils")
    original = getattr(utils, "is_fake_tensor", None)
    if original is not None:
        utils.is_fake_tensor = lambda x: original(x) and recorder.values.of(x) is None
    try:
        yield
    finally:
        if original is not None:
            utils.is_fake_tensor = original


@contextmanager
def quiet() -> Iterator[None]:
    """Without the traceback that torch logs where an op refuses its arguments, which is raised, too, and without its
    warnings that compiled modules do not call the tracer's hooks and that a fake tensor has no memory."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using `torch.compile", UserWarning)
            warnings.filterwarnings("ignore", "torch.cuda.amp.GradScaler is enabled, but", UserWarning)
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor", UserWarning)  # deepcopy does
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def autocast_on_cpu() -> Iterator[None]:
    """`torch.autocast("cuda")` is the CPU's, from which the tracer makes CUDA's."""
    kind: Any = torch.autocast
    original = kind.__init__

    def begin(self: Any, device_type: str, dtype: Any = None, *args: Any, **kwargs: Any) -> None:
        if device_type.startswith("cuda"):
            device_type, dtype = "cpu", dtype or torch.float16  # CUDA's default
        original(self, device_type, dtype, *args, **kwargs)

    kind.__init__ = begin
    try:
        yield
    finally:
        kind.__init__ = original


@contextmanager
def no_draws() -> Iterator[None]:
    """Weights are not drawn from a truncated normal distribution: torch does so again until all are within bounds,
    and those of a fake tensor never are."""
    module: Any = nn.init
    original = module._no_grad_trunc_normal_
    module._no_grad_trunc_normal_ = lambda tensor, *_, **__: tensor
    try:
        yield
    finally:
        module._no_grad_trunc_normal_ = original
