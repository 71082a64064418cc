"""Memory of a run: what was predicted beside what was measured, under the card's limit."""

from collections.abc import Iterator, Mapping

from gptfit.report.html_chart import Chart, Line, bar, binned, chart, lane
from gptfit.report.html_parts import Html, Part, table, tag
from gptfit.report.run_facts import RunFacts, size
from gptfit.report.run_summary import Held, held, unmeasured
from gptfit.units import GiB, format_bytes

PREDICTED, MEASURED, LIKELY = "#56b4e9", "#0072b2", "#8cc9ee"


def memory_section(facts: RunFacts) -> Iterator[Part] | None:
    known = held(facts)
    process = predicted_process(facts)
    if not process and not any(one.predicted_bytes or one.measured_bytes for one in known):
        return None
    return parts(facts, known, process)


def parts(facts: RunFacts, known: list[Held], process: tuple[int, int, int] | None) -> Iterator[Part]:
    measured = any(one.measured_bytes for one in known)
    if not measured:
        text = unmeasured(facts)
        yield tag("p", f"{text[0].upper()}{text[1:]}. Below is what the same run is predicted to hold on one.")
    if not facts.predicted and facts.estimated is not None:
        yield tag("p", "Predicted from run.yaml for a card that is not known.", class_="quiet")
    yield bars(facts, known, process)
    yield rows(facts, known, process)
    yield over_steps(facts, known)


def predicted_process(facts: RunFacts) -> tuple[int, int, int] | None:
    """Low, likeliest and high of what nvidia-smi shows, as it was predicted."""
    given = (facts.predicted.get(key) for key in ("low_bytes", "process_bytes", "high_bytes"))
    low, likely, high = map(size, given)
    if low and likely and high:
        return low, likely, high
    one = facts.estimated
    return (one.interval.low_bytes, one.process_bytes, one.interval.high_bytes) if one else None


def limits(facts: RunFacts) -> list[tuple[str, int]]:
    """The card's total, and what of it was free for the run."""
    card = facts.predicted.get("gpu")
    if not isinstance(card, Mapping):
        return []
    found = [(words, size(card.get(key))) for words, key in (("usable", "usable_bytes"), ("the card", "total_bytes"))]
    return [(words, n) for words, n in found if n]


def card_used(facts: RunFacts) -> int | None:
    return size(facts.newest("measured").get("card_used_bytes"))


def bars(facts: RunFacts, known: list[Held], process: tuple[int, int, int] | None) -> Html:
    """A bar a figure, on one scale; the strokes are the limits, the pale end is the interval."""
    used, ends = card_used(facts), limits(facts)
    sizes = [n for one in known for n in (one.predicted_bytes, one.measured_bytes) if n]
    full = 1.04 * max([*sizes, *(n for _, n in ends), *(process or ()), used or 1])

    def row(name: str, n_bytes: int, colour: str, low: int = 0, high: int = 0) -> Html:
        drawn = [bar(0, n_bytes / full, colour)]
        if high:
            drawn.append(bar(low / full, high / full, LIKELY))
            drawn.append(tag("i", style=f"left:{100 * n_bytes / full:.2f}%;width:2px;background:{MEASURED}"))
        drawn += [tag("i", class_="end", style=f"left:{100 * n / full:.2f}%;width:2px;background:var(--text)")
                  for _, n in ends]  # fmt: skip
        return lane(name, drawn, format_bytes(n_bytes))

    def lanes() -> Iterator[Html]:
        for one in known:
            if one.predicted_bytes:
                yield row(f"{one.name}, predicted", one.predicted_bytes, PREDICTED)
            if one.measured_bytes:
                yield row(f"{one.name}, measured", one.measured_bytes, MEASURED)
        if process:
            yield row("process, predicted", process[1], PREDICTED, process[0], process[2])
        if used:
            yield row("card, measured", used, MEASURED)

    strokes = ", ".join(f"{words} {format_bytes(n)}" for words, n in ends)
    about = "Pale: where nine of ten processes lie." + (f" Strokes: {strokes}." if ends else "")
    return tag("figure", tag("div", lanes(), class_="lanes"), tag("figcaption", about, class_="quiet"))


def rows(facts: RunFacts, known: list[Held], process: tuple[int, int, int] | None) -> Html:
    def text(n_bytes: int | None) -> str:
        return format_bytes(n_bytes) if n_bytes else ""

    found = [(one.name, text(one.predicted_bytes), text(one.measured_bytes), one.off) for one in known]
    if process:
        names = ("process, low end", "process", "process, high end")
        found += [(name, text(n), "", "") for name, n in zip(names, process, strict=True)]
    if used := card_used(facts):
        found.append(("the card, all processes", "", text(used), ""))
    found += [(f"limit: {words}", text(n), "", "") for words, n in limits(facts)]
    if not any(row[2] for row in found):
        return table(("memory", "predicted"), [row[:2] for row in found], "The same as a table", ("predicted",))
    about = "Measured: the most of any step; the difference in per cent of it"
    return table(("memory", "predicted", "measured", "off"), found, about, ("predicted", "measured", "off"))


def over_steps(facts: RunFacts, known: list[Held]) -> Html | None:
    series = facts.series
    lines = [
        Line("reserved", "#e69f00", binned(series.steps, series.columns["peak_reserved_bytes"])),
        Line("allocated", MEASURED, binned(series.steps, series.columns["peak_allocated_bytes"])),
    ]
    levels = [(float(one.predicted_bytes), f"{one.name}, predicted") for one in known[1:] if one.predicted_bytes]
    levels += [(float(n), words) for words, n in limits(facts) if words == "usable"]
    return chart(
        Chart(
            "Peak memory of each step",
            lines,
            lambda n: format_bytes(round(n)),
            levels,
            True,
            facts.step,
            ticks=gib,
            unit=GiB,
        )
    )


def gib(n_bytes: float) -> str:
    """As an axis has room for."""
    return f"{n_bytes / GiB:.3g} GiB" if n_bytes else "0"
