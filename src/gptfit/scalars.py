"""Text to plain values: what a key's text in a YAML file, or after `KEY=` on a command line, means.

PyYAML follows YAML 1.1, where `3e-4` is text and `off` a boolean. Here numbers are Python's, the only
booleans are true and false, and a key that takes text gets its text.
"""

import re
from typing import Any

from gptfit.config import RunConfig, shown
from gptfit.errors import GptfitError

# "none" is not among them: it is a choice of activation_checkpointing.
_WORDS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_NOTHING = ("", "~", "null", "None")
_INTEGER = re.compile(r"[-+]?[0-9][0-9_]{0,39}")
_FLOAT = re.compile(r"[-+]?(?:[0-9][0-9_]{0,39}\.?[0-9_]{0,39}|\.[0-9][0-9_]{0,39})(?:[eE][-+]?[0-9]{1,4})?")


def parse_scalar(key: str, text: str) -> Any:
    """The value of an unquoted `text` given for `key`: bool, None, int, float, or the text itself."""
    field = RunConfig.model_fields.get(key)
    if field is not None and field.annotation is str:
        return text
    if text in _NOTHING:
        return None
    if text in _WORDS:
        return _WORDS[text]
    for pattern, read in ((_INTEGER, int), (_FLOAT, float)):
        if pattern.fullmatch(text):
            try:
                return read(text)
            except ValueError:  # underscores where Python has none, as in 1__0
                return text
    return text


def parse_override(text: str) -> tuple[str, Any]:
    """Key and value of `batch_size=8` or `--batch-size=8`.

    Raises GptfitError where there is no `=`, no key or no value. The key is not checked here.
    """
    key, equals, value = text.partition("=")
    key = key.strip().removeprefix("--").replace("-", "_")
    value = value.strip()
    if not equals or not key:
        raise GptfitError(f'cannot read the override "{shown(text)}": expected KEY=VALUE', "for example batch_size=8")
    if not value:
        raise GptfitError(f'the override "{shown(text)}" has no value', f"write it as {shown(key)}=VALUE")
    if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
        return key, value[1:-1]
    return key, parse_scalar(key, value)
