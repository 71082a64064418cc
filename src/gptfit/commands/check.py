"""What the figures rest on: replay, verify, trace and accuracy."""

from pathlib import Path
from typing import Annotated

import typer

from gptfit.options import (
    NO,
    WORDS,
    YES,
    Capacity,
    Expandable,
    Gpu,
    Json,
    Program,
    Reserve,
    Snapshot,
    Verbose,
    Words,
    asked_for,
    program_of,
)

app = typer.Typer()


@app.command()
def replay(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="A torch memory snapshot, or a trace of events.")],
    capacity: Capacity = None,
    expandable: Expandable = None,
    json: Json = False,
) -> int:
    """What PyTorch's caching allocator makes of recorded allocations."""
    from gptfit.memory.replay import replay_file
    from gptfit.report.lists import replay_view
    from gptfit.report.output import respond
    from gptfit.units import parse_size

    answer = replay_file(trace, parse_size(capacity) if capacity else None, expandable)
    respond(json, answer.to_json, replay_view(answer))
    return NO if capacity and answer.out_of_memory else YES


@app.command(context_settings=WORDS)
def verify(
    context: typer.Context, words: Words = None, program: Program = None, json: Json = False, verbose: Verbose = False
) -> int:
    """Traces the real step on fake tensors, beside the estimate. No GPU, and next to no memory."""
    from gptfit.door import read_config
    from gptfit.report.lists import verification_view
    from gptfit.report.output import respond
    from gptfit.report.terminal import notes_view

    asked = asked_for(context, words)
    source = read_config(asked.config, asked.overrides)
    from gptfit.verify import verify as make_verification  # torch, once the config can be read

    answer = make_verification(source.run, program_of(program, source))
    respond(json, answer.to_json, verification_view(answer), notes_view(source, None, verbose))
    return YES if answer.passed else NO


@app.command(context_settings=WORDS)
def trace(
    context: typer.Context,
    words: Annotated[list[str] | None, typer.Argument(metavar="FILE.py:NAME] [KEY=VALUE", hidden=True)] = None,
    gpu: Gpu = None,
    reserve: Reserve = None,
    fit: Annotated[bool, typer.Option("--fit", help="Find the largest batch_size that fits the card.")] = False,
    snapshot: Snapshot = None,
    json: Json = False,
    verbose: Verbose = False,
) -> int:
    """The memory of any training step: FILE.py:NAME is a function that makes it.

    It returns (module, batch), or a callable that runs one micro-step, and behind it the optimizer if there is one.
    The file is imported and the function called, on fake tensors: no GPU, and next to no memory. KEY=VALUE is one
    of its arguments, or dtype, optimizer, optimizer_impl, grad_clip, gradient_accumulation_steps or compile.
    """
    from gptfit.card import find_card, need_card
    from gptfit.named import function_in
    from gptfit.report.output import respond
    from gptfit.scalars import parse_override

    asked = asked_for(context, words)
    keys = dict(map(parse_override, asked.overrides))
    card = need_card(gpu, reserve, "trace --fit") if fit else find_card(gpu, reserve)
    function_in(asked.config or "")
    from gptfit.report.traces import after_trace, fit_view, notes_view, trace_view  # torch, once there is a file

    if fit and card is not None:
        from gptfit.tracefit import fit_batch

        fitted = fit_batch(asked.config or "", card.profile, card.reserve_bytes, **keys)
        answer, record, view = fitted.report, fitted.to_json, fit_view(fitted, verbose)
    else:
        from gptfit.tracefile import trace_file

        on_card = (card.profile, card.reserve_bytes) if card else (None, 0)
        answer = trace_file(asked.config or "", *on_card, **keys)
        record, view = answer.to_json, trace_view(answer, verbose)
    if snapshot is not None:
        from gptfit.report.torch_snapshot import write_snapshot

        write_snapshot(snapshot, answer.run_tape, answer.expandable_segments)
    respond(json, record, view, notes_view(answer, card), after_trace(answer, asked, fit))
    return NO if answer.verdict == "does_not_fit" else YES


@app.command()
def accuracy(
    rows: Annotated[Path | None, typer.Argument(metavar="ROWS", help="Measurements, one JSON object a line.")] = None,
    json: Json = False,
    verbose: Verbose = False,
) -> int:
    """Every published measurement that ships with gptfit, beside its prediction."""
    from gptfit.accuracy import accuracy as compare_rows
    from gptfit.report.lists import accuracy_view
    from gptfit.report.output import respond

    answer = compare_rows(rows)
    respond(json, answer.to_json, accuracy_view(answer, verbose))
    return NO if answer.missed() else YES
