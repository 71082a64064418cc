"""The shorter views: presets, cards, a replay, a verification, an explained out-of-memory error."""

from collections.abc import Iterable, Iterator, Sequence
from statistics import median
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from gptfit.asked import Asked
from gptfit.report.plans import levers_view
from gptfit.report.terminal import (
    BAD,
    GOOD,
    MAX_ROWS,
    QUIET,
    commands,
    hanging,
    headline,
    margin_text,
    peak_view,
    table,
    title,
)
from gptfit.units import counted, format_bytes, format_mib

if TYPE_CHECKING:
    from gptfit.accuracy import Accuracy, Compared
    from gptfit.asked import Asked
    from gptfit.estimate import Estimate
    from gptfit.levers import LeverEffect
    from gptfit.memory.replay import ReplayResult
    from gptfit.oom.diagnose import Diagnosis
    from gptfit.prepare import Prepared
    from gptfit.presets import Preset
    from gptfit.verify import Verification


def models_view(presets: Iterable[tuple["Preset", int]]) -> Iterator[RenderableType]:
    """Presets with their number of parameters, smallest first; the shape is layers × width."""
    rows = []
    for preset, n_params in sorted(presets, key=lambda item: item[1]):
        run = preset.run
        shape = f"{run.n_layer}×{run.n_embd}"
        rows.append((preset.name, f"{n_params / 1e6:,.1f} M", shape, f"{run.block_size}", preset.title))
    yield table(("model", "parameters", "shape", "block", "what"), rows, right=("parameters", "block"))
    yield from commands(("gptfit plan gpt2-medium --gpu rtx4070",))


def models_json(presets: Iterable[tuple["Preset", int]]) -> dict[str, object]:
    """The object that `gptfit models --json` prints."""
    return {
        "schema": "gptfit.models/1",
        "models": [
            {"name": preset.name, "title": preset.title, "source": preset.source, "n_params": n_params, **preset.values}
            for preset, n_params in presets
        ],
    }


def refusal_view(estimate: "Estimate", levers: Sequence["LeverEffect"], asked: "Asked") -> Iterator[RenderableType]:
    """Why `gptfit train` does not start, and what would make the run fit."""
    yield headline(estimate.verdict, margin_text(estimate))
    yield from peak_view(estimate)
    enough = [lever for lever in levers if lever.fits]
    yield from levers_view(enough or levers, verbose=False)
    yield from commands(
        (asked.gptfit("train", {}, "--auto-fit"), "# train it all the same", asked.gptfit("train", {}, "--force"))
    )


def verification_view(answer: "Verification") -> Iterator[RenderableType]:
    """Whether estimate and trace agree, then where they do not."""
    estimated, traced = answer.estimate, answer.traced
    if estimated is None:
        yield Text(
            f"Traced: {format_bytes(traced.live_bytes)} live at the peak, "
            f"{format_bytes(traced.saved_for_backward_bytes)} kept for backward"
        )
        yield Text(answer.unknown, style=QUIET)
        return
    word, style = ("Agrees: ", GOOD) if answer.passed else ("Differs: ", BAD)
    yield Text.assemble(
        (word, style),
        f"estimated {format_bytes(estimated.live_bytes)} live at the peak, traced {format_bytes(traced.live_bytes)} "
        f"({estimated.program}'s code)",
    )
    if answer.differences:
        yield title("Differences in bytes; up to half a per cent of the live peak are allowed")
        rows = [
            (row.name, format_mib(row.estimate_bytes), format_mib(row.traced_bytes), f"{row.delta_bytes:+,}")
            for row in answer.differences
        ]
        right = ("estimate MiB", "traced MiB", "bytes")
        yield table(("what", *right), rows, right=right)


def prepared_view(answer: "Prepared") -> Iterator[RenderableType]:
    """What `gptfit data prepare` wrote."""
    yield Text(
        f"{answer.folder}: {answer.n_train:,} tokens to train on, {answer.n_val:,} to validate, "
        f"from {counted(answer.n_documents, 'document')} of {counted(answer.n_files, 'file')}; "
        f"tokenizer {answer.tokenizer}, {answer.vocab_size:,} ids"
    )
    how = "documents drawn by their hash" if answer.split == "documents" else "the last part of the text"
    yield Text(f"for validation: {how}", style=QUIET)
    passed = (
        (len(answer.skipped), "file that is not UTF-8 text", "files that are not UTF-8 text"),
        (answer.n_empty, "empty file", "empty files"),
        (answer.n_blank, "line or row without text", "lines and rows without text"),
    )
    if found := [counted(*one) for one in passed if one[0]]:
        first = f"; the first is {answer.skipped[0]}" if answer.skipped else ""
        yield Text(f"passed over: {', '.join(found)}{first}", style=QUIET)
    yield from commands((f"gptfit train tiny dataset={answer.folder} vocab_size={-(-answer.vocab_size // 64) * 64}",))


