"""gptfit: a memory-fit planner and trainer for GPT models."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptfit.trace import trace_module, trace_step
    from gptfit.tracefile import trace_file

__version__ = "0.1.0"
__all__ = ["__version__", "trace_file", "trace_module", "trace_step"]

# Imported when they are first asked for: they bring torch, which `import gptfit` does without.
_LATER = {
    "trace_file": "gptfit.tracefile",
    "trace_module": "gptfit.trace",
    "trace_step": "gptfit.trace",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LATER[name]), name)
