"""Figures over the steps of a run: lines with their range, lanes of bars and marks. No script; each has its numbers."""

import math
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from gptfit.report.html_parts import Html, Part, table, tag

SIZE = 1000  # of the drawing in both directions; it is stretched to the page
MAX_BINS = 250  # points of a line
MAX_DOTS = 40  # more are a line
MAX_ROWS = 12  # of the table below it
LOG_FROM = 10.0  # a range of so many times is drawn on a logarithmic axis

Words = Callable[[float], str]


@dataclass(frozen=True, slots=True)
class Bin:
    """Neighbouring steps, `first` to `last`, and what of them is a number."""

    first: int
    last: int
    low: float
    mean: float
    high: float

    @property
    def middle(self) -> float:
        return (self.first + self.last) / 2


@dataclass(frozen=True, slots=True)
class Line:
    """`dots`: single values far apart. `own_axis`: drawn from 0 to its own largest. Else `bins` may have gaps."""

    name: str
    colour: str
    bins: Sequence[Bin | None]
    dots: bool = False
    own_axis: bool = False


@dataclass(frozen=True, slots=True)
class Axis:
    """From `low` to `high`, upwards."""

    low: float
    high: float
    log: bool
    unit: float = 1.0

    def at(self, value: float) -> float:
        """0 at the bottom, 1 at the top."""
        if self.log:
            value = max(value, self.low)
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        if not self.log:
            return [self.unit * value for value in round_ticks(self.low / self.unit, self.high / self.unit)]
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        digits = (1, 2, 5) if len(powers) <= 4 else (1,)
        every = 1 + len(powers) // 7
        found = [digit * 10.0**power for power in powers if power % every == 0 for digit in digits]
        return [value for value in found if self.low <= value <= self.high]


@dataclass(frozen=True, slots=True)
class Chart:
    """What is drawn, how its figures are written, and levels that are drawn across. Ticks are round in `unit`."""

    label: str
    lines: Sequence[Line]
    words: Words
    levels: Sequence[tuple[float, str]] = ()
    from_zero: bool = False
    last_step: int = 0
    captions: Sequence[str] = ()
    ticks: Words = "{:.4g}".format
    unit: float = 1.0
    first_step: int = 0


