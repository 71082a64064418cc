"""This machine: what is wrong with it, and the page that answers in its browser."""

from typing import Annotated

import typer

from gptfit.options import NO, YES, Json

app = typer.Typer()


@app.command()
def doctor(json: Json = False) -> int:
    """What of this machine keeps a run from working: torch, driver, cards, settings, space."""
    import os
    from pathlib import Path

    from gptfit.doctor import examine
    from gptfit.report.doctor import doctor_view
    from gptfit.report.output import respond

    health = examine(os.environ, Path.cwd())
    respond(json, health.to_json, doctor_view(health))
    return NO if health.wrong else YES


@app.command()
def serve(
    port: Annotated[
        int, typer.Option("--port", metavar="N", min=0, max=65535, help="Where; 0 is any that is free.")
    ] = 8642,
    browser: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
) -> int:
    """The questions as a page in your browser, on this machine alone.

    Paste a traceback, or choose a card and a config. Nothing is stored, run or sent anywhere.
    """
    from gptfit.report.output import write
    from gptfit.serve import serve as run_server

    def ready(url: str) -> None:
        write(f"gptfit answers at {url} until Ctrl-C.\n")
        if browser:
            import threading
            import webbrowser

            threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()

    run_server(port, ready)
    return YES
