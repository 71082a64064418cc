"""What `gptfit train` decides before it trains: which run, and whether it fits where it will run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gptfit.card import Card, find_card
from gptfit.config import RunConfig
from gptfit.device import adapt, pick_device
from gptfit.door import ConfigSource, read_config
from gptfit.estimate import Estimate, estimate
from gptfit.events import Listener, Note
from gptfit.levers import LeverEffect, effects
from gptfit.plan import plan
from gptfit.train import RUN_FILE

# The preset that a CPU trains in minutes.
CPU_PRESET = "tiny"


@dataclass(frozen=True, slots=True)
class Launch:
    """The run to train; its estimate on the card (None without one), and, where that does not fit, what would help."""

    run: RunConfig
    estimate: Estimate | None = None
    levers: tuple[LeverEffect, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def refused(self) -> bool:
        return self.estimate is not None and self.estimate.verdict == "does_not_fit"

    @property
    def predicted(self) -> Mapping[str, int] | None:
        """The figures that training compares with what it measures."""
        if self.estimate is None:
            return None
        return {
            "allocated_bytes": self.estimate.allocated_bytes,
            "reserved_bytes": self.estimate.reserved_bytes,
            "process_bytes": self.estimate.process_bytes,
        }

    def tell(self, listener: Listener) -> None:
        """Hands the notes to whoever listens to the training."""
        for note in self.notes:
            listener(Note(note))


def prepare_launch(
    config: str | None,
    overrides: Sequence[str],
    auto_fit: bool = False,
    resume_from: Path | None = None,
    device_name: str = "",
) -> Launch:
    """The run for this machine. On a GPU it is estimated beside what the driver says is free, or, with `auto_fit`,
    planned for it; on a CPU it is trained as it is, and `auto_fit` without a CONFIG takes a model that is small enough.

    A resumed run without a CONFIG is the one in its folder. Raises GptfitError for what cannot be read.
    """
    device = pick_device(device_name)
    on_gpu = device.type == "cuda"
    if config is None and resume_from is not None and (resume_from / RUN_FILE).is_file():
        config = str(resume_from / RUN_FILE)
    if config is None and auto_fit and not on_gpu:
        config = CPU_PRESET
    source = read_config(config, overrides)
    card = find_card("auto") if on_gpu else None
    if card is None:
        return Launch(source.run, notes=source.notes)
    run, notes = adapt(source.run, device)
    if auto_fit and resume_from is None:
        return plan_launch(replace(source, run=run), card)
    estimated = estimate(run, "gptfit", card.profile, card.reserve_bytes)
    launch = Launch(run, estimated, notes=(*source.notes, *notes))
    if launch.refused:
        launch = replace(launch, levers=tuple(effects(estimated, run, "gptfit", card.profile, card.reserve_bytes)))
    return launch


def plan_launch(source: ConfigSource, card: Card) -> Launch:
    """The best run that fits the card; where none does, the run as given with what would help."""
    planned = plan(source, card.profile, card.reserve_bytes)
    if planned.run is None:
        return Launch(source.run, planned.as_given, planned.levers, source.notes)
    return Launch(planned.run, planned.estimate, notes=(*source.notes, *planned.notes))
