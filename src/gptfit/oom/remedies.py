"""What the text alone says would help: what else is on the card, pieces that cannot be used, the other memories."""

from collections.abc import Iterator
from dataclasses import dataclass

from gptfit.oom.engines import ENGINES
from gptfit.oom.enough import (
    Prospect,
    foreign_bytes,
    fragmented,
    hidden_bytes,
    lent_bytes,
    ranks_alike,
    reserved_bytes,
    spare_bytes,
    unallocated_bytes,
)
from gptfit.oom.read import OomFacts
from gptfit.oom.signs import LEAST_STEPS
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
    if facts.wording in ENGINES:
        return [Remedy(*pair) for pair in ENGINES[facts.wording].remedies]
    if facts.kind in KIND_REMEDIES:
        early = facts.kind == "cuda_driver" and facts.phase == "model_load"  # no step has begun
        rows = [*([OFFLOADED] if facts.offload else []), *KIND_REMEDIES[facts.kind]]
        return [*_other_card(facts), *(Remedy(*pair) for pair in (rows[:1] if early else rows))]
    if facts.kind == "not_oom":
        return []
    found = [*_limit(facts), *_lent(facts), *_others(facts, prospect), *_signs(facts), *_fragments(facts, prospect)]
    if facts.phase == "model_load":
        found += _model_load(facts)
    if facts.phase in ("checkpoint", "model_load") and not facts.gathered:
        why = "on the card a checkpoint is there a second time, optimizer state included, until it is dropped"
        case = prospect.case
        saves = case.checkpoint_bytes if case is not None and facts.phase == "checkpoint" else None
        enough = None if saves is None else prospect.enough(saves)
        found.append(Remedy("torch.load(path, map_location='cpu')", why, saves, enough))
    return found


def _other_card(facts: OomFacts) -> Iterator[Remedy]:
    """A card that nvidia-smi, in the text, shows to be empty where this one is full."""
    index = facts.device_index or 0
    used, total = facts.cards[index] if index < len(facts.cards) else (0, 0)
    if facts.kind not in ON_FULL_CARD or not used or used < 0.8 * total:
        return
    empty = next((number for number, (used, total) in enumerate(facts.cards) if used < 0.05 * total), None)
    if empty is not None:
        held = " and ".join(f"{format_bytes(facts.cards[number][0])} on GPU {number}" for number in (index, empty))
        yield Remedy(f"CUDA_VISIBLE_DEVICES={empty}", f"nvidia-smi in the text has {held} in use")


def _limit(facts: OomFacts) -> Iterator[Remedy]:
    """A limit of the process's own below what the card has."""
    allowed, total = facts.allowed_bytes, facts.total_bytes
    if facts.kind == "per_process_limit" and allowed is not None and total is not None and allowed < total:
        why = f"a fraction that allows {format_bytes(allowed)} of {format_bytes(total)} was set"
        yield Remedy("torch.cuda.set_per_process_memory_fraction(1.0)", why, total - allowed)


# Causes that have a remedy of their own: their first words.
FOREIGN = "something else is on the card"
NOT_FULL = "the card was not full"
KEPT = "something is kept from step to step"
COLLECTED = "predictions pile up"
GATHERED = "whole parameters are put together"
STEPS = "it ran"
POOLS = "CUDA graphs"
TOO_LARGE = "the model alone does not fit"
ABSURD = "more than 1EB"  # the wording
MOSTLY = 0.6  # of the card

END_OTHERS = "nvidia-smi, then end what is not needed"
LOOK = {"hip": "rocm-smi --showpids", "xpu": "xpu-smi ps"}
NOT_FULL_REMEDIES = {
    "hip": (
        ("rocm-smi --showmeminfo vram gtt", "whether the card is full as the run fails, or the computer's memory"),
        ("dmesg | tail", "the driver says there what it could not map"),
    ),
    "xpu": (
        ("UR_L0_ENABLE_RELAXED_ALLOCATION_LIMITS=1", "lets the driver make single tensors of 4 GiB and more"),
        ("xpu-smi ps", "which processes hold the card"),
    ),
}
KEPT_REMEDIES = {
    False: (".item(), or .detach().cpu()", "on that line: a number keeps no graph"),
    True: ("loss.backward()", "without retain_graph=True the graph is freed as backward goes"),
}
ALLOCATED = {"xpu": "torch.xpu.memory_allocated()", "mps": "torch.mps.current_allocated_memory()"}
RANKS = (
    ("nvidia-smi -l 1, beside the run as it starts", "shows what else comes onto the card, and its limits (MIG)"),
    (
        "torch.cuda.set_device(int(os.environ['LOCAL_RANK']))",
        "before anything is on the GPU: else all ranks of a node share GPU 0",
    ),
)


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
    if ranks_alike(facts):
        yield Remedy(*RANKS[1], cures="other processes")
    enough, why = prospect.enough(saves, more=saves), "; ".join(held)
    yield Remedy(END_OTHERS, why, saves, enough)
    if enough is False and (both := _expanded(facts, prospect, saves)) is not None and both.enough:
        yield Remedy(f"{END_OTHERS} and {both.change}", f"{why}; {both.why}", both.saves_bytes, True)


