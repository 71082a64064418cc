"""The plan drawn: choices as memory against speed, and what each single change does as a bar to either side."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gptfit.config import RunConfig, derive
from gptfit.estimate import Estimate, estimate
from gptfit.gpus import GpuProfile
from gptfit.levers import LeverEffect
from gptfit.plan import Plan
from gptfit.report.html_parts import Html, Part, table, tag
from gptfit.report.plans import change_text, delta_text
from gptfit.units import GiB, format_bytes

MAX_SIZES = 7  # micro-batches of a kind that are estimated for the picture
LOSSES, CHECKPOINTING = ("full", "chunked"), ("none", "block")
# Of the kinds, in the order of kinds(): apart for those who see few colours.
KIND_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7")


@dataclass(frozen=True, slots=True)
class Dot:
    """One estimated run in the picture. `role`: chosen, given or other."""

    estimate: Estimate
    role: str
    colour: str

    @property
    def label(self) -> str:
        config = self.estimate.config
        words = [f"batch_size {config['batch_size']}", f"{config['loss']} loss"]
        words += ["compiled"] if config["compile"] else ["eager"]
        words += ["checkpointed"] if config["activation_checkpointing"] != "none" else []
        budget = config["activation_memory_budget"]
        words += [f"memory budget {budget}"] if budget != 1.0 else []
        return ", ".join([*words, f"{self.estimate.program}'s code"])

    @property
    def tokens_per_second(self) -> float:
        return self.estimate.speed.tokens_per_second if self.estimate.speed else 0.0


def dots(plan: Plan, profile: GpuProfile) -> list[Dot]:
    """The choice, the run as given, the runners-up, and beside them what other losses, checkpointing and micro-batches
    would have done: doubled until one is too large."""
    found: dict[tuple[object, ...], Dot] = {}

    def add(one: Estimate, role: str, colour: str) -> None:
        found.setdefault((one.program, *one.config.values()), Dot(one, role, colour))

    best = plan.candidates[0] if plan.candidates else None
    if best is not None:
        add(best.estimate, "chosen", kind_colour(best.run))
    if plan.as_given is not None:
        add(plan.as_given, "given", "currentColor")
    for candidate in plan.candidates:
        add(candidate.estimate, "other", kind_colour(candidate.run))
    for run in others(best.run, plan.tokens_per_step) if best is not None else ():
        add(estimate(run, "gptfit", profile, plan.budget.reserve_bytes), "other", kind_colour(run))
    return list(found.values())


def others(base: RunConfig, tokens: int) -> Iterator[RunConfig]:
    """`base` with each loss and checkpointing, at doubling micro-batches up to twice its own."""
    for loss in LOSSES:
        for checkpointing in CHECKPOINTING:
            for size in (1 << n for n in range(MAX_SIZES)):
                if size > 2 * base.batch_size or size * base.block_size > tokens:
                    break
                steps = max(1, round(tokens / (size * base.block_size * base.n_gpus))) * base.n_gpus
                yield derive(
                    base,
                    loss=loss,
                    activation_checkpointing=checkpointing,
                    activation_memory_budget=1.0,  # which goes with all of them
                    batch_size=size,
                    gradient_accumulation_steps=steps,
                )


def kind_colour(run: RunConfig) -> str:
    at = 2 * (run.loss == LOSSES[0]) + (run.activation_checkpointing != CHECKPOINTING[0])
    return KIND_COLOURS[at]


KINDS = ("chunked loss", "chunked loss, checkpointed", "full loss", "full loss, checkpointed")


def scatter(plan: Plan, drawn: Sequence[Dot]) -> Html:
    """Memory to the right, speed upwards; what fits lies left of the line. Each dot can be reached by Tab."""
    usable = plan.budget.usable_bytes
    right = 1.08 * max(usable, *(one.estimate.process_bytes for one in drawn))
    speeds = [one.tokens_per_second for one in drawn]
    low, high = min(speeds), max(speeds)
    room = (high - low or high or 1.0) * 0.12
    low, high = max(0.0, low - room), high + room

    def place(one: Dot) -> str:
        x, y = one.estimate.process_bytes / right, (one.tokens_per_second - low) / (high - low)
        return f"left:{100 * x:.2f}%;bottom:{100 * y:.2f}%;border-color:{one.colour};color:{one.colour}"

    points = (
        tag(
            "button",
            type="button",
            class_=f"dot {one.role}" + ("" if one.estimate.verdict == "fits" else " over"),
            style=place(one) + ("" if one.role != "chosen" else f";background:{one.colour}"),
            aria_label=dot_text(one),
        )
        for one in sorted(drawn, key=lambda one: one.estimate.process_bytes)
    )
    x_ticks = [(right * i / 4, f"{right * i / 4 / GiB:.1f} GiB") for i in range(1, 4)]
    labels = (tag("span", text, class_="x", style=f"left:{100 * at / right:.2f}%") for at, text in x_ticks)
    y_ticks = [low + (high - low) * i / 4 for i in range(1, 4)]
    sides = (tag("span", f"{at:,.0f}", class_="y", style=f"bottom:{25 * i}%") for i, at in enumerate(y_ticks, 1))
    line = tag(
        "svg",
        tag("path", d="M0 0V100", class_="line dash", transform=f"translate({100 * usable / right:.2f} 0)"),
        viewBox="0 0 100 100",
        preserveAspectRatio="none",
        aria_hidden="true",
    )
    limit = tag(
        "span",
        f"free: {format_bytes(usable)}",
        class_="limit",
        style=f"left:auto;right:{100 - 100 * usable / right:.2f}%",
    )
    legend = tag("ul", (tag("li", entry) for entry in legend_entries()), class_="legend")
    plot = tag("div", line, labels, sides, limit, points, class_="plot scatter")
    axes = "Left to right: memory of the process. Upwards: tokens a second, predicted. Filled: the choice."
    return tag("figure", plot, tag("figcaption", axes, class_="quiet below"), legend, scatter_table(drawn))


def legend_entries() -> Iterator[Part]:
    for name, colour in zip(KINDS, KIND_COLOURS, strict=True):
        yield tag("i", class_="swatch", style=f"background:{colour}", aria_hidden="true"), name
    yield "□ as given; dashed: does not fit"


def dot_text(one: Dot) -> str:
    role = {"chosen": "chosen: ", "given": "as given: "}.get(one.role, "")
    fits = "fits" if one.estimate.verdict == "fits" else "does not fit"
    speed = f"{one.tokens_per_second:,.0f} tokens/s"
    return f"{role}{one.label}; {format_bytes(one.estimate.process_bytes)}, {speed}, {fits}"


def scatter_table(drawn: Sequence[Dot]) -> Html:
    rows = (
        (
            {"chosen": "chosen", "given": "as given"}.get(one.role, ""),
            one.label,
            format_bytes(one.estimate.process_bytes),
            f"{one.tokens_per_second:,.0f}",
            "fits" if one.estimate.verdict == "fits" else "does not fit",
        )
        for one in sorted(drawn, key=lambda one: (-one.tokens_per_second, one.estimate.process_bytes))
    )
    inner = table(("", "run", "process", "tokens/s", "verdict"), rows, "The same as a table", ("process", "tokens/s"))
    return tag("details", tag("summary", f"These {len(drawn)} runs as a table"), inner)


def levers_table(levers: Sequence[LeverEffect]) -> Html:
    """Single changes to the run as given: to the left what saves memory, to the right what costs it."""
    largest = max((abs(lever.process_delta_bytes) for lever in levers), default=0) or 1
    rows = (
        (
            tag("code", change_text(lever.change) + (" *" if lever.changes_numerics else "")),
            bar(lever.process_delta_bytes, largest),
            delta_text(lever.process_delta_bytes),
            "" if lever.delta_seconds_pct is None else f"{lever.delta_seconds_pct:+.0f} %",
            "fits" if lever.fits else "",
            lever.why,
        )
        for lever in levers
    )
    columns = ("change", "less | more memory", "MiB of the process", "time", "then", "why")
    return table(
        columns,
        rows,
        "Each by estimating the run again; * changes the numbers of training",
        ("MiB of the process", "time"),
        True,
    )


def bar(delta_bytes: int, largest: int) -> Html:
    width = f"width:{100 * abs(delta_bytes) / largest:.1f}%"
    side = tag("i", class_="less" if delta_bytes < 0 else "more", style=width) if delta_bytes else None
    return tag("div", tag("b", side if delta_bytes < 0 else None), tag("span", side if delta_bytes > 0 else None),
               class_="bars", aria_hidden="true")  # fmt: skip
