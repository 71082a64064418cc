"""What a run needs: four figures at the worst instant, and what they consist of."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache

from gptfit.config import RunConfig, derive, make_run
from gptfit.errors import GptfitError
from gptfit.gpus import GpuProfile
from gptfit.interval import Interval, process_interval
from gptfit.memory import compiled, sharding
from gptfit.memory.allocator import OutOfMemory
from gptfit.memory.overhead import CUBLAS_HANDLES, UNKNOWN_CARD_CONTEXT_BYTES, cublas_workspace_bytes
from gptfit.memory.reserve import Reserved, replay_run
from gptfit.memory.step import PROGRAMS, Pieces, bare, pieces, representative, steady_step
from gptfit.memory.tape import Peak, Tape
from gptfit.memory.whole_run import evaluation_bytes, run_phases
from gptfit.speed import Speed, predict
from gptfit.units import counted, format_bytes


@dataclass(frozen=True, slots=True)
class TensorRow:
    """One row of the live set at the peak: `count` buffers of this shape, `n_bytes` together."""

    name: str
    category: str
    shape: tuple[int, ...]
    dtype: str
    count: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Budget:
    """What a card offers to one process. usable = total - reserve, the CUDA context still to come out of it."""

    name: str
    total_bytes: int
    reserve_bytes: int

    @property
    def usable_bytes(self) -> int:
        return self.total_bytes - self.reserve_bytes

    def to_json(self) -> dict[str, object]:
        return {
            "name": self.name,
            "total_bytes": self.total_bytes,
            "reserve_bytes": self.reserve_bytes,
            "usable_bytes": self.usable_bytes,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a step needs, estimated or traced. Totals are derived from `tensors`, never stored beside them."""

    budget: Budget | None
    n_params: int
    live_bytes: int
    reserved_bytes: int
    process_bytes: int
    interval: Interval
    retries: int = 0
    fits_squeezed: bool = False
    phase: str
    op: str
    tensors: tuple[TensorRow, ...]
    saved_for_backward_bytes: int
    phases: tuple[tuple[str, int], ...]
    assumptions: tuple[str, ...]

    @property
    def allocated_bytes(self) -> int:
        return sum(row.n_bytes for row in self.tensors)

    @property
    def margin_bytes(self) -> int | None:
        """What is left of the usable memory; negative is what is missing."""
        return None if self.budget is None else self.budget.usable_bytes - self.process_bytes

    @property
    def verdict(self) -> str | None:
        margin = self.margin_bytes
        return None if margin is None else "fits" if margin >= 0 else "does_not_fit"

    @property
    def certain(self) -> bool | None:
        """Whether the verdict is the same at both ends of the interval; None without a card."""
        if self.budget is None:
            return None
        usable_bytes = self.budget.usable_bytes
        return self.fits_squeezed or not self.interval.low_bytes <= usable_bytes < self.interval.high_bytes

    def breakdown(self) -> list[tuple[str, int]]:
        """Bytes by category at the peak, largest first; sums to `allocated_bytes`."""
        totals: dict[str, int] = {}
        for row in self.tensors:
            totals[row.category] = totals.get(row.category, 0) + row.n_bytes
        return sorted(totals.items(), key=lambda item: -item[1])

    def memory_json(self) -> dict[str, object]:
        """The keys that an estimate and a trace have in common."""
        return {
            "verdict": self.verdict,
            "margin_bytes": self.margin_bytes,
            "certain": self.certain,
            "interval": self.interval.to_json(),
            "retries": self.retries,
            "gpu": self.budget.to_json() if self.budget else None,
            "n_params": self.n_params,
            "peak": {
                "live_bytes": self.live_bytes,
                "allocated_bytes": self.allocated_bytes,
                "reserved_bytes": self.reserved_bytes,
                "process_bytes": self.process_bytes,
                "instant": {"phase": self.phase, "op": self.op},
            },
            "breakdown": [{"category": name, "bytes": n_bytes} for name, n_bytes in self.breakdown()],
            "tensors": [
                {
                    "name": row.name,
                    "category": row.category,
                    "shape": list(row.shape),
                    "dtype": row.dtype,
                    "count": row.count,
                    "bytes": row.n_bytes,
                }
                for row in self.tensors
            ],
            "saved_for_backward_bytes": self.saved_for_backward_bytes,
            "phases": [{"name": name, "peak_live_bytes": n_bytes} for name, n_bytes in self.phases],
            "assumptions": list(self.assumptions),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate(Needs):
    """The answer for one run under one program."""

    program: str
    config: Mapping[str, object]
    flops_per_token: int
    tokens_per_step: int
    eval_allocated_bytes: int
    run_phases: tuple[tuple[str, int], ...]
    speed: Speed | None

    def reserved_otherwise(self) -> int:
        """Bytes that the allocator would hold with the other setting of expandable segments, were there no limit."""
        run = make_run(self.config)
        workspace_bytes = next(row.n_bytes for row in self.tensors if row.category == "workspace") // CUBLAS_HANDLES
        other = derive(run, expandable_segments=not run.expandable_segments)
        return replay(other, self.program, workspace_bytes).reserved_bytes

    def to_json(self) -> dict[str, object]:
        """The object that `gptfit estimate --json` prints."""
        return {
            "schema": "gptfit.estimate/1",
            "program": self.program,
            **self.memory_json(),
            "config": dict(self.config),
            "flops_per_token": self.flops_per_token,
            "tokens_per_step": self.tokens_per_step,
            "reserved_with_other_segments_bytes": self.reserved_otherwise(),
            "eval": {"allocated_bytes": self.eval_allocated_bytes},
            "run": [{"name": name, "peak_live_bytes": n_bytes} for name, n_bytes in self.run_phases],
            "speed": None if self.speed is None else speed_json(self.speed),
        }


def speed_json(speed: Speed) -> dict[str, object]:
    return {
        "tokens_per_second": speed.tokens_per_second,
        "seconds_per_step": speed.seconds_per_step,
        "mfu": speed.mfu,
        "low": speed.low,
        "high": speed.high,
        "source": speed.source,
    }


def estimate(
    run: RunConfig,
    program: str = "gptfit",
    profile: GpuProfile | None = None,
    reserve_bytes: int = 0,
    risk: float | None = None,
    squeeze: bool = True,
) -> Estimate:
    """The memory of exactly that run under that program, and whether it fits `profile` beside `reserve_bytes`.

    `risk` is the chance that it needs more than its interval says. With `squeeze`, what does not fit as it comes is
    replayed within what the card has: the allocator gives back what it caches before it gives up.

    Raises GptfitError for an unknown program or what it cannot do, and for a risk that is none.
    """
    run = under_program(run, program)
    workspace_bytes = cublas_workspace_bytes(profile.compute_capability if profile else None)
    replayed = replay(run, program, workspace_bytes)
    live = live_figures(run, program)
    rows = all_rows(live.rows, replayed.allocated_bytes, live.peak.live_bytes, workspace_bytes)
    context_bytes = profile.context_bytes if profile else UNKNOWN_CARD_CONTEXT_BYTES
    budget = Budget(profile.name, profile.total_bytes, reserve_bytes) if profile else None
    other_bytes = None if run.expandable_segments else replay(run, program, workspace_bytes, True).reserved_bytes
    interval = process_interval(run.compile, replayed.reserved_bytes, profile, risk, other_bytes)
    fits_squeezed = False
    if budget is not None and squeeze:
        room_bytes = budget.usable_bytes - context_bytes
        spare_bytes = interval.high_bytes - replayed.reserved_bytes - context_bytes
        squeezed, fits_squeezed = squeeze_in(run, program, workspace_bytes, replayed, room_bytes, spare_bytes)
        if squeezed is not replayed:
            replayed, interval = squeezed, process_interval(run.compile, squeezed.reserved_bytes, profile, risk)
    return Estimate(
        program=program,
        config=run.model_dump(),
        budget=budget,
        n_params=live.n_params,
        flops_per_token=live.flops_per_token,
        tokens_per_step=run.tokens_per_step,
        live_bytes=live.peak.live_bytes,
        reserved_bytes=replayed.reserved_bytes,
        process_bytes=replayed.reserved_bytes + context_bytes,
        interval=interval,
        retries=replayed.retries,
        fits_squeezed=fits_squeezed,
        phase=live.peak.phase,
        op=live.peak.op,
        tensors=rows,
        saved_for_backward_bytes=live.saved_bytes,
        phases=live.phases,
        eval_allocated_bytes=live.evaluation_bytes + CUBLAS_HANDLES * workspace_bytes,
        run_phases=live.run_phases,
        speed=predict(run, profile, live.flops_per_token, program) if profile else None,
        assumptions=(
            *assumptions(run, program, profile, reserve_bytes, replayed.retries),
            *compiled.assumptions(run, program),
            *sharding.assumptions(run),
        ),
    )


@dataclass(frozen=True, slots=True)
class Live:
    """What a run's tape says before any allocator, on every card."""

    n_params: int
    flops_per_token: int
    saved_bytes: int
    peak: Peak
    rows: tuple[TensorRow, ...]
    phases: tuple[tuple[str, int], ...]
    evaluation_bytes: int
    run_phases: tuple[tuple[str, int], ...]


def live_figures(run: RunConfig, program: str) -> Live:
    """Read off the pieces that `replay` plays: ask for both one after the other, and they are written once."""
    return _live_figures(representative(run), program)  # pyright: ignore[reportArgumentType]


@lru_cache(maxsize=256)
def _live_figures(run: RunConfig, program: str) -> Live:
    parts = bare(kernel_pieces(run, program))  # pyright: ignore[reportArgumentType]
    steady = steady_step(run, parts)
    return Live(
        n_params=parts.n_params,
        flops_per_token=parts.flops_per_token,
        saved_bytes=parts.saved_bytes,
        peak=steady.peak(),
        rows=rows_at_peak(steady),
        phases=tuple((name, n_bytes) for name, n_bytes in steady.phases().items() if name != "setup"),
        evaluation_bytes=evaluation_bytes(parts),
        run_phases=run_phases(run, program, parts),
    )


def replay(run: RunConfig, program: str, workspace_bytes: int, other_start: bool = False) -> Reserved:
    """What the allocator holds: the same on all cards with such workspaces, and most of the time that many take.
    The other start is with a first evaluation where the program has none, and without where it has one."""
    return _replay(representative(run), program, workspace_bytes, other_start)  # pyright: ignore[reportArgumentType]  frozen models have a hash


@lru_cache(maxsize=256)
def _replay(run: RunConfig, program: str, workspace_bytes: int, other_start: bool) -> Reserved:
    parts = kernel_pieces(run, program)  # pyright: ignore[reportArgumentType]
    if other_start:
        parts = replace(parts, evaluates_first=not parts.evaluates_first)
    return replay_run(run, parts, workspace_bytes)


@lru_cache(maxsize=2)
def kernel_pieces(run: RunConfig, program: str) -> Pieces:
    return pieces(run, program, kernels=True)


def squeeze_in(
    run: RunConfig, program: str, workspace_bytes: int, free: Reserved, room_bytes: int, spare_bytes: int
) -> tuple[Reserved, bool]:
    """What the allocator holds where there are `room_bytes`, and whether `spare_bytes` less would do, too.

    `free` is what it holds where nothing limits it, and the answer where a limit changes nothing or is too tight.
    """
    if free.reserved_bytes + spare_bytes <= room_bytes or free.allocated_bytes > room_bytes:
        return free, False
    parts = kernel_pieces(representative(run), program)  # pyright: ignore[reportArgumentType]
    for capacity_bytes, is_sure in ((room_bytes - spare_bytes, True), (room_bytes, False)):
        with suppress(OutOfMemory):
            held = replay_run(run, parts, workspace_bytes, capacity_bytes=capacity_bytes)
            return (held if free.reserved_bytes > room_bytes else free), is_sure
    return free, False


def live_rows(steady: Tape, allocated_bytes: int, live_bytes: int, workspace_bytes: int) -> tuple[TensorRow, ...]:
    """The live set at the peak, workspaces and slack, largest first: the rows add up to `allocated_bytes`."""
    return all_rows(rows_at_peak(steady), allocated_bytes, live_bytes, workspace_bytes)


def rows_at_peak(tape: Tape) -> tuple[TensorRow, ...]:
    live = tape.live_at_peak().items()
    return tuple(TensorRow(b.name, b.category, b.shape, b.dtype, count, b.n_bytes * count) for b, count in live)


def all_rows(
    live: Iterable[TensorRow], allocated_bytes: int, live_bytes: int, workspace_bytes: int
) -> tuple[TensorRow, ...]:
    workspaces = CUBLAS_HANDLES * workspace_bytes
    handles = TensorRow("cuBLAS workspaces", "workspace", (workspace_bytes,), "uint8", CUBLAS_HANDLES, workspaces)
    rows = [*live, handles]
    slack = allocated_bytes - live_bytes - workspaces
    if slack > 0:
        rows.append(TensorRow("kernel scratch and slack of large blocks", "slack", (slack,), "uint8", 1, slack))
    return tuple(sorted(rows, key=lambda row: -row.n_bytes))


NANOGPT_ONLY: dict[str, object] = {
    "norm": "layernorm",
    "mlp": "gelu",
    "position": "learned",
    "tie_embeddings": True,
    "qk_norm": False,
    "logit_softcap": 0.0,
    "loss": "full",
    "activation_checkpointing": "none",
    "activation_offload": False,
    "recompute_cheap": False,
    "attention": "flash",
    "param_dtype": "float32",
    "optimizer": "adamw",
    "created_first": "nothing",
    "ema_decay": 0.0,
}


def under_program(run: RunConfig, program: str) -> RunConfig:
    """`run` as that program's code can run it: what nanoGPT cannot choose is what it does.

    Raises GptfitError where `program` is unknown, or a key that was set asks for what its code has not.
    """
    if program not in PROGRAMS:
        raise GptfitError(f'unknown program "{program}"', f"programs are {', '.join(PROGRAMS)}")
    if program != "nanogpt":
        return run
    only = {**NANOGPT_ONLY, "n_kv_head": run.n_head, "n_hidden": 4 * run.n_embd}
    if "expandable_segments" not in run.model_fields_set:
        only["expandable_segments"] = False  # its train.py leaves the allocator as it is
    for key, value in only.items():
        if getattr(run, key) != value and key in run.model_fields_set:
            message = f"nanoGPT's code has no {key}={getattr(run, key)}, only {key}={value}"
            raise GptfitError(message, "use --program gptfit for it")
    return derive(run, **{key: value for key, value in only.items() if getattr(run, key) != value})


def assumptions(
    run: RunConfig, program: str, profile: GpuProfile | None, reserve_bytes: int, retries: int
) -> tuple[str, ...]:
    """What the figures rest on, in words a reader can object to."""
    lines = [
        "the peak is that of a steady step, the second one on: optimizer state exists"
        + (", all gradients are alive during the last micro-steps" if run.micro_steps > 1 else ""),
        "reserved is a replay of "
        + ("an evaluation, " if program == "nanogpt" and run.eval_interval else "")
        + f"steps{' and an evaluation' if run.eval_interval else ''} through the caching allocator, expandable "
        f"segments {'on' if run.expandable_segments else 'off'}",
    ]
    if retries:
        times = counted(retries, "time")
        lines.append(f"it fits as the allocator gives back what it caches, {times} in these steps: that is slow")
    if profile is None:
        lines.append(
            f"context and libraries outside the allocator: {format_bytes(UNKNOWN_CARD_CONTEXT_BYTES)}, no card named"
        )
    else:
        context = f"{format_bytes(profile.context_bytes)} {profile.context_source}"
        lines.append(f"context and libraries outside the allocator: {context}")
        lines.append(f"others on the card hold {format_bytes(reserve_bytes)}")
    return tuple(lines)
