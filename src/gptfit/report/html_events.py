"""What happened to a run beside its steps, over the steps and in words."""

import math
from collections.abc import Iterator
from datetime import UTC, datetime

from gptfit.report.html_chart import lane, marks
from gptfit.report.html_parts import Part, table, tag
from gptfit.report.run_facts import Entry, RunFacts, size
from gptfit.units import format_bytes

MAX_ROWS = 100
MAX_TEXT = 240  # characters of a row

# A note by its first words; the rest is a note.
NOTES = (
    ("out of memory", "out of memory"),
    ("why: ", "out of memory"),
    ("memory on the card", "memory pressure"),
    ("two steps held", "planned anew"),
    ("resumed with", "resumed"),
    ("the data are not", "resumed"),
)
COLOURS = {
    "started, resumed": "#0072b2",
    "evaluations": "#d55e00",
    "checkpoints": "#009e73",
    "samples": "#56b4e9",
    "out of memory": "#cc79a7",
    "memory pressure": "#cc79a7",
    "planned anew": "#e69f00",
    "not applied": "#aa4499",
    "notes": "#7f7f7f",
    "ended": "#b3261e",
}

LANES = {"note": "notes", "resumed": "", "not applied": ""}


def events_section(facts: RunFacts) -> Iterator[Part] | None:
    """Lanes of marks with their counts, and the rows that say what they are."""
    places = lanes(facts)
    rows = list(told(facts))
    if not places and not rows:
        return None
    right = max(1, facts.step)
    drawn = (
        lane(name, marks([min(1.0, step / right) for step in steps], COLOURS[name]), where(steps))
        for name, steps in places.items()
    )
    parts: list[Part] = [tag("div", drawn, class_="lanes")]
    if places:
        parts.append(tag("p", f"From left to right: steps 0 to {right:,}.", class_="quiet"))
    if rows:
        left = len(rows) - MAX_ROWS
        kept = rows if left <= 0 else [*rows[: MAX_ROWS // 2], *rows[-MAX_ROWS // 2 :]]
        about = "In their order; checkpoints, evaluations and samples are above"
        about += f"; {left:,} rows in the middle are left out" if left > 0 else ""
        parts.append(table(("what", "after step", "time (UTC)", "in words"), kept, about, (), prose=True))
    return iter(parts)


def lanes(facts: RunFacts) -> dict[str, list[int]]:
    """The steps at which each kind of thing happened."""
    series = facts.series
    found: dict[str, list[int]] = {name: [] for name in COLOURS}
    for name, column, least in (("evaluations", "val_loss", -math.inf), ("not applied", "skipped", 1)):
        values = series.columns[column]
        found[name] = [step for step, value in zip(series.steps, values, strict=True) if value >= least]
    for entry in facts.events:
        if name := lane_of(entry):
            found[name].append(entry["step"])
    return {name: sorted(steps) for name, steps in found.items() if steps}


def lane_of(entry: Entry) -> str:
    kind = {"started": "started, resumed", "saved": "checkpoints", "sampled": "samples", "finished": "ended",
            "failed": "ended"}.get(entry["event"], "")  # fmt: skip
    if entry["event"] == "note":
        text = str(entry.get("text", ""))
        # The metrics tell which steps were not applied, and an explanation is no second event.
        return "" if text.startswith("why: ") else LANES.get(note_kind(text), note_kind(text))
    return kind


def note_kind(text: str) -> str:
    if " is left out, " in text:
        return "not applied"
    return next((kind for words, kind in NOTES if text.startswith(words)), "note")


def where(steps: list[int]) -> str:
    if len(steps) == 1:
        return f"step {steps[0]:,}"
    return f"{len(steps)}: {steps[0]:,} to {steps[-1]:,}" if len(steps) > 2 else f"steps {steps[0]:,}, {steps[1]:,}"


def told(facts: RunFacts) -> Iterator[tuple[str, str, str, str]]:
    """A row for what cannot be read off the lanes. A run that was started again without a last word was killed."""
    open_at: Entry | None = None
    for entry in facts.events:
        kind, text = words(entry)
        if entry["event"] == "started":
            if open_at is not None:
                yield "killed", "", "", f"what began after step {open_at['step']:,} left no last word"
            open_at = entry
        elif entry["event"] in ("finished", "failed"):
            open_at = None
        if text:
            text = text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + "…"
            yield kind, f"{entry['step']:,}", clock(entry["at"]), text


def words(entry: Entry) -> tuple[str, str]:
    """Kind and text of an event; no text where the lanes say all."""
    kind, text = str(entry["event"]), str(entry.get("text", ""))
    if kind == "note":
        return note_kind(text), text
    if kind == "started":
        micro, n = entry.get("batch_size"), entry.get("gradient_accumulation_steps")
        device = f"on {entry.get('device')}, micro-batches of {micro}, {n} a step"
        return ("resumed", f"after step {entry['step']:,}, {device}") if entry["step"] else ("started", device)
    if kind == "measured":
        known = [(name, size(entry.get(f"{name}_bytes"))) for name in ("allocated", "reserved", "card_used")]
        return "measured", ", ".join(f"{name.replace('_', ' ')} {format_bytes(n)}" for name, n in known
                                     if n)  # fmt: skip
    if kind == "finished":
        by = str(entry.get("stopped_by") or "")
        return "ended", f"stopped by {by}" if by else "at its last step"
    return (kind, text) if kind == "failed" else (kind, "")


def launch_notes(facts: RunFacts) -> list[str]:
    """What was said before the first step of the newest start."""
    found: list[str] = []
    before = False
    for entry in facts.events:
        if entry["event"] == "launched":
            found, before = [], True
        before = before and entry["event"] != "started"
        if before and entry["event"] == "note":
            found.append(str(entry.get("text", ""))[:MAX_TEXT])
    return found[:10]


def clock(at: float | None) -> str:
    return "" if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S")
