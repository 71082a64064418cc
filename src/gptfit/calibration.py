"""From a ladder of short runs on the user's own card to rows, a comparison with the prediction, and an overlay.

Nothing here needs a GPU: `climb` is handed the function that measures, and `readings_in` reads what one wrote before.
"""

import datetime
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from gptfit.accuracy import read_rows
from gptfit.config import RunConfig, make_run
from gptfit.errors import GptfitError
from gptfit.estimate import Estimate, estimate
from gptfit.gpus import GpuProfile, overlaid, shipped_gpu
from gptfit.overlay import FACTOR_RANGE, Overlay, make_overlay, overlay_path
from gptfit.replacing import replacing
from gptfit.speed import CONSTANTS, step_time
from gptfit.units import MiB

# A shape that waits for Python, and GPT-2 124M, which waits for the card. Together they load what training loads:
# the kernels of eager and compiled steps, of both losses, of one micro-step and of several.
SMALL = {"n_layer": 4, "n_head": 4, "n_embd": 256, "vocab_size": 8192, "block_size": 256, "batch_size": 16}
GPT2 = {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50304, "block_size": 1024}
RUNGS: dict[str, dict[str, Any]] = {
    "small-eager": {**SMALL, "compile": False, "gradient_accumulation_steps": 1},
    "small-compiled": {**SMALL, "compile": True, "gradient_accumulation_steps": 1},
    "gpt2-eager": {**GPT2, "compile": False, "batch_size": 2, "gradient_accumulation_steps": 2},
    "gpt2-compiled": {**GPT2, "compile": True, "batch_size": 2, "gradient_accumulation_steps": 2},
    "gpt2-eager-full": {**GPT2, "compile": False, "batch_size": 4, "gradient_accumulation_steps": 1, "loss": "full"},
    "gpt2-compiled-full": {**GPT2, "compile": True, "batch_size": 4, "gradient_accumulation_steps": 4, "loss": "full"},
}
# torch.compile writes Triton kernels, which want compute capability 7.0.
COMPILE_CAPABILITY = 7.0

# A run waits for the card where its arithmetic takes this many times as long as launching its kernels.
CLEARLY = 5.0

METRICS = {
    "max_memory_allocated": "allocated_bytes",
    "max_reserved": "reserved_bytes",
    "nvidia_smi_process": "process_bytes",
}
SECONDS = "seconds_per_step"
FROM_HINT = "expected rows as gptfit measure writes them"


@dataclass(frozen=True, slots=True)
class Rung:
    """One short run of the ladder."""

    name: str
    run: RunConfig


@dataclass(frozen=True, slots=True)
class Machine:
    """The card and the software that a reading was taken with. `gpu` is the profile's name, `device` the driver's."""

    gpu: str
    device: str
    total_bytes: int
    driver_total_bytes: int
    torch: str
    driver: str
    measured_on: datetime.date


@dataclass(frozen=True, slots=True)
class Reading:
    """What one run showed. process_bytes: what the driver says that the process holds; None where it does not say."""

    name: str
    machine: Machine
    config: Mapping[str, Any]
    allocated_bytes: int
    reserved_bytes: int
    process_bytes: int | None
    seconds_per_step: float

    @property
    def context_bytes(self) -> int | None:
        return None if self.process_bytes is None else self.process_bytes - self.reserved_bytes

    def rows(self) -> list[dict[str, object]]:
        """One row a figure, in the form that `gptfit accuracy` reads."""
        machine = self.machine
        common = {
            "gpu": machine.gpu,
            "device": machine.device,
            "torch": machine.torch,
            "driver": machine.driver,
            "measured_on": f"{machine.measured_on}",
            "total_mib": machine.total_bytes / MiB,
            "driver_total_mib": machine.driver_total_bytes / MiB,
            "program": "gptfit",
            "run": self.name,
            "config": dict(self.config),
        }
        rows: list[dict[str, object]] = []
        for metric, figure in METRICS.items():
            n_bytes = getattr(self, figure)
            if n_bytes is not None:
                role = "calibration" if metric == "nvidia_smi_process" else "holdout"
                row = {"id": f"{self.name}-{metric}", "metric": metric, "mib": n_bytes / MiB, **common, "role": role}
                rows.append(row)
        speed = {"id": f"{self.name}-{SECONDS}", "metric": SECONDS, "value": self.seconds_per_step, "unit": "s"}
        return [*rows, {**speed, **common, "role": "excluded", "reason": "seconds, not memory"}]


