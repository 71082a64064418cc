"""The names that figures in the documents are computed with, each from what a command prints with --json."""

import importlib
import inspect
import json
import re
from collections.abc import Iterable
from functools import cache
from typing import Any

import typer
import yaml

import gptfit as package
from documents import ROOT, run
from gptfit.cli import app

MiB = 1 << 20


class Answer(dict[str, Any]):
    """The object that a command prints with --json, and short names for the figures of an estimate."""

    def __getattr__(self, name: str) -> int:
        return self["peak"][f"{name}_bytes"]

    def of(self, category: str) -> int:
        """Bytes of a category at the peak."""
        return sum(row["bytes"] for row in self["breakdown"] if row["category"] == category)

    def tensor(self, name: str) -> int:
        """Bytes of the rows of the live set whose names match, together. There has to be one."""
        found = [row["bytes"] for row in self["tensors"] if re.fullmatch(name, row["name"])]
        assert found, f"{name} is not alive at the peak: {[row['name'] for row in self['tensors']]}"
        return sum(found)

    def phase(self, name: str) -> int:
        return next(row["peak_live_bytes"] for row in self["phases"] if row["name"] == name)


@cache
def ask(command: str) -> Answer:
    """What `gptfit COMMAND` answers."""
    text = run(f"gptfit {command} --json")
    start = re.search(r"^\{$", text, re.MULTILINE)  # what libraries say on stderr comes before
    assert start is not None, text[:500]
    return Answer(json.loads(text[start.start() :]))


def mib(n_bytes: float) -> str:
    return f"{n_bytes / MiB:,.1f} MiB"


def gib(n_bytes: float) -> str:
    return f"{n_bytes / (MiB << 10):.2f} GiB"


def size(n_bytes: int) -> str:
    """A size that is a whole number of a unit: `2 MiB`."""
    for unit in ("MiB", "KiB"):
        if n_bytes % (MiB if unit == "MiB" else 1024) == 0:
            return f"{n_bytes // (MiB if unit == 'MiB' else 1024):,} {unit}"
    return f"{n_bytes:,} bytes"


def change(n_bytes: float) -> str:
    return f"{n_bytes / MiB:+,.1f} MiB" if n_bytes else "nothing"


def percent(share: float, digits: int = 1) -> str:
    return f"{share * 100:.{digits}f} %"


def constant(path: str) -> Any:
    """A number of the program's: `memory.allocator.SMALL_LIMIT`."""
    module, name = f"gptfit.{path}".rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


def table(head: str, rows: Iterable[Iterable[object]]) -> str:
    """A table with its lines: `head` is `name | rows`, all columns but the first to the right."""
    columns = [column.strip() for column in head.split("|")]
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *([str(cell) for cell in row] for row in rows)]
    return "\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n\n"


def commands_of(group: Any, path: str = "") -> dict[str, Any]:
    """All commands by the words that reach them: `plan`, `data prepare`."""
    found: dict[str, Any] = {}
    for name, command in getattr(group, "commands", {}).items():
        words = f"{path} {name}".strip()
        found |= commands_of(command, words) if hasattr(command, "commands") else {words: command}
    return found


COMMANDS = commands_of(typer.main.get_command(app))


def command_reference() -> str:
    texts = {name: run(f"gptfit {name} --help") for name in COMMANDS}
    assert all(text.startswith("Usage:") for text in texts.values()), texts
    parts = [f"## gptfit {name}\n\n```text\n{text}```" for name, text in texts.items()]
    return "\n\n" + "\n\n".join(parts) + "\n\n"


def command_list() -> str:
    rows = [f"* [`gptfit {name}`](#gptfit-{name.replace(' ', '-')})" for name in COMMANDS]
    return "\n\n" + "\n".join(rows) + "\n\n"


def annotation(hint: Any) -> str:
    text = hint if isinstance(hint, str) else inspect.formatannotation(hint)
    return ": " + re.sub(r"\b(?:\w+\.)+(?=\w)", "", text).strip("'\"")


