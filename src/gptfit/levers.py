"""Single changes to a run and what each would do, by estimating again; the folk advice among them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from gptfit.config import RunConfig, derive
from gptfit.errors import GptfitError
from gptfit.estimate import Estimate, estimate, live_figures, replay, under_program
from gptfit.gpus import GpuProfile
from gptfit.memory.overhead import CUBLAS_HANDLES, cublas_workspace_bytes
from gptfit.memory.step import steady_peak
from gptfit.speed import Speed, predict

CLEAR = 0.35  # of the live peak: more than any recorded fragmentation of a training step adds


@dataclass(frozen=True, slots=True)
class Lever:
    """A change of keys, or of whose code runs (`program`). `numerics`: the numbers of training change by more
    than rounding. `why` says what it does to memory, or that it does nothing."""

    change: Mapping[str, object]
    why: str
    numerics: bool = False
    program: str | None = None


@dataclass(frozen=True, slots=True)
class LeverEffect:
    """What a change does to the run as given: to the live bytes at its peak and to the bytes of the process, which the
    verdict is about; to the time for the same tokens; and the verdict, which is `certain` where both ends of the
    estimate's interval agree on it."""

    change: Mapping[str, object]
    delta_bytes: int
    process_delta_bytes: int
    delta_seconds_pct: float | None
    fits: bool
    certain: bool
    changes_numerics: bool
    why: str

    def to_json(self) -> dict[str, object]:
        return {
            "change": dict(self.change),
            "delta_bytes": self.delta_bytes,
            "process_delta_bytes": self.process_delta_bytes,
            "delta_seconds_pct": self.delta_seconds_pct,
            "fits": self.fits,
            "certain": self.certain,
            "changes_numerics": self.changes_numerics,
            "why": self.why,
        }


LEVERS: dict[str, Lever] = {
    "gptfit": Lever(
        {"program": "gptfit"},
        "the gptfit trainer: logits in chunks, never all of them, none returned",
        program="gptfit",
    ),
    "chunked": Lever({"loss": "chunked"}, "the loss in chunks of tokens: no tensor of batch × block × vocabulary"),
    "compile": Lever({"compile": True}, "fuses the loss and norms: no fp32 copies of the logits, fewer activations"),
    "no-compile": Lever(
        {"compile": False}, "eager keeps fp32 copies of the logits and more activations: it costs memory"
    ),
    "checkpointing": Lever(
        {"activation_checkpointing": "block"},
        "keeps the input of each block alone and computes the block again in backward",
    ),
    "budget": Lever(
        {"activation_memory_budget": 0.9},
        "keeps what matmuls and attention give; norms and activations are made again inside backward's kernels",
    ),
    "remake": Lever(
        {"recompute_cheap": True},
        "norms' outputs, activations and weight copies are made again in backward instead of kept",
    ),
    "attention": Lever(
        {"activation_checkpointing": "attention"},
        "keeps the input of each attention alone and computes the attention again in backward",
    ),
    "offload": Lever(
        {"activation_offload": True},
        "what is kept for backward waits in host memory: it costs the time of two transfers over PCIe",
    ),
    "in-backward": Lever(
        {"optimizer_in_backward": True},
        "each parameter is stepped as soon as its gradient is there: no two gradients need be alive together",
    ),
    "float16": Lever({"dtype": "float16"}, "2 bytes an element, as bfloat16: it saves nothing against it"),
    "bfloat16": Lever({"dtype": "bfloat16"}, "2 bytes an element, as float16; against float32 activations halve"),
    "fused": Lever({"optimizer_impl": "fused"}, "the optimizer's step needs no list as large as the parameters"),
    "foreach": Lever({"optimizer_impl": "foreach"}, "its step makes a list as large as the parameters, after the peak"),
    "expandable": Lever(
        {"expandable_segments": True},
        "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True: less reserved but unused; tensors stay the same",
    ),
    "adamw16bit": Lever(
        {"optimizer": "adamw16bit"}, "optimizer state of 4 bytes a parameter instead of 8", numerics=True
    ),
    "adamw8bit": Lever(
        {"optimizer": "adamw8bit"}, "optimizer state of 2 bytes a parameter instead of 8", numerics=True
    ),
    "bf16-params": Lever({"param_dtype": "bfloat16"}, "parameters, gradients and state in 2 bytes", numerics=True),
}


def applicable(lever: Lever, run: RunConfig, program: str) -> bool:
    """Whether the change is one, and the program's code has it."""
    if lever.program is not None:
        return lever.program != program
    if program == "nanogpt" and not set(lever.change) <= {"compile", "dtype", "optimizer_impl", "expandable_segments"}:
        return False
    return any(getattr(run, key) != value for key, value in lever.change.items())


def effects(
    given: Estimate, run: RunConfig, program: str, profile: GpuProfile, reserve_bytes: int
) -> list[LeverEffect]:
    """Each lever's effect on `run`, what saves most first; those that do not help come last, with their figure."""
    found = [effect_of(lever, given, run, program, profile, reserve_bytes) for lever in candidates(run, program)]
    found += micro_batch_effects(given, run, program, profile, reserve_bytes)
    found.append(
        LeverEffect({"empty_cache": True}, 0, 0, None, given.verdict == "fits", bool(given.certain), False, EMPTY_CACHE)
    )
    known = (effect for effect in found if effect is not None)
    return sorted(known, key=lambda effect: (effect.process_delta_bytes, effect.delta_bytes))


