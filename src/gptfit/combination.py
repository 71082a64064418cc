"""One combination of keys in a search, over all micro-batches: what is true of it on every card."""

from collections.abc import Mapping
from functools import cached_property

from gptfit.config import RunConfig, derive
from gptfit.errors import GptfitError
from gptfit.memory.step import steady_peak
from gptfit.speed import Work, work_of


class Combination:
    """`keys` on top of `base`. The searches of several cards share it: a peak that one has asked for is known to all,
    and narrows down what the next has to ask for."""

    def __init__(self, base: RunConfig, keys: Mapping[str, object], tokens: int) -> None:
        self.base = base
        self.keys = dict(keys)
        self.tokens = tokens
        self.runs: dict[int, RunConfig] = {}
        self.peaks: dict[int, int] = {}  # live bytes of the steady step by micro-batch
        self.flops_per_token = 0  # once a peak is known

    def steps(self, micro_batch: int) -> int:
        """Micro-steps of each GPU that come nearest to the tokens of a step."""
        return max(1, round(self.tokens / (micro_batch * self.base.block_size * self.base.n_gpus)))

    def split(self, micro_batch: int) -> dict[str, object]:
        """What a micro-batch decides."""
        n_gpus = self.base.n_gpus
        return {"batch_size": micro_batch, "gradient_accumulation_steps": self.steps(micro_batch) * n_gpus}

    def run(self, micro_batch: int) -> RunConfig:
        if micro_batch not in self.runs:
            self.runs[micro_batch] = derive(self.base, **self.keys, **self.split(micro_batch))
        return self.runs[micro_batch]

    def live_bytes(self, micro_batch: int) -> int:
        """Live bytes at the peak. Raises GptfitError for what cannot be estimated (a budget, for some shapes)."""
        if micro_batch not in self.peaks:
            self.peaks[micro_batch], self.flops_per_token = steady_peak(self.run(micro_batch), "gptfit")
        return self.peaks[micro_batch]

    @cached_property
    def work(self) -> Work:
        """Ask for a peak first: it counts the FLOPs."""
        micro_batch = next(iter(self.peaks))
        return work_of(self.run(micro_batch), self.flops_per_token, "gptfit")

    def largest(self, first: int, last: int, room_bytes: int) -> int:
        """The largest micro-batch from `first` to `last` whose live peak is within `room_bytes`, as memory grows with
        it; less than `first` if none is, or one on the way there cannot be estimated.

        Peaks are nearly straight lines over micro-batches: the next one to look at is where the line through the
        nearest known ones meets the room, every third time the middle between what fits and what does not.
        """
        fits = {m: live for m, live in self.peaks.items() if first <= m <= last and live <= room_bytes}
        too_large = {m: live for m, live in self.peaks.items() if first <= m <= last and live > room_bytes}
        low, high = max(fits, default=first - 1), min(too_large, default=last + 1)
        stride = turn = 1
        while low + 1 < high:
            if high not in too_large and len(fits) < 2:
                middle, stride = low + stride, stride * 4
            elif high not in too_large:
                before = max(m for m in fits if m < low)
                rise = max(1, fits[low] - fits[before])
                middle = low + max(1, (room_bytes - fits[low]) * (low - before) // rise)
            elif low not in fits or turn % 3 == 0:
                middle = (low + high) // 2
            else:
                rise = too_large[high] - fits[low]
                middle = low + (room_bytes - fits[low]) * (high - low) // rise
            middle = min(max(middle, low + 1), high - 1)
            turn += 1
            try:
                live_bytes = self.live_bytes(middle)
            except GptfitError:
                return first - 1
            if live_bytes <= room_bytes:
                low, fits[middle] = middle, live_bytes
            else:
                high, too_large[middle] = middle, live_bytes
        return low
