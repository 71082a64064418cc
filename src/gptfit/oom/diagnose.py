"""From the facts of a paste to what failed, why, and what helps."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from gptfit.config import RunConfig
from gptfit.errors import GptfitError
from gptfit.estimate import under_program
from gptfit.memory.overhead import UNKNOWN_CARD_CONTEXT_BYTES
from gptfit.oom import tensors
from gptfit.oom.case import WITHIN, Case
from gptfit.oom.causes import cause_of, summary_of
from gptfit.oom.changes import Failure, run_remedies, worded_remedies
from gptfit.oom.container import seen_from_outside
from gptfit.oom.engines import ENGINES
from gptfit.oom.enough import Prospect, hidden_bytes, lent_bytes, missing_bytes, reserved_bytes
from gptfit.oom.failed_run import BATCH, MODEL, FailedRun, failed_run
from gptfit.oom.folk import folk_advice
from gptfit.oom.instant import SLACK, Instant, find_instant
from gptfit.oom.read import OomFacts, read_paste
from gptfit.oom.remedies import ABSURD, KIND_REMEDIES, NotRemedy, Remedy, general_remedies, watched
from gptfit.oom.trainers import ANY, TRAINERS, Trainer, trainer_of
from gptfit.units import format_bytes

FIGURES = (
    "tried_bytes",
    "device_index",
    "total_bytes",
    "free_bytes",
    "process_bytes",
    "other_processes_bytes",
    "allocated_bytes",
    "reserved_bytes",
    "reserved_unallocated_bytes",
)
LEAST_HIDDEN = 512 << 20  # more than contexts were seen to take: 120 to 504 MiB
HIDDEN = "a CUDA context (0.1 to 0.5 GiB), and a desktop, a browser or another container"
# Of the computer's memory, or of a kernel's: what the card holds of the run has no part in it.
OFF_THE_CARD = frozenset(("not_oom", "host_ram", "host_killed", "shm", "triton_shared_memory"))
# Kinds whose failing request is a tensor of the step.
OF_A_TENSOR = frozenset(("cuda_caching_allocator", "hip", "xpu", "mps", "cuda_async_allocator", "per_process_limit"))


SDPA = "F.scaled_dot_product_attention(q, k, v, is_causal=True)"
NO_STEP = frozenset(("model_load", "checkpoint", "data"))
EXACT = frozenset(("unknown", *(name for name, trainer in TRAINERS.items() if trainer.exact)))


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What `gptfit explain-oom` answers. `trainer` is whose code the text is of, `program` whose tape stands for it;
    `instant` is None where the run is not known, or makes no such tensor; `missing` are the sizes that nobody told.
    `title` says in whose words the remedies are."""

    facts: OomFacts
    tensor: tensors.Tensor | None
    cause: str
    summary: str
    remedies: tuple[Remedy, ...]
    not_remedies: tuple[NotRemedy, ...]
    warnings: tuple[str, ...]
    program: str
    trainer: str
    recognised: Mapping[str, object]
    instant: Instant | None
    missing: frozenset[str]
    title: str

    @property
    def heading(self) -> str:
        """In whose words the remedies are, and when they save what they say: at another instant it may be less."""
        when = "at that instant" if self.instant or self.facts.phase in WITHIN else "at the peak of a step"
        saves = any(remedy.saves_bytes for remedy in self.remedies)
        return "; ".join(part for part in (self.words, f"what it saves {when}" if saves else "") if part)

    @property
    def words(self) -> str:
        """In whose words the remedies are; "" where they are not about a trainer's code."""
        if self.facts.kind not in OF_A_TENSOR or not _of_a_step(self.facts):
            return ""
        words = f"in the words of {self.title}" if self.title else ""
        nobody = "" if self.trainer in TRAINERS else "nothing tells whose code ran"
        return ": ".join(part for part in (words, nobody) if part)

    def to_json(self) -> dict[str, object]:
        facts, tensor, instant = self.facts, self.tensor, self.instant
        return {
            "schema": "gptfit.oom/1",
            "kind": facts.kind,
            "wording": facts.wording,
            **{name: getattr(facts, name) for name in FIGURES},
            "phase": facts.phase,
            "tensor": None
            if tensor is None
            else {
                "name": tensor.name,
                "shape": list(tensor.shape),
                "dtype": tensor.dtype,
                "bytes": tensor.n_bytes,
                "confidence": tensor.confidence,
            },
            "cause": self.cause,
            "summary": self.summary,
            "alive": [{"name": row.name, "bytes": row.n_bytes} for row in instant.rows] if instant else [],
            "alive_bytes": instant.alive_bytes if instant else None,
            "remedies": [remedy.to_json() for remedy in self.remedies],
            "not_remedies": [{"change": advice.change, "why": advice.why} for advice in self.not_remedies],
            "warnings": list(self.warnings),
            "program": self.program,
            "trainer": self.trainer,
            "recognised": dict(self.recognised),
        }


