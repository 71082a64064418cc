"""Files of keys and values: YAML or TOML, one flat mapping, read as data and as nothing else."""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptfit.config import shown
from gptfit.errors import GptfitError, nearest
from gptfit.scalars import parse_scalar

# Ten times the longest config anyone writes by hand; what is larger is another kind of file.
MAX_CONFIG_BYTES = 256 * 1024

_HINT_FLAT = "write one key and one value a line: batch_size: 8"
_HINT_TEXT = "expected a gptfit YAML or TOML file, a nanoGPT config .py, or a Hugging Face config.json"


@dataclass(frozen=True, slots=True)
class Entry:
    """One key's value and the place it stands, `run.yaml:3: `, or `run.toml: ` where lines are not known."""

    value: Any
    where: str


def read_text(path: Path) -> str:
    """The text of a config file.

    Raises GptfitError for a missing, unreadable, overlong or binary file, a directory or a device.
    """
    try:
        if path.is_dir():
            inside = path / "config.json"
            hint = f"did you mean {shown(inside, 200)}?" if inside.is_file() else _HINT_TEXT
            raise GptfitError(f'"{shown(path, 200)}" is a directory, expected a file', hint)
        if path.is_symlink() and not path.exists():
            raise GptfitError(f'"{shown(path, 200)}" is a link that leads nowhere', _HINT_TEXT)
        if not path.exists():
            raise GptfitError(f'there is no file "{shown(path, 200)}"{_nearest_file(path)}', _HINT_TEXT)
        if not path.is_file():
            raise GptfitError(f'"{shown(path, 200)}" is not a regular file', _HINT_TEXT)
        with path.open("rb") as file:
            raw = file.read(MAX_CONFIG_BYTES + 1)
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise GptfitError(f'"{shown(path, 200)}" is not UTF-8 text', _HINT_TEXT) from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise GptfitError(f'cannot read "{shown(path, 200)}": {reason.lower()}', _HINT_TEXT) from None
    if len(raw) > MAX_CONFIG_BYTES:
        raise GptfitError(f'"{shown(path, 200)}" is longer than {MAX_CONFIG_BYTES} bytes', _HINT_TEXT)
    if "\0" in text:
        raise GptfitError(f'"{shown(path, 200)}" is a binary file', _HINT_TEXT)
    if not text.strip():
        raise GptfitError(f'"{shown(path, 200)}" is empty', _HINT_TEXT)
    return text


def _nearest_file(path: Path) -> str:
    """The clause that offers configs beside the missing `path`."""
    try:
        beside = itertools.islice(path.parent.iterdir(), 1000)
        names = [file.name for file in beside if file.suffix == path.suffix and file.exists()]
        return nearest(path.name[:60], names)
    except OSError:
        return ""


def parse_yaml(text: str, name: str) -> dict[str, Entry]:
    """Keys and values of a flat YAML mapping; `name` is the file's, for errors.

    It reads the parser's events and builds no objects: tags, nesting and second documents are refused,
    as are duplicate keys (which YAML forbids and PyYAML lets pass). Raises GptfitError.
    """
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    entries: dict[str, Entry] = {}
    anchors: dict[str, Any] = {}
    key: str | None = None
    inside = False
    try:
        for event in yaml.parse(text, Loader=loader):
            where = f"{name}:{event.start_mark.line + 1}: " if event.start_mark else f"{name}: "
            if isinstance(event, yaml.MappingStartEvent) and not inside and not entries:
                _refuse_tag(event, where)
                inside = True
            elif isinstance(event, yaml.MappingEndEvent):
                inside = False
            elif isinstance(event, yaml.DocumentStartEvent) and entries:
                raise GptfitError(f"{where}a second document begins, expected one", _HINT_FLAT)
            elif isinstance(event, yaml.ScalarEvent | yaml.AliasEvent | yaml.CollectionStartEvent):
                value = _value(event, key, anchors, where, inside)
                if key is None:
                    key = str(event.value) if isinstance(event, yaml.ScalarEvent) else str(value)
                    if key in entries:
                        raise GptfitError(f'{where}duplicate key "{shown(key)}"', "keep one of the two lines")
                else:
                    entries[key] = Entry(value, where)
                    key = None
    except yaml.YAMLError as error:
        raise GptfitError(_yaml_message(error, name), _HINT_FLAT) from None
    if not entries:
        raise GptfitError(f"{name} holds no keys", _HINT_FLAT)
    return entries


def _value(event: Any, key: str | None, anchors: dict[str, Any], where: str, inside: bool) -> Any:
    """The plain value of one YAML event, which must be a scalar, or an alias of one."""
    import yaml

    if not inside:
        raise GptfitError(f"{where}expected keys and values (batch_size: 8)", _HINT_FLAT)
    if isinstance(event, yaml.AliasEvent):
        if event.anchor not in anchors:
            raise GptfitError(f'{where}unknown alias "{shown(event.anchor)}"', _HINT_FLAT)
        return anchors[event.anchor]
    _refuse_tag(event, where)
    if not isinstance(event, yaml.ScalarEvent):
        given = "a list" if isinstance(event, yaml.SequenceStartEvent) else "a mapping"
        raise GptfitError(f"{where}{shown(key) if key else 'a key'} is {given}, expected a single value", _HINT_FLAT)
    value = parse_scalar(key or "", event.value) if event.implicit[0] else event.value
    if event.anchor:
        anchors[event.anchor] = value
    return value


def _refuse_tag(event: Any, where: str) -> None:
    if event.tag is not None and event.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:map"):
        raise GptfitError(f'{where}the tag "{shown(event.tag)}" is refused: values are plain', _HINT_FLAT)


def _yaml_message(error: Exception, name: str) -> str:
    """One line for PyYAML's many: the place and the problem."""
    mark = getattr(error, "problem_mark", None)
    line = f":{mark.line + 1}" if mark else ""
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "unreadable"
    return f"{name}{line}: not YAML: {shown(problem, 120)}"


def parse_toml(text: str, name: str) -> dict[str, Entry]:
    """Keys and values of a flat TOML file; `name` is the file's, for errors. Raises GptfitError."""
    import tomllib

    try:
        values = tomllib.loads(text)
    except RecursionError:
        raise GptfitError(f"{name}: nested too deeply", _HINT_FLAT) from None
    except ValueError as error:  # TOMLDecodeError, or an integer of thousands of digits
        raise GptfitError(f"{name}: not TOML: {shown(str(error), 120)}", _HINT_FLAT) from None
    for key, value in values.items():
        if not isinstance(value, str | int | float):
            raise GptfitError(f"{name}: {shown(key)} is not a single value", _HINT_FLAT)
    if not values:
        raise GptfitError(f"{name} holds no keys", _HINT_FLAT)
    return {key: Entry(value, f"{name}: ") for key, value in values.items()}
