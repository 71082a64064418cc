"""What the NVIDIA driver says about this machine's GPUs, asked without torch: through NVML, or nvidia-smi.

Totals are the driver's, larger than PyTorch's by what the driver keeps (`GpuProfile.driver_bytes`); what is free is
free for PyTorch too. A MIG slice is not told from the whole card.
"""

import platform
import shutil
import subprocess
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptfit.units import KiB, MiB

# Without a persistence daemon the driver is loaded first, which takes seconds.
TIMEOUT_SECONDS = 10.0

PROC_VERSION = Path("/proc/version")
PROC_MEMINFO = Path("/proc/meminfo")
# Under WSL the driver's tools are here, which not every shell has on its PATH.
WSL_NVIDIA_SMI = Path("/usr/lib/wsl/lib/nvidia-smi")

_GPU_FIELDS = "index,uuid,name,memory.total,memory.free,memory.used,driver_version"
# The process's name comes last: it may have commas in it.
_PROCESS_FIELDS = "gpu_uuid,pid,used_gpu_memory,process_name"

SPILLS = (
    "Windows' driver lets a program take more than the card has and moves the rest to system memory: a run that is"
    " too large does not fail, it becomes many times slower"
)
HIDDEN = "the driver does not list the processes of Windows to WSL, only what they hold together"
UNIFIED = "the GPU shares the system's memory: free is what the system has to spare"


@dataclass(frozen=True, slots=True)
class DriverProcess:
    """A process on a GPU; `used_bytes` is None where the driver does not say."""

    pid: int
    name: str
    used_bytes: int | None


@dataclass(frozen=True, slots=True)
class DriverGpu:
    """One GPU as the driver sees it now. `used_bytes` is what all processes hold, a desktop's included."""

    index: int
    uuid: str
    name: str
    total_bytes: int
    free_bytes: int
    used_bytes: int
    driver_version: str
    processes: tuple[DriverProcess, ...] = ()
    notes: tuple[str, ...] = ()


def detect() -> list[DriverGpu]:
    """The GPUs of this machine in the driver's order; empty where there is no driver, or it does not answer."""
    return _ask_nvml() or _ask_nvidia_smi()


def is_wsl() -> bool:
    """Whether this is Linux on Windows, whose driver is Windows' own."""
    try:
        return "microsoft" in PROC_VERSION.read_text(encoding="utf-8", errors="replace").lower()
    except OSError:
        return False


def platform_notes() -> tuple[str, ...]:
    """What to know of this system's driver, a sentence each; none on plain Linux."""
    if platform.system() == "Windows":
        return (SPILLS,)
    return (SPILLS, HIDDEN) if is_wsl() else ()


# ------------------------------------------------------------------------------------------- NVML


def _ask_nvml() -> list[DriverGpu]:
    """Through pynvml (nvidia-ml-py); empty where that is not installed or finds no driver."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an old package of that name announces its end when imported
            import pynvml  # pyright: ignore[reportMissingImports]

        pynvml.nvmlInit()
    except Exception:  # ImportError, NVMLError, or a package of that name that is another one
        return []
    try:
        version = _text(pynvml.nvmlSystemGetDriverVersion())
        gpus = [_nvml_gpu(pynvml, index, version) for index in range(pynvml.nvmlDeviceGetCount())]
        return [gpu for gpu in gpus if gpu is not None]
    except pynvml.NVMLError:
        return []
    finally:
        pynvml.nvmlShutdown()


def _nvml_gpu(pynvml: Any, index: int, driver_version: str) -> DriverGpu | None:
    """The GPU at `index`; None for one that does not answer, as one that fell off the bus."""
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        name, uuid = _text(pynvml.nvmlDeviceGetName(handle)), _text(pynvml.nvmlDeviceGetUUID(handle))
        figures = _nvml_memory(pynvml, handle)
    except pynvml.NVMLError:
        return None
    return _gpu(index, uuid, name, figures, driver_version, _nvml_processes(pynvml, handle))


def _nvml_memory(pynvml: Any, handle: Any) -> tuple[int, int, int] | None:
    """Total, free and used bytes; None where the GPU has no memory of its own. Raises NVMLError."""
    # The first version of this call counts what the driver keeps as used; the second does not, nor does nvidia-smi.
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
    except (pynvml.NVMLError, AttributeError, TypeError):  # an older driver, or an older pynvml
        try:
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        except pynvml.NVMLError_NotSupported:
            return None
    return int(memory.total), int(memory.free), int(memory.used)


def _nvml_processes(pynvml: Any, handle: Any) -> tuple[DriverProcess, ...]:
    """Programs that compute, and those that draw; largest first."""
    found: dict[int, DriverProcess] = {}
    for ask in ("nvmlDeviceGetGraphicsRunningProcesses", "nvmlDeviceGetComputeRunningProcesses"):
        try:
            for process in getattr(pynvml, ask)(handle):
                name = _nvml_process_name(pynvml, process.pid)
                found[process.pid] = DriverProcess(process.pid, name, _known(process.usedGpuMemory))
        except pynvml.NVMLError:
            continue
    return _largest_first(found.values())


def _nvml_process_name(pynvml: Any, pid: int) -> str:
    try:
        return _text(pynvml.nvmlSystemGetProcessName(pid))
    except pynvml.NVMLError:  # another user's, or already gone
        return ""


def _known(n_bytes: int | None) -> int | None:
    """None for NVML's "not available", which is None or a number with all bits set."""
    return n_bytes if n_bytes is not None and 0 <= n_bytes < 1 << 62 else None


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


