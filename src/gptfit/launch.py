"""What `gptfit train` decides before it trains: which run, and whether it fits where it will run."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from gptfit.asked import Asked
from gptfit.autofit import AutoFit
from gptfit.card import Card, detected_card
from gptfit.checkpoint import checkpoint_paths
from gptfit.config import RunConfig, derive
from gptfit.created import as_resumed
from gptfit.device import adapt, has_expandable_segments, pick_device
from gptfit.door import ConfigSource, read_config
from gptfit.driver import DriverGpu, detect
from gptfit.errors import GptfitError
from gptfit.estimate import Estimate, estimate, speed_json
from gptfit.events import Listener, Note
from gptfit.levers import LeverEffect, effects
from gptfit.plan import plan
from gptfit.session import Refit
from gptfit.setup import RUN_FILE

# Without a CONFIG, auto-fit trains what ends within minutes: on a CPU a preset made for it, on a GPU the first
# twenty million tokens of GPT-2, 60 × 1024 a step.
CPU_PRESET = "tiny"
GPU_OVERRIDES = (
    "gradient_accumulation_steps=5",
    "max_iters=320",
    "warmup_iters=32",
    "eval_interval=80",
    "eval_iters=10",
)


# Keys of nanoGPT's train.py that are options here, by the start of what has no effect.
OPTIONS = {
    "out_dir": "the run's folder is --out DIR",
    "device": "--device NAME says it",
    "wandb_log": "--log wandb does it",
}


@dataclass(frozen=True, slots=True)
class Launch:
    """The run to train; its estimate on the card (None without one), and, where that does not fit, what would help.
    `refit` judges a plan by what its second step measures."""

    run: RunConfig
    estimate: Estimate | None = None
    levers: tuple[LeverEffect, ...] = ()
    notes: tuple[str, ...] = ()
    refit: Refit | None = None

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

    def record(self) -> dict[str, object]:
        """What a report needs to know: the run as given where it was planned, and what is predicted."""
        given = self.refit.source.run.model_dump() if isinstance(self.refit, AutoFit) else None
        one = self.estimate
        if one is None or one.budget is None:
            return {"given": given, "predicted": None}
        known = {**(self.predicted or {}), "low_bytes": one.interval.low_bytes, "high_bytes": one.interval.high_bytes}
        speed = speed_json(one.speed) if one.speed else None
        return {"given": given, "predicted": {**known, "gpu": one.budget.to_json(), "speed": speed}}

    def tell(self, listener: Listener) -> None:
        """Hands the notes to whoever listens to the training."""
        for note in self.notes:
            listener(Note(note))


def prepare_launch(
    asked: Asked,
    auto_fit: bool = False,
    resume_from: Path | None = None,
    device_name: str = "",
) -> Launch:
    """The run for this machine. On a GPU it is estimated beside what the driver says is free, or, with `auto_fit`,
    planned for it; on a CPU it is trained as it is, and `auto_fit` without a CONFIG takes a model that is small enough.

    A resumed run without a CONFIG is the one in its folder. Raises GptfitError for what cannot be read.
    """
    seen = detect()  # before CUDA starts here, whose context would count as others' memory
    device = pick_device(device_name)
    source = choose_source(asked, auto_fit, resume_from, device)
    source = replace(source, notes=(*source.notes, *said_otherwise(source)))
    if device.type != "cuda":
        return Launch(source.run, notes=source.notes)
    gpu = next((gpu for gpu in seen if gpu.uuid.endswith(gpu_uuid(device))), None)
    if gpu is None:
        return Launch(source.run, notes=(*source.notes, "not estimated: the driver does not say what is free"))
    try:
        card = detected_card(gpu)
    except GptfitError as error:
        return Launch(source.run, notes=(*source.notes, f"not estimated: {error.message}"))
    run, notes = adapt(source.run, device)
    if run.expandable_segments and not has_expandable_segments():
        run = derive(run, expandable_segments=False)
        notes = (*notes, "expandable_segments=False: this system or its environment has none")
    if auto_fit and resume_from is None:
        return plan_launch(replace(source, run=run, notes=(*source.notes, *notes)), card, gpu)
    begun = as_resumed(run) if resume_from is not None else run
    estimated = estimate(begun, "gptfit", card.profile, card.reserve_bytes)
    launch = Launch(run, estimated, notes=(*source.notes, *card.notes, *notes))
    if launch.refused:
        launch = replace(launch, levers=tuple(effects(estimated, run, "gptfit", card.profile, card.reserve_bytes)))
    return launch


def choose_source(asked: Asked, auto_fit: bool, resume_from: Path | None, device: torch.device) -> ConfigSource:
    """The run that was asked for; without a CONFIG the one to resume, or one that `auto_fit` ends in minutes."""
    if asked.config is not None or not (auto_fit or resume_from):
        return read_config(asked.config, asked.overrides)
    if resume_from is not None and (resume_from / RUN_FILE).is_file():
        return read_config(str(resume_from / RUN_FILE), asked.overrides)
    if resume_from is not None and checkpoint_paths(resume_from):
        raise GptfitError(f'"{resume_from}" has lost its {RUN_FILE}', "give the CONFIG that the run was begun with")
    if device.type == "cuda":
        given = asked.changed({})
        mine = (word for word in GPU_OVERRIDES if word.partition("=")[0] not in given)
        return read_config(None, (*mine, *asked.overrides))
    return read_config(CPU_PRESET, asked.overrides)


def said_otherwise(source: ConfigSource) -> list[str]:
    """A line for each key that train.py obeys and that is an option here.

    Raises GptfitError for eval_only: who asks for that wants no weight changed.
    """
    given = {key: set_to(text) for key, text in source.ignored.items()}
    if given.get("eval_only") == "True":
        raise GptfitError(
            "eval_only=True: gptfit train changes weights",
            "leave it out to train; the losses of a run: gptfit report DIR",
        )
    plain = {"wandb_log": "False"}
    return [
        f"{key}={given[key]} has no effect here: {how}"
        for key, how in OPTIONS.items()
        if key in given and given[key] != plain.get(key)
    ]


def set_to(text: str) -> str:
    """The value in a key's text: out_dir = 'out', out_dir=out or out_dir: out."""
    return re.split("[=:]", text, maxsplit=1)[-1].strip().strip("'\"")


def plan_launch(source: ConfigSource, card: Card, gpu: DriverGpu) -> Launch:
    """The best run that fits the card; where none does, the run as given with what would help."""
    planned = plan(source, card.profile, card.reserve_bytes)
    if planned.run is None or planned.estimate is None:
        return Launch(source.run, planned.as_given, planned.levers, source.notes)
    refit = AutoFit(source, card, gpu, planned.run, planned.estimate)
    return Launch(planned.run, planned.estimate, notes=(*source.notes, *planned.notes), refit=refit)


def gpu_uuid(device: torch.device) -> str:
    """What the driver calls that device, without its prefix."""
    return str(torch.cuda.get_device_properties(device).uuid)
