"""What would be tried next and does not help here, each with its computed effect."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from gptfit.levers import with_micro_batch
from gptfit.oom.case import Case
from gptfit.oom.remedies import ON_FULL_CARD, NotRemedy, Remedy
from gptfit.units import format_bytes

MiB = 1 << 20
EMPTY_CACHE = "returns only what is unused, and the allocator has done that itself before it gave up"


NOT_THE_CARD = {
    "host_ram": "the computer's memory ran out; this frees the card's",
    "host_killed": "the computer's memory ran out; this frees the card's",
    "shm": "/dev/shm ran out; this frees the card's memory",
    "triton_shared_memory": "a multiprocessor's own memory is too small for the kernel; this frees the card's",
}
WATERMARK = "lifts the limit that keeps the system itself alive: macOS may freeze instead"


def folk_advice(
    kind: str, case: Case | None, within: tuple[str, ...], remedies: Sequence[Remedy]
) -> Iterator[NotRemedy]:
    """Advice with its effect on the run: at the peak of a step, or on what the process reserves. `case` is None where
    the run is not known."""
    if kind in NOT_THE_CARD:
        yield from (NotRemedy(change, NOT_THE_CARD[kind]) for change in ("torch.cuda.empty_cache()", "float16"))
        return
    if kind == "mps":
        yield NotRemedy("PYTORCH_MPS_HIGH_WATERMARK_RATIO=0.0", WATERMARK)
    if case is None:
        yield NotRemedy("float16 instead of bfloat16", "both take 2 bytes an element: nothing is saved")
        device = kind if kind in ("mps", "xpu") else "cuda"
        if kind not in ON_FULL_CARD:  # there it gives the driver something back
            yield NotRemedy(f"torch.{device}.empty_cache()", EMPTY_CACHE)
        return
    if case.run.dtype != "float32" and case.run.param_dtype == "float32":
        other = "float16" if case.run.dtype == "bfloat16" else "bfloat16"
        delta = _delta(case, case.changed(dtype=other))
        if delta is not None and delta > -MiB:
            why = f"both take 2 bytes an element: it {_effect(delta)}"
            yield NotRemedy(f"dtype={other} instead of {case.run.dtype}", why)
    if case.run.compile:
        eager = case.changed(compile=False)
        delta = None if eager is None else eager.reserved_bytes - case.reserved_bytes
        if delta is not None and delta > -MiB:
            why = f"eager keeps float32 copies and more activations: the whole run {_effect(delta)}"
            yield NotRemedy("compile=False", why)
    if kind not in ON_FULL_CARD:
        yield NotRemedy("torch.cuda.empty_cache()", EMPTY_CACHE)
    yield from _power_of_two(case, within, remedies)
    if case.run.micro_steps > 2:
        fewer = case.changed(gradient_accumulation_steps=2 * case.run.n_gpus)
        delta = _delta(case, fewer) or 0
        why = f"the peak is that of one micro-batch, however many there are: it {_effect(delta)}"
        yield NotRemedy("fewer gradient_accumulation_steps", why)


def _delta(case: Case, after: Case | None) -> int | None:
    """Of the live peak of a steady step."""
    return None if after is None else max(after.phases.values()) - max(case.phases.values())


def _effect(delta: int) -> str:
    if abs(delta) < MiB:
        return "saves nothing"
    return f"costs {format_bytes(delta)} more" if delta > 0 else f"saves {format_bytes(-delta)} only"


def _power_of_two(case: Case, within: tuple[str, ...], remedies: Sequence[Remedy]) -> Iterator[NotRemedy]:
    """Where a micro-batch that is no power of two fits, rounding it down gives memory away."""
    best = next((remedy.micro_batch for remedy in remedies if remedy.enough and remedy.micro_batch), 0)
    lower = 1 << max(0, best.bit_length() - 1)
    if best and lower != best:
        sizes = [replace(case, run=with_micro_batch(case.run, size)).need(within) for size in (best, lower)]
        idle = format_bytes(sizes[0] - sizes[1])
        yield NotRemedy(f"a power of two, batch_size={lower}", f"{best} fits as well; {idle} would lie idle")
