"""What was typed, kept so that an answer can say what to type next."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Asked:
    """A CONFIG (None: the default preset) and the KEY=VALUE words behind it, as typed."""

    config: str | None = None
    overrides: tuple[str, ...] = ()

    def changed(self, changes: Mapping[str, object]) -> dict[str, str]:
        """Keys and values of the overrides, those in `changes` replaced."""
        pairs = (word.removeprefix("--").partition("=") for word in self.overrides)
        typed = {key.replace("-", "_"): value for key, _, value in pairs}
        return typed | {key: str(value) for key, value in changes.items()}

    def gptfit(self, command: str, changes: Mapping[str, object] | None = None, *options: str) -> str:
        """`gptfit train gpt2 batch_size=8 --gpu rtx4070`: this run with `changes`, under another command."""
        words = [f"{key}={value}" for key, value in self.changed(changes or {}).items()]
        return shlex.join(["gptfit", command, *([self.config] if self.config else []), *words, *options])

    def nanogpt(self, changes: Mapping[str, object]) -> str:
        """`python train.py config/train_gpt2.py --batch_size=8`: the same for nanoGPT's trainer, which leaves the
        allocator to the environment."""
        file = [self.config] if self.config and self.config.endswith(".py") else []
        keys = self.changed(changes)
        segments = keys.pop("expandable_segments", None)
        around = [] if segments is None else [f"PYTORCH_CUDA_ALLOC_CONF=expandable_segments:{segments}"]
        return shlex.join([*around, "python", "train.py", *file, *(f"--{key}={value}" for key, value in keys.items())])
