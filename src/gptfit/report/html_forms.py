"""The pages of `gptfit serve`: the two questions as forms, and an explained out-of-memory error."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from gptfit.report.html import bullets, document, footer
from gptfit.report.html_parts import Html, Part, section, table, tag
from gptfit.report.lists import figures_read
from gptfit.units import format_bytes, format_mib

if TYPE_CHECKING:
    from gptfit.oom.diagnose import Diagnosis

HOME = tag("nav", tag("a", "← another question", href="/"))
TITLE = "gptfit: does it fit?"


def start_page(
    cards: Sequence[tuple[str, str]],
    presets: Sequence[tuple[str, str]],
    fields: Mapping[str, str] | None = None,
    error: tuple[str, str] | None = None,
) -> Html:
    """Both forms. `cards`, `presets`: names and titles; `fields`: what was filled in; `error`: a line and a hint."""
    given = fields or {}
    said = None
    if error is not None:
        said = tag("div", tag("p", f"error: {error[0]}"), tag("p", f"hint: {error[1]}") if error[1] else None,
                   class_="error", role="alert", id="error")  # fmt: skip
    return document(
        TITLE if error is None else f"Error: {error[0]}",
        tag("header", tag("h1", TITLE)),
        said,
        section("Does this run fit?", fit_form(cards, presets, given)),
        section("Why did it run out of memory?", oom_form(given)),
        footer("gptfit serve"),
    )


def fit_form(cards: Sequence[tuple[str, str]], presets: Sequence[tuple[str, str]], given: Mapping[str, str]) -> Html:
    card_choices = [("", "none: memory alone"), ("auto", "the card of this machine"), *cards]
    programs = [("", "the config's own"), ("gptfit", "gptfit"), ("nanogpt", "nanoGPT")]
    return tag(
        "form",
        tag(
            "div",
            tag("div", choice("gpu", "Card", card_choices, given.get("gpu", "rtx4070"))),
            tag("div", choice("preset", "Model", presets, given.get("preset", "gpt2"))),
            tag("div", line("keys", "Changes, as KEY=VALUE", given, "batch_size=8 block_size=2048")),
            tag("div", line("reserve", "Held by others on the card", given, "1.5GiB")),
            tag("div", choice("program", "Whose code runs it", programs, given.get("program", ""))),
            class_="pair",
        ),
        box("pasted", "Instead of a model: the text of a nanoGPT config", given, 4, "batch_size = 12"),
        tag("button", "Plan the best run", type="submit", name="what", value="plan"),
        tag("button", "Estimate exactly this", type="submit", name="what", value="estimate"),
        method="post",
        action="/fit",
    )


def oom_form(given: Mapping[str, str]) -> Html:
    return tag(
        "form",
        box(
            "paste", "The traceback, or the end of the log", given, 10, "torch.OutOfMemoryError: CUDA out of memory. …"
        ),
        line("run", "What is known of the run, as KEY=VALUE", given, "n_layer=12 n_embd=768 batch_size=12"),
        tag("button", "Explain", type="submit"),
        method="post",
        action="/oom",
    )


def choice(name: str, text: str, choices: Iterable[tuple[str, str]], chosen: str) -> Iterable[Part]:
    yield tag("label", text, for_=name)
    options = (tag("option", label, value=value, selected=value == chosen) for value, label in choices)
    yield tag("select", options, id=name, name=name)


def line(name: str, text: str, given: Mapping[str, str], example: str) -> Iterable[Part]:
    yield tag("label", text, for_=name)
    yield tag("input", id=name, name=name, value=given.get(name, ""), placeholder=example, autocomplete="off",
              autocapitalize="off", spellcheck="false")  # fmt: skip


def box(name: str, text: str, given: Mapping[str, str], rows: int, example: str) -> Iterable[Part]:
    yield tag("label", text, for_=name)
    # A line break right after the tag is not part of the text.
    yield tag("textarea", "\n", given.get(name, ""), id=name, name=name, rows=rows, placeholder=example,
              autocomplete="off", autocapitalize="off", spellcheck="false")  # fmt: skip


def oom_page(answer: "Diagnosis") -> Html:
    """What `gptfit explain-oom` says."""
    what, _, why = answer.summary.partition(" Why: ")
    parts: list[Part] = [HOME, tag("header", tag("h1", what), tag("p", f"Why: {why}") if why else None)]
    if answer.instant is not None:
        rows = [(row.name, format_mib(row.n_bytes)) for row in answer.instant.rows if row.n_bytes >= 1 << 20]
        alive = table(("alive", "MiB"), rows, answer.instant.sentence(), ("MiB",))
        parts.append(section("Alive at that instant", alive))
    if answer.remedies:
        enough = {True: "enough", False: "not enough alone", None: ""}
        rows = [
            (
                tag("code", one.change),
                "" if one.saves_bytes is None else f"saves {format_bytes(one.saves_bytes)}",
                enough[one.enough],
                one.why,
            )
            for one in answer.remedies
        ]
        helps = table(
            ("change", "memory", "then", "why"), rows, answer.heading or "Best first", ("memory",), prose=True
        )
        parts.append(section("What helps", helps))
    if answer.not_remedies:
        rows = [(tag("code", one.change), one.why) for one in answer.not_remedies]
        parts.append(section("What does not", table(("change", "why"), rows, "Often advised", prose=True)))
    if known := figures_read(answer):
        parts.append(section("Read from the text", table(("figure", "memory"), known, "As printed", ("memory",))))
    if answer.recognised:
        rows = [(key, f"{value}") for key, value in sorted(answer.recognised.items())]
        parts.append(section("The run, from the text", table(("key", "value"), rows, "Keys that the text tells")))
    if answer.warnings:
        parts.append(section("Notes", bullets(answer.warnings)))
    return document(what, *parts, footer("gptfit explain-oom"))


def message_page(text: str, hint: str = "") -> Html:
    """One line where there is no answer: no such page, too much text, too many at once."""
    return document(text, HOME, tag("header", tag("h1", text)), tag("p", hint) if hint else None)
