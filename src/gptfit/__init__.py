"""gptfit: a memory-fit planner and trainer for GPT models."""

__version__ = "0.1.0"