# ------------------------------------------------------------------------------------------- nvidia-smi


def _ask_nvidia_smi() -> list[DriverGpu]:
    """Through the command line tool that comes with the driver; empty where there is none, or it fails."""
    rows = [row for line in _nvidia_smi(f"--query-gpu={_GPU_FIELDS}") if len(row := _cells(line, 7)) == 7]
    by_uuid = _nvidia_smi_processes() if rows else {}
    gpus = []
    for index, uuid, name, *memory, driver_version in rows:
        if not index.isdecimal():
            continue
        if all(size.isdecimal() for size in memory):
            total, free, used = (int(size) * MiB for size in memory)
            figures = (total, free, used)
        elif all(size in ("[N/A]", "N/A", "[Not Supported]") for size in memory):
            figures = None
        else:  # [GPU requires reset], [Unknown Error]
            continue
        gpus.append(_gpu(int(index), uuid, name, figures, driver_version, _largest_first(by_uuid.get(uuid, []))))
    return [gpu for gpu in gpus if gpu is not None]


def _nvidia_smi_processes() -> dict[str, list[DriverProcess]]:
    """Programs that compute, by GPU. Those that only draw are not in this list, but in what is used."""
    by_uuid: dict[str, list[DriverProcess]] = {}
    for line in _nvidia_smi(f"--query-compute-apps={_PROCESS_FIELDS}"):
        cells = _cells(line, 4)
        if len(cells) == 4 and cells[1].isdecimal():
            uuid, pid, used, name = cells
            process = DriverProcess(int(pid), name, int(used) * MiB if used.isdecimal() else None)
            by_uuid.setdefault(uuid, []).append(process)
    return by_uuid


def _nvidia_smi(query: str) -> list[str]:
    """The lines that nvidia-smi answers with, sizes in MiB; none where it is missing, fails or hangs."""
    program = shutil.which("nvidia-smi") or (str(WSL_NVIDIA_SMI) if WSL_NVIDIA_SMI.is_file() else None)
    if program is None:
        return []
    try:
        done = subprocess.run(
            [program, query, "--format=csv,noheader,nounits"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def _cells(line: str, n: int) -> list[str]:
    return [cell.strip() for cell in line.split(",", n - 1)]


# ------------------------------------------------------------------------------------------- both


def _gpu(
    index: int,
    uuid: str,
    name: str,
    figures: tuple[int, int, int] | None,
    driver_version: str,
    processes: tuple[DriverProcess, ...],
) -> DriverGpu | None:
    """`figures` are total, free and used bytes; the system's stand for them where the GPU has no memory of its own."""
    notes = platform_notes()
    if figures is None:
        figures = system_memory()
        notes = (*notes, UNIFIED)
    return DriverGpu(index, uuid, name, *figures, driver_version, processes, notes) if figures else None


def system_memory() -> tuple[int, int, int] | None:
    """Total, available and used bytes of the system; None where it does not say."""
    try:
        lines = PROC_MEMINFO.read_text(encoding="utf-8", errors="replace").splitlines()
        kib = {key: int(rest.split()[0]) for key, _, rest in (line.partition(":") for line in lines) if rest.split()}
        total, free = kib["MemTotal"] * KiB, kib["MemAvailable"] * KiB
    except (OSError, KeyError, ValueError):
        return None
    return total, free, total - free


def _largest_first(processes: Any) -> tuple[DriverProcess, ...]:
    return tuple(sorted(processes, key=lambda process: (-(process.used_bytes or 0), process.pid)))