@dataclass(frozen=True, slots=True)
class Compared:
    """One run, as measured and as the shipped profile predicts it."""

    reading: Reading
    estimate: Estimate

    def figures(self) -> dict[str, tuple[float, float | None]]:
        """Predicted and measured, bytes or seconds, by the name of the figure."""
        found: dict[str, tuple[float, float | None]] = {
            name: (getattr(self.estimate, name), getattr(self.reading, name)) for name in METRICS.values()
        }
        speed = self.estimate.speed
        if speed is not None:
            found[SECONDS] = (speed.seconds_per_step, self.reading.seconds_per_step)
        return found


@dataclass(frozen=True, slots=True)
class Calibration:
    """The readings of one card beside the shipped profile's predictions, and the overlay that follows from them."""

    profile: GpuProfile
    compared: tuple[Compared, ...]
    overlay: Overlay
    left_out: tuple[tuple[str, str], ...] = ()

    def to_json(self) -> dict[str, object]:
        """The object that `gptfit measure --json` prints."""
        return {
            "schema": "gptfit.measure/1",
            "gpu": self.profile.name,
            "runs": [
                {
                    "name": row.reading.name,
                    "config": dict(row.reading.config),
                    **{
                        name: {"predicted": predicted, "measured": measured}
                        for name, (predicted, measured) in row.figures().items()
                    },
                }
                for row in self.compared
            ],
            "left_out": [{"name": name, "reason": reason} for name, reason in self.left_out],
            "overlay": self.overlay.model_dump(mode="json"),
        }


# ------------------------------------------------------------------------------------------- measuring


def ladder(profile: GpuProfile, expandable_segments: bool) -> list[Rung]:
    """The runs for this card: no bf16 and no compiling where it has no units for them."""
    dtype = "float16" if profile.flops.bf16 is None else "bfloat16"
    compiles = float(profile.compute_capability) >= COMPILE_CAPABILITY
    settings = {"dtype": dtype, "expandable_segments": expandable_segments}
    return [
        Rung(name, make_run({**values, **settings}))
        for name, values in RUNGS.items()
        if compiles or not values["compile"]
    ]


def climb(
    rungs: Sequence[Rung],
    profile: GpuProfile,
    reserve_bytes: int,
    measure: Callable[[Rung], Reading],
    tell: Callable[[str], None],
) -> Calibration:
    """Measures each rung that is predicted to fit beside `reserve_bytes`; one that fails is left out, with the reason.

    Raises GptfitError where none could be measured.
    """
    readings, left_out = [], []
    for number, rung in enumerate(rungs, 1):
        if estimate(rung.run, "gptfit", profile, reserve_bytes).verdict != "fits":
            left_out.append((rung.name, "it is predicted not to fit in what is free"))
            continue
        tell(f"measuring {rung.name} ({number} of {len(rungs)})")
        try:
            readings.append(measure(rung))
        except GptfitError as error:
            left_out.append((rung.name, error.message))
    if not readings:
        name, reason = left_out[0]
        raise GptfitError(f"nothing could be measured: {name}: {reason}", "gptfit gpus --detect says what is free")
    return calibrate(readings, profile, tuple(left_out))


# ------------------------------------------------------------------------------------------- reading rows


def readings_in(path: Path) -> list[Reading]:
    """The readings in a file of rows that `gptfit measure` wrote; other rows are errors.

    Raises GptfitError, which names the file and the line.
    """
    runs: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(read_rows(path), 1):
        where = f"{path}:{number}"
        values = runs.setdefault(_text(row, "run", where), {"where": where})
        machine = _machine(row, where)
        if values.setdefault("machine", machine) != machine or next(iter(runs.values()))["machine"] != machine:
            raise GptfitError(f"{where}: another card, driver, torch or day than in the rows before", FROM_HINT)
        config = row.get("config")
        if row.get("program") != "gptfit" or not isinstance(config, dict):
            raise GptfitError(f"{where}: expected the program gptfit and its config", FROM_HINT)
        if values.setdefault("config", config) != config:
            raise GptfitError(f"{where}: another config than in the rows before of that run", FROM_HINT)
        metric = _text(row, "metric", where)
        if metric != SECONDS and metric not in METRICS:
            raise GptfitError(f'{where}: the metric "{metric[:60]}" is none of this ladder', FROM_HINT)
        figure = METRICS.get(metric, SECONDS)
        if figure in values:
            raise GptfitError(f"{where}: a second {metric} of {row['run']}", FROM_HINT)
        values[figure] = _number(row, "value", where) if metric == SECONDS else _bytes(row, "mib", where)
    if not runs:
        raise GptfitError(f"{path} holds no rows", FROM_HINT)
    return [_reading(name, values) for name, values in runs.items()]


def _reading(name: str, values: Mapping[str, Any]) -> Reading:
    for figure in ("allocated_bytes", "reserved_bytes", SECONDS):
        if figure not in values:
            raise GptfitError(f"{values['where']}: {name} has no {figure}", FROM_HINT)
    try:
        make_run(values["config"])
        shipped_gpu(values["machine"].gpu)
    except GptfitError as error:
        raise GptfitError(f"{values['where']}: {error.message}", error.hint) from None
    figures = (values["allocated_bytes"], values["reserved_bytes"], values.get("process_bytes"), values[SECONDS])
    return Reading(name, values["machine"], values["config"], *figures)


