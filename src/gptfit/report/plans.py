"""A plan at the terminal: the best run that fits, what it changes, and what each single change would do."""

import shlex
from collections.abc import Iterator, Mapping, Sequence

from rich.console import RenderableType
from rich.text import Text

from gptfit.asked import Asked
from gptfit.config import derive, make_run
from gptfit.door import ConfigSource
from gptfit.estimate import Estimate
from gptfit.levers import LeverEffect, step_text
from gptfit.plan import LAST_RESORT, Plan, changes_numerics
from gptfit.report.terminal import (
    QUIET,
    Narrowing,
    commands,
    hanging,
    headline,
    margin_text,
    memory_rows,
    peak_title,
    peak_view,
    run_text,
    speed_text,
    title,
)
from gptfit.units import format_bytes, format_mib

MAX_CANDIDATES = 3

# Keys that are too long for a line of several.
SHORT = {
    "gradient_accumulation_steps": "accumulation",
    "activation_checkpointing": "checkpointing",
    "activation_memory_budget": "memory budget",
    "loss_chunk_size": "chunk",
}

# What nanoGPT's train.py takes on its command line, of what a lever changes.
NANOGPT_KEYS = {"batch_size", "gradient_accumulation_steps", "compile", "dtype", "block_size", "expandable_segments"}


def plan_view(plan: Plan, verbose: bool = False) -> Iterator[RenderableType]:
    """The best run that fits, what it changes, the runners-up, and what each single change would do."""
    best, given = plan.estimate, plan.as_given
    if best is None:
        yield headline("does_not_fit", f"no run of this model fits {plan.budget.name}")
    else:
        yield headline("fits", margin_text(best), best.certain)
        yield Text(run_text(best))
        if best.speed is not None:
            yield Text(f"{speed_text(best.speed)}.")
    if given is not None:
        yield from given_view(given, best)
    shown = best or given
    if shown is not None:
        yield peak_title(shown, " of the choice" if best else "")
        yield memory_rows(shown)
    yield from candidates_view(plan)
    yield from levers_view(plan.levers, verbose)
    yield from (Text(f"note: {note}", style=QUIET) for note in plan.notes)


def given_view(given: Estimate, best: Estimate | None) -> Iterator[RenderableType]:
    """Whether the run fits as it is, why not, and which keys the choice changes."""
    fits = given.verdict == "fits"
    words = "fits" if fits else "does not fit"
    yield Text(f"\nAs given, under {given.program}'s code, it {words}: {margin_text(given, of_card=False)}.")
    if not fits:
        yield from peak_view(given) if best else ()
    if best is not None:
        changes = ", ".join(changed(given, best))
        yield Text(f"Changed: {changes}." if changes else "The run as given is the choice.")
        if changes_numerics(make_run(given.config), best.config):
            yield Text("  * changes the numbers of training, not only its memory", style=QUIET)


def changed(given: Estimate, best: Estimate) -> Iterator[str]:
    """Keys in which the choice differs from the run as given; evaluation follows the micro-batch."""
    if given.program != best.program:
        yield f"code {given.program} → {best.program}"
    for key, value in best.config.items():
        before = given.config.get(key)
        # Evaluation takes the micro-batch of training, unless it is given its own.
        follows = key == "eval_batch_size" and before == given.config["batch_size"]
        if value != before and not follows:
            yield f"{SHORT.get(key, key)} {before} → {value}" + (" *" if key in LAST_RESORT else "")