def prepared_json(answer: "Prepared") -> dict[str, object]:
    return {
        "schema": "gptfit.prepared/1",
        "folder": str(answer.folder),
        "tokenizer": answer.tokenizer,
        "vocab_size": answer.vocab_size,
        "n_train": answer.n_train,
        "n_val": answer.n_val,
        "split": answer.split,
        "n_shards": answer.n_shards,
        "n_documents": answer.n_documents,
        "n_files": answer.n_files,
        "skipped": [str(path) for path in answer.skipped],
        "n_empty": answer.n_empty,
        "n_blank": answer.n_blank,
    }


NOTHING = Asked()  # a paste, and no key
# The figures of a paste that a person looks for, in the order of the message.
FIGURES = (
    ("tried to allocate", "tried_bytes"),
    ("the card", "total_bytes"),
    ("free", "free_bytes"),
    ("this process", "process_bytes"),
    ("other processes", "other_processes_bytes"),
    ("allocated by PyTorch", "allocated_bytes"),
    ("reserved by PyTorch", "reserved_bytes"),
    ("reserved and unused", "reserved_unallocated_bytes"),
)


def diagnosis_view(answer: "Diagnosis", asked: Asked = NOTHING, *options: str) -> Iterator[RenderableType]:
    """What failed and why; what was alive then; what helps, what does not, and the figures read from the text. The
    command to type next is `asked`, whose CONFIG is the log, and its `options` with the sizes that are missing."""
    yield Text(answer.summary, style="bold")
    if answer.instant is not None:
        yield title("Alive at that instant")
        rows = [(row.name, format_mib(row.n_bytes)) for row in answer.instant.rows if row.n_bytes >= 1 << 20]
        yield table(("", "MiB"), rows, right=("MiB",))
        yield hanging(answer.instant.sentence())
    if answer.remedies:
        yield title("What helps" + (f" ({answer.heading})" if answer.heading else ""))
    for remedy in answer.remedies:
        saves = "" if remedy.saves_bytes is None else f"saves {format_bytes(remedy.saves_bytes)}"
        enough = {True: "enough", False: "not enough alone", None: ""}[remedy.enough]
        yield from advice_lines(remedy.change, ", ".join(word for word in (saves, enough) if word), remedy.why)
    if answer.not_remedies:
        yield title("What does not")
    for advice in answer.not_remedies:
        yield from advice_lines(advice.change, "", advice.why)
    known = figures_read(answer)
    if known:
        yield title("Read from the text")
        yield table(("", " "), known, right=(" ",))
    yield from (Text(f"note: {warning}", style=QUIET) for warning in answer.warnings)
    if answer.missing and answer.facts.kind != "not_oom":
        keys = {key: value for key, value in EXAMPLE.items() if key in answer.missing}
        yield from commands(
            ("# with your run's sizes it says by how much", asked.gptfit("explain-oom", keys, *options))
        )


def figures_read(answer: "Diagnosis") -> list[tuple[str, str]]:
    """The figures of the text. Its message lists other processes, or names none: that does not say that none is."""
    read = [(name, key, getattr(answer.facts, key)) for name, key in FIGURES]
    return [
        (name, "named: none" if key == "other_processes_bytes" and n_bytes == 0 else format_bytes(n_bytes))
        for name, key, n_bytes in read
        if n_bytes is not None
    ]


# Keys of a run that a paste often leaves out, with the values of GPT-2 124M to show their form.
EXAMPLE = {"n_layer": 12, "n_embd": 768, "batch_size": 12, "block_size": 1024}


def advice_lines(change: str, effect: str, why: str) -> Iterator[RenderableType]:
    """A change on a line of its own, to be copied, with its effect behind it, or below where it is long; the reason."""
    parts = [change] if len(change) <= COLUMNS else change.replace(" and ", "\n  and ").split("\n")
    effect = f"({effect})" if effect else ""
    if len(parts[-1]) + len(effect) + 6 <= COLUMNS:
        parts[-1] += f"    {effect}" if effect else ""
    elif effect:
        parts.append(f"    {effect}")
    yield Text("\n".join(f"  {part}" for part in parts), no_wrap=True)
    yield Padding(Text(why, style=QUIET), (0, 0, 0, 6))


COLUMNS = 80


RIGHT = ("measured", "predicted", "%")


def _compared(row: "Compared") -> tuple[str, str, str, str]:
    """One row; a verdict has no figures."""
    measured = "" if row.measured_bytes is None else format_mib(row.measured_bytes)
    predicted = "" if row.predicted_bytes is None else format_mib(row.predicted_bytes)
    if row.error is None:
        return row.id, measured, predicted, "right" if row.right else "wrong"
    return row.id, measured, predicted, f"{100 * row.error:+.2f}"


CLASS_RIGHT = ("rows", "mean", "worst")