def _signs(facts: OomFacts) -> Iterator[Remedy]:
    """What the figures beside the tensor, the code in the traceback and the log before it ask for."""
    if facts.wording == ABSURD:
        yield Remedy("print(x.shape) before that line", "one of its sizes is negative, or not what was meant")
        yield Remedy("the first error of each rank", "after a failed or timed out collective, what it left is garbage")
        return
    if foreign_bytes(facts) and facts.process_bytes is None:
        look = LOOK.get(facts.kind, "nvidia-smi")
        yield Remedy(f"{look}, then end what is not needed", "more is in use than PyTorch holds here", cures=FOREIGN)
    elif spare_bytes(facts) and not (facts.other_processes_bytes or 0):
        for change, why in NOT_FULL_REMEDIES.get(facts.kind, RANKS if facts.ranked else RANKS[:1]):
            yield Remedy(change, why, cures=NOT_FULL)
    if facts.kept:
        yield Remedy(*KEPT_REMEDIES["retain_graph" in facts.kept], cures=KEPT)
    if facts.collected:
        yield Remedy(
            "prediction_loss_only=True, or preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1)",
            "one id is kept for each token instead of one logit for each word of the vocabulary",
            cures=COLLECTED,
        )
        yield Remedy("eval_accumulation_steps=1", "what was collected goes to the computer's memory", cures=COLLECTED)
    if facts.gathered:
        yield Remedy("fsdp_state_dict_type: SHARDED_STATE_DICT", "each rank saves its own part", cures=GATHERED)
        yield Remedy(
            "FullStateDictConfig(offload_to_cpu=True, rank0_only=True)",
            "in FSDP.state_dict_type(model, FULL_STATE_DICT, ...): they go to the memory of rank 0's computer",
            cures=GATHERED,
        )
    pools = facts.private_pools_bytes or 0
    if pools and pools >= 0.2 * (facts.allocated_bytes or pools + 1):
        why = f"without CUDA graphs their {format_bytes(pools)} are shared with everything else"
        yield Remedy('torch.compile(model), no mode="reduce-overhead"', why, cures=POOLS)


def watched(facts: OomFacts) -> Iterator[Remedy]:
    """What tells a leak from a longer sample, where steps ran before."""
    if facts.steps >= LEAST_STEPS and facts.phase in ("forward", "loss", "backward", "unknown") and not facts.kept:
        allocated = ALLOCATED.get(facts.kind, "torch.cuda.memory_allocated()")
        why = f"it ran {facts.steps:,} steps: what grows with each is kept; where it jumps, a sample is longer"
        yield Remedy(f"print({allocated} >> 20) after each step", why, cures=STEPS)


def _model_load(facts: OomFacts) -> Iterator[Remedy]:
    """A model that is larger than what is left: fewer bytes a parameter, or parts of it elsewhere."""
    held, total = reserved_bytes(facts) or 0, facts.total_bytes or 0
    if not total or held < MOSTLY * total:
        return
    yield Remedy("from_pretrained(..., dtype=torch.bfloat16)", "2 bytes a parameter instead of 4", cures=TOO_LARGE)
    why = "half a byte a parameter: for inference, and for LoRA"
    yield Remedy("BitsAndBytesConfig(load_in_4bit=True)", why, cures=TOO_LARGE)
    why = "what does not fit goes to other cards, then to the computer's memory, which is slow"
    yield Remedy("from_pretrained(..., device_map='auto')", why, cures=TOO_LARGE)


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
    if facts.wording == "torch<1.4":
        why = f"{format_bytes(unallocated)} are cached in pieces that this tensor cannot use, nor this torch join"
        change = "torch 2.1 or later, with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
        return Remedy(change, why, unallocated + more, cures=FRAGMENTATION if fragmented(facts) else "")
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
OFFLOADED = (
    "DeepSpeed: offload_optimizer to none, or to nvme",
    "offloaded, each parameter takes some 16 bytes of the computer's memory, on all ranks of the node together",
)
ON_FULL_CARD = frozenset(("cuda_driver", "cublas", "cudnn", "nccl"))
EMPTIED = ("torch.cuda.empty_cache() before that line", "gives the driver back what PyTorch reserved and does not use")
HOLDERS = (
    "nvidia-smi, then CUDA_VISIBLE_DEVICES=<another>",
    "which processes hold the card: if it is full before this one begins, end them or take another card",
)
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
        HOLDERS,
        ("CUDA_LAUNCH_BLOCKING=1", "if the card has room: an index out of range before it shows as this error, too"),
    ),
    "cudnn": (
        ("free some hundred MiB: a smaller micro-batch", "cuDNN takes its workspace when a layer runs first"),
        HOLDERS,
    ),
    "cuda_driver": (
        HOLDERS,
        (
            "leave some hundred MiB free: a smaller micro-batch",
            "kernels, graphs and libraries take memory from the driver, not from PyTorch's allocator",
        ),
        EMPTIED,
    ),
    "nccl": (
        (
            "leave 1 GiB free: a smaller micro-batch",
            "NCCL's buffers lie outside PyTorch's allocator and come when first used",
        ),
        ("torch.cuda.set_per_process_memory_fraction(0.95)", "PyTorch then leaves 5 % of the card to NCCL"),
        EMPTIED,
        ("NCCL_BUFFSIZE=1048576", "buffers of 1 instead of 4 MiB a channel"),
    ),
}
