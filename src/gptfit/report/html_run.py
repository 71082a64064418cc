"""The page of a run: made from its folder alone, at the run's end or later, whatever became of the run."""

import math
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path

from gptfit.report.html import bullets, document, footer, write_page
from gptfit.report.html_chart import Chart, Line, binned, chart, singles
from gptfit.report.html_events import events_section, launch_notes
from gptfit.report.html_parts import Html, Part, joined, section, table, tag
from gptfit.report.html_run_memory import memory_section
from gptfit.report.run_facts import RunFacts
from gptfit.report.run_summary import figures, loss_text, mfu, predicted_speed
from gptfit.units import format_time

NAME = "report.html"
TRAIN, VAL, RATE = "#0072b2", "#d55e00", "#7f7f7f"
MAX_SAMPLES = 8
MAX_SAMPLE = 1500  # characters
MAX_KEYS = 150
MIN_LATER, MOST_OF = 100, 2.0  # steps, and the share of heights, from which on the later loss is drawn by itself
MAX_VALUE = 200  # characters


def write_report(facts: RunFacts, path: Path | None = None) -> Path:
    """Writes the page into the run's folder, or to `path`. Raises GptfitError where it cannot be written."""
    path = path or facts.folder / NAME
    write_page(path, run_page(facts))
    return path


def run_page(facts: RunFacts) -> Html:
    kind, text = facts.state
    return document(
        f"{facts.folder.name}: {text}",
        tag("header", tag("h1", tag("span", text, class_=kind)), why(facts)),
        tag(
            "dl",
            (tag("div", tag("dt", name), tag("dd", value.replace(" %", "\u00a0%"))) for name, value in figures(facts)),
        ),
        whole("Loss", loss_chart(facts)),
        whole("Speed", speed_chart(facts)),
        whole("Memory", memory_section(facts)),
        whole("What happened", events_section(facts)),
        whole("Gradient norm", norm_chart(facts)),
        whole("What it wrote", samples(facts)),
        whole("The run", config(facts)),
        whole("Where this is from", provenance(facts)),
        footer(f"gptfit report {shlex.quote(str(facts.folder))}"),
    )


def whole(title: str, content: Part) -> Html | None:
    markup = joined(content)
    return section(title, markup) if markup else None


def why(facts: RunFacts) -> Iterator[Html]:
    """What it died of; how long the steps took; what of the file could not be read."""
    if facts.state[0] == "failed":
        yield tag("p", str(facts.newest("failed").get("text", ""))[:500], class_="error")
    if facts.seconds > 0:
        yield tag("p", f"{format_time(facts.seconds)} in steps; evaluations, checkpoints and pauses are not in it.")
    if facts.series.n_bad:
        yield tag("p", f"Lines of metrics.jsonl that could not be read, and are left out: {facts.series.n_bad:,}.")


def loss_chart(facts: RunFacts) -> Part:
    series = facts.series
    steps, columns = series.steps, series.columns
    lines = [
        Line("train loss", TRAIN, binned(steps, columns["loss"])),
        Line("validation loss", VAL, singles(steps, columns["val_loss"]), dots=True),
        Line("learning rate", RATE, binned(steps, columns["lr"]), own_axis=True),
    ]
    captions = [text for line, name in ((lines[0], "loss"), (lines[1], "val_loss"))
                if (text := course(facts, name, line.name))]  # fmt: skip
    n_none = sum(map(math.isnan, columns["loss"]))
    if n_none:
        captions.append(f"Steps whose loss is no number: {n_none:,}; the line has gaps there.")
    whole = Chart("Loss, nats a token", lines, loss_text, last_step=facts.step, captions=captions)
    return chart(whole), later_loss(facts)


def later_loss(facts: RunFacts) -> Html | None:
    """The same without the first tenth, where that is most of the picture's height."""
    series = facts.series
    begin = len(series.steps) // 10
    early, late = (sorted(value for value in part if not math.isnan(value))
                   for part in (series.columns["loss"][:begin], series.columns["loss"][begin:]))  # fmt: skip
    if not early or len(late) < MIN_LATER or early[-1] - late[0] < MOST_OF * (late[-1] - late[0]):
        return None
    steps = series.steps[begin:]
    lines = [
        Line("train loss", TRAIN, binned(steps, series.columns["loss"][begin:])),
        Line("validation loss", VAL, singles(steps, series.columns["val_loss"][begin:]), dots=True),
    ]
    captions = [f"The same from step {steps[0]:,} on."]
    return chart(Chart("Loss, later", lines, loss_text, (), False, facts.step, captions, first_step=steps[0]))


def course(facts: RunFacts, column: str, name: str) -> str:
    """The first, the lowest and the last value, in a sentence."""
    values, steps = facts.series.columns[column], facts.series.steps
    known = [(value, step) for value, step in zip(values, steps, strict=True) if not math.isnan(value)]
    if not known:
        return ""
    (first, at), (least, lowest), (last, end) = known[0], min(known), known[-1]
    name = name[0].upper() + name[1:]
    return (
        f"{name}: {loss_text(first)} after step {at:,}, lowest {loss_text(least)} after {lowest:,}, "
        f"{loss_text(last)} after {end:,}."
    )


