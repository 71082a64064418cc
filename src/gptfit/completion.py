"""What the shell offers at Tab: presets, keys with their values, cards. Quick, so imports are inside."""

from typing import TYPE_CHECKING, Any, get_args

import typer

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

PROGRAMS = ("gptfit", "nanogpt")  # whose code runs the step


def words(context: typer.Context, incomplete: str) -> list[str]:
    """A preset where CONFIG is still to come, and KEY=; the values of a key that is already there."""
    from gptfit.config import KEYS, RunConfig
    from gptfit.presets import preset_names

    typed: list[str] = context.params.get("words") or []
    # bash splits at "=": the key then is a word before this one, with or without the sign.
    split = typed[-1:] == ["="]
    key = "".join(typed[:-1][-1:] if split else typed[-1:]).removeprefix("--")
    if split or key in KEYS:
        return values(RunConfig.model_fields[key]) if key in KEYS else []
    key, equals, _ = incomplete.partition("=")
    if equals:
        return [f"{key}={value}" for value in values(RunConfig.model_fields[key])] if key in KEYS else []
    named = any("=" not in word for word in typed)
    offered = [*([] if named else preset_names()), *(f"{key}=" for key in KEYS)]
    offered = [word for word in offered if word.startswith(incomplete)]
    if len(offered) == 1 and offered[0].endswith("="):
        # One candidate alone would get a space behind it.
        key = offered[0].removesuffix("=")
        offered += [f"{key}={value}" for value in values(RunConfig.model_fields[key])]
    return offered


def log_words(context: typer.Context, incomplete: str) -> list[str]:
    """Files, which the shell knows itself, for the first word; then keys."""
    return [word for word in words(context, incomplete) if "=" in word] if context.params.get("words") else []


def config(incomplete: str) -> list[str]:
    from gptfit.presets import preset_names

    return [name for name in preset_names() if name.startswith(incomplete)]


def gpu(incomplete: str) -> list[str]:
    from gptfit.gpus import gpu_names

    return [name for name in (*gpu_names(), "auto") if name.startswith(incomplete)]


def gpus(incomplete: str) -> list[str]:
    """One card, or the last of several: rtx4070,l4."""
    before, comma, last = incomplete.rpartition(",")
    names = gpu(last) if comma else sorted({*gpu(last), *(["all"] if "all".startswith(last) else [])})
    return [f"{before}{comma}{name}" for name in names if not comma or name not in (*before.split(","), "auto")]


def program(incomplete: str) -> list[str]:
    return [name for name in PROGRAMS if name.startswith(incomplete)]


def values(field: "FieldInfo") -> list[str]:
    """The choices of a key, or its default; none where that follows from other keys or is empty."""
    if field.annotation is bool:
        return ["True", "False"]
    if choices := get_args(field.annotation):
        return [str(choice) for choice in choices]
    default: Any = field.default
    return [str(default)] if field.default_factory is None and default != "" else []
