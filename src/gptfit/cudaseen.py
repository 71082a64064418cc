"""What torch.cuda says to a user's code that is traced without a GPU: that there is one.

`device = "cuda" if torch.cuda.is_available() else "cpu"` decides in many programs about autocast, fused optimizers and
more, so that the step of a machine without a GPU would be another one. Libraries hear the truth.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

# What the code is told where there is no GPU.
ANSWERS: dict[str, Any] = {
    "is_available": True,
    "is_bf16_supported": True,
    "device_count": 1,
    "current_device": 0,
    "set_device": None,
    "synchronize": None,
    "empty_cache": None,
    "ipc_collect": None,
    "reset_peak_memory_stats": None,
    "reset_max_memory_allocated": None,
}


@contextmanager
def cuda_is_seen() -> Iterator[None]:
    """Lets ANSWERS be heard by code that no package installed has. With a GPU nothing is changed."""
    module: Any = torch.cuda
    if torch.cuda.is_available():
        yield
        return
    originals = {name: getattr(module, name) for name in ANSWERS}
    for name, original in originals.items():
        setattr(module, name, answering(original, ANSWERS[name]))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(module, name, original)


def answering(original: Callable[..., Any], answer: Any) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        caller = sys._getframe(1).f_code.co_filename
        return original(*args, **kwargs) if "site-packages" in caller or "dist-packages" in caller else answer

    return call
