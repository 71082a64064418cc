"""Why there was no room, in one clause, and the two sentences that say what could not be allocated."""

from gptfit.oom import tensors
from gptfit.oom.engines import ENGINES
from gptfit.oom.enough import (
    UNUSED_TIMES,
    Prospect,
    foreign_bytes,
    fragmented,
    lent_bytes,
    missing_bytes,
    ranks_alike,
    reserved_bytes,
    spare_bytes,
    unallocated_bytes,
)
from gptfit.oom.instant import Instant
from gptfit.oom.read import OomFacts
from gptfit.oom.remedies import (
    ABSURD,
    ALLOC_CONF,
    COLLECTED,
    FOREIGN,
    FRAGMENTATION,
    GATHERED,
    KEPT,
    MOSTLY,
    NOT_FULL,
    ON_FULL_CARD,
    POOLS,
    STEPS,
    TOO_LARGE,
)
from gptfit.oom.signs import LEAST_STEPS
from gptfit.units import format_bytes

MiB = 1 << 20
OF_STEPS = frozenset(("cuda_caching_allocator", "hip", "xpu", "mps"))

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
MUCH_FOREIGN = 0.25  # of the card: then it matters more than pieces
THC = "the card was full: torch before 1.0 prints no figure of it"
FIRST = "the driver had no memory left for what comes first onto the card: mostly, other processes hold it"


def cause_of(facts: OomFacts, prospect: Prospect, tensor: tensors.Tensor | None, instant: Instant | None) -> str:
    """One clause that says why there was no room. `prospect` has the run, where it is known."""
    if facts.wording in ENGINES:
        return ENGINES[facts.wording].cause
    if facts.wording == ABSURD:
        return "a size was computed wrongly (a failed or timed out collective leaves such ones): no card has that much"
    if facts.kind in ELSEWHERE:
        first = FIRST if facts.kind == "cuda_driver" and facts.phase == "model_load" else ""
        first = THC if facts.wording == "cuda runtime error (2)" else first
        return (_full_by_table(facts) or first or ELSEWHERE[facts.kind]) + (
            f": {facts.explanation}" if facts.kind == "not_oom" and facts.explanation else ""
        )
    tried, total = facts.tried_bytes, facts.total_bytes
    if tried is not None and total is not None and tried > total:
        return f"a single tensor of {format_bytes(tried)} is larger than the card"
    allowed = getattr(facts, "allowed_bytes", None)
    if allowed is not None and total is not None and allowed < total:
        return f"a limit of {format_bytes(allowed)} is set for this process, below what the card has"
    square = tensor is not None and tensor.name == "attention scores"
    signs = _by_signs(facts, prospect, square) if instant is None else ""  # else the tape says what took the room
    found = _by_others(facts, prospect) or _by_code(facts) or _by_figures(facts, prospect) or signs or _beside(instant)
    return found or _by_phase(facts, tensor) + _also_in_pieces(facts)


def _also_in_pieces(facts: OomFacts) -> str:
    """Where much is reserved and unused, though not so much that expandable segments were seen to be enough."""
    unused = unallocated_bytes(facts) or 0
    if facts.kind not in ALLOC_CONF or unused < max(UNUSED_TIMES * (facts.tried_bytes or unused + 1), 512 * MiB):
        return ""
    return f"; {format_bytes(unused)} of it are reserved and unused, in pieces"


def _full_by_table(facts: OomFacts) -> str:
    """Where the driver or a library had no room: what nvidia-smi says of the card, if it is in the text."""
    if facts.kind not in ON_FULL_CARD or not facts.cards:
        return ""
    index = facts.device_index or 0
    used, total = facts.cards[index] if index < len(facts.cards) else (0, 0)
    if used < 0.8 * total or not total:
        return ""
    return f"nvidia-smi in the text has {format_bytes(used)} of {format_bytes(total)} in use on GPU {index}"


def _by_others(facts: OomFacts, prospect: Prospect) -> str:
    """What is lent, and what others hold of the card."""
    if lent := lent_bytes(facts):
        return (
            f"{format_bytes(facts.allocated_bytes or 0)} are allocated, more than the card has: the driver lent "
            f"{format_bytes(lent)} or more of the computer's memory (sysmem fallback, on Windows), until that ended, "
            f"too; the run is {format_bytes(missing_bytes(facts) or lent)} too large for the card"
        )
    others, missing = facts.other_processes_bytes or 0, missing_bytes(facts)
    if others >= 256 * MiB and missing is not None and others >= missing:
        fits = prospect.enough(others, more=others)
        told = "this would have fitted" if fits else "there would have been room for this tensor"
        more = ", but not for the whole run" if fits is False else ""
        alike = ranks_alike(facts)
        job = f" ({alike} alike, as ranks of one job that all begin on this GPU)" if alike else ""
        return f"other processes hold {format_bytes(others)} of the card{job}; without them {told}{more}"
    foreign = foreign_bytes(facts)
    return _foreign(foreign) if foreign >= MUCH_FOREIGN * (facts.total_bytes or 0) and foreign else ""


