"""What there is to choose from: models and gpus."""

from typing import Annotated

import typer

from gptfit.options import (
    NO,
    YES,
    Json,
)

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
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="One card, each figure with its source.")] = None,
    detect: Annotated[bool, typer.Option("--detect", help="The cards of this machine, and what is free.")] = False,
    json: Json = False,
) -> int:
    """The cards that have a profile."""
    from gptfit.gpus import all_gpus, load_gpu
    from gptfit.report import cards
    from gptfit.report.output import respond

    if detect:
        from gptfit.driver import detect as ask_driver

        seen = ask_driver()
        respond(json, lambda: cards.seen_json(seen), cards.seen_view(seen))
        return YES if seen else NO
    profiles = [load_gpu(name)] if name is not None else all_gpus()
    view = cards.gpu_view(profiles[0]) if name is not None else cards.gpus_view(profiles)
    respond(json, lambda: cards.gpus_json(profiles), view)
    return YES
