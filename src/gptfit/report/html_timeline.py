"""A step drawn over its allocations: bytes by category, its phases, the limits of the card, and what is alive when."""

from collections.abc import Iterator

from gptfit.estimate import Estimate
from gptfit.memory.tape import Buffer
from gptfit.report.html_parts import COLOURS, Html, colour_of, data, swatch, table, tag
from gptfit.report.timeline import Instant, Span, Timeline
from gptfit.units import GiB, MiB, format_bytes, format_mib

WIDTH, HEIGHT = 1000, 1000  # of the drawing, which is stretched to the page
COLUMNS = ("alive", "MiB", "count", "shape", "dtype", "category")
RIGHT = ("MiB", "count")


def timeline_figure(estimate: Estimate, drawn: Timeline, title: str) -> Html:
    """The chart of one estimate. It stands on what the process holds beside tensors at the peak, so that its top is
    the process figure, beside the card's."""
    base_bytes = estimate.process_bytes - estimate.live_bytes
    budget = estimate.budget
    highest = max(estimate.process_bytes, base_bytes + max(one.live_bytes for one in drawn.instants))
    full = 1.04 * max(highest, budget.total_bytes if budget else 0)
    peak = drawn.instants[drawn.peak]
    label = f"{title}: {format_bytes(peak.live_bytes)} of tensors at the peak, in {peak.phase} ({peak.op})"
    svg = tag(
        "svg",
        areas(drawn, base_bytes, full),
        (rule(step, full, "grid") for step in ticks(full)),
        (rule(n_bytes, full, "line dash") for n_bytes, _ in limits(estimate)),
        mark(peak.x, "line dash"),
        mark(peak.x, "line cursor"),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        preserveAspectRatio="none",
        role="img",
        aria_label=label,
    )
    at_ticks = (
        tag("span", f"{step / GiB:g} GiB", class_="y", style=f"bottom:{100 * step / full:.2f}%") for step in ticks(full)
    )
    at_limits = (
        tag("span", text, class_="limit", style=f"bottom:calc({100 * n_bytes / full:.2f}% {shift})")
        for (n_bytes, text), shift in zip(limits(estimate), ("+ 2px", "- 1.1rem"), strict=False)
    )
    return tag(
        "figure",
        tag("div", svg, at_ticks, at_limits, class_="plot"),
        strip(drawn.phases, peak, "phases"),
        strip(drawn.parts, peak, "parts"),
        slider(drawn),
        legend(peak, base_bytes),
        tag("p", f"{peak.phase} ({peak.op}): {format_mib(peak.live_bytes)} MiB of tensors", class_="words"),
        table(COLUMNS, rows(peak), "The largest of what is alive at the instant shown", RIGHT),
        tag("figcaption", CAPTION, class_="quiet"),
        data(record(drawn)),
        data_timeline=True,
    )


CAPTION = (
    "From left to right: the allocations and frees of one steady step, in their order; not time, and no phase is drawn "
    "too narrow to be seen. The grey foot is what the process holds beside tensors at the peak: CUDA context, "
    "libraries, workspaces, and what the allocator keeps."
)


def limits(estimate: Estimate) -> list[tuple[int, str]]:
    """The card's lines: what it has, and what is left of it for this process."""
    budget = estimate.budget
    if budget is None:
        return []
    if not budget.reserve_bytes:
        return [(budget.total_bytes, f"{budget.name}: {format_bytes(budget.total_bytes)}")]
    return [
        (budget.total_bytes, f"{budget.name}: {format_bytes(budget.total_bytes)}"),
        (budget.usable_bytes, f"free for this run: {format_bytes(budget.usable_bytes)}"),
    ]


def ticks(full: float) -> list[int]:
    """Four to eight round steps of GiB below `full`."""
    step = 1 / 64
    while full / GiB / step > 8:
        step *= 2
    return [round(i * step * GiB) for i in range(1, int(full / GiB / step) + 1)]