def _foreign(n_bytes: int) -> str:
    return (
        f"{FOREIGN}: at least {format_bytes(n_bytes)} are neither free nor PyTorch's here: another process (a rank on "
        "the same GPU, a notebook, a desktop, another container)"
    )


def _by_code(facts: OomFacts) -> str:
    """What a line of the traceback does."""
    if facts.kept:
        return f"{KEPT}: `{facts.kept[:60]}` keeps a tensor and what its backward needs"
    if facts.collected:
        return f"{COLLECTED}: the evaluation keeps the logits of all its batches on the card, and copies them for each"
    if facts.gathered:
        return f"{GATHERED} for the checkpoint, on every rank's card, which holds its own part alone otherwise (FSDP)"
    return ""


def _by_figures(facts: OomFacts, prospect: Prospect) -> str:
    """What the message's own figures say, and the run's tape where it is known."""
    tried, case = facts.tried_bytes, prospect.case
    if spare := spare_bytes(facts):
        return f"{NOT_FULL}: {_spare(facts, spare)}"
    if fragmented(facts) and facts.kind in ALLOC_CONF and not (case and case.run.expandable_segments):
        unused = format_bytes(unallocated_bytes(facts) or 0)
        pieces = f"but in pieces smaller than the {format_bytes(tried or 0)} asked for"
        return f"{FRAGMENTATION}: {unused} are reserved and unused, {pieces}"
    if case is not None and facts.phase == "model_load":
        model_bytes, held = case.parameter_bytes, facts.allocated_bytes or 0
        earlier = "an earlier model (a notebook's cell that ran before) or a checkpoint is still on the card"
        if held > 2 * model_bytes:
            return f"{format_bytes(held)} are allocated where this model has {format_bytes(model_bytes)}: {earlier}"
    peak_bytes = case.least_bytes(()) if case is not None else None
    if peak_bytes is not None and facts.allocated_bytes is not None and facts.allocated_bytes > 1.2 * peak_bytes:
        return (
            f"{format_bytes(facts.allocated_bytes)} are allocated where a step of this run peaks at "
            f"{format_bytes(peak_bytes)}: something is kept from step to step"
        )
    return ""


def _spare(facts: OomFacts, spare: int) -> str:
    asked = format_bytes(facts.tried_bytes or 0)
    if facts.free_bytes is None:
        held = format_bytes(reserved_bytes(facts) or 0)
        return f"PyTorch held {held} of its {format_bytes(facts.total_bytes or 0)}; what refused {asked} is not told"
    why = {
        "hip": "another limit of the driver's refused it, or a process that has ended since held it",
        "xpu": "the driver refuses a single tensor of 4 GiB and more on many Intel cards",
    }.get(facts.kind, "a process or rank that has ended since held it, or a limit below the card's size refused it")
    return f"{format_bytes(spare)} were free where {asked} were asked for; {why}"


def _by_signs(facts: OomFacts, prospect: Prospect, square: bool) -> str:
    """What nobody accounts for, then what the code in the traceback and the log before it say."""
    if foreign := foreign_bytes(facts):
        return _foreign(foreign)
    pools = facts.private_pools_bytes or 0
    if pools >= 0.2 * (facts.allocated_bytes or pools + 1):
        return f"{POOLS} hold {format_bytes(pools)}: what a graph uses is kept for it alone, one graph for each shape"
    if facts.kind == "mps" and facts.allowed_bytes is not None:
        beside = facts.beside_bytes or 0
        buffers = f", {format_bytes(beside)} beside them (Metal's buffers and the graphs it keeps for each shape)"
        return (
            f"macOS lets the GPU have {format_bytes(facts.allowed_bytes)} of the computer's memory: "
            f"{format_bytes(facts.allocated_bytes or 0)} are in tensors{buffers if beside >= 256 * MiB else ''}"
        )
    trained = facts.phase in ("forward", "loss", "backward", "unknown")
    if facts.steps >= LEAST_STEPS and trained and not square and prospect.case is None and facts.kind in OF_STEPS:
        return (
            f"{STEPS} {facts.steps:,} steps first: a batch of longer samples came, or memory is kept from step to "
            "step, or what is free lies in pieces"
        )
    return ""


