"""The best run that fits: levers, search over every micro-batch, ranking by predicted time.

The search reads tapes in closed form; the finalists are replayed through the allocator. Keys that the
user set are kept, unless nothing fits; the tokens of a step are kept as nearly as can be, and that is said.
"""

import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from heapq import heapify, heappop
from itertools import product
from typing import Any

from gptfit.allowed import LAST_RESORT, allowed
from gptfit.combination import Combination, Combinations
from gptfit.config import RunConfig, check_key, shown
from gptfit.created import created_least, is_fragmented, saved_bytes
from gptfit.door import ConfigSource
from gptfit.errors import GptfitError
from gptfit.estimate import Budget, Estimate, Speed, estimate, speed_json, under_program
from gptfit.gpus import GpuProfile
from gptfit.levers import LeverEffect, effects
from gptfit.memory.overhead import CUBLAS_HANDLES, cublas_workspace_bytes
from gptfit.speed import Pace
from gptfit.units import format_bytes

# What the search may choose freely: the numbers of training stay the same to rounding.
FREE: dict[str, tuple[object, ...]] = {
    "loss": ("full", "chunked"),
    "compile": (True, False),
    "activation_checkpointing": ("none", "block"),
    "optimizer_impl": ("fused",),
    "activation_memory_budget": (1.0, 0.9),
}
# Tried for a chunked loss beside the run's own size: the larger, the fewer times the head's gradient is added up.
CHUNK_SIZES = (2048, 4096, 8192)
FINALISTS = 4
MANY = 1024
TRITON_CAPABILITY = 7.0  # what torch.compile asks of a card (torch/_inductor/scheduler.py, GPUTooOldForTriton)
BOUND = 1.0 + 1e-9  # what rounding may take from a bound
INEXACT = 0.015  # the speed that the exact number of tokens a step is worth; the nearest, by how far off it is


@dataclass(frozen=True, slots=True)
class Candidate:
    """One choice of keys, and the estimate of it."""

    choice: Mapping[str, object]
    run: RunConfig
    estimate: Estimate

    @property
    def fits(self) -> bool:
        return self.estimate.verdict == "fits"

    @property
    def reserved_bytes(self) -> int:
        return self.estimate.reserved_bytes

    @property
    def speed(self) -> Speed | None:
        return self.estimate.speed


@dataclass(frozen=True, slots=True)
class Plan:
    """The answer: the run as given, the best one that fits, and what each single change would do."""

    budget: Budget
    tokens_per_step: int
    as_given: Estimate | None
    smallest_change: LeverEffect | None
    choice: Mapping[str, object] | None
    run: RunConfig | None
    estimate: Estimate | None
    candidates: tuple[Candidate, ...]
    n_searched: int
    levers: tuple[LeverEffect, ...]
    notes: tuple[str, ...]

    @property
    def verdict(self) -> str:
        return "fits" if self.estimate is not None else "does_not_fit"

    @property
    def speed(self) -> Speed | None:
        return self.estimate.speed if self.estimate else None

    def to_json(self) -> dict[str, object]:
        budget, speed = self.budget, self.speed
        return {
            "schema": "gptfit.plan/1",
            "verdict": self.verdict,
            "gpu": budget.to_json(),
            "tokens_per_step": self.tokens_per_step,
            "as_given": self.as_given.to_json() if self.as_given else None,
            "smallest_change": self.smallest_change.to_json() if self.smallest_change else None,
            "choice": dict(self.choice) if self.choice is not None else None,
            "estimate": self.estimate.to_json() if self.estimate else None,
            "speed": speed_json(speed) if speed else None,
            "candidates": [
                {
                    "choice": dict(candidate.choice),
                    "reserved_bytes": candidate.reserved_bytes,
                    "tokens_per_second": candidate.estimate.speed.tokens_per_second
                    if candidate.estimate.speed
                    else None,
                    "fits": candidate.fits,
                }
                for candidate in self.candidates
            ],
            "n_searched": self.n_searched,
            "levers": [effect.to_json() for effect in self.levers],
            "notes": list(self.notes),
        }


