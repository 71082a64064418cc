"""What the text alone says would help: what else is on the card, pieces that cannot be used, the other memories."""

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
