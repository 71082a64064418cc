"""Model presets: one YAML file each in models/, with a title, a source and RunConfig's keys."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptfit.config import RunConfig, check_key, make_run, shown
from gptfit.errors import GptfitError, nearest
from gptfit.flatfile import parse_yaml, read_text

MODELS = Path(__file__).parent / "models"

DEFAULT_PRESET = "gpt2"


@dataclass(frozen=True, slots=True)
class Preset:
    """A named run: `values` are the keys that its file sets, the rest are RunConfig's defaults."""

    name: str
    title: str
    source: str
    values: dict[str, Any]

    @property
    def run(self) -> RunConfig:
        return make_run(self.values)


def preset_names() -> tuple[str, ...]:
    """All presets' names, sorted; no file is read."""
    return tuple(sorted(path.stem for path in MODELS.glob("*.yaml")))


def load_preset(name: str) -> Preset:
    """The preset `name`; only its own file is read.

    Raises GptfitError with the nearest names where there is none.
    """
    names = preset_names()
    if name not in names:
        raise GptfitError(
            f'unknown preset "{shown(name)}"{nearest(name[:60], names)}', f"presets are {', '.join(names)}"
        )
    path = MODELS / f"{name}.yaml"
    entries = parse_yaml(read_text(path), path.name)
    values = {key: entry.value for key, entry in entries.items() if key not in ("title", "source")}
    for key in values:
        check_key(key, entries[key].where)
    title, source = (str(entries[key].value) if key in entries else "" for key in ("title", "source"))
    return Preset(name, title, source, values)
