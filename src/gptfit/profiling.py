"""`--profile`: some steps as a trace for Perfetto or chrome://tracing, and on a GPU what the allocator did in them."""

from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from gptfit.events import Listener, Note

TRACE = "profile-trace.json.gz"
# https://pytorch.org/memory_viz shows it, and `gptfit replay` reads it.
SNAPSHOT = "profile-memory.pickle"

# Steps of this process, from 1: the first two compile, make the optimizer's states and warm up.
FIRST, LAST = 3, 5
MAX_ENTRIES = 200_000


class Profile:
    """Told before and after each step. `wanted`: otherwise it does nothing."""

    def __init__(self, wanted: bool, out: Path, device: torch.device, emit: Listener) -> None:
        self.wanted, self.out, self.device, self.emit = wanted, out, device, emit
        self.n_steps = 0
        self.running: Any = None

    def before_step(self) -> None:
        self.n_steps += 1
        if not self.wanted or self.n_steps != FIRST:
            return
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=MAX_ENTRIES)
        self.running = profile(activities=activities)
        self.running.start()

    def after_step(self) -> None:
        if self.n_steps == LAST:
            self.close()

    def close(self) -> None:
        """Writes what was recorded. That it cannot be written is said, and ends no run."""
        if not self.wanted:
            return
        self.wanted = False
        if self.running is None:
            self.emit(Note(f"no profile: it begins at the third step, and there were {self.n_steps}"))
            return
        try:
            self.running.stop()
            files = [self.out / TRACE]
            self.running.export_chrome_trace(str(files[0]))
            if self.device.type == "cuda":
                files.append(self.out / SNAPSHOT)
                torch.cuda.memory._dump_snapshot(str(files[1]))
                torch.cuda.memory._record_memory_history(enabled=None)
            self.emit(Note(f"profile of steps {FIRST} to {self.n_steps}: {', '.join(map(str, files))}"))
        except (OSError, RuntimeError) as error:
            self.emit(Note(f"no profile: {str(error).splitlines()[0][:200]}"))
        self.running = None