EMPTY_CACHE = "torch.cuda.empty_cache() returns only what is unused; the allocator does so itself before it gives up"


def candidates(run: RunConfig, program: str) -> Iterator[Lever]:
    for lever in LEVERS.values():
        if applicable(lever, run, program):
            yield lever
    yield Lever(
        {"gradient_accumulation_steps": 2 * run.gradient_accumulation_steps},
        "more accumulation of the same micro-batch: the peak is that of one micro-batch"
        + ("" if run.micro_steps > 1 else ", and one set of gradients is alive through it"),
        numerics=True,
    )


def effect_of(
    lever: Lever, given: Estimate, run: RunConfig, program: str, profile: GpuProfile, reserve_bytes: int
) -> LeverEffect | None:
    """None where the changed run cannot be estimated."""
    change = dict(lever.change)
    if run.activation_memory_budget < 1 and (
        change.get("compile") is False or change.get("activation_checkpointing", "none") != "none"
    ):
        change["activation_memory_budget"] = 1.0  # which neither goes with (config.py)
    changes = {key: value for key, value in change.items() if key != "program"}
    if lever.program == "gptfit":
        changes = {"loss": "chunked"}
    program = lever.program or program
    try:
        after = under_program(derive(run, **changes), program)
        live = live_figures(after, program)
        live_bytes = live.peak.live_bytes
        fits, certain = fits_surely(live_bytes, profile, reserve_bytes), True
        if fits is None:
            full = estimate(after, program, profile, reserve_bytes, given.interval.risk)
            fits, certain, process_bytes = full.verdict == "fits", bool(full.certain), full.process_bytes
        else:
            process_bytes = process_bytes_of(after, program, profile)
    except GptfitError:
        return None
    speed = predict(after, profile, live.flops_per_token, program)
    return LeverEffect(
        change,
        live_bytes - given.live_bytes,
        process_bytes - given.process_bytes,
        slower(given, speed),
        fits,
        certain,
        lever.numerics,
        lever.why,
    )


def process_bytes_of(run: RunConfig, program: str, profile: GpuProfile) -> int:
    """What the process holds where nothing limits it; an estimate's figure, without the rest of the estimate."""
    workspace_bytes = cublas_workspace_bytes(profile.compute_capability)
    return replay(run, program, workspace_bytes).reserved_bytes + profile.context_bytes  # pyright: ignore[reportArgumentType]  frozen models have a hash


def fits_surely(live_bytes: int, profile: GpuProfile, reserve_bytes: int) -> bool | None:
    """The verdict where the live peak alone decides it; None where the allocator has to be replayed."""
    workspaces = CUBLAS_HANDLES * cublas_workspace_bytes(profile.compute_capability)
    floor = live_bytes + workspaces + profile.context_bytes
    usable = profile.total_bytes - reserve_bytes
    if floor > usable:
        return False
    return True if floor + live_bytes * CLEAR <= usable else None


def slower(given: Estimate, speed: Speed) -> float | None:
    """Percent more time for the same tokens."""
    if given.speed is None:
        return None
    return round(100 * (given.speed.tokens_per_second / speed.tokens_per_second - 1), 1)


def micro_batch_effects(
    given: Estimate, run: RunConfig, program: str, profile: GpuProfile, reserve_bytes: int
) -> list[LeverEffect]:
    """The largest micro-batch that fits as the code stands, with accumulation to match."""
    if given.verdict != "does_not_fit" or run.batch_size == 1:
        return []
    low, high, best = 0, run.batch_size - 1, None
    while low < high:
        middle = (low + high + 1) // 2
        smaller = with_micro_batch(run, middle)
        live_bytes, _ = steady_peak(smaller, program)
        after = None
        if fits_surely(live_bytes, profile, reserve_bytes) is not False:
            after = estimate(smaller, program, profile, reserve_bytes, given.interval.risk)
        if after is not None and after.verdict == "fits" and after.certain:
            low, best = middle, after
        else:
            high = middle - 1
    if best is None:
        return []
    smaller = with_micro_batch(run, low)
    change = {"batch_size": low, "gradient_accumulation_steps": smaller.gradient_accumulation_steps}
    why = f"the largest micro-batch that fits; it need not be a power of two; {step_text(run, smaller)}"
    deltas = best.live_bytes - given.live_bytes, best.process_bytes - given.process_bytes
    pct = slower(given, best.speed) if best.speed else None
    return [LeverEffect(change, *deltas, pct, True, True, False, why)]


def with_micro_batch(run: RunConfig, batch_size: int) -> RunConfig:
    """`run` with another micro-batch and the accumulation that keeps its tokens a step, as nearly as can be."""
    per_step = run.batch_size * run.gradient_accumulation_steps
    steps = max(1, round(per_step / (batch_size * run.n_gpus))) * run.n_gpus
    return derive(run, batch_size=batch_size, gradient_accumulation_steps=steps)


def step_text(before: RunConfig, after: RunConfig) -> str:
    """Whether a step has as many tokens as it had: a micro-batch that does not divide its sequences changes them."""
    if after.tokens_per_step == before.tokens_per_step:
        return "the tokens of a step stay the same"
    return f"{after.tokens_per_step:,} tokens a step for {before.tokens_per_step:,}"
