"""The command line: parse, call, render, exit code. Heavy imports stand inside the commands.

Exit codes: 0 yes or done, 1 the answer is no, 2 it could not be answered, 130 interrupted. Answers go to
stdout, everything else to stderr.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from typer.exceptions import TyperException

from gptfit import __version__
from gptfit.errors import GptfitError
from gptfit.options import (
    WORDS,
    Allow,
    Capacity,
    Config,
    Device,
    Expandable,
    Gpu,
    Json,
    Keep,
    Out,
    Program,
    Reserve,
    Save,
    TokensPerStep,
    Verbose,
    Words,
    asked_for,
    program_of,
)

YES, NO, UNANSWERED, INTERRUPTED = 0, 1, 2, 130

app = typer.Typer(
    name="gptfit",
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
data_app = typer.Typer(rich_markup_mode=None, help="Data sets.", no_args_is_help=True)
app.add_typer(data_app, name="data")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs one command and exits with its code; the only place where errors become lines."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    try:
        code = _invoke([word for word in words if word != "--debug"])
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:
        from gptfit.report.output import close_quietly

        close_quietly()
        code = YES
    except Exception as error:
        code = _explain(error, debug)
    sys.exit(code)


def _invoke(words: list[str]) -> int:
    command = typer.main.get_command(app)
    try:
        with command.make_context("gptfit", words) as context:
            return command.invoke(context) or YES
    except typer.Exit as done:
        return done.exit_code


def _explain(error: Exception, debug: bool) -> int:
    """Prints what went wrong, one line and a hint, on stderr; returns the exit code."""
    if isinstance(error, GptfitError):
        message, hint = error.message, error.hint
    elif isinstance(error, TyperException):
        message, hint = error.format_message().rstrip(".").replace(". Did", "; did"), "see: gptfit --help"
        message = message[:1].lower() + message[1:]
    else:
        message = " ".join(f"internal error: {type(error).__name__}: {error}".split())[:500]
        hint = "please report it; the same command with --debug says where it happened"
    if debug:
        import traceback

        traceback.print_exception(error)
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
    return UNANSWERED


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Print a traceback with an error.")] = False,
) -> None:
    """Plans and trains GPT models that fit the GPU you own.

    CONFIG is a preset (see: gptfit models), a YAML or TOML file, a nanoGPT config .py, or a Hugging Face
    config.json. Any KEY=VALUE after it changes that key: gptfit plan gpt2 batch_size=8 --gpu rtx4070
    """
    if version:
        print(f"gptfit {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command(context_settings=WORDS)
def plan(
    context: typer.Context,
    words: Words = None,
    gpu: Gpu = None,
    tokens_per_step: TokensPerStep = None,
    allow: Allow = None,
    keep: Keep = None,
    program: Program = None,
    reserve: Reserve = None,
    save: Save = None,
    json: Json = False,
    verbose: Verbose = False,
) -> int:
    """The best run that fits the card: what to change, and how fast it will be."""
    from gptfit.card import need_card
    from gptfit.door import read_config
    from gptfit.plan import plan as make_plan
    from gptfit.report.output import respond
    from gptfit.report.plans import after_plan, plan_view
    from gptfit.report.terminal import notes_view

    asked = asked_for(context, words)
    source = read_config(asked.config, asked.overrides)
    source = replace(source, program=program_of(program, source))
    card = need_card(gpu, reserve, "plan")
    answer = make_plan(source, card.profile, card.reserve_bytes, tokens_per_step, allow or (), keep or ())
    if save is not None and answer.run is not None:
        from gptfit.door import save_run

        save_run(answer.run, save, asked.gptfit("plan", {}, "--gpu", card.profile.name))
    view = plan_view(answer, verbose), notes_view(source, card, verbose), after_plan(answer, source, asked, save)
    respond(json, answer.to_json, *view)
    return YES if answer.verdict == "fits" else NO


@app.command(context_settings=WORDS)
def estimate(
    context: typer.Context,
    words: Words = None,
    gpu: Gpu = None,
    program: Program = None,
    reserve: Reserve = None,
    json: Json = False,
    verbose: Verbose = False,
) -> int:
    """The memory of exactly this run, and whether it fits."""
    from gptfit.card import find_card
    from gptfit.door import read_config
    from gptfit.estimate import estimate as make_estimate
    from gptfit.report.output import respond
    from gptfit.report.terminal import after_estimate, estimate_view, notes_view

    asked = asked_for(context, words)
    source = read_config(asked.config, asked.overrides)
    card = find_card(gpu, reserve)
    on_card = (card.profile, card.reserve_bytes) if card else (None, 0)
    answer = make_estimate(source.run, program_of(program, source), *on_card)
    # A config written for nanoGPT is answered for both programs: its owner may train it with either.
    both = program is None and source.program == "nanogpt" and not json
    other = make_estimate(source.run, "gptfit", *on_card) if both else None
    view = estimate_view(answer, other, verbose), notes_view(source, card, verbose), after_estimate(answer, asked)
    respond(json, answer.to_json, *view)
    return NO if answer.verdict == "does_not_fit" else YES


@app.command("explain-oom", context_settings=WORDS)
def explain_oom(
    context: typer.Context,
    words: Words = None,
    config: Config = None,
    program: Program = None,
    json: Json = False,
) -> int:
    """Why a run ran out of memory, from its traceback or log.

    The first word is the file; - or a pipe reads from there, and a terminal asks for the text.
    """
    from gptfit.logfile import read_log
    from gptfit.oom.diagnose import diagnose
    from gptfit.oom.failed_run import failed_run
    from gptfit.oom.read import read_paste
    from gptfit.report.lists import diagnosis_view
    from gptfit.report.output import respond

    asked = asked_for(context, words)  # its CONFIG is the log
    facts = read_paste(read_log(asked.config))
    answer = diagnose(facts, failed_run(facts, config, asked.overrides), program)
    respond(json, answer.to_json, diagnosis_view(answer))
    return NO if facts.kind == "not_oom" else YES


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
    from gptfit.verify import verify as make_verification

    asked = asked_for(context, words)
    source = read_config(asked.config, asked.overrides)
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
    json: Json = False,
    verbose: Verbose = False,
) -> int:
    """The memory of any training step: FILE.py:NAME is a function that makes it.

    It returns (module, batch), or a callable that runs one micro-step, and behind it the optimizer if there is one.
    The file is imported and the function called, on fake tensors: no GPU, and next to no memory. KEY=VALUE is one
    of its arguments, or dtype, optimizer, optimizer_impl, grad_clip, gradient_accumulation_steps or compile.
    """
    from gptfit.card import find_card, need_card
    from gptfit.report.output import respond
    from gptfit.report.traces import after_trace, fit_view, notes_view, trace_view
    from gptfit.scalars import parse_override

    asked = asked_for(context, words)
    keys = dict(map(parse_override, asked.overrides))
    card = need_card(gpu, reserve, "trace --fit") if fit else find_card(gpu, reserve)
    if fit and card is not None:
        from gptfit.tracefit import fit_batch

        fitted = fit_batch(asked.config or "", card.profile, card.reserve_bytes, **keys)
        answer, record, view = fitted.report, fitted.to_json, fit_view(fitted, verbose)
    else:
        from gptfit.tracefile import trace_file

        on_card = (card.profile, card.reserve_bytes) if card else (None, 0)
        answer = trace_file(asked.config or "", *on_card, **keys)
        record, view = answer.to_json, trace_view(answer, verbose)
    respond(json, record, view, notes_view(answer, card), after_trace(answer, asked, fit))
    return NO if answer.verdict == "does_not_fit" else YES


@app.command(context_settings=WORDS)
def train(
    context: typer.Context,
    words: Words = None,
    auto_fit: Annotated[bool, typer.Option("--auto-fit", help="Train the best run that fits here.")] = False,
    out: Out = "out",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in DIR.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Train even if it is predicted not to fit.")] = False,
    device: Device = "",
) -> int:
    """Trains a run: estimated first, measured beside predicted, resumable."""
    from gptfit.launch import prepare_launch
    from gptfit.progress import Progress
    from gptfit.report.lists import refusal_view
    from gptfit.report.output import show, write
    from gptfit.train import train as run_training

    asked = asked_for(context, words)
    launch = prepare_launch(asked, auto_fit, Path(out) if resume else None, device)
    if launch.estimate is not None and launch.refused and not force:
        show(refusal_view(launch.estimate, launch.levers, asked))
        return NO
    with Progress() as progress:
        launch.tell(progress)
        finished = run_training(launch.run, out, resume, launch.predicted, progress, device)
    if auto_fit and not finished.stopped_by:
        from gptfit.sample import sample as draw

        write(draw(out, n_tokens=300, device_name=device) + "\n")
    return INTERRUPTED if finished.stopped_by == "SIGINT" else YES


@app.command()
def sample(
    out: Out = "out",
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="What the text begins with.")] = "",
    tokens: Annotated[int, typer.Option("--tokens", metavar="N", min=0, help="How many tokens to draw.")] = 500,
    temperature: Annotated[float, typer.Option(metavar="X", min=0, help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(metavar="K", min=0, help="Draw from the K likeliest; 0 from all.")] = 200,
    seed: Annotated[int, typer.Option(metavar="N", help="The same seed draws the same text.")] = 1337,
    device: Device = "",
) -> None:
    """Text from the newest checkpoint of a run."""
    from gptfit.report.output import write
    from gptfit.sample import sample as draw

    write(draw(out, prompt, tokens, temperature, top_k, seed, device) + "\n")


@data_app.command("prepare")
def data_prepare(
    sources: Annotated[list[str], typer.Argument(metavar="FILE", help="Text files, folders of them, or - for stdin.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where train.bin and val.bin go.")],
    tokenizer: Annotated[str, typer.Option(metavar="NAME", help="byte, gpt2, or a rank file.")] = "byte",
    val_fraction: Annotated[float, typer.Option(metavar="X", help="The share that is for validation.")] = 0.05,
) -> None:
    """Token files from text, in nanoGPT's format."""
    from gptfit.prepare import prepare
    from gptfit.report.lists import prepared_view
    from gptfit.report.output import show

    show(prepared_view(prepare(sources, tokenizer, out, val_fraction)))


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