def _class_row(rows: Sequence["Compared"]) -> tuple[str, ...]:
    """Rows of one class: their number, the mean and the worst error; of verdicts how many are right."""
    errors = {row.id: abs(row.error) for row in rows if row.error is not None}
    if not errors:
        return rows[0].kind, f"{len(rows)}", "", "", f"{sum(bool(row.right) for row in rows)} right"
    worst = max(errors, key=lambda name: errors[name])
    shares = (f"{100 * share:.2f} %" for share in (sum(errors.values()) / len(errors), errors[worst]))
    return rows[0].kind, f"{len(rows)}", *shares, worst


def _speed_row(label: str, errors: Sequence[float]) -> tuple[str, ...]:
    sizes = [abs(error) for error in errors]
    return label, f"{len(sizes)}", f"{100 * median(sizes):.1f} %", f"{100 * max(sizes):.1f} %"


def accuracy_view(answer: "Accuracy", verbose: bool) -> Iterator[RenderableType]:
    """Whether the gates hold, the errors of each class; the rows that are outside, or all of them."""
    missed = answer.missed()
    compared = [row for row in answer.rows if row.role != "excluded"]
    word, style = ("Missed: ", BAD) if missed else ("Holds: ", GOOD)
    yield Text.assemble(
        (word, style), f"{counted(len(compared), 'measurement')} compared, {len(missed)} outside of what is allowed"
    )
    if missed:
        yield title("Outside")
        yield from (Text(f"  {line}") for line in missed)
    kinds = sorted({row.kind for row in compared})
    yield title("What is compared, and how far the prediction is off")
    yield table(("", "rows", "mean", "worst", " "), map(_class_row, map(answer.of_kind, kinds)), right=CLASS_RIGHT)
    if answer.speed is not None:
        speed = answer.speed
        yield title("Speed: tokens per second of published runs")
        yield table(
            ("", "rows", "median", "worst"),
            [
                _speed_row(f"on {speed.n_cards} cards, each run by the others of its card", speed.left_out),
                _speed_row("that nothing was fitted to", speed.held_out),
            ],
            right=("rows", "median", "worst"),
        )
    for kind in kinds if verbose else ():
        yield title(kind if kind == "verdict" else f"{kind}: MiB, and the difference in per cent of the measured")
        yield table(("", *RIGHT), [_compared(row) for row in compared if row.kind == kind], right=RIGHT)
    excluded = [row for row in answer.rows if row.role == "excluded"]
    if excluded and verbose:
        yield title("Not compared")
        yield table(("row", "why"), [(row.id, row.reason) for row in excluded])
    elif excluded:
        yield Text(f"\n{len(excluded)} more are not compared; -v says why, and shows each row", style=QUIET)


def replay_view(answer: "ReplayResult") -> Iterator[RenderableType]:
    """What the allocator held at most and why; beside it what the recording says, if it does."""
    failed, recorded, lost = answer.out_of_memory, answer.recorded, answer.fragmentation
    if failed is not None:
        held = f"{format_bytes(failed.allocated_bytes)} allocated and {format_bytes(failed.reserved_bytes)} reserved"
        asked = f"event {failed.event} asked for {format_bytes(failed.request_bytes)}, with {held}"
        before = f"{held} before the first event"
        yield Text.assemble(("Out of memory: ", BAD), asked if failed.event >= 0 else before)
    yield Text(
        f"{format_bytes(answer.peak_reserved_bytes)} reserved at most, {format_bytes(answer.peak_allocated_bytes)} "
        f"allocated; {format_bytes(answer.final_reserved_bytes)} reserved at the end",
        style="bold",
    )
    kind = "expandable segments" if answer.expandable_segments else "plain segments"
    retries = counted(answer.retries, "retry", "retries")
    yield Text(f"{counted(answer.events, 'event')}, {kind}, {retries} after a failed cudaMalloc")
    if recorded is not None:
        peak = recorded.peak_reserved_bytes
        said = [] if peak is None else [f"{format_bytes(peak)} reserved at most"]
        if recorded.segment_events_total:
            said.append(
                f"{recorded.segment_events_matched:,} of its {recorded.segment_events_total:,} segment events matched"
            )
        if said:
            yield Text(f"The recording: {'; '.join(said)}")
    yield title("Reserved, at its peak")
    rows = [
        ("requested", format_mib(lost.requested_bytes)),
        ("rounding, unsplit slack", format_mib(lost.allocated_bytes - lost.requested_bytes)),
        ("free in small segments", format_mib(lost.free_small_bytes)),
        ("free in large segments", format_mib(lost.free_large_bytes)),
        ("reserved", format_mib(lost.reserved_bytes)),
    ]
    yield table(("", "MiB"), rows, right=("MiB",))
    if answer.alive_at_peak:
        yield title("Allocated, at its peak")
        alive = [(row.tag, f"{row.count}", format_mib(row.block_bytes)) for row in answer.alive_at_peak[:MAX_ROWS]]
        yield table(("from", "count", "MiB"), alive, right=("count", "MiB"))
