"""The run that failed: as it was given, or as the text tells it and GPT-2 where it does not."""

from collections.abc import Sequence
from dataclasses import dataclass

from gptfit.config import RunConfig
from gptfit.door import read_config
from gptfit.errors import GptfitError
from gptfit.oom.read import OomFacts

MODEL = frozenset(("n_layer", "n_embd"))
BATCH = frozenset(("batch_size", "block_size"))
TOLD = MODEL | BATCH | {"vocab_size", "n_head"}


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
        return self.from_file or (self.told >= MODEL | BATCH)


def failed_run(facts: OomFacts, config: str | None = None, overrides: Sequence[str] = ()) -> FailedRun | None:
    """None where neither the text nor the user tells any of its sizes.

    Raises GptfitError for a config or an override that cannot be read; what the text tells is only used if it fits.
    """
    if config is not None:
        return FailedRun(read_config(config, overrides).run, frozenset(), True)
    typed = read_config(None, overrides)
    recognised = {key: value for key, value in facts.config.items() if key not in typed.user_keys}
    told = typed.user_keys | recognised.keys()
    if not told & TOLD:
        return None
    texts = [f"{key}={value}" for key, value in recognised.items()]
    if "n_embd" in told and "n_head" not in told:
        texts.append(f"n_head={heads(int(str(recognised.get('n_embd', typed.run.n_embd))))}")
    try:
        run = read_config(None, [*texts, *overrides]).run
    except GptfitError as error:
        note = f"the keys that the text tells do not make a run ({error.message}); only what was typed is used"
        return FailedRun(typed.run, typed.user_keys, False, (note,)) if typed.user_keys & TOLD else None
    assumed = sorted(key for key in TOLD - told if key != "n_head")
    values = " ".join(f"{key}={getattr(run, key)}" for key in assumed)
    notes = (f"not told, taken from GPT-2: {values}",) if assumed else ()
    return FailedRun(run, frozenset(told), False, notes)


def heads(n_embd: int) -> int:
    """Heads of 64, or of the next smaller size that divides n_embd: few figures depend on it."""
    return n_embd // next(size for size in range(min(64, n_embd), 0, -1) if n_embd % size == 0)
