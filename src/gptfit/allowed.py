"""Changes to the numbers of training, which are made where they are allowed, or where nothing fits without."""

from collections.abc import Iterable

from gptfit.config import shown
from gptfit.errors import GptfitError, nearest
from gptfit.levers import LEVERS

# Tried when nothing fits, or with --allow: these change the numbers.
LAST_RESORT: dict[str, tuple[object, ...]] = {
    "optimizer": ("adamw16bit", "adamw8bit"),
    "param_dtype": ("bfloat16",),
}
# What --allow takes: a key, or one value of it.
ALLOWED_TEXT = ", ".join(f"{key} ({', '.join(map(str, values))})" for key, values in LAST_RESORT.items())


def allowed(allow: Iterable[str]) -> dict[str, tuple[object, ...]]:
    """What of LAST_RESORT `allow` names, by a key for all its values or by one of them. A lever that changes no numbers
    needs no leave. Raises GptfitError for a name that is none."""
    found: dict[str, tuple[object, ...]] = {}
    for name in allow:
        name = "bfloat16" if name == "bf16-params" else name  # the lever's name
        if name in LAST_RESORT:
            found[name] = LAST_RESORT[name]
        elif key := next((key for key, values in LAST_RESORT.items() if name in values), None):
            found[key] = tuple(value for value in LAST_RESORT[key] if value == name or value in found.get(key, ()))
        elif name not in LEVERS:
            known = [*LAST_RESORT, *(str(value) for values in LAST_RESORT.values() for value in values)]
            raise GptfitError(f'unknown lever "{shown(name)}"{nearest(str(name), known)}', f"levers: {ALLOWED_TEXT}")
    return found