@contextmanager
def uncollected() -> Iterator[None]:
    """Without Python's cyclic garbage collector, which takes a fifth of a search's time and finds next to nothing:
    what tapes are made of goes by reference count."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@uncollected()
def plan(
    source: ConfigSource,
    profile: GpuProfile,
    reserve_bytes: int = 0,
    tokens_per_step: int | None = None,
    allow: Sequence[str] = (),
    keep: Sequence[str] = (),
    risk: float | None = None,
) -> Plan:
    """The fastest run of the gptfit trainer that fits to the upper end of its interval, for the same tokens a step.
    Where none does, one that fits within the error, and a note that says so.

    Raises GptfitError for an unknown lever in `allow`, or fewer tokens a step than one sequence has.
    """
    tokens = checked_tokens(source.run, tokens_per_step, allow)
    budget = Budget(profile.name, profile.total_bytes, reserve_bytes)
    given = under_program(source.run, source.program)
    as_given = estimate(given, source.program, profile, reserve_bytes, risk)
    search = Search(under_program(source.run, "gptfit"), profile, budget, tokens, risk)
    found, notes = choices(search, source, allow, keep)
    best = found[0] if found else None
    chosen = best.estimate if best else None
    if chosen is not None and not chosen.certain:
        notes.append("it fits, but within the error of the estimate; nothing was found that fits for sure")
    levers = tuple(effects(as_given, given, source.program, profile, reserve_bytes))
    return Plan(
        budget=budget,
        tokens_per_step=tokens,
        as_given=as_given,
        smallest_change=smallest_change(as_given, levers),
        choice=best.choice if best else None,
        run=best.run if best else None,
        estimate=chosen,
        candidates=tuple(found[:20]),
        n_searched=search.n_searched,
        levers=levers,
        notes=tuple(notes),
    )


def checked_tokens(run: RunConfig, tokens_per_step: int | None, allow: Iterable[str]) -> int:
    """Tokens of a step, those of `run` if not given. Raises as `plan` does."""
    allowed(allow)
    if tokens_per_step is not None and (type(tokens_per_step) is not int or tokens_per_step < 1):
        raise GptfitError(f"tokens per step {shown(tokens_per_step)}: expected a whole number from 1 up", "as 491520")
    tokens = tokens_per_step or run.tokens_per_step
    if tokens < run.block_size:
        raise GptfitError(
            f"tokens per step {tokens} is less than one sequence of block_size {run.block_size}",
            "take a multiple of block_size",
        )
    return tokens


def choices(
    search: "Search", source: ConfigSource, allow: Sequence[str], keep: Sequence[str]
) -> tuple[list[Candidate], list[str]]:
    """What fits, best first, and what to say of it: keys that the user set change only where nothing fits else."""
    for key in keep:
        check_key(key, "--keep: ")
    kept = (source.user_keys | set(keep)) - {"batch_size", "gradient_accumulation_steps"}
    search.keeps_created = "created_first" in kept
    if "batch_size" in keep:
        search.micro_batch = source.run.batch_size
    elif "gradient_accumulation_steps" in keep:
        steps = source.run.gradient_accumulation_steps
        search.micro_batch = max(1, round(search.tokens / source.run.block_size / steps))
    notes: list[str] = []
    found = search.run(options(source.run, search.profile, kept, allow))
    if not found:
        found = search.run(options(source.run, search.profile, frozenset(keep), tuple(LAST_RESORT)))
        if found:
            notes.append("nothing fits with the keys as given; some of them are changed, and marked")
    if found and found[0].run.tokens_per_step != search.tokens:
        notes.append(
            f"tokens per step: {found[0].run.tokens_per_step:,} instead of {search.tokens:,}, the nearest to it"
        )
    if found and (created := found[0].run.created_first) not in ("nothing", source.run.created_first):
        saved = saved_bytes(found[0].run, search.profile.compute_capability)
        notes.append(f"created_first={created}: the allocator holds {format_bytes(saved)} less than in torch's order")
    return found, notes


def smallest_change(as_given: Estimate, levers: Iterable[LeverEffect]) -> LeverEffect | None:
    """Of the single changes that make the run fit, the one that saves least: it gives up least."""
    if as_given.verdict != "does_not_fit":
        return None
    enough = [effect for effect in levers if effect.fits and not effect.changes_numerics]
    sure = [effect for effect in enough if effect.certain]
    return min(sure or enough, key=lambda effect: -effect.delta_bytes, default=None)


def options(run: RunConfig, profile: GpuProfile, kept: Iterable[str], allow: Sequence[str]) -> list[dict[str, object]]:
    """Every combination of what may be chosen; a kept key has its one value."""
    kept = set(kept)
    free = {key: values for key, values in FREE.items() if key not in kept}
    if "compile" in free and (float(profile.compute_capability) < TRITON_CAPABILITY or is_eager_alone(run)):
        free["compile"] = (False,)
    if run.dtype == "bfloat16" and profile.flops.bf16 is None and "dtype" not in kept:
        free["dtype"] = ("float16", "bfloat16")  # what nanoGPT does where there are no units for bf16
    for key, values in allowed(allow).items():
        if key not in kept:
            free[key] = (getattr(run, key), *(value for value in values if value != getattr(run, key)))
    every = [dict(zip(free, values, strict=True)) for values in product(*free.values())]
    if "loss_chunk_size" not in kept:
        chunked = [choice for choice in every if choice.get("loss", run.loss) == "chunked"]
        sizes = [size for size in CHUNK_SIZES if size > run.loss_chunk_size]
        every += [{**choice, "loss_chunk_size": size} for choice in chunked for size in sizes]
    return [choice for choice in every if _is_valid(run, choice)]


def _is_valid(run: RunConfig, choice: Mapping[str, object]) -> bool:
    """Whether weights in bf16 meet activations in bf16, and no average of them is kept (config.py); and whether the
    partitioner, which alone reads a memory budget, has a graph to cut and no checkpoints to keep."""

    def chosen(key: str) -> Any:
        return choice.get(key, getattr(run, key))

    if chosen("activation_memory_budget") < 1 and (
        not chosen("compile") or chosen("activation_checkpointing") != "none" or run.shards > 1
    ):
        return False
    param_dtype, dtype = chosen("param_dtype"), chosen("dtype")
    return param_dtype != "bfloat16" or (dtype == "bfloat16" and not run.ema_decay)


def changes_numerics(run: RunConfig, choice: Mapping[str, object] | None) -> bool:
    """Whether the numbers of training are others under `choice` than in `run`, not only its memory."""
    return any((choice or {}).get(key, getattr(run, key)) != getattr(run, key) for key in LAST_RESORT)


def is_eager_alone(run: RunConfig) -> bool:
    """Whether `run` does what a compiled step cannot (config.py)."""
    return (
        run.activation_offload
        or run.optimizer_in_backward
        or run.recompute_cheap
        or run.activation_checkpointing == "attention"
    )


class Search:
    """Every integer micro-batch of every combination. What fits is found by bisection, as memory grows with it."""

    def __init__(
        self,
        run: RunConfig,
        profile: GpuProfile,
        budget: Budget,
        tokens: int,
        risk: float | None = None,
        finalists: int = FINALISTS,
        combinations: Combinations | None = None,
    ) -> None:
        self.base = run
        self.finalists = finalists
        self.combinations = combinations or Combinations(run, tokens)
        self.profile = profile
        self.tokens = tokens
        self.overhead_bytes = profile.context_bytes + CUBLAS_HANDLES * cublas_workspace_bytes(
            profile.compute_capability
        )
        self.usable_bytes = budget.usable_bytes
        self.reserve_bytes = budget.reserve_bytes
        self.risk = risk
        self.keeps_created = False  # whether created_first is to stay as it is
        self.micro_batch: int | None = None  # the only one to try, where it is to be kept
        self.n_searched = 0

    def run(self, choices: Iterable[Mapping[str, object]]) -> list[Candidate]:
        """Candidates that fit, best first; the finalists have been replayed."""
        return self.replayed(self.ranked([self.combinations.of(keys) for keys in choices]))

    def ranked(self, combinations: Sequence[Combination]) -> Iterator[tuple[Combination, int]]:
        """Each combination with each micro-batch whose live peak fits, best first.

        A combination is looked into when even its fastest, were all of the card used, would be next: mostly never.
        """
        largest = max(1, self.tokens // self.base.block_size // self.base.n_gpus)
        # A gradient that is used up in backward cannot be accumulated: one micro-batch is the step.
        first = largest if self.base.optimizer_in_backward else 1
        if self.micro_batch is not None:
            first = largest = self.micro_batch
        self.n_searched += len(combinations) * (largest - first + 1)
        room_bytes = self.usable_bytes - self.overhead_bytes
        paces = [Pace(combination.work, self.profile) for combination in combinations]
        # Less the worth, the combination, the micro-batch: 0 is all of them.
        heap = [(-BOUND * self.base.n_gpus / pace.least_token_seconds(), n, 0) for n, pace in enumerate(paces)]
        heapify(heap)
        while heap:
            _, number, micro_batch = heappop(heap)
            combination = combinations[number]
            if micro_batch:
                if combination.fits(micro_batch, room_bytes):
                    yield combination, micro_batch
                continue
            if not combination.fits(first, room_bytes):
                continue
            last = min(largest, combination.bracket(room_bytes)[1] - 1)
            if last - first >= MANY:
                last = combination.largest(first, last, room_bytes)
            tried = worth_trying(first, last, largest)
            heap += [(-self.worth(combination, paces[number], batch), number, batch) for batch in tried]
            heapify(heap)

    def worth(self, combination: Combination, pace: Pace, micro_batch: int) -> float:
        """Predicted tokens per second; the farther the tokens of a step are from those asked for, the less."""
        steps = combination.steps(micro_batch)
        tokens = micro_batch * self.base.block_size * steps * self.base.n_gpus
        tokens_per_second = tokens / pace.seconds(micro_batch, steps)
        away = abs(tokens - self.tokens) / self.tokens
        return tokens_per_second * (1.0 - INEXACT - away if away else 1.0)

    def replayed(self, ranked: Iterable[tuple[Combination, int]]) -> list[Candidate]:
        """The first few of the ranking that fit for sure when replayed, or if none does, those that fit within the
        error. A candidate that does not fit moves the limit of its combination down by what is missing."""
        sure: list[Candidate] = []
        unsure: list[Candidate] = []
        limits: dict[Combination, int] = {}
        settled: set[tuple[object, ...]] = set()  # those that fit with a chunk at least as fast
        for combination, micro_batch in ranked:
            but_for_chunk = (micro_batch, *(item for item in combination.keys.items() if item[0] != "loss_chunk_size"))
            if micro_batch > limits.get(combination, micro_batch) or but_for_chunk in settled:
                continue
            run = combination.run(micro_batch)
            full = estimate(run, "gptfit", self.profile, self.reserve_bytes, self.risk, squeeze=False)
            run, full = self.fragmented_least(run, full, is_best=not sure)
            choice = {**combination.keys, **combination.split(micro_batch)}
            if run.created_first != self.base.created_first:
                choice["created_first"] = run.created_first
            candidate = Candidate(choice, run, full)
            missing = full.interval.high_bytes - self.usable_bytes
            if missing <= 0:
                sure.append(candidate)
                settled.add(but_for_chunk)
                if len(sure) >= self.finalists:
                    break
                continue
            if candidate.fits and len(unsure) < self.finalists:
                unsure.append(candidate)
            per_sequence = max(1, full.saved_for_backward_bytes // micro_batch)
            limits[combination] = micro_batch - max(1, missing // per_sequence)
        return sure or unsure

    def fragmented_least(self, run: RunConfig, full: Estimate, is_best: bool) -> tuple[RunConfig, Estimate]:
        """The run that creates states and gradients when it fragments least, where that is of use: it is the best one,
        or would fit with what is reserved and not handed out."""
        missing = full.interval.high_bytes - self.usable_bytes
        rescued = 0 < missing <= full.reserved_bytes - full.allocated_bytes
        if self.keeps_created or not is_fragmented(full) or not (rescued or (is_best and missing <= 0)):
            return run, full
        best = created_least(run, cublas_workspace_bytes(self.profile.compute_capability))
        if best == run:
            return run, full
        return best, estimate(best, "gptfit", self.profile, self.reserve_bytes, self.risk, squeeze=False)


def worth_trying(first: int, last: int, sequences: int) -> Iterable[int]:
    """Every micro-batch from `first` to `last`; of more than can be looked at (a small model on a large card), beyond
    MANY the largest alone, and for each number of micro-batches the one that comes nearest to `sequences` of a step."""
    if last - first < MANY:
        return range(first, last + 1)
    nearest_ones = {round(sequences / steps) for steps in range(1, sequences // (first + MANY) + 2)}
    return (*range(first, first + MANY), *sorted(m for m in nearest_ones if first + MANY <= m < last), last)
