"""gptfit: a memory-fit planner and trainer for GPT models.

gptfit.plan("gpt2", gpu="rtx4070", batch_size=8)      the best run that fits
gptfit.estimate("gpt2", gpu="rtx4070")                the memory of exactly this run
gptfit.explain_oom(text)                              why a run ran out of memory
gptfit.trace_step(make, gpu="rtx4070")                the memory of any training step
gptfit.check(globals())                               one line in nanoGPT's train.py
with gptfit.guard("config/train_gpt2.py"): ...        explains an out of memory, and raises it again
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptfit.api import check, estimate, explain_oom, guard, plan, trace_step
    from gptfit.errors import GptfitError
    from gptfit.trace import trace_module
    from gptfit.tracefile import trace_file

__version__ = "0.1.0"
__all__ = [
    "GptfitError",
    "__version__",
    "check",
    "estimate",
    "explain_oom",
    "guard",
    "plan",
    "trace_file",
    "trace_module",
    "trace_step",
]

# Imported when they are first asked for: some bring torch, and all bring more than `import gptfit` should.
_LATER = {
    "GptfitError": "gptfit.errors",
    "check": "gptfit.api",
    "estimate": "gptfit.api",
    "explain_oom": "gptfit.api",
    "guard": "gptfit.api",
    "plan": "gptfit.api",
    "trace_file": "gptfit.tracefile",
    "trace_module": "gptfit.trace",
    "trace_step": "gptfit.api",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LATER[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Callable(ModuleType):
    """A module that is called as the function of the same name."""

    def __call__(self, *args: Any, **keys: Any) -> Any:
        return __getattr__(self.__name__.rpartition(".")[2])(*args, **keys)


class _Package(ModuleType):
    """Python sets an imported module on its package: gptfit.plan is then the module, and has to stay a function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and _LATER.get(name) == "gptfit.api":
            value.__class__ = _Callable
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
