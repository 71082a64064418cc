"""What the text alone says would help: what else is on the card, pieces that cannot be used, the other memories."""

from collections.abc import Iterator
from dataclasses import dataclass

from gptfit.oom.read import OomFacts
from gptfit.units import format_bytes

MiB = 1 << 20


@dataclass(frozen=True, slots=True)
class Remedy:
    """A change as one would type it. `saves_bytes` at that instant and `enough` are None where the run is not known.
    `micro_batch` is the one that it changes to, if that is all it changes."""

    change: str
    why: str
    saves_bytes: int | None = None
    enough: bool | None = None
    micro_batch: int = 0

    def to_json(self) -> dict[str, object]:
        return {"change": self.change, "saves_bytes": self.saves_bytes, "enough": self.enough, "why": self.why}


@dataclass(frozen=True, slots=True)
class NotRemedy:
    """Advice that is often given and does not help here."""

    change: str
    why: str


def unallocated_bytes(facts: OomFacts) -> int | None:
    """What PyTorch reserved and did not use; torch before 2.1 prints the reserved total instead."""
    if facts.reserved_unallocated_bytes is None and facts.reserved_bytes is not None and facts.allocated_bytes:
        return max(0, facts.reserved_bytes - facts.allocated_bytes)
    return facts.reserved_unallocated_bytes


def general_remedies(facts: OomFacts, checkpoint_bytes: int | None = None) -> list[Remedy]:
    """What follows from the text alone. `checkpoint_bytes` is what a checkpoint of the run has, where it is known."""
    if facts.kind in KIND_REMEDIES:
        return [Remedy(*pair) for pair in KIND_REMEDIES[facts.kind]]
    if facts.kind == "not_oom":
        return []
    found = [*_limit(facts), *_others(facts), *_fragments(facts)]
    if facts.phase in ("checkpoint", "model_load"):
        why = "on the card a checkpoint is there a second time, optimizer state included, until it is dropped"
        saves = checkpoint_bytes if facts.phase == "checkpoint" else None
        enough = None if saves is None else saves + (facts.free_bytes or 0) >= (facts.tried_bytes or 0)
        found.append(Remedy("torch.load(path, map_location='cpu')", why, saves, enough))
    return found


def _limit(facts: OomFacts) -> Iterator[Remedy]:
    """A limit of the process's own below what the card has."""
    allowed, total = facts.allowed_bytes, facts.total_bytes
    if facts.kind == "per_process_limit" and allowed is not None and total is not None and allowed < total:
        why = f"a fraction that allows {format_bytes(allowed)} of {format_bytes(total)} was set"
        yield Remedy("torch.cuda.set_per_process_memory_fraction(1.0)", why, total - allowed)


def _others(facts: OomFacts) -> Iterator[Remedy]:
    """Memory that other processes hold: those that the message names, and what nobody accounts for."""
    free, tried, others = facts.free_bytes or 0, facts.tried_bytes or 0, facts.other_processes_bytes or 0
    if others >= 256 * MiB:
        why = f"other processes hold {format_bytes(others)}"
        yield Remedy("nvidia-smi, then end what is not needed", why, others, free + others >= tried)
    elif facts.total_bytes and facts.process_bytes and facts.free_bytes is not None:
        hidden = facts.total_bytes - facts.free_bytes - facts.process_bytes
        if hidden >= 512 * MiB:
            why = (
                f"{format_bytes(hidden)} of the card are neither free nor this process's: a desktop, a browser, "
                "another container"
            )
            yield Remedy("nvidia-smi, then end what is not needed", why, hidden, free + hidden >= tried)


def _fragments(facts: OomFacts) -> Iterator[Remedy]:
    """Expandable segments, where what is reserved and unused would go some way; before torch 2.1 there are none."""
    unallocated, tried = unallocated_bytes(facts) or 0, facts.tried_bytes or 0
    if not tried or unallocated < max(tried // 2, 256 * MiB) or facts.kind not in ALLOC_CONF:
        return
    old = facts.wording in ("torch<1.4", "torch1.x")
    name = "PYTORCH_ALLOC_CONF" if facts.wording == "torch2.9" else ALLOC_CONF[facts.kind]
    setting = "max_split_size_mb:512" if old else "expandable_segments:True"
    why = f"{format_bytes(unallocated)} are reserved but in pieces that this tensor cannot use"
    yield Remedy(f"{name}={setting}", why, unallocated, None if old else unallocated + (facts.free_bytes or 0) >= tried)


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
