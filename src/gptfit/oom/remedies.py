"""What the text alone says would help: what else is on the card, pieces that cannot be used, the other memories."""

from collections.abc import Iterator
from dataclasses import dataclass

from gptfit.oom.enough import Prospect, fragmented, hidden_bytes, lent_bytes, unallocated_bytes
from gptfit.oom.read import OomFacts
from gptfit.units import format_bytes

MiB = 1 << 20


@dataclass(frozen=True, slots=True)
class Remedy:
    """A change as one would type it. `saves_bytes` at that instant and `enough` are None where the run is not known.
    `micro_batch` is the one that it changes to, if that is all it changes; `cures` a cause that it is the answer to."""

    change: str
    why: str
    saves_bytes: int | None = None
    enough: bool | None = None
    micro_batch: int = 0
    cures: str = ""

    def to_json(self) -> dict[str, object]:
        return {"change": self.change, "saves_bytes": self.saves_bytes, "enough": self.enough, "why": self.why}


@dataclass(frozen=True, slots=True)
class NotRemedy:
    """Advice that is often given and does not help here."""

    change: str
    why: str


def general_remedies(facts: OomFacts, prospect: Prospect) -> list[Remedy]:
    """What follows from the text, and whether it would be enough for the run, where that is known."""
    if facts.kind in KIND_REMEDIES:
        return [Remedy(*pair) for pair in KIND_REMEDIES[facts.kind]]
    if facts.kind == "not_oom":
        return []
    found = [*_limit(facts), *_lent(facts), *_others(facts, prospect), *_fragments(facts, prospect)]
    if facts.phase in ("checkpoint", "model_load"):
        why = "on the card a checkpoint is there a second time, optimizer state included, until it is dropped"
        case = prospect.case
        saves = case.checkpoint_bytes if case is not None and facts.phase == "checkpoint" else None
        enough = None if saves is None else prospect.enough(saves)
        found.append(Remedy("torch.load(path, map_location='cpu')", why, saves, enough))
    return found


def _limit(facts: OomFacts) -> Iterator[Remedy]:
    """A limit of the process's own below what the card has."""
    allowed, total = facts.allowed_bytes, facts.total_bytes
    if facts.kind == "per_process_limit" and allowed is not None and total is not None and allowed < total:
        why = f"a fraction that allows {format_bytes(allowed)} of {format_bytes(total)} was set"
        yield Remedy("torch.cuda.set_per_process_memory_fraction(1.0)", why, total - allowed)


END_OTHERS = "nvidia-smi, then end what is not needed"


def _lent(facts: OomFacts) -> Iterator[Remedy]:
    """Where Windows' driver lends the computer's memory: that it may not."""
    if lent_bytes(facts):
        why = (
            "NVIDIA Control Panel, Manage 3D settings: a run that does not fit ends at once then, instead of crawling "
            "over the PCIe bus first"
        )
        yield Remedy("CUDA - Sysmem Fallback Policy: Prefer No Sysmem Fallback", why, enough=False)


def _others(facts: OomFacts, prospect: Prospect) -> Iterator[Remedy]:
    """Memory that other processes hold: those that the message names, and what nobody accounts for."""
    others, hidden = facts.other_processes_bytes or 0, hidden_bytes(facts)
    known = facts.process_bytes is not None  # else this process's own context is among what is hidden
    hidden = hidden if known and hidden >= 512 * MiB else 0
    others = others if others >= 256 * MiB else 0
    held = [f"other processes hold {format_bytes(others)}"] if others else []
    if hidden:
        whose = "a desktop, a browser, another container"
        held.append(
            f"{format_bytes(hidden)} of the card are neither free nor this process's nor a named one's: {whose}"
        )
    saves = others + hidden
    if not saves:
        return
    enough, why = prospect.enough(saves, more=saves), "; ".join(held)
    yield Remedy(END_OTHERS, why, saves, enough)
    if enough is False and (both := _expanded(facts, prospect, saves)) is not None and both.enough:
        yield Remedy(f"{END_OTHERS} and {both.change}", f"{why}; {both.why}", both.saves_bytes, True)


def _fragments(facts: OomFacts, prospect: Prospect) -> Iterator[Remedy]:
    """Expandable segments: where they are enough, and where what is reserved and unused would go some way."""
    tried, unallocated = facts.tried_bytes or 0, unallocated_bytes(facts) or 0
    remedy = _expanded(facts, prospect)
    if remedy is not None and (remedy.cures or remedy.enough or (tried and unallocated >= max(tried // 2, 256 * MiB))):
        yield remedy


def _expanded(facts: OomFacts, prospect: Prospect, more: int = 0) -> Remedy | None:
    """Expandable segments, beside `more` room; before torch 2.1 there are none. None where the run has them."""
    case, unallocated = prospect.case, unallocated_bytes(facts)
    if not unallocated or lent_bytes(facts) or facts.kind not in ALLOC_CONF:
        return None
    if case is not None and case.run.expandable_segments:
        return None
    old = facts.wording in ("torch<1.4", "torch1.x")
    name = "PYTORCH_ALLOC_CONF" if facts.wording == "torch2.9" else ALLOC_CONF[facts.kind]
    setting = "max_split_size_mb:512" if old else "expandable_segments:True"
    saves = unallocated + more
    enough = None if old else prospect.enough(saves, case.changed(expandable_segments=True) if case else None, more)
    why = f"{format_bytes(unallocated)} are reserved but in pieces that this tensor cannot use"
    return Remedy(f"{name}={setting}", why, saves, enough, cures=FRAGMENTATION if fragmented(facts) else "")


FRAGMENTATION = "fragmentation"
ALLOC_CONF = {
    "cuda_caching_allocator": "PYTORCH_CUDA_ALLOC_CONF",
    "per_process_limit": "PYTORCH_CUDA_ALLOC_CONF",
    "hip": "PYTORCH_HIP_ALLOC_CONF",
}
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