def explain_text(text: str, run: RunConfig | None = None, program: str | None = None) -> Diagnosis:
    """The diagnosis of a message or a whole log: for a trainer that knows its `run` and catches its own error, and
    for anyone else. Raises GptfitError if there is nothing in the text."""
    facts = read_paste(text)
    return diagnose(facts, FailedRun(run, frozenset(), True) if run else failed_run(facts), program)


def diagnose(facts: OomFacts, failed: FailedRun | None = None, program: str | None = None) -> Diagnosis:
    """Explains `facts`. `failed` is the failed run as far as it is known, `program` whose code ran it."""
    facts = seen_from_outside(facts)
    trainer = trainer_of(facts.program, program)
    warnings = list(facts.notes)
    case = _case(failed, trainer, facts.progress == "first", warnings) if _of_a_step(facts) else None
    known = case is not None and failed is not None and failed.model_known
    tensor = _tensor(facts, case, known)
    if case is not None and failed is not None and "compile" not in failed.told and not failed.from_file:
        case = _eager(case, tensor, warnings)
    if not known and (facts.kind == "cuda_driver" or _of_anything(facts, failed, program)):
        case = None
    if case is not None and not trainer.exact and (not known or facts.adapters):
        why = "a few added weights are trained" if facts.adapters else "the text does not tell the model's shape"
        warnings.append(f"{why}: no figure is computed")
        case, known = None, False
    instant = None
    if case is not None and known and facts.kind in OF_A_TENSOR:
        instant = find_instant(
            case, facts.phase, tensor, facts.tried_bytes, facts.allocated_bytes, facts.total_bytes, facts.progress
        )
        if instant is not None and instant.impossible:
            told = "what is saved is computed for these keys all the same" if trainer.exact else "no figure is computed"
            warnings.append(f"{instant.sentence()}; {told}")
            case, known, instant = case if trainer.exact else None, False, None
            if tensor is not None and tensor.confidence == "exact" and not tensor.printed:
                tensor = replace(tensor, confidence="likely")
    if failed is not None and case is not None:
        warnings += failed.notes
    within = instant.within if instant else WITHIN.get(facts.phase, ())
    prospect = _prospect(facts, trainer, case if known else None, instant, within)
    hidden = hidden_bytes(facts)
    if facts.process_bytes is None and hidden >= LEAST_HIDDEN:
        warnings.append(
            f"{format_bytes(hidden)} of the card are neither free nor reserved nor of a process named: {HIDDEN}"
        )
    cause = cause_of(facts, prospect, tensor, instant)
    failure = Failure(case, trainer, within, instant, prospect) if case is not None else None
    spoken = ANY if case is None and program is None and facts.program not in TRAINERS else trainer
    remedies = [*general_remedies(facts, prospect), *_of_the_run(facts, failure, spoken, tensor), *watched(facts)]
    if case is not None and not trainer.exact:
        warnings.append(
            f"the figures are those of the same model in gptfit's code, eager unless told; {trainer.title} keeps more "
            "or less of it"
        )
    return Diagnosis(
        facts=facts,
        tensor=tensor,
        cause=cause,
        summary=summary_of(facts, tensor, cause),
        remedies=tuple(sorted(remedies, key=lambda remedy: _rank(remedy, cause))),
        not_remedies=tuple(folk_advice(facts.kind, case, within, remedies)) if _folk(facts) else (),
        warnings=tuple(warnings),
        program=trainer.twin,
        trainer=program or (facts.program if facts.program in TRAINERS else "unknown"),
        recognised=dict(facts.config),
        instant=instant,
        missing=_missing(facts, failed, trainer),
        title=spoken.title,
    )


def _of_the_run(
    facts: OomFacts, failure: Failure | None, spoken: Trainer, tensor: tensors.Tensor | None
) -> list[Remedy]:
    """Changes to the run: with figures where it is known, else in words."""
    if not _of_a_step(facts) or facts.phase in NO_STEP:
        return []
    fused = _fused_attention(facts, tensor)
    if failure is not None:
        return [*fused, *run_remedies(failure)]
    if facts.kind in KIND_REMEDIES:
        return []
    logits = tensor is not None and tensor.name.startswith(("logits", "cross entropy"))
    return [*fused, *worded_remedies(facts, spoken, logits)]


