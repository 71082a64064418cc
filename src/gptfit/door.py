"""The doors by which a config comes in: a preset, a gptfit file, a nanoGPT file, a Hugging Face config; and overrides.

Layers, later ones win: defaults of the form, what `init_from` or a character data set imply, the file, the overrides.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gptfit.config import RunConfig, check_key, make_run, shown
from gptfit.errors import GptfitError
from gptfit.flatfile import Entry, parse_toml, parse_yaml, read_text
from gptfit.nanogpt_file import TRAIN_PY, NanogptFile, implied, is_harmless, parse_nanogpt, read_nanogpt
from gptfit.presets import DEFAULT_PRESET, load_preset, preset_names
from gptfit.scalars import parse_override

# What a config without a file is called.
PASTED = "pasted.py"
SUFFIXES = (".yaml", ".yml", ".toml", ".py", ".json")


@dataclass(frozen=True, slots=True)
class ConfigSource:
    """A run and where it came from.

    `name` is the preset or the file as given; `user_keys` are RunConfig keys that the user set, in a
    file or an override (a preset's own keys are not); `program` is whose code such a config is written
    for; `ignored` maps accepted keys that bear on neither memory nor speed to their text.
    """

    run: RunConfig
    name: str
    user_keys: frozenset[str] = frozenset()
    program: Literal["gptfit", "nanogpt"] = "gptfit"
    ignored: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Layers:
    """What a CONFIG gives before overrides: `base` is the form's own, `values` the user's."""

    base: Mapping[str, Any]
    values: Mapping[str, Any]
    other: Mapping[str, Any] = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    program: Literal["gptfit", "nanogpt"] = "gptfit"


def read_config(config: str | None, overrides: Sequence[str] = ()) -> ConfigSource:
    """The run that CONFIG and KEY=VALUE overrides describe, validated.

    `config` is a preset's name (None: gpt2) or the path of a .yaml, .yml, .toml, .py or .json file;
    one that reads as KEY=VALUE is the first override. Raises GptfitError, one line, for whatever
    cannot be read.
    """
    if config is not None and "=" in config and not os.path.lexists(config):
        config, overrides = None, [config, *overrides]
    typed = _typed(overrides)
    return _source(config or DEFAULT_PRESET, _read(config, frozenset(typed.values)), typed)


def read_given(preset: str, overrides: Sequence[str] = (), pasted: str = "") -> ConfigSource:
    """As `read_config`, for what a stranger may have written: nothing on this machine is read or looked for.

    The run is a preset's, or that of the nanoGPT config whose text is `pasted`. Raises GptfitError, also for a
    preset or an init_from that is a path.
    """
    typed = _typed(overrides)
    if pasted.strip():
        return _source(PASTED, _nanogpt(parse_nanogpt(pasted, PASTED, frozenset(typed.values))), typed, files=False)
    return _source(preset, _Layers(base=load_preset(preset).values, values={}), typed, files=False)


def _typed(overrides: Sequence[str]) -> _Layers:
    values: dict[str, Any] = {}
    other: dict[str, Any] = {}
    texts: dict[str, str] = {}
    notes: list[str] = []
    for text in overrides:
        key, value = parse_override(text)
        if key in RunConfig.model_fields:
            if values.get(key, value) != value:
                notes.append(f"{key} is given twice: {shown(value)} holds, not {shown(values[key])}")
            values[key] = value
        elif is_harmless(key):
            other[key] = value
            texts[key] = text.removeprefix("--")
        else:
            check_key(key)
    return _Layers({}, values, other, texts, tuple(notes))


def _source(name: str, layers: _Layers, typed: _Layers, files: bool = True) -> ConfigSource:
    user = {**layers.values, **typed.values}
    extra, notes = implied({**layers.other, **typed.other}, user, layers.program, files)
    return ConfigSource(
        run=make_run({**layers.base, **extra, **user}),
        name=name,
        user_keys=frozenset(user),
        program=layers.program,
        ignored={**layers.ignored, **typed.ignored},
        notes=(*layers.notes, *typed.notes, *notes),
    )


def _read(config: str | None, overridden: frozenset[str]) -> _Layers:
    """The layers of one CONFIG, by its form."""
    if config is not None and not config.strip():
        raise GptfitError("the config is an empty text", f"give a preset or a file, or nothing for {DEFAULT_PRESET}")
    if config is None or config in preset_names():
        return _Layers(base=load_preset(config or DEFAULT_PRESET).values, values={})
    path = Path(config)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        if os.sep in config or _exists(path):
            read_text(path)  # a missing file, a directory or a binary one is said first
            raise GptfitError(
                f'"{shown(config, 200)}" is a file of another kind, expected {", ".join(SUFFIXES)}',
                "rename it after what it holds, for example run.yaml",
            )
        load_preset(config)  # raises with the nearest names
    if path.stem in preset_names() and not _exists(path):
        raise GptfitError(f'there is no file "{shown(path, 200)}"; did you mean {path.stem}?', "a preset has no suffix")
    if suffix == ".py":
        return _nanogpt(read_nanogpt(path, overridden))
    text = read_text(path)
    if suffix == ".json":
        from gptfit.huggingface_file import parse_huggingface

        model = parse_huggingface(text, path.name)
        return _Layers({}, model.values, ignored=model.ignored, notes=model.notes)
    return _flat((parse_toml if suffix == ".toml" else parse_yaml)(text, path.name))


def _nanogpt(file: NanogptFile) -> _Layers:
    return _Layers(TRAIN_PY, file.values, file.other, file.ignored, program="nanogpt")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long, or with a null byte
        return False


def _flat(entries: Mapping[str, Entry]) -> _Layers:
    """The layers of a gptfit YAML or TOML file."""
    values: dict[str, Any] = {}
    other: dict[str, Any] = {}
    ignored: dict[str, str] = {}
    for key, entry in entries.items():
        if key in RunConfig.model_fields:
            values[key] = entry.value
        elif is_harmless(key):
            other[key] = entry.value
            ignored[key] = f"{key}: {shown(entry.value)}"
        else:
            check_key(key, entry.where)
    return _Layers({}, values, other, ignored)


def save_run(run: RunConfig, path: str | Path, header: str = "") -> None:
    """Writes `run` as YAML that `read_config` takes back exactly; `header` goes above it as a comment.

    A key that follows another (n_kv_head follows n_head) and was not set on its own is written as a
    comment, so that it still follows when the file is read with an override. The file is written
    beside and renamed: `path`, or what it is a link to, holds the old text or the new, never half.
    Raises GptfitError where it cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in (".yaml", ".yml"):
        raise GptfitError(
            f'cannot save a run as "{shown(path, 200)}": expected a name in .yaml', "for example run.yaml"
        )
    try:
        target = Path(os.path.realpath(path))
        beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            with beside.open("w", encoding="utf-8", newline="\n") as file:
                file.write(format_run(run, header))
                file.flush()
                os.fsync(file.fileno())
            beside.replace(target)
        finally:
            beside.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise GptfitError(f'cannot write "{shown(path, 200)}": {reason}', "give another file name") from None


def format_run(run: RunConfig, header: str = "") -> str:
    """The YAML that `save_run` writes."""
    lines = [f"# {shown(line, 500)}".rstrip() for line in header.splitlines()]
    for key, info in RunConfig.model_fields.items():
        text = _yaml(getattr(run, key), info.annotation is str)
        follows = info.default_factory is not None and key not in run.model_fields_set
        lines.append(f"# {key}: {text}    (follows from other keys)" if follows else f"{key}: {text}")
    return "\n".join(lines) + "\n"


def _yaml(value: str | int | float | bool, free_text: bool) -> str:
    """A value on one line as any YAML reader takes it: free text in double quotes, choices as plain words."""
    if free_text:
        import yaml

        return yaml.safe_dump(value, default_style='"', width=1 << 30, allow_unicode=True).strip()
    text = str(value).lower() if isinstance(value, bool) else str(value)
    # YAML 1.1 reads a float only with a point: 6.0e-05.
    return text.replace("e", ".0e") if isinstance(value, float) and "e" in text and "." not in text else text
