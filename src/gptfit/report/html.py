"""An answer as one page: self-contained, loads nothing, for screens of any width, for printers and keyboards."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from gptfit import __version__
from gptfit.config import RunConfig
from gptfit.estimate import Estimate
from gptfit.gpus import GpuProfile
from gptfit.plan import Plan
from gptfit.replacing import replacing
from gptfit.report.html_assets import CSS, SCRIPT
from gptfit.report.html_parts import Html, Part, section, swatch, table, tag
from gptfit.report.html_plan import dots, levers_table, scatter
from gptfit.report.html_timeline import timeline_figure
from gptfit.report.terminal import headline, margin_text, run_text, shares, speed_text
from gptfit.report.timeline import timeline_of
from gptfit.units import format_bytes, format_mib

if TYPE_CHECKING:
    from gptfit.card import Card
    from gptfit.door import ConfigSource

# The page may do nothing but show itself: whatever it would load is refused by the browser.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def write_page(path: str | Path, page: Html) -> None:
    """Raises GptfitError where `path` cannot be written; what was there before is then still there."""
    with replacing(Path(path)) as file:
        file.write(page.encode(errors="replace"))


def estimate_page(
    answer: Estimate, source: "ConfigSource", card: "Card | None", command: str, above: Part = None
) -> Html:
    """The page of `gptfit estimate`. `command` is what was typed; `above` comes first."""
    profile = card.profile if card else None
    return document(
        f"{run_name(source)}: {margin_text(answer)}",
        above,
        header(answer.verdict, margin_text(answer), answer),
        figures(answer),
        section("One step", timeline_figure(answer, timeline_of(source.run, answer.program), "Memory of one step")),
        section("Memory at the peak", parts_table(answer), tensors(answer)),
        section("Assumed", bullets(answer.assumptions), notes(source, card)),
        section("Where the numbers are from", provenance(answer, profile)),
        section("The run", config_table(answer.config, source)),
        footer(command),
    )


def plan_page(answer: Plan, source: "ConfigSource", card: "Card", command: str, above: Part = None) -> Html:
    """The page of `gptfit plan`. `command` is what was typed; `above` comes first."""
    best, given = answer.estimate, answer.as_given
    text = margin_text(best) if best else f"no run of this model fits {answer.budget.name}"
    parts: list[Part] = [above, header(answer.verdict, text, best)]
    if best is not None and answer.run is not None:
        parts += [figures(best), section("One step of the choice", step_figure(best, answer.run))]
        parts.append(section("What was changed", changed(given, best)))
    drawn = dots(answer, card.profile)
    if len(drawn) > 1:
        searched = f"The best of {answer.n_searched:,} that were searched, and others beside them."
        parts.append(section("Memory against speed", tag("p", searched), scatter(answer, drawn)))
    if given is not None:
        word = "fits" if given.verdict == "fits" else "does not fit"
        about = tag("p", f"Under {given.program}'s code it {word}: {margin_text(given)}.")
        parts.append(section("One step as given", about, step_figure(given, source.run)))
    if answer.levers:
        parts.append(section("Single changes to the run as given", levers_table(answer.levers)))
    if best is not None:
        parts.append(section("Memory of the choice at its peak", parts_table(best), tensors(best)))
    assumed = best or given
    parts.append(section("Assumed", bullets(assumed.assumptions if assumed else ()), bullets(answer.notes),
                         notes(source, card)))  # fmt: skip
    parts.append(section("Where the numbers are from", provenance(assumed, card.profile)))
    return document(f"{run_name(source)}: {text}", *parts, footer(command))


def document(title: str, *content: Part) -> Html:
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("link", rel="icon", href="data:,"),
        tag("style", Html(CSS)),
    )
    body = tag("body", tag("main", content), tag("script", Html(SCRIPT)))
    return Html(f"<!doctype html>\n{tag('html', head, body, lang='en')}\n")


def header(verdict: str | None, text: str, run: Estimate | None) -> Html:
    word = headline(verdict, "", run.certain if run else True).plain
    about = (tag("p", run_text(run)), tag("p", f"{speed_text(run.speed)}.") if run.speed else None) if run else None
    return tag("header", tag("h1", tag("span", word, class_=verdict), text), about)


def figures(one: Estimate) -> Html:
    """The four figures, each with what it is, and how far off the last may be."""
    rows = (
        ("live: tensors", format_bytes(one.live_bytes)),
        ("allocated: in blocks", format_bytes(one.allocated_bytes)),
        ("reserved: in segments", format_bytes(one.reserved_bytes)),
        ("process: as nvidia-smi", format_bytes(one.process_bytes)),
        (f"process, {1 - 2 * one.interval.risk:.0%} likely", range_text(one)),
    )
    return tag("dl", (tag("div", tag("dt", name), tag("dd", text)) for name, text in rows))


def range_text(one: Estimate) -> str:
    return f"{format_bytes(one.interval.low_bytes)} to {format_bytes(one.interval.high_bytes)}"


def step_figure(one: Estimate, run: RunConfig) -> Html:
    return timeline_figure(one, timeline_of(run, one.program), f"Memory of one step, {one.program}'s code")


def parts_table(one: Estimate) -> Html:
    rows: list[tuple[Part, str]] = [((swatch(name), name), format_mib(n_bytes)) for name, n_bytes in shares(one)]
    rows.append(("the process", format_mib(one.process_bytes)))
    if one.budget is not None:
        rows.append((f"usable on {one.budget.name}", format_mib(one.budget.usable_bytes)))
    return table(("part", "MiB"), rows, f"The peak is in {one.phase} ({one.op})", ("MiB",))


def tensors(one: Estimate) -> Html:
    """The whole live set: its rows add up to `allocated`."""
    rows: list[tuple[Part, ...]] = [
        (
            (swatch(row.category), row.name),
            format_mib(row.n_bytes),
            f"{row.count}",
            " × ".join(map(str, row.shape)),
            row.dtype,
            row.category,
        )
        for row in one.tensors
    ]
    rows.append(("allocated", format_mib(one.allocated_bytes), "", "", "", ""))
    columns = ("alive at the peak", "MiB", "count", "shape", "dtype", "category")
    inner = table(columns, rows, "A count of 12 is one in each of 12 blocks", ("count", "MiB"))
    return tag("details", tag("summary", f"All {len(one.tensors)} rows of what is alive then"), inner)


def changed(given: Estimate | None, best: Estimate) -> Html:
    before = given.config if given else {}
    rows = [(key, f"{before.get(key)}", f"{value}") for key, value in best.config.items() if before.get(key) != value]
    if given is not None and given.program != best.program:
        rows.insert(0, ("code", given.program, best.program))
    if not rows:
        return tag("p", "Nothing: the run as given is the choice.")
    return table(("key", "as given", "chosen"), rows, "Keys in which the choice differs")


def bullets(lines: Iterable[str]) -> Html | None:
    entries = [tag("li", line) for line in lines]
    return tag("ul", entries) if entries else None


def notes(source: "ConfigSource", card: "Card | None") -> Html | None:
    return bullets([*source.notes, *(card.notes if card else ())])


def provenance(one: Estimate | None, profile: GpuProfile | None) -> Iterator[Part]:
    """Which figure comes from where: the model of the step, then each number of the card."""
    lines = [
        "live: each tensor of the step, written as what the code allocates and frees; compared with traces of it",
        "allocated, reserved: the same through a replay of PyTorch's caching allocator",
        "process: reserved, and the CUDA context of the card",
    ]
    if one is not None and one.speed is not None:
        lines.append(f"speed: {one.speed.source}")
    yield bullets(lines)
    if profile is not None:
        rows = [(key, shown(getattr(profile, key, "")), text) for key, text in profile.sources.items()]
        yield table(("number", "value", "source"), rows, f"{profile.title}", prose=True)


def shown(value: object) -> str:
    if isinstance(value, int) and value > 1 << 20:
        return format_bytes(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    fields = getattr(value, "__dict__", None)
    if isinstance(fields, Mapping):
        return ", ".join(f"{key} {shown(one)}" for key, one in fields.items())
    return f"{value}"


def config_table(config: Mapping[str, object], source: "ConfigSource") -> Html:
    rows = [(key, f"{value}", "set" if key in source.user_keys else "") for key, value in config.items()]
    inner = table(("key", "value", ""), rows, f"As read from {source.name}; set: in the file or on the command line")
    return tag("details", tag("summary", f"All {len(rows)} keys"), inner)


def run_name(source: "ConfigSource") -> str:
    return source.name.rsplit("/", 1)[-1]


def footer(command: str) -> Html:
    return tag("footer", tag("p", f"gptfit {__version__}: ", tag("code", command), class_="quiet"))
