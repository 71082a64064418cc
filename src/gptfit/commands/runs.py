"""What trains: train, sample and data prepare."""

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from gptfit.errors import GptfitError
from gptfit.options import (
    INTERRUPTED,
    NO,
    WORDS,
    YES,
    Device,
    Json,
    Out,
    Page,
    Words,
    asked_for,
)

Raw = Annotated[bool, typer.Option("--raw", help="With ema_decay: the weights, not their average.")]

app = typer.Typer()
data_app = typer.Typer(rich_markup_mode=None)
app.add_typer(data_app, name="data")


@data_app.callback(invoke_without_command=True)
def data(context: typer.Context) -> None:
    """Data sets."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command(context_settings=WORDS)
def train(
    context: typer.Context,
    words: Words = None,
    auto_fit: Annotated[bool, typer.Option("--auto-fit", help="Train the best run that fits here.")] = False,
    out: Out = "out",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in DIR.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Train even if it is predicted not to fit.")] = False,
    log: Annotated[str, typer.Option(metavar="NAMES", help="Metrics also to: csv,tensorboard,wandb.")] = "",
    on_nan: Annotated[
        str, typer.Option("--on-nan", metavar="HOW", help="A loss that is no number: stop, or skip that step.")
    ] = "",
    profile: Annotated[
        bool, typer.Option("--profile", help="A trace of steps 3 to 5, on a GPU their memory too, into DIR.")
    ] = False,
    device: Device = "",
    printed: Annotated[
        str, typer.Option("--print", metavar="KIND", help="Print a torchrun line or slurm script; do not train.")
    ] = "",
) -> int:
    """Trains a run: estimated first, measured beside predicted, resumable.

    Ctrl-C, SIGTERM and a closed terminal end the step and save, SIGUSR1 saves and goes on; any KEY=VALUE may be
    changed with --resume, but those that shape the weights.

    On several GPUs: torchrun --standalone --nproc_per_node=2 -m gptfit train CONFIG n_gpus=2 strategy=ddp
    """
    asked = asked_for(context, [*(words or []), *([f"on_nan={on_nan}"] if on_nan else [])])
    from gptfit.signals import ignore_save

    ignore_save()
    if printed:
        from gptfit.cluster import start_script
        from gptfit.door import read_config
        from gptfit.report.output import write

        write(start_script(printed, asked, read_config(asked.config, asked.overrides).run, out))
        return YES
    if asked.config is not None and not resume and "RANK" not in os.environ:  # several ranks say it once, together
        from gptfit.door import read_config

        read_config(asked.config, asked.overrides)  # what is wrong with it is said before torch is loaded
    from gptfit.distributed import joined, launched
    from gptfit.journal import journaled
    from gptfit.launch import prepare_launch
    from gptfit.progress import Progress
    from gptfit.report.lists import refusal_view
    from gptfit.report.output import show, write
    from gptfit.sinks import Logs
    from gptfit.train import train as run_training

    ranks = launched()
    with joined(ranks):
        with ranks.together():
            launch = prepare_launch(asked, auto_fit, Path(out) if resume else None, device)
        if launch.estimate is not None and launch.refused and not force:
            show(refusal_view(launch.estimate, launch.levers, asked))
        if ranks.any(launch.refused) and not force:
            return NO
        with Progress() if ranks.first else nullcontext() as progress:
            logs = Logs(log, progress)
            with journaled(Path(out), launch.record(), logs) if ranks.first else nullcontext(logs) as listener:
                if ranks.first:
                    launch.tell(listener)
                finished = run_training(
                    launch.run, out, resume, launch.predicted, listener, device, launch.refit, profile
                )
        if auto_fit and ranks.first and not finished.stopped_by:
            from gptfit.sample import sample as draw

            write(draw(out, n_tokens=300, device_name=device) + "\n")
    return INTERRUPTED if finished.stopped_by == "SIGINT" else YES


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The run's folder.")] = Path("out"),
    html: Page = None,
    json: Json = False,
) -> None:
    """The page of a run, made again from its folder: DIR/report.html."""
    from gptfit.report.html_run import write_report
    from gptfit.report.output import respond
    from gptfit.report.run_facts import read_run
    from gptfit.report.run_summary import summary_json, summary_view

    facts = read_run(folder)
    path = write_report(facts, Path(html) if html is not None else None)
    respond(json, lambda: summary_json(facts, path), summary_view(facts, path))


@app.command()
def sample(
    out: Out = "out",
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="What the text begins with.")] = "",
    tokens: Annotated[int, typer.Option("--tokens", metavar="N", min=0, help="How many tokens to draw.")] = 500,
    temperature: Annotated[float, typer.Option(metavar="X", min=0, help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(metavar="K", min=0, help="Draw from the K likeliest; 0 from all.")] = 200,
    seed: Annotated[int, typer.Option(metavar="N", help="The same seed draws the same text.")] = 1337,
    device: Device = "",
    raw: Raw = False,
) -> None:
    """Text from the newest checkpoint of a run."""
    from gptfit.named import check_checkpoint
    from gptfit.report.output import write

    check_checkpoint(out)
    from gptfit.sample import sample as draw  # torch, once there is something to load

    write(draw(out, prompt, tokens, temperature, top_k, seed, device, raw) + "\n")


@data_app.command("prepare")
def data_prepare(
    sources: Annotated[
        list[str], typer.Argument(metavar="FILE", help="Text, JSON lines or parquet, folders of them, or - for stdin.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where train.bin and val.bin go.")],
    tokenizer: Annotated[str, typer.Option(metavar="NAME", help="byte, gpt2, or a rank file.")] = "byte",
    val_fraction: Annotated[float, typer.Option(metavar="X", help="The share that is for validation.")] = 0.05,
    field: Annotated[str, typer.Option(metavar="KEY", help="The key of a JSON line's text: text if not given.")] = "",
    split: Annotated[str, typer.Option(metavar="HOW", help="By documents, or tail; what suits if not given.")] = "",
    shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Go on in a new file from here, as 1GiB.")] = "",
    workers: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Processes that encode.", show_default="one a core")
    ] = None,
    train_bpe: Annotated[
        int | None,
        typer.Option("--train-bpe", metavar="N", help="Learn a tokenizer of N ids from this text.", show_default=False),
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew where one was cut short.")] = False,
    json: Json = False,
) -> None:
    """Token files from text, in nanoGPT's format.

    Cut short (a kill, a power cut, a full disk), it goes on when the same is typed again.
    """
    from gptfit.prepare import prepare
    from gptfit.progress import Counter
    from gptfit.report.lists import prepared_json, prepared_view
    from gptfit.report.output import respond
    from gptfit.units import MiB, parse_size

    shard_bytes = parse_size(shard_size) if shard_size else 0
    if shard_size and shard_bytes < MiB:
        raise GptfitError(f"--shard-size {shard_size}: expected 1MiB or more, each is a file", "1GiB is usual")
    if train_bpe is not None:
        from gptfit.bpe import train_bpe as learn

        tokenizer = learn(sources, train_bpe, out, field, restart)
    with Counter() as counter:
        how = {"field": field, "split": split, "shard_bytes": shard_bytes, "workers": workers, "restart": restart}
        prepared = prepare(sources, tokenizer, out, val_fraction, counter, **how, on_begin=counter.begin)
    if train_bpe is not None and prepared.vocab_size < train_bpe:
        print(f"this text has no pairs for {train_bpe:,} ids: they are {prepared.vocab_size:,}", file=sys.stderr)
    respond(json, lambda: prepared_json(prepared), prepared_view(prepared))


@app.command()
def export(
    out: Out = "out",
    to: Annotated[
        Path | None, typer.Option("--to", metavar="DIR", help="Where to write; a folder in the run's if not given.")
    ] = None,
    format: Annotated[str, typer.Option("--format", metavar="NAME", help="hf or nanogpt.")] = "hf",
    raw: Raw = False,
    json: Json = False,
) -> None:
    """The newest checkpoint of a run, for Hugging Face transformers or nanoGPT."""
    from gptfit.named import check_checkpoint, check_format
    from gptfit.report.output import write, write_json

    check_format(format)
    check_checkpoint(out)
    from gptfit.export import export as write_export  # torch, once there is something to write

    answer = write_export(out, to, format, raw)
    files = [str(path) for path in answer.files]
    if json:
        write_json({"schema": "gptfit.export/1", "model": answer.model, "step": answer.step, "files": files})
    else:
        write(f"{answer.model}, step {answer.step}\n" + "".join(f"{path}\n" for path in files))
