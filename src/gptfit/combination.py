"""One combination of keys in a search, over all micro-batches: what is true of it on every card."""

from collections.abc import Mapping
from functools import cached_property

from gptfit.config import RunConfig, derive
from gptfit.errors import GptfitError
from gptfit.memory.step import steady_peak
from gptfit.speed import Work, work_of

NEVER = 1 << 62  # more than there can be


class Combination:
    """`keys` on top of `base`. The searches of several cards share it: a peak that one has asked for is known to all,
    and narrows down what the next has to ask for."""

    def __init__(
        self, base: RunConfig, keys: Mapping[str, object], tokens: int, kin: "list[Combination] | None" = None
    ) -> None:
        self.base = base
        self.keys = dict(keys)
        self.tokens = tokens
        self.runs: dict[int, RunConfig] = {}
        self.peaks: dict[int, int] = {}  # live bytes of the steady step by micro-batch
        self.kin = [] if kin is None else kin  # those that need nearly the same, this one included
        self.kin.append(self)

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
            self.peaks[micro_batch], _ = steady_peak(self.run(micro_batch), "gptfit")
        return self.peaks[micro_batch]

    @cached_property
    def work(self) -> Work:
        """What a model computes for a token does not depend on what is chosen here: the base's is counted, eager, as
        that is the least to write."""
        eager = derive(self.base, compile=False, activation_memory_budget=1.0)
        return work_of(derive(self.base, **self.keys), steady_peak(eager, "gptfit")[1], "gptfit")

    def bracket(self, room_bytes: int) -> tuple[int, int]:
        """The largest micro-batch known to fit (0 does, in any room), and the smallest known not to."""
        known = self.peaks.items()
        low = max((m for m, live_bytes in known if live_bytes <= room_bytes), default=0)
        return low, min((m for m, live_bytes in known if live_bytes > room_bytes), default=NEVER)

    def fits(self, micro_batch: int, room_bytes: int) -> bool:
        """Whether the live peak is within `room_bytes`, as memory grows with the micro-batch. What cannot be estimated
        does not fit.

        Peaks are asked for at the limit as it seems to be: they decide most of what is asked next, too.
        """
        for seems in (True, True, False):
            low, high = self.bracket(room_bytes)
            if not low < micro_batch < high:
                break
            limits = (one.near_limit(room_bytes) for one in (self, *self.kin))
            limit, asked = next(filter(None, limits), 0), micro_batch
            if seems and limit:
                limit = min(max(limit, low), high - 1)
                asked = limit if limit >= micro_batch else limit + 1
            try:
                self.live_bytes(asked)
            except GptfitError:
                self.peaks[asked] = NEVER
        return micro_batch <= self.bracket(room_bytes)[0]

    def near_limit(self, room_bytes: int) -> int:
        """The largest micro-batch that fits, were peaks a line through the nearest known ones, and nothing taken by no
        micro-batch; 0 where too few are known."""
        low, high = self.bracket(room_bytes)
        left, right = low, high
        if high == NEVER:
            left, right = max((m for m in self.peaks if m < low), default=0), low
        if left == 0 and high == NEVER:
            return 0
        start = self.peaks.get(left, 0)
        return left + (room_bytes - start) * (right - left) // max(1, self.peaks[right] - start)

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


class Combinations:
    """Each combination of keys once, for the searches of all cards."""

    def __init__(self, base: RunConfig, tokens: int) -> None:
        self.base = base
        self.tokens = tokens
        self.made: dict[tuple[object, ...], Combination] = {}
        self.kin: dict[tuple[object, ...], list[Combination]] = {}  # but for the size of a chunk

    def of(self, keys: Mapping[str, object]) -> Combination:
        name = tuple(keys.items())
        if name not in self.made:
            kind = tuple(item for item in name if item[0] != "loss_chunk_size")
            self.made[name] = Combination(self.base, keys, self.tokens, self.kin.setdefault(kind, []))
        return self.made[name]
