"""Every published measurement that gptfit ships, predicted and compared.

A row has a role: `calibration` (a number of a profile comes from it), `holdout` (nothing does), `excluded` (with
the reason). Gates are on the classes below; a row that cannot be predicted is an error, not a pass.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from gptfit.config import make_run
from gptfit.errors import GptfitError
from gptfit.estimate import Estimate, estimate
from gptfit.gpus import shipped_gpu
from gptfit.throughput import SpeedErrors, speed_errors
from gptfit.units import MiB, parse_size

ROWS = Path(__file__).parent / "measured" / "peaks.jsonl"

# Peaks of programs that gptfit does not mirror, each traced from a rewritten copy of it (benchmarks/real_cards.py).
TRACED = ROWS.with_name("traced.jsonl")

FIGURES = {
    "max_memory_allocated": "allocated_bytes",
    "max_allocated": "allocated_bytes",
    "max_reserved": "reserved_bytes",
    "nvidia_smi_total": "process_bytes",
    "nvidia_smi_process": "process_bytes",
}


@dataclass(frozen=True, slots=True)
class Gate:
    """The largest error that a row of a class may have, and the mean of all its rows; fractions."""

    each: float
    mean: float


GATES = {
    "allocated, eager": Gate(0.005, 0.001),
    "allocated, compiled": Gate(0.03, 0.03),
    "other code, eager": Gate(0.005, 0.003),
    "other code, compiled": Gate(0.03, 0.02),
    "process": Gate(0.04, 0.015),
}


@dataclass(frozen=True, slots=True)
class Compared:
    """One row: what was measured, what is predicted, and the relative error (of a verdict: whether it is right)."""

    id: str
    gpu: str
    metric: str
    role: str
    reason: str
    kind: str
    measured_bytes: int | None
    predicted_bytes: int | None
    right: bool | None

    @property
    def error(self) -> float | None:
        if self.measured_bytes is None or self.predicted_bytes is None:
            return None
        return self.predicted_bytes / self.measured_bytes - 1

    def to_json(self) -> dict[str, object]:
        return {
            "id": self.id,
            "gpu": self.gpu,
            "metric": self.metric,
            "role": self.role,
            "reason": self.reason,
            "class": self.kind,
            "measured_bytes": self.measured_bytes,
            "predicted_bytes": self.predicted_bytes,
            "error": self.error,
            "right": self.right,
        }


@dataclass(frozen=True, slots=True)
class Accuracy:
    """All rows, and the gates that were missed."""

    rows: tuple[Compared, ...]
    speed: SpeedErrors | None = None  # of the rows that gptfit ships; there is no gate on it

    def of_kind(self, kind: str) -> list[Compared]:
        return [row for row in self.rows if row.kind == kind and row.role != "excluded"]

    def missed(self) -> list[str]:
        found = [f"{row.id}: the verdict is wrong" for row in self.of_kind("verdict") if not row.right]
        for kind, gate in GATES.items():
            errors = {row.id: abs(row.error) for row in self.of_kind(kind) if row.error is not None}
            found += [
                f"{name}: {error:.2%} off, {gate.each:.2%} allowed"
                for name, error in errors.items()
                if error > gate.each
            ]
            if errors and mean(errors.values()) > gate.mean:
                found.append(f"{kind}: {mean(errors.values()):.2%} off on average, {gate.mean:.2%} allowed")
        return found

    def to_json(self) -> dict[str, object]:
        classes = {}
        for kind in (*GATES, "verdict"):
            rows = self.of_kind(kind)
            errors = [abs(row.error) for row in rows if row.error is not None]
            classes[kind] = {
                "rows": len(rows),
                "mean_error": mean(errors) if errors else None,
                "worst_error": max(errors) if errors else None,
                "right": sum(1 for row in rows if row.right) if kind == "verdict" else None,
            }
        return {
            "schema": "gptfit.accuracy/1",
            "passed": not self.missed(),
            "missed": self.missed(),
            "classes": classes,
            "speed": self.speed.to_json() if self.speed else None,
            "rows": [row.to_json() for row in self.rows],
        }


def accuracy(path: Path | None = None) -> Accuracy:
    """Compares the rows that gptfit ships, or those of a JSONL file. Raises GptfitError for an unreadable file."""
    traced = {str(row["id"]): row for row in read_rows(TRACED)}
    rows = tuple(compare(row, traced) for row in read_rows(path or ROWS))
    return Accuracy(rows, speed_errors() if path is None else None)


def read_rows(path: Path) -> Iterable[Mapping[str, object]]:
    """The objects of a JSONL file. Raises GptfitError, with the line, for what is none, and where there is none."""
    hint = "one JSON object a line, as gptfit measure writes them"
    rows: list[Mapping[str, object]] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise GptfitError(f"cannot read {path}: it is not UTF-8 text", hint) from None
    except OSError as error:
        raise GptfitError(f"cannot read {path}: {(error.strerror or str(error)).lower()}", hint) from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise GptfitError(f"{path}:{number}: not JSON: {str(error)[:80]}", hint) from None
        if not isinstance(row, dict) or not {"id", "metric", "program"} <= row.keys():
            raise GptfitError(
                f"{path}:{number} is no measurement", "a row has at least id, metric, program, config and mib"
            )
        rows.append(row)
    if not rows:
        raise GptfitError(f"there is no measurement in {path}", hint)
    return rows


def compare(row: Mapping[str, object], traced: Mapping[str, Mapping[str, object]]) -> Compared:
    """Predicts one row, or takes what was `traced` for it. What gptfit does not model is excluded, with the reason,
    whatever the row says."""
    role, reason = str(row.get("role", "holdout")), str(row.get("reason", ""))
    measured = round(float(str(row["mib"])) * MiB) if row.get("mib") is not None else None
    metric, gpu = str(row["metric"]), str(row.get("gpu", ""))
    kind, predicted, right = "", None, None
    record = traced.get(str(row["id"]))
    if role != "excluded" and record is not None:
        kind = f"other code, {'compiled' if record['compiled'] else 'eager'}"
        predicted = round(float(str(record["mib"])) * MiB)
    elif role != "excluded":
        try:
            found = predict(row)
        except GptfitError as error:
            role, reason, found = "excluded", error.message, None
        if found is not None and metric == "verdict":
            kind, right = "verdict", (found.verdict == "fits") == (row.get("verdict") == "fits")
        elif found is not None and metric in FIGURES:
            figure = FIGURES[metric]
            compiled = "compiled" if found.config["compile"] else "eager"
            kind = "process" if figure == "process_bytes" else f"{figure.removesuffix('_bytes')}, {compiled}"
            predicted = getattr(found, figure)
        elif found is not None:
            role, reason = "excluded", f'the metric "{metric}" is not one that gptfit predicts'
    return Compared(str(row["id"]), gpu, metric, role, reason, kind, measured, predicted, right)


def predict(row: Mapping[str, object]) -> Estimate:
    program, config = str(row["program"]), row.get("config")
    if program not in ("nanogpt", "gptfit") or not isinstance(config, dict):
        raise GptfitError(f"the program {program} is not one that gptfit mirrors", "")
    defaults = {"loss": "full", "expandable_segments": False} if program == "nanogpt" else {}
    profile = shipped_gpu(str(row["gpu"])) if row.get("gpu") else None
    return estimate(make_run({**defaults, **config}), program, profile, parse_size(str(row.get("reserve", 0))))
