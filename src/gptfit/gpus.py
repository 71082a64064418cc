"""GPU profiles: one YAML file each in profiles/, every number with its source, found by any usual spelling.

A name is taken apart into the model and what qualifies it, and so are the files' names: a directory listing answers
the usual spellings, and one file is read. The other files are opened, for their aliases, only where that fails.
"""

import functools
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from gptfit.errors import GptfitError, nearest
from gptfit.overlay import Overlay, overlay_path, read_overlay
from gptfit.spelling import Spelling, letters_of
from gptfit.units import format_bytes, parse_size

PROFILES = Path(__file__).parent / "profiles"

# "24GB" stands for 24,564 MiB, or for 23,034 where ECC takes its share; the next size up or down is 8 % or more away.
SIZE_TOLERANCE = 0.075
# A total as PyTorch sees it, as a share of the driver's: Linux shows 94 to 99 %, Windows all of it. Less is a slice.
POSSIBLE_TOTALS = (0.85, 1.02)

Bytes = Annotated[int, BeforeValidator(parse_size), Field(ge=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Flops(BaseModel):
    """Dense peak FLOP/s with FP32 accumulation, no sparsity; None where the hardware has no units for it.

    bf16, fp16 and tf32 are those of the tensor cores, fp32 that of the CUDA cores.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bf16: Rate | None
    fp16: Rate | None
    tf32: Rate | None
    fp32: Rate


class GpuProfile(BaseModel):
    """One GPU. Memory in bytes as PyTorch sees it on Linux; `sources` says where each number is from.

    total_bytes    what torch.cuda.get_device_properties().total_memory says, never the figure on the box
    driver_bytes   what the driver calls the total, less total_bytes: it keeps that for itself
    context_bytes  CUDA context, kernels and libraries of one training process, outside the caching allocator
    display_bytes  what a desktop on this card usually holds; 0 for cards that usually drive none

    power_limit_watts is the whole card's, as its maker ships it; None where that is not one figure, as in laptops.
    measured       what was measured on this machine's own card: its figures stand here in place of the profile's
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    title: str
    aliases: tuple[str, ...]
    vendor: Literal["nvidia", "amd"]
    architecture: Literal[
        "kepler", "maxwell", "pascal", "volta", "turing", "ampere", "ada", "hopper", "blackwell", "cdna3"
    ]
    compute_capability: Annotated[str, Field(pattern=r"^[0-9]{1,2}\.[0-9]$")]
    sm_count: Annotated[int, Field(ge=1)]
    total_bytes: Annotated[Bytes, Field(gt=0)]
    driver_bytes: Bytes
    context_bytes: Bytes
    context_low_bytes: Bytes
    context_high_bytes: Bytes
    display_bytes: Bytes
    flops: Flops
    bandwidth_bytes_per_second: Rate
    power_limit_watts: Rate | None = None
    released: Annotated[int, Field(ge=2006, le=2100)]
    sources: dict[str, str]
    measured: Overlay | None = None

    @property
    def speed_factor(self) -> float:
        """How many times faster than predicted this machine's card is; 1 where nothing was measured."""
        return self.measured.speed_factor if self.measured else 1.0

    @property
    def context_source(self) -> str:
        """Where `context_bytes` is from, in the words of an assumption."""
        return self.measured.source if self.measured else "on this card"

    @property
    def box_bytes(self) -> int:
        """The total as nvidia-smi and the driver count it."""
        return self.total_bytes + self.driver_bytes


def gpu_names() -> list[str]:
    """All profiles' names, sorted; no file is read."""
    return sorted(path.stem for path in PROFILES.glob("*.yaml"))


def all_gpus() -> list[GpuProfile]:
    """All profiles as shipped, by name. Reads every file: for lists and tests."""
    return [_profile(name) for name in gpu_names()]


def load_gpu(name: str, box_bytes: int | None = None) -> GpuProfile:
    """The profile that `name` means, with what was measured on this machine's own card, where that was done.

    Raises GptfitError as `shipped_gpu`, and for a broken file of measurements.
    """
    return with_measured(shipped_gpu(name, box_bytes))


def with_measured(profile: GpuProfile) -> GpuProfile:
    """`profile` with the figures of this machine's overlay, if there is one. Raises GptfitError for a broken one."""
    overlay = read_overlay(profile.name)
    return profile if overlay is None else overlaid(profile, overlay, str(overlay_path(profile.name)))


def overlaid(profile: GpuProfile, overlay: Overlay, file: str) -> GpuProfile:
    """`profile` with the overlay's figures, each with its source. `file` opens the error line.

    Raises GptfitError where the total is not that of such a card, as it is for a slice of one.
    """
    low, high = (round(share * profile.box_bytes) for share in POSSIBLE_TOTALS)
    if not low <= overlay.total_bytes <= high:
        raise GptfitError(
            f"{file}: total_bytes is {format_bytes(overlay.total_bytes)}, but a {profile.title} has "
            f"{format_bytes(profile.box_bytes)}",
            "gptfit measure writes it anew; a slice of a card is not the card",
        )
    keys = [key for key in GpuProfile.model_fields if key.endswith("_bytes") and key in Overlay.model_fields]
    source = f"{overlay.source}, {overlay.n_runs} runs, torch {overlay.torch}, driver {overlay.driver}"
    sources = {key: f"{source}; the profile has {format_bytes(getattr(profile, key))}" for key in keys}
    speed = {"speed_factor": f"{source}: predicted over measured seconds of a step"}
    figures = {key: getattr(overlay, key) for key in keys}
    return profile.model_copy(
        update={**figures, "sources": {**profile.sources, **sources, **speed}, "measured": overlay}
    )


def shipped_gpu(name: str, box_bytes: int | None = None) -> GpuProfile:
    """The profile that `name` means, as the driver, a shop or a person spells it; nothing of this machine is in it.

    `box_bytes` is the driver's total, where the driver was asked: it tells an RTX 3060 of 12 GB from one of 8 GB,
    which both call themselves NVIDIA GeForce RTX 3060, by the nearest size. A name that could mean cards that differ
    is refused, but for two customs: without a size it means the card that the bare name is common for (`rtx4060ti`
    8 GB, `rtx3080` 10 GB, `rtx3060` 12 GB), and `H100` means the SXM one.

    Raises GptfitError for an unknown or ambiguous name, or one with a memory size that the card does not have.
    """
    asked = Spelling.read(name)
    stems = {stem: Spelling.read(stem) for stem in gpu_names()}
    # Where a card comes as SXM and as PCIe, mostly only the PCIe one says so in its file's name.
    stem = _by_file_name(asked, stems) or _by_file_name(asked.without("sxm"), stems)
    stem = stem or _by_alias(name, asked, list(stems))
    if asked.size_bytes is None and box_bytes is not None:
        wanted = stems[stem] if stem else asked.without("sxm")
        stem = min(
            (other for other in stems if stems[other].is_like(wanted)), key=_distance_to(box_bytes), default=stem
        )
    if stem is None:
        _refuse(name, asked, stems)
    return _profile(stem)


def _by_file_name(asked: Spelling, stems: dict[str, Spelling]) -> str | None:
    """The file that `asked` means by the files' names alone; one is read where a size has to be compared."""
    alike = [stem for stem, spelling in stems.items() if spelling.is_like(asked)]
    bare = [stem for stem in alike if stems[stem].size_bytes is None]
    if asked.size_bytes is None:
        return bare[0] if bare else None
    exact = [stem for stem in alike if stems[stem].size_bytes == asked.size_bytes]
    return next((stem for stem in exact + bare if _has_size(stem, asked.size_bytes)), None)


def _by_alias(name: str, asked: Spelling, stems: list[str]) -> str | None:
    """The file with `name` among its aliases: the same letters, or the same parts in another order."""
    letters = letters_of(name)
    for stem in stems:
        if any(letters_of(alias) == letters for alias in _names_in(stem)):
            return stem
    for stem in stems:
        if asked.model and any(Spelling.read(alias) == asked for alias in _names_in(stem)):
            return stem
    return None


def _distance_to(box_bytes: int) -> Any:
    return lambda stem: abs(_profile(stem).box_bytes - box_bytes)


def _has_size(stem: str, size_bytes: int) -> bool:
    return abs(_profile(stem).box_bytes - size_bytes) <= SIZE_TOLERANCE * size_bytes


def _refuse(name: str, asked: Spelling, stems: dict[str, Spelling]) -> NoReturn:
    """Raises the error that says why `name` is no card: another size, more than one card, or unknown."""
    given = "".join(letter if letter.isprintable() else "?" for letter in name[:60])
    size_bytes = asked.size_bytes
    alike = [stem for stem, spelling in stems.items() if spelling.is_like(asked.without("sxm"))]
    if alike and size_bytes is not None:
        sizes = " or ".join(f"{format_bytes(_profile(stem).box_bytes)} ({stem})" for stem in alike)
        raise GptfitError(f'"{given}" has {sizes}, not {format_bytes(size_bytes)}', f"write it as {alike[0]}")
    # The name fits, but leaves open which one it is: A100, V100, RTX 6000.
    words = asked.words - {"sxm"}
    wider = [
        stem
        for stem, spelling in stems.items()
        if spelling.model == asked.model
        and spelling.words >= words
        and ("laptop" in words or "laptop" not in spelling.words)
        and (size_bytes is None or _has_size(stem, size_bytes))
    ]
    if len(wider) > 1:
        raise GptfitError(f'"{given}" is more than one card: {", ".join(wider)}', f"write one of them: {wider[0]}")
    guess = "-".join([asked.model, *sorted(asked.words)]) if asked.model else letters_of(name)
    raise GptfitError(
        f'unknown GPU "{given}"{nearest(guess, stems)}', "gptfit gpus lists the cards that have a profile"
    )


@functools.cache
def _profile(stem: str) -> GpuProfile:
    return read_profile(PROFILES / f"{stem}.yaml")


def read_profile(path: Path) -> GpuProfile:
    """The profile in a YAML file, where each number stands as a `value` (those of `flops` by dtype) and its `source`.

    Raises GptfitError for a file that is not a profile, or a number without a source.
    """
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for key, entry in _load_yaml(path.read_text(encoding="utf-8"), path).items():
        values[key] = entry
        if isinstance(entry, dict):
            numbers = {word: value for word, value in entry.items() if word != "source"}
            values[key] = numbers["value"] if list(numbers) == ["value"] else numbers
            if source := str(entry.get("source") or "").strip():
                sources[key] = source
        if isinstance(entry, dict | int | float) and key not in sources:
            raise GptfitError(f"{path.name}: {key} has no source", "say beside each number where it is from")
    try:
        return GpuProfile(**values, sources=sources)
    except GptfitError as error:  # from parse_size
        raise GptfitError(f"{path.name}: {error.message}", error.hint) from None
    except (ValidationError, TypeError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        where = ".".join(map(str, first["loc"])) or "the file"
        raise GptfitError(f"{path.name}: {where}: {first['msg']}", "see profiles/rtx4070.yaml for the form") from None


@functools.cache
def _names_in(stem: str) -> tuple[str, ...]:
    """Title and aliases of a profile: they stand above `vendor`, and only that far the file is parsed."""
    path = PROFILES / f"{stem}.yaml"
    head = _load_yaml(path.read_text(encoding="utf-8").partition("\nvendor:")[0], path)
    return (str(head.get("title", "")), *map(str, head.get("aliases", ())))


def _load_yaml(text: str, path: Path) -> dict[str, Any]:
    import yaml

    try:
        loaded = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise GptfitError(f"{path.name} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(loaded, dict):
        raise GptfitError(f"{path.name} is not a profile", "see profiles/rtx4070.yaml for the form")
    return loaded
