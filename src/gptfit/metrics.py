"""metrics.jsonl: one JSON object a step, each step once however often the run was resumed."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gptfit.events import Stepped
from gptfit.replacing import not_written, replacing

NAME = "metrics.jsonl"

# Keys of the lines of steps that were evaluated, or left out.
SOMETIMES = ("val_loss", "val_bpb", "skipped")


def append(folder: Path, record: Stepped) -> None:
    """Adds one line. What is no finite number is null: JSON has no word for it.

    Raises GptfitError where the disk is full or cannot be written; what a resume finds then is a torn line at most.
    """
    plain = {key: finite(value) for key, value in asdict(record).items() if key not in SOMETIMES or value is not None}
    try:
        with (folder / NAME).open("a", encoding="utf-8") as file:
            file.write(json.dumps(plain) + "\n")
    except OSError as error:
        raise not_written(folder / NAME, error) from error


def read(folder: Path) -> list[dict[str, Any]]:
    """The lines, without a last one that a crash cut short; none where there is no file."""
    path = folder / NAME
    return [entry for _, entry in _lines(path.read_text(encoding="utf-8"))] if path.exists() else []


def keep_until(folder: Path, step: int) -> None:
    """Removes what a run that goes on from `step` will write again: later steps, repeated ones, a torn last line."""
    path = folder / NAME
    if not path.exists():
        return
    kept = [line for line, entry in _lines(path.read_text(encoding="utf-8")) if entry["step"] <= step]
    with replacing(path) as file:
        file.write("".join(line + "\n" for line in kept).encode())


def finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Lines that are objects with a step, in the file's order."""
    entries = []
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            entries.append((line, entry))
    return entries