def speed_chart(facts: RunFacts) -> Html | None:
    """Tokens a second, beside what was predicted of them; MFU in proportion."""
    series = facts.series
    predicted, share = predicted_speed(facts)
    levels, captions = [], []
    if facts.tokens_per_second:
        known = series.finite("tokens_per_second")
        ends = f"slowest {min(known):,.0f}, fastest {max(known):,.0f}"
        captions.append(f"Median step {facts.tokens_per_second:,.0f} tokens/s, {ends}.")
    if predicted and share:
        levels = [(predicted, f"predicted: {predicted:,.0f}")]
        own = mfu(facts)
        measured = f"; measured, the median step has {own:.1%}" if own else ""
        captions.append(f"Predicted {predicted:,.0f}, at an MFU of {share:.1%}{measured}.")
    else:
        captions.append("MFU is not known: no card, no peak to compare with.")
    words = "{:,.0f}".format
    line = Line("tokens/s", TRAIN, binned(series.steps, series.columns["tokens_per_second"]))
    return chart(Chart("Tokens a second", [line], words, levels, True, facts.step, captions, words))


def norm_chart(facts: RunFacts) -> Html | None:
    clip = facts.config.get("grad_clip")
    levels = []
    if isinstance(clip, int | float) and 0 < clip < 1e12:
        levels = [(float(clip), f"clipped above {clip:g}")]
    values = facts.series.columns["grad_norm"]
    captions = [course(facts, "grad_norm", "before clipping")]
    if levels:
        captions.append(f"Steps that were clipped: {sum(value > levels[0][0] for value in values):,}.")
    line = Line("gradient norm", TRAIN, binned(facts.series.steps, values))
    return chart(Chart("Gradient norm", [line], "{:.3g}".format, levels, False, facts.step, captions))


def samples(facts: RunFacts) -> Iterator[Part] | None:
    """The texts that the model wrote on the way: the last, and below it the first and some between."""
    found = facts.of("sampled")
    if not found:
        return None
    last = len(found) - 1
    kept = sorted({round(i * last / (MAX_SAMPLES - 1)) for i in range(MAX_SAMPLES)})
    texts = [
        (tag("p", f"After step {one['step']:,}:"), tag("pre", str(one.get("text", ""))[:MAX_SAMPLE], class_="sample"))
        for one in (found[i] for i in kept)
    ]
    earlier = f"{len(kept) - 1} earlier ones" + (f" of {last:,}" if len(kept) <= last else "")
    before = tag("details", tag("summary", earlier), texts[:-1]) if texts[:-1] else None
    return iter([texts[-1], before])


def config(facts: RunFacts) -> Iterator[Part] | None:
    """What auto-fit changed, what was said before the first step, and every key."""
    if not facts.config:
        return None
    given = facts.newest("launched").get("given")
    parts: list[Part] = []
    if isinstance(given, Mapping):
        rows = [(cut(key), cut(given.get(key, "")), cut(value)) for key, value in facts.config.items()
                if given.get(key) != value]  # fmt: skip
        if rows:
            parts.append(table(("key", "as given", "chosen"), rows[:MAX_KEYS], "What auto-fit changed"))
        else:
            parts.append(tag("p", "Auto-fit changed nothing: the run as given is the choice."))
    parts.append(bullets(launch_notes(facts)))
    rows = [(cut(key), cut(value)) for key, value in list(facts.config.items())[:MAX_KEYS]]
    inner = table(("key", "value"), rows, "As in run.yaml, which gptfit train takes as it is")
    parts.append(tag("details", tag("summary", f"All {len(rows)} keys"), inner))
    return iter(parts)


def cut(value: object) -> str:
    text = f"{value}"
    return text if len(text) <= MAX_VALUE else text[:MAX_VALUE] + "…"


def provenance(facts: RunFacts) -> Html:
    launched, started = facts.newest("launched"), facts.newest("started")
    rows = [("then" if i else "command", cut(one.get("command", "")))
            for i, one in enumerate(facts.of("launched")[-5:])]  # fmt: skip
    versions = launched.get("versions")
    if isinstance(versions, Mapping):
        rows.append(("versions", cut(", ".join(f"{name} {version}" for name, version in versions.items()))))
    rows += [(name, cut(launched[name])) for name in ("platform",) if name in launched]
    rows += [(words, cut(f"{started[name]:,}" if isinstance(started[name], int) else started[name]))
             for name, words in STARTED if name in started]  # fmt: skip
    rows.append(("steps", f"metrics.jsonl, {len(facts.series.steps):,} lines"))
    rows.append(("events", f"events.jsonl, {len(facts.events):,} lines" if facts.events else "no events.jsonl"))
    rows.append(("config", "run.yaml" if facts.config else "no run.yaml"))
    return table(("what", "value"), rows, "From the files in the run's folder", prose=True)


STARTED = (("device", "device"), ("n_params", "parameters"), ("data", "data"),
           ("n_train_tokens", "tokens to train on"), ("tokenizer", "tokenizer"))  # fmt: skip
