"""Markup by construction: whatever is not `Html` is escaped when it becomes part of an element."""

import html
import json
from collections.abc import Iterable, Sequence

# Each category keeps its colour in every chart; told apart by those who see few colours (after Okabe and Ito), and
# visible on white as on black.
COLOURS = {
    "parameter": "#0072b2",
    "optimizer state": "#56b4e9",
    "gradient": "#009e73",
    "buffer": "#999933",
    "activation": "#e69f00",
    "logits": "#d55e00",
    "temporary": "#cc79a7",
    "workspace": "#aa4499",
    "slack": "#7f7f7f",
}
OTHER_COLOUR = "#8c8c8c"

VOID = frozenset(("meta", "link", "input", "br"))


class Html(str):
    """Text that is markup."""

    __slots__ = ()


Part = str | Iterable["Part"] | None


def joined(part: Part) -> Html:
    """The parts one after another, escaped where they are plain text."""
    if part is None:
        return Html()
    if isinstance(part, str):
        return part if isinstance(part, Html) else Html(html.escape(part))
    return Html("".join(map(joined, part)))


def tag(name: str, /, *content: Part, **attributes: str | int | float | bool | None) -> Html:
    """An element. `class_` is class, `aria_label` aria-label; True is an attribute without a value, None none."""
    written = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{html.escape(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    return Html(f"<{name}{written}>" if name in VOID else f"<{name}{written}>{joined(content)}</{name}>")


def data(value: object) -> Html:
    """JSON for the page's script; no `</script>` in it can end it."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Html('<script type="application/json">' + text.replace("<", "\\u003c") + "</script>")


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[Part]],
    caption: str,
    right: Sequence[str] = (),
    prose: bool = False,
) -> Html:
    """A table that scrolls by itself where it is wider than the page; columns in `right` are numbers.

    `prose`: the last column is text, and goes below the others on a narrow screen.
    """
    sides = ["number" if column in right else None for column in columns]
    head = tag("tr", (tag("th", column, scope="col", class_=side) for column, side in zip(columns, sides, strict=True)))
    body = (tag("tr", (tag("td", cell, class_=side) for cell, side in zip(row, sides, strict=True))) for row in rows)
    kind = "prose" if prose else None
    inner = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", body), class_=kind)
    return tag("div", inner, class_="scroll", tabindex=0, role="region", aria_label=caption)


def section(title: str, *content: Part) -> Html:
    return tag("section", tag("h2", title), content)


def colour_of(category: str) -> str:
    return COLOURS.get(category, OTHER_COLOUR)


def swatch(category: str) -> Html:
    return tag("i", class_="swatch", style=f"background:{colour_of(category)}", aria_hidden="true")