def areas(drawn: Timeline, base_bytes: int, full: float) -> Iterator[Html]:
    """One area a category, each from the floor up to its sum with those below; the lowest is painted last."""
    names = [name for name in COLOURS if any(one.categories.get(name) for one in drawn.instants)]
    names += sorted({name for one in drawn.instants for name in one.categories} - set(names) - set(COLOURS))
    sums = [[base_bytes + sum(one.categories.get(name, 0) for name in names[:n]) for one in drawn.instants]
            for n in range(len(names) + 1)]  # fmt: skip
    for name, tops in reversed(list(zip(["", *names], sums, strict=True))):
        path = outline(drawn.instants, [HEIGHT * (1 - top / full) for top in tops])
        yield tag("path", tag("title", name or "beside tensors"), d=path, fill=colour_of(name) if name else None,
                  class_=None if name else "base")  # fmt: skip


def outline(instants: tuple[Instant, ...], ys: list[float]) -> str:
    """Stairs over the instants, closed along the floor; steps of equal height are one."""
    path, last = [f"M0 {HEIGHT}"], None
    for one, y in zip(instants, ys, strict=True):
        if round(y, 1) != last:
            last = round(y, 1)
            path.append(f"H{WIDTH * one.x:.1f}V{last:g}")
    return "".join([*path, f"H{WIDTH}V{HEIGHT}Z"])


def rule(n_bytes: float, full: float, class_: str) -> Html:
    y = HEIGHT * (1 - n_bytes / full)
    return tag("path", d=f"M0 {y:.1f}H{WIDTH}", class_=class_)


def mark(x: float, class_: str) -> Html:
    return tag("path", d=f"M0 0V{HEIGHT}", transform=f"translate({WIDTH * x:.1f} 0)", class_=class_)


def strip(spans: tuple[Span, ...], peak: Instant, class_: str) -> Html:
    """Names below the chart; the one that the peak is in stands out."""
    return tag(
        "div",
        (
            tag(
                "span",
                span.name,
                title=span.name,
                class_="is-peak" if span.start <= peak.x < span.end else None,
                style=f"left:{100 * span.start:.2f}%;width:{100 * (span.end - span.start):.2f}%",
            )
            for span in spans
        ),
        class_=f"strip {class_}",
    )


def slider(drawn: Timeline) -> Html:
    """For keyboards and fingers; hidden until the script that it needs has run."""
    last = len(drawn.instants) - 1
    field = tag("input", type="range", min=0, max=last, value=drawn.peak, aria_label="Instant of the step")
    return tag("div", field, tag("button", "Peak", type="button"), class_="instant", hidden=True)


def legend(peak: Instant, base_bytes: int) -> Html:
    entries = [(swatch(name), f"{name} {format_mib(peak.categories.get(name, 0))}") for name in COLOURS
               if name in peak.categories]  # fmt: skip
    base = tag("i", class_="swatch base", aria_hidden="true")
    entries.append((base, f"beside tensors {format_mib(base_bytes)}"))
    return tag("ul", (tag("li", entry) for entry in entries), class_="legend", aria_label="MiB at the peak")


def rows(instant: Instant) -> Iterator[tuple[str, ...]]:
    for buffer, count in instant.largest:
        name, *rest = described(buffer)
        yield (name, format_mib(buffer.n_bytes * count), f"{count}", *rest)


def described(buffer: Buffer) -> tuple[str, str, str, str]:
    return buffer.name, " × ".join(map(str, buffer.shape)), buffer.dtype, buffer.category


def record(drawn: Timeline) -> dict[str, object]:
    """What the script needs: each buffer once, and the instants by their numbers."""
    numbers: dict[Buffer, int] = {}
    instants = [
        {
            "x": round(one.x, 4),
            "words": f"{one.phase} ({one.op})",
            "mib": round(one.live_bytes / MiB, 2),
            "rows": [[numbers.setdefault(buffer, len(numbers)), count] for buffer, count in one.largest],
        }
        for one in drawn.instants
    ]
    buffers = [[*described(buffer), round(buffer.n_bytes / MiB, 4)] for buffer in numbers]
    return {"peak": drawn.peak, "buffers": buffers, "instants": instants}
