"""What would have helped, by estimating the run again with each change; and what would not."""

from collections.abc import Iterator
from dataclasses import dataclass

from gptfit.config import RunConfig, derive
from gptfit.errors import GptfitError
from gptfit.estimate import Estimate, estimate
from gptfit.levers import with_micro_batch
from gptfit.memory.tape import DTYPE_BYTES
from gptfit.oom.read import OomFacts
from gptfit.units import format_bytes

MiB = 1 << 20


@dataclass(frozen=True, slots=True)
class Remedy:
    """A change as one would type it. `saves_bytes` at the peak and `enough` are None where the run is not known."""

    change: str
    why: str
    saves_bytes: int | None = None
    enough: bool | None = None

    def to_json(self) -> dict[str, object]:
        return {"change": self.change, "saves_bytes": self.saves_bytes, "enough": self.enough, "why": self.why}


@dataclass(frozen=True, slots=True)
class NotRemedy:
    """Advice that is often given and does not help here."""

    change: str
    why: str


def general_remedies(facts: OomFacts) -> list[Remedy]:
    """What follows from the text alone."""
    found: list[Remedy] = []
    tried, free, others = facts.tried_bytes or 0, facts.free_bytes or 0, facts.other_processes_bytes or 0
    if facts.kind in KIND_REMEDIES:
        return [Remedy(*pair) for pair in KIND_REMEDIES[facts.kind]]
    if facts.kind == "not_oom":
        return []
    if others >= 256 * MiB:
        found.append(
            Remedy(
                "nvidia-smi, then end what is not needed",
                f"other processes hold {format_bytes(others)}",
                others,
                free + others >= tried,
            )
        )
    unallocated = facts.reserved_unallocated_bytes or 0
    if tried and unallocated >= max(tried // 2, 256 * MiB):
        found.append(
            Remedy(
                "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True",
                f"{format_bytes(unallocated)} are reserved but in unusable pieces",
                unallocated,
                unallocated + free >= tried,
            )
        )
    if facts.phase in ("checkpoint", "model_load"):
        found.append(
            Remedy(
                "torch.load(path, map_location='cpu')",
                "on the card a checkpoint is there a second time, optimizer state included, until it is dropped",
            )
        )
    return found


KIND_REMEDIES: dict[str, tuple[tuple[str, str], ...]] = {
    "host_ram": (
        ("fewer DataLoader workers (num_workers=2)", "each worker is a process with its own copy of what it touches"),
        ("numpy memmap for the data", "the file is read page by page, not loaded whole"),
        ("torch.load(path, map_location='cpu', mmap=True)", "the checkpoint is not read whole"),
    ),
    "host_killed": (
        ("dmesg | grep -i 'out of memory'", "shows which process the kernel ended, and how much it held"),
        ("fewer DataLoader workers (num_workers=2)", "each worker is a process with its own copy of what it touches"),
        (
            "ask the scheduler for more memory (--mem)",
            "exit 137 under Slurm or Kubernetes is their limit, not the card's",
        ),
    ),
    "shm": (
        ("docker run --ipc=host, or --shm-size=8g", "a container has 64 MiB of /dev/shm unless told otherwise"),
        ("num_workers=0", "no worker, no shared memory"),
    ),
    "triton_shared_memory": (
        (
            "smaller blocks or fewer stages in the kernel (num_stages=2)",
            "the kernel's tiles must fit one multiprocessor",
        ),
        ("TORCHINDUCTOR_MAX_AUTOTUNE=0", "autotuning tries tiles that this card cannot hold"),
    ),
    "cublas": (
        ("free some hundred MiB: a smaller micro-batch", "cuBLAS needs a workspace of 8 to 32 MiB for each thread"),
    ),
    "cudnn": (("free some hundred MiB: a smaller micro-batch", "cuDNN takes its workspace when a layer runs first"),),
    "nccl": (
        (
            "leave 1 GiB free: a smaller micro-batch",
            "NCCL's buffers lie outside PyTorch's allocator and come when first used",
        ),
        ("NCCL_BUFFSIZE=1048576", "buffers of 1 instead of 4 MiB a channel"),
    ),
}


def run_remedies(facts: OomFacts, run: RunConfig, program: str, before: Estimate, model_known: bool) -> list[Remedy]:
    """Single changes to the run that failed, cheapest and most saving first. Whether one is enough is said only
    where the model is known, and not assumed."""
    room = card_room(facts, before) if model_known else None
    found: list[Remedy] = []

    def add(change: str, why: str, after: Estimate | None) -> None:
        if after is not None and after.allocated_bytes < before.allocated_bytes:
            enough = None if room is None else after.reserved_bytes <= room
            found.append(Remedy(change, why, before.allocated_bytes - after.allocated_bytes, enough))

    if program == "nanogpt":
        if not run.compile:
            add(
                "--compile=True",
                "compiled, the loss makes no fp32 copies of the logits",
                again(run, program, compile=True),
            )
        else:
            zeros = run.batch_size * run.block_size * run.vocab_size * DTYPE_BYTES[run.dtype]
            enough = None if room is None else before.reserved_bytes - zeros <= room
            why = "model.py, GPT.forward: compiled backward fills a tensor of zeros for the returned, unused logits"
            found.append(Remedy("return logits.detach(), loss", why, zeros, enough))
        add(
            "gptfit train with the same keys",
            "the loss is computed in chunks: the logits are never all there, nor their gradient",
            again(run, "gptfit", loss="chunked"),
        )
    elif run.loss == "full":
        add("loss=chunked", "the logits are never all there, nor their gradient", again(run, program, loss="chunked"))
    if program == "gptfit" and run.activation_checkpointing == "none":
        why = "keeps the input of each block alone, and computes the block again in backward"
        add("activation_checkpointing=block", why, again(run, program, activation_checkpointing="block"))
    if run.optimizer_impl != "fused" and facts.phase == "optimizer":
        add(
            "optimizer_impl=fused (AdamW(..., fused=True))",
            "the step makes no lists",
            again(run, program, optimizer_impl="fused"),
        )
    found += micro_batch(run, program, before, room)
    return sorted(found, key=lambda remedy: (remedy.enough is False, -(remedy.saves_bytes or 0)))


def micro_batch(run: RunConfig, program: str, before: Estimate, room: int | None) -> list[Remedy]:
    """The largest micro-batch that fits this card, tokens a step kept; half of it where the card is not known."""
    if run.batch_size == 1:
        return []
    low, high, best = 0, run.batch_size - 1, None
    if room is None:
        low = high = run.batch_size // 2
        best = again(with_micro_batch(run, low), program)
    while low < high:
        middle = (low + high + 1) // 2
        after = again(with_micro_batch(run, middle), program)
        if after is not None and after.reserved_bytes <= (room or 0):
            low, best = middle, after
        else:
            high = middle - 1
    if best is None:
        return []
    steps = with_micro_batch(run, low).gradient_accumulation_steps
    change = f"--batch_size={low} --gradient_accumulation_steps={steps}"
    why = (
        "the largest micro-batch that fits here; the tokens of a step stay the same" if room else "half the micro-batch"
    )
    return [Remedy(change, why, before.allocated_bytes - best.allocated_bytes, None if room is None else True)]


def again(run: RunConfig, program: str, **changes: object) -> Estimate | None:
    try:
        return estimate(derive(run, **changes) if changes else run, program)
    except GptfitError:
        return None


def card_room(facts: OomFacts, before: Estimate) -> int | None:
    """What the allocator may reserve on that card: its total less what others and the context hold."""
    if facts.total_bytes is None:
        return None
    context = before.process_bytes - before.reserved_bytes
    if facts.process_bytes and facts.allocated_bytes is not None and facts.reserved_unallocated_bytes is not None:
        context = max(0, facts.process_bytes - facts.allocated_bytes - facts.reserved_unallocated_bytes)
    return facts.total_bytes - (facts.other_processes_bytes or 0) - context


def folk_advice(facts: OomFacts, run: RunConfig | None, program: str, before: Estimate | None) -> Iterator[NotRemedy]:
    """What would be tried next, with its computed effect here."""
    if run is None or before is None:
        yield NotRemedy("float16 instead of bfloat16", "both take 2 bytes an element: nothing is saved")
    else:
        for change, key, value in (
            ("dtype=float16 instead of bfloat16", "dtype", "float16"),
            ("compile=False", "compile", False),
        ):
            after = again(run, program, **{key: value}) if getattr(run, key) != value else None
            if after is not None and after.allocated_bytes >= before.allocated_bytes - MiB:
                delta = after.allocated_bytes - before.allocated_bytes
                yield NotRemedy(change, "saves nothing" if abs(delta) < MiB else f"costs {format_bytes(delta)} more")
    yield NotRemedy(
        "torch.cuda.empty_cache()",
        "returns only what is unused, and the allocator has done that itself before it gave up",
    )
    if run is not None and run.micro_steps > 2:
        yield NotRemedy(
            "fewer gradient_accumulation_steps", "the peak is that of one micro-batch, however many there are"
        )
