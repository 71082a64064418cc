"""From the facts of a paste to what failed, why, and what helps."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from gptfit.config import RunConfig
from gptfit.errors import GptfitError
from gptfit.estimate import Estimate, estimate, under_program
from gptfit.oom import tensors
from gptfit.oom.failed_run import FailedRun
from gptfit.oom.read import OomFacts
from gptfit.oom.remedies import NotRemedy, Remedy, folk_advice, general_remedies, run_remedies
from gptfit.units import format_bytes

MiB = 1 << 20

ELSEWHERE = {
    "host_ram": "the computer's own memory ran out, not the GPU's",
    "host_killed": "the operating system killed the process: the computer's own memory ran out, not the GPU's",
    "shm": "shared memory (/dev/shm) ran out: data loader workers hand their batches over through it",
    "triton_shared_memory": "a Triton kernel asked for more on-chip shared memory than a multiprocessor has; "
    "the card's memory is not the matter",
    "cublas": "cuBLAS could not make its workspace or handle: the card's memory was exhausted just before",
    "cudnn": "cuDNN could not make its workspace: the card's memory was exhausted just before",
    "nccl": "NCCL could not allocate its buffers, which lie outside PyTorch's allocator",
    "cuda_driver": "the driver had no memory left, outside PyTorch's allocator",
    "not_oom": "this is not an out-of-memory error",
}


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


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What `gptfit explain-oom` answers."""

    facts: OomFacts
    tensor: tensors.Tensor | None
    cause: str
    summary: str
    remedies: tuple[Remedy, ...]
    not_remedies: tuple[NotRemedy, ...]
    warnings: tuple[str, ...]
    program: str
    recognised: Mapping[str, object]
    estimate: Estimate | None

    def to_json(self) -> dict[str, object]:
        facts, tensor = self.facts, self.tensor
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
            "remedies": [remedy.to_json() for remedy in self.remedies],
            "not_remedies": [{"change": advice.change, "why": advice.why} for advice in self.not_remedies],
            "warnings": list(self.warnings),
            "program": self.program,
            "recognised": dict(self.recognised),
        }


def diagnose(facts: OomFacts, failed: FailedRun | None = None, program: str | None = None) -> Diagnosis:
    """Explains `facts`. `failed` is the failed run as far as it is known, `program` whose code ran it."""
    program = program or (facts.program if facts.program in ("gptfit", "nanogpt") else "nanogpt")
    warnings = [*facts.notes, *(failed.notes if failed else ())]
    run: RunConfig | None = None
    estimated: Estimate | None = None
    if failed is not None:
        try:
            run = under_program(failed.run, program)
            estimated = estimate(run, program)
        except GptfitError as error:
            warnings.append(error.message)
    model_known = failed is not None and failed.model_known
    lines = [text for frame in facts.frames for text in (frame.function, frame.code) if text]
    tensor = tensors.name_tensor(facts.phase, lines, facts.tried_bytes, run)
    if tensor is not None and tensor.confidence == "exact" and not model_known and not tensor.printed:
        tensor = replace(tensor, confidence="likely")  # part of the arithmetic rests on sizes that nobody told
    if facts.kind not in ("cuda_caching_allocator", "hip", "xpu", "mps", "cuda_async_allocator", "per_process_limit"):
        tensor = None
    cause = cause_of(facts, estimated if model_known else None, tensor)
    remedies: list[Remedy] = general_remedies(facts)
    if run is not None and estimated is not None and facts.kind != "not_oom":
        remedies += run_remedies(facts, run, program, estimated, model_known)
    return Diagnosis(
        facts=facts,
        tensor=tensor,
        cause=cause,
        summary=summary_of(facts, tensor, cause),
        remedies=tuple(remedies),
        not_remedies=tuple(folk_advice(facts, run, program, estimated)) if facts.kind != "not_oom" else (),
        warnings=tuple(warnings),
        program=program,
        recognised=dict(facts.config),
        estimate=estimated,
    )


def cause_of(facts: OomFacts, estimated: Estimate | None, tensor: tensors.Tensor | None) -> str:
    """One clause that says why there was no room."""
    if facts.kind in ELSEWHERE:
        return ELSEWHERE[facts.kind] + (
            f": {facts.explanation}" if facts.kind == "not_oom" and facts.explanation else ""
        )
    tried, total = facts.tried_bytes, facts.total_bytes
    if tried is not None and total is not None and tried > total:
        return f"a single tensor of {format_bytes(tried)} is larger than the card"
    allowed = getattr(facts, "allowed_bytes", None)
    if allowed is not None and total is not None and allowed < total:
        return f"a limit of {format_bytes(allowed)} is set for this process, below what the card has"
    others = facts.other_processes_bytes or 0
    free = facts.free_bytes or 0
    if tried is not None and others >= 256 * MiB and free + others >= tried:
        return f"other processes hold {format_bytes(others)} of the card; without them this would have fitted"
    unallocated = facts.reserved_unallocated_bytes
    if unallocated is None and facts.reserved_bytes is not None and facts.allocated_bytes is not None:
        unallocated = max(0, facts.reserved_bytes - facts.allocated_bytes)
    if tried is not None and unallocated is not None and unallocated >= tried:
        return (
            f"fragmentation: {format_bytes(unallocated)} are reserved and unused, but in pieces smaller than the "
            f"{format_bytes(tried)} asked for"
        )
    if (
        estimated is not None
        and facts.allocated_bytes is not None
        and facts.allocated_bytes > 1.2 * estimated.allocated_bytes
    ):
        return (
            f"{format_bytes(facts.allocated_bytes)} are allocated where a step of this run peaks at "
            f"{format_bytes(estimated.allocated_bytes)}: something is kept from step to step"
        )
    return _by_phase(facts.phase, tensor)


def _by_phase(phase: str, tensor: tensors.Tensor | None) -> str:
    name = tensor.name if tensor else ""
    if phase == "optimizer":
        if name == "optimizer temporary":
            return "the optimizer's foreach implementation makes a list as large as the parameters in its step"
        return (
            "the first optimizer step creates the optimizer's state, two tensors as large as the parameters for AdamW"
        )
    if phase == "eval":
        return "the evaluation makes the logits of a whole batch while parameters and optimizer state are there"
    if phase in ("model_load", "checkpoint"):
        return "the card was full before training began: something else holds it, or a checkpoint was loaded onto it"
    if name.startswith("logits") or name.startswith("cross entropy"):
        return "the logits, batch × block × vocabulary, and the copies that the loss makes of them, make the peak"
    if phase == "unknown" and not name:
        return "the run needs more than the card has"
    return "activations kept for backward, parameters, gradients and optimizer state need more than the card has"


def summary_of(facts: OomFacts, tensor: tensors.Tensor | None, cause: str) -> str:
    """Two sentences: what could not be allocated, and why."""
    if facts.kind == "not_oom":
        return cause[:1].upper() + cause[1:] + "."
    what = "memory"
    if tensor is not None:
        shape = " × ".join(str(size) for size in tensor.shape)
        hedge = {"exact": "", "likely": "probably ", "possible": "possibly "}[tensor.confidence]
        what = f"{hedge}the {tensor.name}" + (f" [{shape}] {tensor.dtype}" if shape else "")
    asked = f" ({format_bytes(facts.tried_bytes)})" if facts.tried_bytes is not None else ""
    where = {"unknown": "", "eval": " during evaluation", "model_load": " while the model was moved to the card"}.get(
        facts.phase, f" in {facts.phase}"
    )
    return f"What could not be allocated{where}: {what}{asked}. Why: {cause}."
