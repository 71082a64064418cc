"""What there is to choose from, models and gpus; and the card that is here, measured."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gptfit import completion
from gptfit.options import (
    NO,
    YES,
    Json,
    Verbose,
)

if TYPE_CHECKING:
    from gptfit.calibration import Calibration

app = typer.Typer()


@app.command()
def models(json: Json = False) -> None:
    """The presets."""
    from gptfit.memory.step import pieces
    from gptfit.presets import load_preset, preset_names
    from gptfit.report.lists import models_json, models_view
    from gptfit.report.output import respond

    presets = [load_preset(name) for name in preset_names()]
    rows = [(preset, pieces(preset.run, "gptfit").n_params) for preset in presets]
    respond(json, lambda: models_json(rows), models_view(rows))


@app.command()
def gpus(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="One card, each figure with its source.", autocompletion=completion.gpu),
    ] = None,
    detect: Annotated[bool, typer.Option("--detect", help="The cards of this machine, and what is free.")] = False,
    json: Json = False,
    verbose: Verbose = False,
) -> int:
    """The cards that have a profile."""
    from gptfit.gpus import all_gpus, load_gpu, with_measured
    from gptfit.report import cards
    from gptfit.report.output import respond

    if detect:
        from gptfit.driver import detect as ask_driver

        seen = ask_driver()
        respond(json, lambda: cards.seen_json(seen), cards.seen_view(seen))
        return YES if seen else NO
    profiles = [load_gpu(name)] if name is not None else [with_measured(card) for card in all_gpus()]
    view = cards.gpu_view(profiles[0]) if name is not None else cards.gpus_view(profiles, verbose)
    respond(json, lambda: cards.gpus_json(profiles), view)
    return YES


@app.command()
def measure(
    rows: Annotated[
        Path | None,
        typer.Option("--rows", metavar="FILE", help="Where the rows go; beside the overlay if not given."),
    ] = None,
    source: Annotated[
        Path | None, typer.Option("--from", metavar="ROWS", help="Rows of an earlier time, instead of measuring.")
    ] = None,
    json: Json = False,
) -> int:
    """Measures this machine's own card: a few short runs, beside their prediction. Later plans use it.

    What it finds (total memory, CUDA context, speed) goes to GPTFIT_PROFILES, or gptfit/profiles in ~/.config.
    """
    from gptfit.calibration import calibrate, readings_in, write_overlay, write_rows
    from gptfit.overlay import overlay_path
    from gptfit.report.calibrations import calibration_view, files_view
    from gptfit.report.output import respond

    answer = calibrate(readings_in(source)) if source is not None else _measured_here()
    gpu = answer.profile.name
    rows = rows or source or overlay_path(gpu).with_suffix(".jsonl")
    if rows != source:
        write_rows([compared.reading for compared in answer.compared], rows)
    written = write_overlay(answer.overlay)
    files = {"rows_file": str(rows), "overlay_file": str(written)}
    respond(json, lambda: answer.to_json() | files, calibration_view(answer), files_view(gpu, rows, written))
    return YES


def _measured_here() -> "Calibration":
    """The ladder on the card that CUDA would take. Raises GptfitError where there is none."""
    import os
    import sys

    from gptfit.calibration import climb, ladder
    from gptfit.card import choose
    from gptfit.driver import detect as ask_driver
    from gptfit.errors import GptfitError
    from gptfit.gpus import shipped_gpu

    seen = choose(ask_driver(), os.environ)
    if seen is None:
        raise GptfitError("there is no GPU here to measure", "on another machine: gptfit plan --gpu rtx4070")
    profile = shipped_gpu(seen.name, seen.total_bytes)
    from gptfit.measure import measure_rung

    return climb(
        ladder(profile, expandable_segments=sys.platform == "linux"),
        profile,
        max(0, profile.total_bytes - seen.free_bytes),
        lambda rung: measure_rung(rung, profile, seen),
        lambda line: print(line, file=sys.stderr, flush=True),
    )