def _fused_attention(facts: OomFacts, tensor: tensors.Tensor | None) -> list[Remedy]:
    """An attention that never has all its scores, where they are what failed."""
    if tensor is None or tensor.name != "attention scores":
        return []
    library = facts.program in ("huggingface", "trl")
    change = 'from_pretrained(..., attn_implementation="sdpa")' if library else SDPA
    return [Remedy(change, "the scores, tokens × tokens for each head, are then never all there")]


def _of_anything(facts: OomFacts, failed: FailedRun | None, program: str | None) -> bool:
    """Whether nothing says whose code it was, nor how large the model: a figure would be one of GPT-2 in nanoGPT's."""
    told = failed.told if failed is not None and not failed.from_file else MODEL
    return program is None and facts.program not in TRAINERS and not told >= MODEL


def _folk(facts: OomFacts) -> bool:
    """Whether the usual advice about torch's allocator is about this error."""
    return facts.kind != "not_oom" and facts.wording not in ENGINES and facts.wording != ABSURD


def _missing(facts: OomFacts, failed: FailedRun | None, trainer: Trainer) -> frozenset[str]:
    """Sizes with which more could be said."""
    foreign = facts.adapters or facts.phase == "model_load"  # of a model that is not what gptfit's twins are of
    exact = trainer.exact and facts.program in TRAINERS
    if not _of_a_step(facts) or facts.kind == "cuda_driver" or facts.phase == "data" or (foreign and not exact):
        return frozenset()
    return failed.missing if failed else MODEL | BATCH


def _of_a_step(facts: OomFacts) -> bool:
    """Whether it is what a step of torch holds of the card that matters: then the run's sizes do."""
    return facts.kind not in OFF_THE_CARD and facts.wording not in ENGINES and facts.wording != ABSURD


def _rank(remedy: Remedy, cause: str) -> tuple[bool, bool, int]:
    """The cure of the cause first, then what saves most, what is not enough last."""
    cures = bool(remedy.cures) and cause.startswith(remedy.cures)
    return not cures, remedy.enough is False, -(remedy.saves_bytes or 0)


def _case(failed: FailedRun | None, trainer: Trainer, first: bool, warnings: list[str]) -> Case | None:
    """None, and a warning, where the program has no such run."""
    if failed is None:
        return None
    try:
        case = Case(under_program(failed.run, trainer.twin), trainer.twin, first=first)
        case.need(())
        return case
    except GptfitError as error:
        warnings.append(error.message)
        return None


def _prospect(
    facts: OomFacts, trainer: Trainer, case: Case | None, instant: Instant | None, within: tuple[str, ...]
) -> Prospect:
    room = None if case is None else _room(facts, trainer, instant)
    return Prospect(case, room, missing_bytes(facts), within)


def _eager(case: Case, tensor: tensors.Tensor | None, warnings: list[str]) -> Case:
    """The case not compiled, where nobody told and a tensor failed that a compiled loss does not make."""
    made = tensor is not None and tensor.name.startswith("cross entropy") and tensor.shape and not tensor.printed
    if not made or not case.run.compile or case.run.dtype == "float32":
        return case
    warnings.append("not told, taken as compile=False: compiled, the loss makes no float32 tensor of that size")
    return case.changed(compile=False) or case


def _tensor(facts: OomFacts, case: Case | None, known: bool) -> tensors.Tensor | None:
    """The tensor that failed; "exact" only where no size that nobody told is part of the arithmetic."""
    if facts.kind not in OF_A_TENSOR:
        return None
    lines = [text for frame in facts.frames for text in (frame.function, frame.code) if text]
    lines = lines or list(facts.near)
    case = case if known or "vocab_size" in facts.config or facts.program in EXACT else None
    tensor = tensors.name_tensor(facts.phase, lines, facts.tried_bytes, case.run if case else None)
    if tensor is not None and tensor.confidence == "exact" and not known and not tensor.printed:
        return replace(tensor, confidence="likely")
    return tensor


def _room(facts: OomFacts, trainer: Trainer, instant: Instant | None) -> int | None:
    """What the allocator could hold at that instant, for the tensors of this run: what it held and what was free, less
    what is held beside the run. None where the text does not say, or where the tape is not that of the run."""
    if not trainer.exact and (instant is None or instant.adds_up is False):
        return None
    reserved = None if lent_bytes(facts) else reserved_bytes(facts)
    room = None
    if facts.allowed_bytes is not None:
        room = facts.allowed_bytes
    elif reserved is not None and facts.free_bytes is not None:
        room = reserved + facts.free_bytes
    elif facts.total_bytes is not None:
        room = facts.total_bytes - (facts.other_processes_bytes or 0) - UNKNOWN_CARD_CONTEXT_BYTES
    if room is None or instant is None or instant.unexplained_bytes <= SLACK * (instant.allocated_bytes or 0):
        return room
    return room - instant.unexplained_bytes
