"""The command line: what all commands share. Each is in commands/: parse, call, render, exit code, and what is
heavy is imported inside of it. Answers go to stdout, everything else to stderr.
"""

import errno
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, NoReturn

import typer
from typer.exceptions import TyperException

from gptfit import __version__
from gptfit.commands import cards, check, fit, here, runs
from gptfit.errors import GptfitError
from gptfit.options import INTERRUPTED, UNANSWERED, YES

# What a device says that takes no more: full, over quota, over the size of a file, broken.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

app = typer.Typer(
    name="gptfit",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
for part in (fit, check, runs, cards, here):
    app.add_typer(part.app)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs one command and exits with its code; the only place where errors become lines."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # the shell closed it (>&-): nothing comes from there, what goes there is gone
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
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
    if "_GPTFIT_COMPLETE" in os.environ:  # a shell asks what could come at Tab; this answers and exits
        command.main(words, "gptfit")
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
        message = error.format_message().rstrip(".").replace(". Did", "; did").replace("Input should be", "expected")
        message = message[:1].lower() + message[1:]
        context = getattr(error, "ctx", None)
        hint = f"see: {context.command_path if context else 'gptfit'} --help"
    elif isinstance(error, OSError) and error.errno in FULL:
        from gptfit.report.output import close_quietly

        close_quietly()  # what is still to be written would fail again
        message, hint = f"cannot write {error.filename or 'the answer'}: {(error.strerror or '').lower()}", ""
    else:
        message = " ".join(f"internal error: {type(error).__name__}: {error}".split())[:500]
        hint = "please report it; the same command with --debug says where it happened"
    if debug:
        import traceback

        traceback.print_exception(error)
    with suppress(OSError):  # where stderr is full, too, the exit code alone can tell
        print(f"error: {message}" + (f"\nhint: {hint}" if hint else ""), file=sys.stderr, flush=True)
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