def _beside(instant: Instant | None) -> str:
    """What is alive beside a tensor as wide as the vocabulary, where its own kind makes the peak."""
    if instant is None or instant.wanted.category != "logits":
        return ""
    wide = [row for row in instant.rows if row.wide]
    kept = next((row for row in instant.rows if row.name.startswith("activations")), None)
    rows = [*wide, *([kept] if kept else [])]
    if not wide:
        return ""
    listed = [f"{row.name} ({format_bytes(row.n_bytes)})" for row in rows]
    together = f"{', '.join(listed[:-1])}{' and ' if listed[1:] else ''}{listed[-1]}"
    return f"beside it are alive the {together}; with the rest there is no room for one more"


def _by_phase(facts: OomFacts, tensor: tensors.Tensor | None) -> str:
    phase, name = facts.phase, tensor.name if tensor and tensor.confidence != "possible" else ""
    first = facts.progress == "first"  # no optimizer state yet
    if phase == "optimizer":
        lines = [*facts.near, *(frame.code for frame in facts.frames)]
        if name == "optimizer temporary" and any(line.startswith("denom") for line in lines):
            return (
                "the optimizer's step makes a temporary as large as each parameter: as large as a rank's whole part "
                "where parameters are one flat buffer (DeepSpeed ZeRO, FSDP)"
            )
        if name == "optimizer temporary":
            return "the optimizer's foreach implementation makes a list as large as the parameters in its step"
        return (
            "the first optimizer step creates the optimizer's state, two tensors as large as the parameters for AdamW"
        )
    if phase == "eval":
        there = "parameters are" if first else "parameters and optimizer state are"
        return f"the evaluation makes the logits of a whole batch while {there} there"
    held, total = reserved_bytes(facts) or 0, facts.total_bytes or 0
    if phase == "model_load" and total and held >= MOSTLY * total:
        return (
            f"{TOO_LARGE}: {format_bytes(held)} of the card are PyTorch's already, and more is to come; or an earlier "
            "model is still held (a notebook's cell that ran before)"
        )
    if phase == "checkpoint" and total and held >= MOSTLY * total:
        return "a checkpoint, or a copy of its state, came onto the card beside the run's own parameters and state"
    if phase in ("model_load", "checkpoint"):
        return "the card was full before training began: something else holds it, or a checkpoint was loaded onto it"
    if name == "attention scores":
        return (
            "the attention makes its scores whole, tokens × tokens for each head: twice the tokens, four times as much"
        )
    if name.startswith("logits") or name.startswith("cross entropy"):
        return "the logits, batch × block × vocabulary, and the copies that the loss makes of them, make the peak"
    if phase == "unknown" and not name:
        return "the run needs more than the card has"
    needs = "parameters and gradients" if first else "parameters, gradients and optimizer state"
    return f"activations kept for backward, {needs} need more than the card has"


IN_WORDS = {
    "logits": "the logits",
    "logits gradient": "the gradient of the logits",
    "cross entropy": "the float32 copy of the logits in the loss",
    "cross entropy gradient": "the float32 gradient of the logits in the loss",
    "parameter": "a parameter",
    "parameter gradient": "the gradient of a parameter",
    "optimizer state": "a part of the optimizer's state",
    "optimizer temporary": "a temporary of the optimizer",
    "attention scores": "the scores of an attention",
    "attention output": "the output of an attention",
    "mlp activation": "an activation of an MLP",
    "embedding": "an embedding",
}
WHERE = {
    "unknown": "",
    "eval": " during evaluation",
    "model_load": " while the model was moved to the card",
    "checkpoint": " while a checkpoint was loaded or saved",
    "data": " while a batch was brought to the card",
    "compile": " while torch.compile tuned its kernels",
    "optimizer": " in the optimizer's step",
    "loss": " in the loss",
}


def summary_of(facts: OomFacts, tensor: tensors.Tensor | None, cause: str) -> str:
    """Two sentences: what could not be allocated, and why."""
    if facts.kind == "not_oom":
        return cause[:1].upper() + cause[1:] + "."
    what = "memory"
    if tensor is not None:
        shape = " × ".join(str(size) for size in tensor.shape)
        hedge = {"exact": "", "likely": "probably ", "possible": "possibly "}[tensor.confidence]
        what = f"{hedge}{IN_WORDS.get(tensor.name, tensor.name)}" + (f" [{shape}] {tensor.dtype}" if shape else "")
    asked = f" ({format_bytes(facts.tried_bytes)})" if facts.tried_bytes is not None else ""
    if tensor is not None and tensor.name == "logits gradient":
        asked += ", not the logits before the loss"
    where = WHERE.get(facts.phase, f" in {facts.phase}")
    return f"What could not be allocated{where}: {what}{asked}. Why: {cause}."
