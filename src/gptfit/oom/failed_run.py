"""The run that failed: as it was given, or as the text tells it, its trainer's defaults, and GPT-2 for the rest."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from gptfit.config import ModelConfig, RunConfig, derive, make_run
from gptfit.errors import GptfitError
from gptfit.oom.read import OomFacts, shape_keys
from gptfit.oom.sizes import inferred
from gptfit.oom.trainers import trainer_of

if TYPE_CHECKING:
    from gptfit.door import ConfigSource

SIZES = ("batch_size", "block_size", "vocab_size")  # what the shape of the logits tells
MODEL = frozenset(("n_layer", "n_embd"))
BATCH = frozenset(("batch_size", "block_size"))
TOLD = MODEL | BATCH | {"vocab_size", "n_head"}
# More than anyone has trained: a text that tells more does not tell a run.
MOST: Mapping[str, int] = {
    **{"n_layer": 256, "n_head": 1024, "n_kv_head": 1024, "n_embd": 1 << 16, "n_hidden": 1 << 19},
    **{"vocab_size": 1 << 22, "block_size": 1 << 21, "batch_size": 1 << 16, "eval_batch_size": 1 << 16},
    **{"gradient_accumulation_steps": 1 << 20, "n_gpus": 1 << 17},
}


@dataclass(frozen=True, slots=True)
class FailedRun:
    """`told` are the keys that the text or the user told; the others are the config's, or GPT-2's."""

    run: RunConfig
    told: frozenset[str]
    from_file: bool
    notes: tuple[str, ...] = ()

    @property
    def model_known(self) -> bool:
        """Whether memory estimated for it says something about the run that failed, and not about GPT-2."""
        return not self.missing

    @property
    def missing(self) -> frozenset[str]:
        """The sizes that nobody told."""
        return frozenset() if self.from_file else (MODEL | BATCH) - self.told


def failed_run(facts: OomFacts, config: str | None = None, overrides: Sequence[str] = ()) -> FailedRun | None:
    """None where neither the text nor the user tells any of its sizes.

    Raises GptfitError for a config or an override that cannot be read; what the text tells is only used if it fits.
    """
    if config is not None:
        return corrected(facts, FailedRun(_read(config, overrides).run, frozenset(), True))
    typed = _read(None, overrides) if overrides else None
    found = _told_run(facts, typed, overrides)
    return corrected(facts, found, typed.user_keys) if found and typed else found


def corrected(facts: OomFacts, failed: FailedRun, keys: Collection[str] | None = None) -> FailedRun:
    """The run with the sizes of a tensor that the text prints, where what the user said (`keys`, or all) is another.
    Raises GptfitError where these make no run."""
    said = {key: getattr(failed.run, key) for key in SIZES if keys is None or key in keys}
    printed = shape_keys(facts.shapes)
    wrong = {key: printed[key] for key, value in said.items() if key in printed and printed[key] != value}
    if not wrong:
        return failed
    notes = [f"the text says {key} {size}, you said {said[key]}: {size} is used" for key, size in wrong.items()]
    return replace(failed, run=derive(failed.run, **wrong), notes=(*notes, *failed.notes))


def _told_run(facts: OomFacts, typed: "ConfigSource | None", overrides: Sequence[str]) -> FailedRun | None:
    trainer = trainer_of(facts.program)
    typed_keys = typed.user_keys if typed else frozenset()
    recognised = {key: value for key, value in facts.config.items() if key not in typed_keys}
    huge = [key for key, value in recognised.items() if isinstance(value, int) and value > MOST.get(key, value)]
    notes = [f"{key}={recognised.pop(key)} is not believed, and not used" for key in huge]
    named = _named(facts.model) if not trainer.exact else {}
    typed_values = {key: getattr(typed.run, key) for key in typed_keys} if typed else {}
    products = inferred(facts, {**named, **recognised, **typed_values})
    if products:
        notes.append(f"told by their product: {' '.join(f'{key}={value}' for key, value in products.items())}")
    recognised |= products
    told = typed_keys | recognised.keys() | named.keys()
    if not told & TOLD:
        return None
    known = {**trainer.assumed, **named}
    values = {**{key: value for key, value in known.items() if key not in typed_keys}, **recognised}
    if named:
        notes.append(f"the shape of the model is that of the preset {facts.model}, which the text names")
    if trainer.per_gpu and "gradient_accumulation_steps" in recognised:
        values["gradient_accumulation_steps"] = int(str(values["gradient_accumulation_steps"])) * _gpus(values)
    elif "n_gpus" in recognised and "gradient_accumulation_steps" not in told:
        values["gradient_accumulation_steps"] = _gpus(values)
    if "n_embd" in told and "n_head" not in told:
        values["n_head"] = heads(int(str(recognised.get("n_embd") or (typed and typed.run.n_embd))))
    try:
        texts = [*(f"{key}={value}" for key, value in values.items()), *overrides]
        run = _read(None, texts).run if typed else make_run(values)
    except GptfitError as error:
        notes.append(f"the keys that the text tells do not make a run ({error.message}); only what was typed is used")
        return FailedRun(typed.run, typed_keys, False, tuple(notes)) if typed and typed_keys & TOLD else None
    return FailedRun(run, frozenset(told), False, (*notes, *_assumed(run, told, trainer.assumed, trainer.title)))


def _read(config: str | None, overrides: Sequence[str]) -> "ConfigSource":
    from gptfit.door import read_config  # which reads YAML: a paste alone does without

    return read_config(config, overrides)


def _named(model: str) -> dict[str, object]:
    """The shape of a well-known model; how long its texts are is the run's."""
    from gptfit.presets import load_preset

    values = load_preset(model).values if model else {}
    return {key: value for key, value in values.items() if key in ModelConfig.model_fields and key != "block_size"}


def _gpus(values: Mapping[str, object]) -> int:
    return int(str(values.get("n_gpus", 1)))


def _assumed(run: RunConfig, told: frozenset[str] | set[str], own: Mapping[str, object], title: str) -> list[str]:
    """What neither the text nor the user told, and what stands for it."""
    notes = []
    trainers = sorted(key for key in own.keys() - told if key not in ("expandable_segments", "n_gpus"))
    if trainers and own.keys() & TOLD:
        values = " ".join(f"{key}={getattr(run, key)}" for key in trainers)
        notes.append(f"not told, {title}'s own defaults: {values}")
    assumed = sorted(key for key in TOLD - told - own.keys() if key != "n_head")
    if assumed:
        values = " ".join(f"{key}={getattr(run, key)}" for key in assumed)
        notes.append(f"not told, taken from GPT-2: {values}")
    return notes


def heads(n_embd: int) -> int:
    """Heads of 64, or of the next smaller size that divides n_embd: few figures depend on it."""
    return n_embd // next(size for size in range(min(64, n_embd), 0, -1) if n_embd % size == 0)
