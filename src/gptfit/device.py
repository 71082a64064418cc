"""The device a run trains on: which one, what it can do, what it has held."""

import os
import sys
from dataclasses import dataclass

# OpenMP reads it when torch is loaded. Its threads otherwise spin while they wait for one another, which on a
# CPU that others use too makes a step several times longer; on an idle one waiting quietly is as fast.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from gptfit.config import RunConfig, derive
from gptfit.errors import GptfitError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# The names under which torch reads allocator settings, the documented one first.
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")

EXPANDABLE = "expandable_segments:True"

# Triton, in which compiled GPU code is written, wants compute capability 7.0; bf16 arithmetic is there from 8.0 on.
COMPILE_CAPABILITY = (7, 0)
BFLOAT16_CAPABILITY = (8, 0)


@dataclass(frozen=True, slots=True)
class HeldMemory:
    """Peaks of the allocator since they were last reset; and now: what the card's memory holds, of any process, what of
    it is free, what the allocator holds, and how often it had to hand back what it had cached to get more."""

    allocated_bytes: int
    reserved_bytes: int
    card_used_bytes: int
    free_bytes: int = 0
    reserved_now_bytes: int = 0
    retries: int = 0

    @property
    def room_bytes(self) -> int:
        """What this process's tensors can take together, cached or free."""
        return self.reserved_now_bytes + self.free_bytes

    @property
    def total_bytes(self) -> int:
        return self.card_used_bytes + self.free_bytes


def set_expandable_segments(wanted: bool) -> None:
    """Asks torch's CUDA allocator for expandable segments: best before CUDA starts, else from the next segment on.

    A setting that the user made in the environment stays. Linux only: elsewhere torch has none and warns.
    """
    if not wanted or sys.platform != "linux":
        return
    given = [name for name in ALLOCATOR_VARIABLES if os.environ.get(name)]
    settings = os.environ[given[0]] if given else ""
    if "expandable_segments" in settings:
        return
    os.environ[given[0] if given else ALLOCATOR_VARIABLES[0]] = ",".join(
        part for part in (settings, EXPANDABLE) if part
    )
    if torch.cuda.is_initialized():  # the environment has been read by then
        torch.cuda.memory._set_allocator_settings(EXPANDABLE)


def has_expandable_segments() -> bool:
    """Whether torch's CUDA allocator has them once they are asked for: on Linux, unless the environment says no."""
    settings = next((os.environ[name] for name in ALLOCATOR_VARIABLES if os.environ.get(name)), "")
    return sys.platform == "linux" and "expandable_segments:False" not in settings.replace(" ", "")


def pick_device(name: str = "") -> torch.device:
    """The device `name`, or the best there is: CUDA, else the CPU. (Apple's mps only by name: not tried.)

    Raises GptfitError where `name` is no device of this machine.
    """
    if not name:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:200]
        if reason.startswith("Expected one of"):  # torch goes on with all that it has ever known
            reason = "there is no such kind"
        raise GptfitError(f'device "{name}" cannot be used: {reason}', "devices are cuda, cuda:1 …, mps, cpu") from None
    return device


def start(device: torch.device, seed: int) -> None:
    """Seeds every generator; on a GPU fp32 matmuls use TF32, as in nanoGPT."""
    torch.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")


def capability(device: torch.device) -> tuple[int, int] | None:
    """CUDA compute capability, or None on other devices."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def adapt(run: RunConfig, device: torch.device) -> tuple[RunConfig, tuple[str, ...]]:
    """`run` as this device can do it, and a line for each change.

    What a GPU has no hardware for is changed in any case. On a CPU, bf16 and compiling work but are no help: there
    only what nobody asked for is changed.
    """
    changes: dict[str, object] = {}
    eager = {"compile": False, "activation_memory_budget": 1.0}
    notes = []
    cuda = capability(device)
    if cuda is not None:
        if run.dtype == "bfloat16" and cuda < BFLOAT16_CAPABILITY:
            changes["dtype"] = "float16"
            notes.append(f"dtype=float16: this GPU (compute capability {cuda[0]}.{cuda[1]}) has no bfloat16")
        if run.compile and cuda < COMPILE_CAPABILITY:
            changes |= eager
            notes.append(f"compile=False: this GPU (compute capability {cuda[0]}.{cuda[1]}) is too old for Triton")
    elif device.type == "cpu":
        if run.dtype != run.param_dtype and "dtype" not in run.model_fields_set:
            changes["dtype"] = "float32"
            notes.append("dtype=float32: on a CPU half precision is slower")
        if run.compile and "compile" not in run.model_fields_set:
            changes |= eager
            notes.append("compile=False: on a CPU compiling takes longer than it saves")
    return (derive(run, **changes) if changes else run), tuple(notes)


def reset_peaks(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def held_memory(device: torch.device) -> HeldMemory | None:
    """What the allocator held at most since reset_peaks; None where there is no CUDA allocator."""
    if device.type != "cuda":
        return None
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return HeldMemory(
        allocated_bytes=torch.cuda.max_memory_allocated(device),
        reserved_bytes=torch.cuda.max_memory_reserved(device),
        card_used_bytes=total_bytes - free_bytes,
        free_bytes=free_bytes,
        reserved_now_bytes=torch.cuda.memory_reserved(device),
        retries=torch.cuda.memory_stats(device).get("num_alloc_retries", 0),
    )


def room_bytes(device: torch.device) -> int | None:
    """What this process's tensors can take together: what its allocator holds, used or not, and what is free. None
    where that is not known."""
    if device.type != "cuda":
        return None
    return torch.cuda.memory_reserved(device) + torch.cuda.mem_get_info(device)[0]


def release_cached(device: torch.device) -> None:
    """Hands cached blocks back to the driver, after an out-of-memory error."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
