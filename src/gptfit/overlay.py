"""What `gptfit measure` found on this machine's own card: a small YAML file that stands over the shipped profile.

One file a card, `<profile's name>.yaml`, plain data, validated as strictly as a profile. It is in the folder that
GPTFIT_PROFILES names, else in gptfit/profiles under the user's configuration folder. Deleting it undoes it.
"""

import datetime
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from gptfit.config import shown
from gptfit.errors import GptfitError, nearest
from gptfit.flatfile import parse_yaml, read_text
from gptfit.units import format_bytes, parse_size

FOLDER_VARIABLE = "GPTFIT_PROFILES"

Size = Annotated[int, BeforeValidator(parse_size), Field(ge=0)]
# No card is ten times faster or slower than its profile: such a factor is a slip of the pen.
FACTOR_RANGE = (0.1, 10.0)
Factor = Annotated[float, Field(strict=True, ge=FACTOR_RANGE[0], le=FACTOR_RANGE[1], allow_inf_nan=False)]


class Overlay(BaseModel):
    """Figures of one card in one machine; they take the place of the profile's.

    total_bytes    torch.cuda.get_device_properties().total_memory
    driver_bytes   what the driver calls the total, less total_bytes
    context_bytes  what the driver says that a training process holds, less what the caching allocator reserved: the
                   median of `n_runs` runs, and beside it their lowest and highest
    speed_factor   predicted over measured seconds of a step: 1.25 is a quarter faster than the profile says
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    gpu: str
    measured_on: datetime.date
    torch: str
    driver: str
    n_runs: Annotated[int, Field(strict=True, ge=1)]
    total_bytes: Annotated[Size, Field(gt=0)]
    driver_bytes: Size
    context_bytes: Size
    context_low_bytes: Size
    context_high_bytes: Size
    speed_factor: Factor

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if not self.context_low_bytes <= self.context_bytes <= self.context_high_bytes < self.total_bytes:
            raise ValueError("expected context_low_bytes <= context_bytes <= context_high_bytes < total_bytes")
        return self

    @property
    def source(self) -> str:
        """Where the figures are from, in words that an assumption can end with."""
        return f"measured on this machine on {self.measured_on}"

    def to_yaml(self) -> str:
        """The file, with sizes as a person reads them beside the bytes."""
        lines = ["# Written by gptfit measure. Plans for this card use it; delete it to go back to the profile."]
        for key, value in self.model_dump(mode="json").items():
            note = f"  # {format_bytes(value)}" if key.endswith("_bytes") else ""
            lines.append(f"{key}: {json.dumps(value)}{note}")  # YAML reads JSON's quotes and numbers
        return "\n".join(lines) + "\n"


def overlay_folder(environment: Mapping[str, str] | None = None) -> Path:
    """Where overlays are: GPTFIT_PROFILES, else gptfit/profiles in XDG_CONFIG_HOME or ~/.config."""
    environment = os.environ if environment is None else environment
    if given := environment.get(FOLDER_VARIABLE):
        return Path(given).expanduser()
    config = environment.get("XDG_CONFIG_HOME", "")
    # The XDG base directory specification: a path that is not absolute is to be ignored.
    base = Path(config) if config and Path(config).is_absolute() else Path("~/.config").expanduser()
    return base / "gptfit" / "profiles"


def overlay_path(name: str) -> Path:
    """The file for the profile `name`, whether it is there or not."""
    return overlay_folder() / f"{name}.yaml"


def read_overlay(name: str) -> Overlay | None:
    """What was measured on this machine for the profile `name`; None where nothing was.

    Raises GptfitError, which names the file, for one that is no overlay of that card.
    """
    path = overlay_path(name)
    if not os.path.lexists(path):
        return None
    overlay = _parse(read_text(path), str(path))
    if overlay.gpu != name:
        raise _broken(str(path), f"gpu is {shown(overlay.gpu)}, expected {name}, as the file is called")
    return overlay


def _parse(text: str, file: str) -> Overlay:
    entries = parse_yaml(text, file)
    for key, entry in entries.items():
        if key not in Overlay.model_fields:
            raise _broken(entry.where.removesuffix(": "), f'unknown key "{shown(key)}"{_nearest_key(key)}')
    return make_overlay({key: entry.value for key, entry in entries.items()}, file)


def make_overlay(values: Mapping[str, Any], file: str) -> Overlay:
    """A validated overlay. Raises GptfitError, whose line begins with `file`, for an impossible figure."""
    try:
        return Overlay.model_validate(dict(values))
    except GptfitError as error:  # from parse_size
        raise _broken(file, error.message) from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = f"{first['loc'][0]}: " if first["loc"] else ""
        message = first["msg"].removeprefix("Value error, ")
        raise _broken(file, f"{key}{message[:1].lower()}{message[1:]}") from None


def _nearest_key(key: str) -> str:
    return nearest(key[:60], Overlay.model_fields, 1)


def _broken(file: str, what: str) -> GptfitError:
    return GptfitError(f"{file}: {what}", "gptfit measure writes it anew; without the file the profile's figures count")