def candidates_view(plan: Plan) -> Iterator[RenderableType]:
    """The best choices beside one another; keys in which they agree are left out."""
    shown = plan.candidates[:MAX_CANDIDATES]
    if len(shown) < 2:
        return
    chosen = dict.fromkeys(key for candidate in shown for key in candidate.choice)
    keys = [key for key in chosen if len({getattr(candidate.run, key) for candidate in shown}) > 1]
    # Those of other tokens a step rank lower, however fast.
    differ = ["tokens a step"] if len({candidate.estimate.tokens_per_step for candidate in shown}) > 1 else []
    rows = [
        (
            *(f"{getattr(candidate.run, key)}" for key in keys),
            format_bytes(candidate.estimate.reserved_bytes),
            *(f"{candidate.estimate.tokens_per_step:,}" for _ in differ),
            f"{candidate.estimate.speed.tokens_per_second:,.0f}" if candidate.estimate.speed else "",
        )
        for candidate in shown
    ]
    yield title(f"The best of {plan.n_searched:,} that were searched")
    names = [SHORT.get(key, key) for key in keys]
    follows = [name for name in names if name == SHORT["gradient_accumulation_steps"]]  # from the micro-batch
    others = [name for name in reversed(names) if name != "batch_size" and name not in follows]
    yield Narrowing((*names, "reserved", *differ, "tokens/s"), rows, spare=(*follows, *differ, *others))


def levers_view(levers: Sequence[LeverEffect], verbose: bool) -> Iterator[RenderableType]:
    """What each single change would do to the run as given; those that save nothing and change no tensor share one."""
    if not levers:
        return
    yield title("Single changes to the run as given, each estimated again; MiB of the process")
    idle = [lever for lever in levers if is_idle(lever) and not verbose]
    rows = [
        (
            lever_text(lever),
            delta_text(lever.process_delta_bytes),
            "" if lever.delta_seconds_pct is None else f"{lever.delta_seconds_pct:+.0f} %".replace("-0", "+0"),
            "fits" if lever.fits else "does not fit",
        )
        for lever in levers
        if lever not in idle
    ]
    if rows:
        yield Narrowing(("change", "process", "time", " "), rows, spare=("time",), right=("process", "time"))
    if idle:
        yield hanging(f"no memory is saved by {', '.join(change_text(lever.change) for lever in idle)}")
    if any(lever.changes_numerics for lever in levers if lever not in idle):
        yield Text("  * changes the numbers of training, not only its memory", style=QUIET)
    if verbose:
        yield from (hanging(f"{change_text(lever.change)}: {lever.why}") for lever in levers)


def is_idle(lever: LeverEffect) -> bool:
    """Whether it saves nothing, and costs at most fragmentation."""
    process, live = (delta_text(n_bytes) for n_bytes in (lever.process_delta_bytes, lever.delta_bytes))
    return process == "0" or (live == "0" and lever.process_delta_bytes > 0)


def lever_text(lever: LeverEffect) -> str:
    return change_text(lever.change) + (" *" if lever.changes_numerics else "")


def delta_text(delta_bytes: int) -> str:
    """A signed difference in MiB; one that the column cannot show is a plain 0."""
    text = format_mib(delta_bytes)
    return "0" if text.strip("-") == "0.0" else f"+{text}" if delta_bytes > 0 else text


def change_text(change: Mapping[str, object]) -> str:
    return " ".join(f"{key}={value}" for key, value in change.items())


def after_plan(plan: Plan, source: ConfigSource, asked: Asked, saved: str | None) -> Iterator[RenderableType]:
    """Commands that use the plan: `source` is what was planned, `asked` how it was typed, `saved` where it went."""
    yield from commands(next_lines(plan, source, asked, saved))


def next_lines(plan: Plan, source: ConfigSource, asked: Asked, saved: str | None) -> Iterator[str]:
    change = plan.smallest_change
    if source.program == "nanogpt" and change is not None and set(change.change) <= NANOGPT_KEYS:
        after = derive(source.run, **change.change)
        same = after.tokens_per_step == source.run.tokens_per_step
        yield "# the smallest change that fits" + ("" if same else f"; {step_text(source.run, after)}")
        yield asked.nanogpt(change.change)
    if plan.choice is not None:
        changes = {key: value for key, value in plan.choice.items() if getattr(source.run, key) != value}
        yield shlex.join(["gptfit", "train", saved]) if saved else asked.gptfit("train", changes)
    else:
        yield asked.gptfit("plan", {}, "--gpu", "all")