def public_functions() -> list[str]:
    return [name for name in package.__all__ if inspect.isfunction(getattr(package, name))]


def signature(name: str, module: str = "api") -> str:
    """A function of the interface as its source has it, types in words, and what its docstring says."""
    function = constant(f"{module}.{name}")
    parts = []
    star = False
    for parameter in inspect.signature(inspect.unwrap(function)).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            star = True
            parts.append("*")
        star = star or parameter.kind is parameter.VAR_POSITIONAL
        note = "" if parameter.annotation is parameter.empty else annotation(parameter.annotation)
        mark = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        parts.append(f"{mark}{parameter.name}{note}{default}")
    lines = "".join(f"    {part},\n" for part in parts)
    doc = inspect.cleandoc(function.__doc__ or "")
    return f"\n\n```text\ngptfit.{name}(\n{lines})\n```\n\n{doc}\n\n"


def accuracy_classes() -> str:
    answer = ask("accuracy")
    rows = []
    for name, found in answer["classes"].items():
        if found["rows"]:
            mean, worst = (found[f"{what}_error"] for what in ("mean", "worst"))
            told = ("", f"{found['right']} right") if mean is None else (percent(mean, 2), percent(worst, 2))
            rows.append((name, found["rows"], *told))
    return table("figure | measurements | mean error | worst error", rows)


def accuracy_rows() -> str:
    found = [row for row in ask("accuracy")["rows"] if row["role"] != "excluded" and row["error"] is not None]
    return table(
        "measurement | figure | role | measured, MiB | predicted, MiB | error",
        (
            (
                f"`{row['id']}`",
                row["class"],
                row["role"],
                f"{row['measured_bytes'] / MiB:,.1f}",
                f"{row['predicted_bytes'] / MiB:,.1f}",
                f"{row['error'] * 100:+.2f} %",
            )
            for row in sorted(found, key=lambda row: (row["class"], -abs(row["error"])))
        ),
    )


def holdout(kind: str) -> str:
    """How far off the rows of a kind are that nothing was taken from."""
    rows = [row for row in ask("accuracy")["rows"] if row["class"] == kind and row["role"] == "holdout"]
    return f"{len(rows)}, " + ", ".join(f"{row['error'] * 100:+.2f} %" for row in rows) + " off"


def gates() -> str:
    found = constant("accuracy.GATES")
    return table(
        "figure | each row | the mean", ((name, percent(g.each, 2), percent(g.mean, 2)) for name, g in found.items())
    )


def excluded() -> int:
    return sum(row["role"] == "excluded" for row in ask("accuracy")["rows"])


def interval_errors() -> str:
    found = yaml.safe_load(constant("interval.ERRORS").read_text("utf-8"))
    rows = ((name, percent(entry["value"]), entry["source"]) for name, entry in found.items())
    return table("kind | share | because", rows)


SHAPE = "n_layer=2 n_head=4 n_embd=128 vocab_size=4096 block_size=128 batch_size=4 gradient_accumulation_steps=2"
VERIFIED = {
    "nanoGPT's code, eager": "compile=False --program nanogpt",
    "ours, eager, chunked loss": "compile=False",
    "ours, eager, full loss, checkpointed": "compile=False loss=full activation_checkpointing=block",
    "ours, compiled": "compile=True",
}


def verified() -> str:
    """Estimate and trace of some small runs."""
    rows = []
    for name, changes in VERIFIED.items():
        answer = ask(f"verify {SHAPE} {changes}")
        estimated, traced = answer["estimate"]["peak"]["live_bytes"], answer["traced"]["live_bytes"]
        rows.append((name, f"{estimated:,}", f"{traced:,}", f"{(estimated / traced - 1) * 100:+.3f} %"))
    return table("step | estimated live peak, bytes | traced, bytes | error", rows)


def same(by_hand: float, told: float) -> str:
    """A product that the page writes out, where it is what the program says; else the page is wrong."""
    assert by_hand == told, f"{by_hand} by hand, {told} by the program"
    return mib(told)