def _machine(row: Mapping[str, Any], where: str) -> Machine:
    try:
        day = datetime.date.fromisoformat(_text(row, "measured_on", where))
    except ValueError:
        raise GptfitError(f"{where}: measured_on is no date", FROM_HINT) from None
    gpu, device, torch, driver = (_text(row, key, where) for key in ("gpu", "device", "torch", "driver"))
    totals = (_bytes(row, "total_mib", where), _bytes(row, "driver_total_mib", where))
    return Machine(gpu, device, *totals, torch, driver, day)


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value or not value.isprintable():
        raise GptfitError(f"{where}: {key} is missing or no text", FROM_HINT)
    return value


def _number(row: Mapping[str, Any], key: str, where: str) -> float:
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise GptfitError(f"{where}: {key} is missing or no positive number", FROM_HINT)
    return value


def _bytes(row: Mapping[str, Any], key: str, where: str) -> int:
    return round(_number(row, key, where) * MiB)


# ------------------------------------------------------------------------------------------- the overlay


def calibrate(
    readings: Sequence[Reading], profile: GpuProfile | None = None, left_out: tuple[tuple[str, str], ...] = ()
) -> Calibration:
    """Readings of one card, compared, and its overlay. `profile` is the shipped one, looked up if not given.

    Raises GptfitError where no reading says what the process holds, or where figures are impossible.
    """
    profile = profile or shipped_gpu(readings[0].machine.gpu)
    compared = tuple(Compared(reading, estimate(make_run(reading.config), "gptfit", profile)) for reading in readings)
    machine = readings[0].machine
    contexts = [reading.context_bytes for reading in readings if reading.context_bytes is not None]
    if not contexts or min(contexts) <= 0:
        what = "no run says what its process holds" if not contexts else "a process holds less than its allocator"
        raise GptfitError(f"{what}: the context cannot be told", "measure again while nothing else uses the card")
    figures = {
        "gpu": profile.name,
        "measured_on": machine.measured_on,
        "torch": machine.torch,
        "driver": machine.driver,
        "n_runs": len(readings),
        "total_bytes": machine.total_bytes,
        "driver_bytes": max(0, machine.driver_total_bytes - machine.total_bytes),
        "context_bytes": round(median(contexts)),
        "context_low_bytes": min(contexts),
        "context_high_bytes": max(contexts),
        "speed_factor": speed_factor(compared, profile),
    }
    overlay = make_overlay(figures, machine.device)
    overlaid(profile, overlay, machine.device)
    return Calibration(profile, compared, overlay, left_out)


def speed_factor(compared: Sequence[Compared], profile: GpuProfile) -> float:
    """Predicted over measured seconds, the median of the runs that wait for the card and not for Python.

    Runs that are predicted to wait for Python say nothing of the card; they count where there are no others. Raises
    GptfitError for a factor beyond all cards.
    """
    waits_for_card = [row for row in compared if _waits_for_card(row, profile)]
    ratios = [predicted / measured for predicted, measured in map(_seconds, waits_for_card or compared)]
    factor = round(math.exp(median(map(math.log, ratios))), 4)
    low, high = FACTOR_RANGE
    if not low <= factor <= high:
        raise GptfitError(
            f"steps are {factor:.3g} times as fast as a {profile.title} is predicted to be",
            "measure again while nothing else uses the card",
        )
    return factor


def _seconds(row: Compared) -> tuple[float, float]:
    predicted, measured = row.figures()[SECONDS]
    assert measured is not None
    return predicted, measured


def _waits_for_card(row: Compared, profile: GpuProfile) -> bool:
    time = step_time(make_run(row.reading.config), profile, row.estimate.flops_per_token, "gptfit", CONSTANTS)
    return time.compute + time.traffic > CLEARLY * time.launch


# ------------------------------------------------------------------------------------------- files


def write_rows(readings: Sequence[Reading], path: Path) -> None:
    """Raises GptfitError where it cannot be written."""
    text = "".join(f"{json.dumps(row)}\n" for reading in readings for row in reading.rows())
    _write(path, text)


def write_overlay(overlay: Overlay) -> Path:
    """Where it was written. Raises GptfitError where it cannot be."""
    path = overlay_path(overlay.gpu)
    _write(path, overlay.to_yaml())
    return path


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise GptfitError(
            f'cannot make the folder "{path.parent}": {reason}', "GPTFIT_PROFILES names another"
        ) from None
    with replacing(path) as file:
        file.write(text.encode())
