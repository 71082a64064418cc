"""What `gptfit doctor` prints: the answer, what to look at with what to do, and what is fine."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from gptfit.report.terminal import BAD, GOOD, UNSURE, table, title

if TYPE_CHECKING:
    from gptfit.doctor import Health

STYLES = {"bad": BAD, "warn": UNSURE}


def doctor_view(health: "Health") -> Iterator[RenderableType]:
    """What is wrong first, each with its fix on a line that can be copied."""
    yield Text(health.answer, style=STYLES["warn"] if health.wrong else GOOD)
    for check in sorted(health.wrong, key=lambda check: check.state != "bad"):
        yield Text("")
        yield Padding(
            Text.assemble((f"{check.state}: ", STYLES[check.state]), f"{check.name}: {check.text}"), (0, 0, 0, 2)
        )
        if check.fix:
            command = check.fix.startswith("pip ")  # to be copied, so never wrapped
            yield Padding(Text(check.fix), (0, 0, 0, 4)) if not command else Text(f"    {check.fix}", no_wrap=True)
    rows = [(check.name, check.text) for check in health.checks if check not in health.wrong]
    if rows:
        yield title("Looked at")
        yield table(("", " "), rows)
