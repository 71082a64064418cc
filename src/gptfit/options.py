"""What the commands share on the command line: their options, and the words that are CONFIG and KEY=VALUE."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from gptfit import completion
from gptfit.asked import Asked
from gptfit.completion import PROGRAMS
from gptfit.errors import GptfitError, nearest

if TYPE_CHECKING:
    from gptfit.door import ConfigSource

# Exit codes: yes or done, the answer is no, it could not be answered, stopped with Ctrl-C.
YES, NO, UNANSWERED, INTERRUPTED = 0, 1, 2, 130

# nanoGPT's users type --batch_size=8, so what looks like an option may be a key: unknown ones come here as words.
WORDS = {"ignore_unknown_options": True}

# typer wraps the name in brackets and adds dots: [CONFIG] [KEY=VALUE]...
Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="CONFIG] [KEY=VALUE", hidden=True, autocompletion=completion.words),
]
LogWords = Annotated[
    list[str] | None,
    typer.Argument(metavar="FILE | -] [KEY=VALUE", hidden=True, autocompletion=completion.log_words),
]
Gpu = Annotated[
    str | None,
    typer.Option(
        "--gpu",
        metavar="NAME",
        help="The card, as in `gptfit gpus`; auto asks the driver.",
        show_default=False,
        autocompletion=completion.gpu,
    ),
]
Reserve = Annotated[
    str | None,
    typer.Option("--reserve", metavar="SIZE", help="What others hold on the card, as 1.5GiB.", show_default=False),
]
Risk = Annotated[
    float | None,
    typer.Option("--risk", metavar="X", help="The chance to accept that it needs more; 0.05.", show_default=False),
]
Program = Annotated[
    str | None,
    typer.Option(
        "--program",
        metavar="NAME",
        help="Whose code runs the step: gptfit or nanogpt.",
        show_default=False,
        autocompletion=completion.program,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more: ignored keys, assumptions.")]
Formulas = Annotated[bool, typer.Option("--formulas", help="Every tensor alive at the peak, as count × shape × bytes.")]
Config = Annotated[
    str | None,
    typer.Option(
        "--config",
        metavar="CONFIG",
        help="The config of that run.",
        show_default=False,
        autocompletion=completion.config,
    ),
]
Out = Annotated[str, typer.Option("--out", metavar="DIR", help="The run's folder.")]
Cards = Annotated[
    str | None,
    typer.Option(
        "--gpu",
        metavar="NAME",
        help="The card, or several: rtx4070,l4 or all; auto asks the driver.",
        show_default=False,
        autocompletion=completion.gpus,
    ),
]
Tokens = Annotated[
    str | None,
    typer.Option("--tokens", metavar="N", help="Say how long until so many tokens, as 10B.", show_default=False),
]
Price = Annotated[
    str | None,
    typer.Option("--price", metavar="P", help="Money for a card and hour: what the tokens cost.", show_default=False),
]
PricePerKwh = Annotated[
    str | None,
    typer.Option("--price-per-kwh", metavar="P", help="Money for a kWh: what their energy costs.", show_default=False),
]
Gpus = Annotated[
    int | None,
    typer.Option("--gpus", metavar="N", min=1, help="Of N such cards together: ddp, hsdp or fsdp.", show_default=False),
]
TokensPerStep = Annotated[
    int | None,
    typer.Option("--tokens-per-step", metavar="N", min=1, help="Tokens of one optimizer step.", show_default=False),
]
Allow = Annotated[
    list[str] | None,
    typer.Option(
        "--allow",
        metavar="LEVER",
        help="Let it change numerics: optimizer (adamw16bit, adamw8bit), param_dtype (bfloat16). Repeatable.",
        show_default=False,
    ),
]
Keep = Annotated[
    list[str] | None,
    typer.Option("--keep", metavar="KEY", help="Leave this key as it is. Repeatable.", show_default=False),
]
Save = Annotated[
    str | None, typer.Option("--save", metavar="FILE", help="Write the run, for gptfit train.", show_default=False)
]
Page = Annotated[
    str | None,
    typer.Option("--html", metavar="FILE", help="Write the answer as a page, with charts.", show_default=False),
]
Snapshot = Annotated[
    str | None,
    typer.Option("--snapshot", metavar="FILE", help="Write it as torch's memory snapshot.", show_default=False),
]
Capacity = Annotated[
    str | None, typer.Option("--capacity", metavar="SIZE", help="What the card has, as 11.5GiB.", show_default=False)
]
Expandable = Annotated[
    bool | None,
    typer.Option(
        "--expandable-segments/--no-expandable-segments", help="As recorded, if not given.", show_default=False
    ),
]
Device = Annotated[
    str,
    typer.Option("--device", metavar="NAME", help="cuda, cuda:1 or cpu; the best if not given.", show_default=False),
]


def asked_for(context: typer.Context, words: Sequence[str] | None) -> Asked:
    """CONFIG and the overrides among `words`.

    Raises GptfitError for a second CONFIG and for an option that the command does not have.
    """
    config: str | None = None
    overrides: list[str] = []
    for word in words or ():
        if word.startswith("-") and word != "-":
            _check_option(context, word)
        if "=" in word and (config is not None or not os.path.lexists(word)):
            overrides.append(word)
        elif config is None:
            config = word
        else:
            raise GptfitError(
                f'unexpected "{word[:60]}" after the config "{config[:60]}"', "changes are written as KEY=VALUE"
            )
    return Asked(config, tuple(overrides))


def _check_option(context: typer.Context, word: str) -> None:
    """Raises GptfitError unless `word` is --KEY=VALUE with a key that could be a config's."""
    from gptfit.config import KEYS
    from gptfit.nanogpt_file import is_harmless

    name, equals, _ = word.partition("=")
    key = name.removeprefix("--").replace("-", "_")
    is_key = key in KEYS or is_harmless(key)
    if is_key and equals and name.startswith("--"):
        return
    if is_key and name.startswith("--"):
        raise GptfitError(f"{name} has no value", f"write it as {key}=VALUE, or --{key}=VALUE")
    options = [
        option for parameter in context.command.params for option in (*parameter.opts, *parameter.secondary_opts)
    ]
    others = context.parent.command.commands.values() if context.parent else ()  # pyright: ignore
    if takers := [o.name for o in others if any(name in parameter.opts for parameter in o.params)]:
        raise GptfitError(
            f"{context.command_path} takes no {name}; {', '.join(takers)} {'do' if takers[1:] else 'does'}",
            f"see: {context.command_path} --help",
        )
    known = [option for option in options if option.startswith("--")] + [f"--{key}" for key in KEYS]
    raise GptfitError(f'unknown option "{name[:60]}"{nearest(name[:60], known)}', f"see: {context.command_path} --help")


def program_of(program: str | None, source: "ConfigSource | None" = None) -> str:
    """The program asked for, or the one that the config is written for.

    Raises GptfitError for a name that is none.
    """
    if program is None:
        return source.program if source is not None else "gptfit"
    if program not in PROGRAMS:
        program = str(program)
        raise GptfitError(f'unknown program "{program[:60]}"{nearest(program[:60], PROGRAMS)}', "gptfit or nanogpt")
    return program


def for_one_card(**files: str | None) -> None:
    """Raises GptfitError for a file of one run, asked of several cards; files by the name of their option."""
    for name, file in files.items():
        if file is not None:
            raise GptfitError(f"--{name} writes the run of one card", "name that card alone: --gpu rtx4070")


def options_of(**given: str | None) -> list[str]:
    """`--gpu rtx4070 --reserve 1GiB`: those that have a value, as they would be typed."""
    return [
        word for name, value in given.items() if value is not None for word in (f"--{name.replace('_', '-')}", value)
    ]