def kept_per_token(command: str) -> str:
    """What is alive of each block at the peak, in bytes a token and layer."""
    answer = ask(f"estimate {command}")
    config = answer["config"]
    batch, width, layers = config["batch_size"], config["n_embd"], config["n_layer"]
    tokens = batch * config["block_size"]
    rows = [
        (row["name"], row["dtype"], row["bytes"] / row["count"] / tokens)
        for row in answer["tensors"]
        if row["category"] == "activation" and row["name"].startswith("h.*") and row["shape"][:1] == [batch]
        if row["count"] >= layers
    ]
    wide = [(f"`{name}`", dtype, f"{each / width:.0f} × n_embd") for name, dtype, each in rows if each % width == 0]
    rest = sum(each for _, _, each in rows if each % width)
    total = sum(each for _, _, each in rows if each % width == 0) / width
    return table(
        "kept for backward | dtype | bytes a token and layer",
        [
            *wide,
            ("one number a row or head", "float32", f"{rest:.0f}"),
            ("together", "", f"{total:.0f} × n_embd + {rest:.0f}"),
        ],
    )


def optimizer_states() -> str:
    """Bytes a parameter of each optimizer, and what its step adds to the peak of the optimizer's phase."""
    rows = []
    for name in constant("memory.optimizers.OPTIMIZERS"):
        answer = ask(f"estimate gpt2 optimizer={name}")
        rows.append((f"`{name}`", f"{answer.of('optimizer state') / answer['n_params']:.2f}"))
    return table("optimizer | bytes a parameter", rows)


def said(verdict: str, holds: bool) -> str:
    """A verdict in words, where what it rests on holds; else the page is wrong."""
    assert holds, f"no longer so: {verdict}"
    return f"**{verdict}**"


def recordings() -> str:
    """Recordings of real GPUs that the tests replay: segment events in the order, place and size of the model's."""
    rows = []
    for path in sorted((ROOT / "tests" / "data" / "snapshots").glob("*.json.gz")):
        answer = ask(f"replay tests/data/snapshots/{path.name}")
        found = answer["recorded"]
        peaks = (found["peak_reserved_bytes"], answer["peak_reserved_bytes"])
        matched = f"{found['segment_events_matched']:,} of {found['segment_events_total']:,}"
        name = path.name.split(".")[0]
        rows.append((f"`{name}`", f"{answer['events']:,}", matched, *(f"{peak:,}" for peak in peaks)))
    return table("recording | events | segments as recorded | peak reserved, recorded | replayed", rows)


def settings_of_segments() -> str:
    """Reserved of nanoGPT's GPT-2, compiled, by micro-batch, with and without expandable segments."""
    rows = []
    for batch in (8, 12, 16, 24, 32):
        plain, wide = (
            ask(f"estimate gpt2 batch_size={batch} expandable_segments={on} --program nanogpt") for on in (False, True)
        )
        rows.append((batch, *(f"{figure / MiB:,.0f}" for figure in (plain.live, plain.reserved, wide.reserved))))
    return table("micro-batch | live, MiB | reserved, plain segments | reserved, expandable", rows)


KEPT_LESS = (
    "compile=False",
    "compile=False recompute_cheap=True",
    "compile=False activation_checkpointing=attention",
    "compile=False activation_checkpointing=block",
    "compile=False activation_offload=True",
    "compile=True",
    "activation_memory_budget=0.9",
    "activation_checkpointing=block",
    "activation_checkpointing=block checkpoint_every=2",
)


def kept_less() -> str:
    """What keeps less for backward, in gptfit's code."""
    rows = []
    for changes in KEPT_LESS:
        answer = ask(f"estimate gpt2 batch_size=12 {changes}")
        saved = answer["saved_for_backward_bytes"]
        rows.append((f"`{changes}`", f"{saved / MiB:,.0f}", f"{answer.live / MiB:,.0f}"))
    return table("keys | saved for backward, MiB | live at the peak, MiB", rows)