def binned(steps: Sequence[int], values: array, max_bins: int = MAX_BINS) -> list[Bin | None]:
    """Equal numbers of steps each; None where none of them is a number."""
    size = max(1, -(-len(steps) // max_bins))
    found: list[Bin | None] = []
    for start in range(0, len(steps), size):
        known = [value for value in values[start : start + size] if not math.isnan(value)]
        last = steps[min(start + size, len(steps)) - 1]
        mean = math.fsum(known) / len(known) if known else 0.0
        found.append(Bin(steps[start], last, min(known), mean, max(known)) if known else None)
    return found


def singles(steps: Sequence[int], values: array) -> list[Bin | None]:
    """A bin for each step that has a number; of more than can be told apart, every second, third …"""
    known = [(step, value) for step, value in zip(steps, values, strict=True) if not math.isnan(value)]
    every = max(1, -(-len(known) // MAX_BINS))
    kept = known[::-every][::-1]
    return [Bin(step, step, value, value, value) for step, value in kept]


def chart(what: Chart) -> Html | None:
    """The figure; None where nothing of it is known."""
    drawn = [line for line in what.lines if any(line.bins)]
    shared = [one for line in drawn if not line.own_axis for one in line.bins if one]
    if not shared:
        return None
    axis = axis_of([one.low for one in shared], [one.high for one in shared], what)
    right = max(1, what.last_step, *(one.last for one in shared))
    steps = Axis(what.first_step, max(right, what.first_step + 1), False)
    svg = tag(
        "svg",
        (rule(axis.at(value), "grid") for value in axis.ticks()),
        (part for line in drawn for part in shapes(line, axis, steps)),
        (rule(axis.at(value), "line dash") for value, _ in what.levels),
        viewBox=f"0 0 {SIZE} {SIZE}",
        preserveAspectRatio="none",
        role="img",
        aria_label=f"{what.label} over the steps. {' '.join(what.captions)}",
    )
    at_ticks = (tag("span", what.ticks(value), class_="y", style=f"bottom:{100 * axis.at(value):.2f}%")
                for value in axis.ticks())  # fmt: skip
    at_steps = (tag("span", f"{round(value):,}", class_="x last" if steps.at(value) > 0.95 else "x",
                    style=f"left:{100 * steps.at(value):.2f}%")
                for value in round_ticks(steps.low, steps.high) if value == round(value))  # fmt: skip
    at_levels = (tag("span", text, class_="limit",
                     style=f"bottom:calc({100 * axis.at(value):.2f}% + 2px);left:calc({50 * i}% + .3rem)")
                 for i, (value, text) in enumerate( what.levels))  # fmt: skip
    captions = [*what.captions, *axis_words(axis, drawn)]
    return tag(
        "figure",
        legend(drawn, what.words),
        tag("div", svg, at_ticks, at_steps, at_levels, class_="plot low"),
        tag("figcaption", " ".join(captions), class_="quiet below"),
        numbers(what, drawn),
    )


def axis_of(lows: Sequence[float], highs: Sequence[float], what: Chart) -> Axis:
    """Room for all values and levels; logarithmic where they are far apart and above 0."""
    low = min(*lows, *(value for value, _ in what.levels), math.inf)
    high = max(*highs, *(value for value, _ in what.levels), -math.inf)
    if what.from_zero:
        return Axis(0.0, 1.08 * high or 1.0, False, what.unit)
    if low > 0 and high / low > LOG_FROM:
        return Axis(low / 1.1, high * 1.1, True)
    room = 0.05 * (high - low) or abs(high) * 0.05 or 1.0
    return Axis(low - room, high + room, False, what.unit)


def axis_words(axis: Axis, drawn: Sequence[Line]) -> Iterator[str]:
    """What of the picture is not as it seems."""
    if axis.log:
        yield "The upward axis is logarithmic."
    elif axis.low > 0:
        yield "The upward axis does not begin at 0."
    sizes = [one.last - one.first + 1 for line in drawn if not line.dots for one in line.bins if one]
    if sizes and max(sizes) > 1:
        yield f"Each point is up to {max(sizes):,} steps: the line is their mean, the band their least and most."


def round_ticks(low: float, high: float, n: int = 5) -> list[float]:
    """About `n` round numbers between."""
    rough = (high - low) / n
    if not rough > 0 or not math.isfinite(rough):
        return []
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(digit * power for digit in (1, 2, 5, 10) if digit * power >= rough * 0.999)
    first = math.ceil(low / step)
    return [i * step for i in range(first, first + 2 * n + 2) if i * step <= high]


def rule(y: float, class_: str) -> Html:
    return tag("path", d=f"M0 {SIZE * (1 - y):.1f}H{SIZE}", class_=class_)


def shapes(line: Line, axis: Axis, steps: Axis) -> Iterator[Html]:
    """Its band where steps were put together, its line, and dots where it has few values."""
    if line.own_axis:
        axis = Axis(0.0, 1.05 * max(one.high for one in line.bins if one) or 1.0, False)

    def point(step: float, value: float) -> str:
        return f"{SIZE * steps.at(step):.1f} {SIZE * (1 - axis.at(value)):.1f}"

    for part in unbroken(line.bins):
        if any(one.high > one.low for one in part) and not line.own_axis:
            up = [point(one.middle, one.high) for one in part]
            down = [point(one.middle, one.low) for one in reversed(part)]
            yield tag("path", d=f"M{'L'.join(up + down)}Z", fill=line.colour, opacity="0.25")
        path = "L".join(point(one.middle, one.mean) for one in part)
        width = "1" if line.own_axis else "2"
        yield tag("path", d=f"M{path}", class_="curve", stroke=line.colour, stroke_width=width)
        if (line.dots and len(part) <= MAX_DOTS) or len(
            part
        ) == 1:  # a stroke of no length is a round dot, whatever the drawing is stretched to
            dots = "".join(f"M{point(one.middle, one.mean)}h0" for one in part)
            yield tag("path", d=dots, class_="curve", stroke=line.colour, stroke_width=7)


def unbroken(bins: Sequence[Bin | None]) -> Iterator[list[Bin]]:
    part: list[Bin] = []
    for one in (*bins, None):
        if one is not None:
            part.append(one)
        elif part:
            yield part
            part = []


def legend(drawn: Sequence[Line], words: Words) -> Html:
    def entry(line: Line) -> Part:
        scale = ""
        if line.own_axis:
            scale = f", on a scale of its own from 0 to {max(one.high for one in line.bins if one):.3g}"
        return mark(line.colour), f"{line.name}{scale}"

    return tag("ul", (tag("li", entry(line)) for line in drawn), class_="legend")


def mark(colour: str) -> Html:
    return tag("i", class_="swatch", style=f"background:{colour}", aria_hidden="true")


def numbers(what: Chart, drawn: Sequence[Line]) -> Html:
    """The lines as a table of a dozen rows at most: the steps are put together once more."""
    main = next(line for line in drawn if not line.own_axis)
    known = [one for one in main.bins if one]
    size = -(-len(known) // MAX_ROWS)
    rows: list[tuple[Part, ...]] = []
    for start in range(0, len(known), size):
        part = known[start : start + size]
        first, last = part[0].first, part[-1].last
        mean = math.fsum(one.mean for one in part) / len(part)
        low, high = min(one.low for one in part), max(one.high for one in part)
        others = [within(line, first, last, what.words) for line in drawn if line is not main]
        of = f"{first:,}" if first == last else f"{first:,} to {last:,}"
        rows.append((of, *map(what.words, (mean, low, high)), *others))
    names = [line.name for line in drawn if line is not main]
    columns = ("steps", "mean", "least", "most", *names)
    inner = table(columns, rows, f"{main.name}" + ("; the others as they were last" if names else ""), columns[1:])
    return tag("details", tag("summary", f"{what.label}: the numbers"), inner)


def within(line: Line, first: int, last: int, words: Words) -> str:
    """The last value of the line in these steps."""
    found = [one.mean for one in line.bins if one and first <= one.last and one.first <= last]
    return "" if not found else f"{found[-1]:.3g}" if line.own_axis else words(found[-1])


def lane(name: Part, track: Part, text: Part) -> Html:
    """A row of a figure: its name, what is drawn, and that in words."""
    parts = (tag("span", name), tag("div", track, class_="track", aria_hidden="true"), tag("span", text))
    return tag("div", parts, class_="lane")


def bar(low: float, high: float, colour: str) -> Html:
    """From `low` to `high`, shares of the track."""
    style = f"left:{100 * low:.2f}%;width:{max(0.3, 100 * (high - low)):.2f}%;background:{colour}"
    return tag("i", style=style)


def marks(places: Sequence[float], colour: str) -> Html:
    """An upright stroke at each share of the track."""
    xs = sorted({round(SIZE * place) for place in places})
    path = tag("path", d="".join(f"M{x} 0V10" for x in xs), class_="curve", stroke=colour, stroke_width=2)
    return tag("svg", path, viewBox=f"0 0 {SIZE} 10", preserveAspectRatio="none")
