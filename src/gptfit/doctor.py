"""What of this machine decides whether a training run works, checked without torch: a function a check.

Each check takes what it judges as arguments and returns rows; `examine` gathers those from this machine.
"""

import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from gptfit import __version__
from gptfit.driver import DriverGpu, detect, platform_notes, system_memory
from gptfit.errors import GptfitError
from gptfit.gpus import load_gpu, shipped_gpu
from gptfit.memory.allocator_options import parse_options
from gptfit.overlay import Overlay, overlay_folder, read_overlay
from gptfit.units import GiB, format_bytes

State = Literal["ok", "warn", "bad", "info"]

# The oldest driver of each CUDA: docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
OLDEST_DRIVER = {"11": 450, "12": 525, "13": 580}
# CUDA 13 is not built for Maxwell, Pascal and Volta: docs.nvidia.com/cuda/archive/13.0.0, release notes
OLDEST_OF_CUDA_13 = (7, 5)
# Docker gives 64 MiB where nothing is said (docs.docker.com, docker run --shm-size); loader workers need more.
LITTLE_SHM = GiB
LITTLE_RAM = 2 * GiB
# A few checkpoints of GPT-2 124M: 12 bytes a parameter, 1.4 GiB each.
LITTLE_DISK = 5 * GiB
NVIDIA, DISPLAY = "0x10de", "0x03"
PCI = Path("/sys/bus/pci/devices")
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@dataclass(frozen=True, slots=True)
class Check:
    """One row: `fix` is what to type or do, empty where nothing is to be done."""

    name: str
    state: State
    text: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Torch:
    """The torch that is installed: `cuda` is the CUDA that it was built for, None where it was built without."""

    version: str
    cuda: str | None
    hip: bool = False


@dataclass(frozen=True, slots=True)
class Health:
    checks: tuple[Check, ...]

    @property
    def wrong(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.state in ("warn", "bad"))

    @property
    def answer(self) -> str:
        n = len(self.wrong)
        return f"{n} thing{'s' if n > 1 else ''} to look at" if n else "Nothing is wrong."

    def to_json(self) -> dict[str, object]:
        return {"schema": "gptfit.doctor/1", "checks": [asdict(check) for check in self.checks]}


def examine(environment: Mapping[str, str], folder: Path) -> Health:
    """All checks of this machine; `folder` is where a run would write."""
    seen, torch, triton = detect(), installed_torch(), _version("triton", "triton-windows", "pytorch-triton")
    return Health(
        (
            Check("versions", "info", f"gptfit {__version__}, Python {sys.version.split()[0]}, {sys.platform}"),
            *check_torch(torch, wanted_torch()),
            *check_build(torch, seen, _nvidia_on_bus()),
            *check_triton(torch, triton, bool(seen), sys.platform),
            *check_cards(seen),
            *check_allocator(environment, sys.platform),
            *check_environment(environment, seen),
            *(Check("platform", "info", note) for note in platform_notes()),
            *check_overlays(torch, seen),
            *check_memory(system_memory()),
            *check_space("shared memory", "/dev/shm", _total("/dev/shm"), LITTLE_SHM, SHM_FIX),
            *check_space("disk", str(folder), _free(folder), LITTLE_DISK, "free some, or train with --out on another"),
        )
    )


# ------------------------------------------------------------------------------------------- torch


def _version(*names: str) -> str | None:
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def installed_torch() -> Torch | None:
    """From its metadata and the text of its version.py: importing it takes seconds."""
    version = _version("torch")
    if version is None:
        return None
    try:
        text = Path(str(metadata.distribution("torch").locate_file("torch/version.py"))).read_text(encoding="utf-8")
    except OSError:
        text = ""
    return read_torch(version, text)


def read_torch(version: str, text: str) -> Torch:
    """`text` is that of torch/version.py; where it says nothing, the tag in the version does (2.13.0+cu130)."""
    full = re.search(r"^__version__\b[^=\n]*= '([^']+)'", text, re.MULTILINE)
    cuda = re.search(r"^cuda\b[^=\n]*= '([^']+)'", text, re.MULTILINE)
    hip = re.search(r"^hip\b[^=\n]*= '([^']+)'", text, re.MULTILINE)
    version = full[1] if full else version
    tag = re.search(r"\+cu(\d\d)(\d)$", version)
    return Torch(version, cuda[1] if cuda else f"{tag[1]}.{tag[2]}" if tag else None, bool(hip))


def wanted_torch() -> str:
    """As gptfit's own metadata says it: `torch<2.14,>=2.13`."""
    try:
        wanted = metadata.requires("gptfit") or []
    except metadata.PackageNotFoundError:
        wanted = []
    return next((line for line in wanted if re.match(r"torch\b", line)), "torch")


def check_torch(torch: Torch | None, wanted: str) -> Iterator[Check]:
    install = f'pip install "{wanted}"'
    if torch is None:
        yield Check("torch", "bad", "PyTorch is not installed: plans work, training does not", install)
        return
    built = f"built for CUDA {torch.cuda}" if torch.cuda else "built for ROCm" if torch.hip else "built without CUDA"
    text = f"PyTorch {torch.version}, {built}"
    bounds = {sign: _numbers(number) for sign, number in re.findall(r"(>=|<)([\d.]+)", wanted)}
    have = _numbers(torch.version)
    fits = bounds.get(">=", ()) <= have and ("<" not in bounds or have < bounds["<"])
    yield Check("torch", "ok", text) if fits else Check("torch", "warn", f"{text}; gptfit is for {wanted}", install)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:2])


def check_build(torch: Torch | None, seen: Sequence[DriverGpu], on_bus: bool) -> Iterator[Check]:
    """Whether this torch, this driver and these cards work together."""
    if not seen:
        if on_bus:
            text = "there is an NVIDIA card, but its driver does not answer"
            yield Check("driver", "bad", text, "nvidia-smi says why; in a container: docker run --gpus all")
        else:
            yield Check("driver", "info", "no NVIDIA driver answers: runs here are on the CPU; --gpu plans for a card")
        return
    driver = seen[0].driver_version
    oldest = OLDEST_DRIVER.get(torch.cuda.split(".")[0], 0) if torch and torch.cuda else 0
    major = (_numbers(driver) or (0,))[0]
    if 0 < major < oldest and torch:
        text = f"driver {driver} is too old for CUDA {torch.cuda}, which needs {oldest} or newer"
        yield Check("driver", "bad", text, f"update the driver to {oldest} or newer")
    else:
        yield Check("driver", "ok", f"NVIDIA driver {driver}")
    if torch is None:
        return
    series = ".".join(map(str, _numbers(torch.version)))
    if torch.cuda is None and not torch.hip:
        text = f"this PyTorch is built without CUDA, so the {seen[0].name} is not used"
        old = 0 < major < OLDEST_DRIVER["13"] or any((0,) < _capability(gpu) < OLDEST_OF_CUDA_13 for gpu in seen)
        yield Check("CUDA build", "bad", text, _wheel(series, "cu126" if old else "cu130"))
    for gpu in seen if torch.cuda and torch.cuda.startswith("13") else ():
        if (at := _capability(gpu)) and at < OLDEST_OF_CUDA_13:
            text = f"CUDA {torch.cuda} is not built for the {gpu.name} (compute capability {at[0]}.{at[1]})"
            fix = (
                f'pip install --force-reinstall "torch=={series}.*" --index-url https://download.pytorch.org/whl/cu126'
            )
            yield Check("CUDA build", "bad", text, fix)


def _wheel(series: str, tag: str) -> str:
    return f'pip install --force-reinstall "torch=={series}.*" --index-url https://download.pytorch.org/whl/{tag}'


def _capability(gpu: DriverGpu) -> tuple[int, ...]:
    try:
        return tuple(map(int, load_gpu(gpu.name, gpu.total_bytes).compute_capability.split(".")))
    except GptfitError:
        return ()


def check_triton(torch: Torch | None, triton: str | None, has_card: bool, platform: str) -> Iterator[Check]:
    """torch.compile makes its kernels for a card with it."""
    if triton is not None:
        yield Check("triton", "ok", f"triton {triton}")
    elif has_card and torch and torch.cuda:
        name = "triton-windows" if platform == "win32" else "triton"
        text = "triton is not installed: torch.compile cannot make kernels for the card"
        yield Check("triton", "warn", text, f"pip install {name}, or compile=False")
    else:
        yield Check("triton", "info", "triton is not installed; without a card it is not needed")


# ------------------------------------------------------------------------------------------- cards


def check_cards(seen: Sequence[DriverGpu]) -> Iterator[Check]:
    """What is free on each card, and who holds the rest."""
    for gpu in seen:
        held = [
            f"{process.name or 'a process'} (pid {process.pid})"
            + (f" {format_bytes(process.used_bytes)}" if process.used_bytes else "")
            for process in gpu.processes[:3]
        ]
        text = f"{gpu.name}: {format_bytes(gpu.free_bytes)} of {format_bytes(gpu.total_bytes)} free"
        text += f", beside {', '.join(held)}" if held else ""
        full = gpu.free_bytes < gpu.total_bytes // 2
        fix = "end what is not needed; plans count on what is free now" if full else ""
        yield Check(f"card {gpu.index}", "warn" if full else "ok", text, fix)
        try:
            shipped_gpu(gpu.name, gpu.total_bytes)
        except GptfitError as error:
            yield Check(f"card {gpu.index}", "warn", error.message, error.hint)


def check_overlays(torch: Torch | None, seen: Sequence[DriverGpu]) -> Iterator[Check]:
    """What `gptfit measure` wrote: whether it is readable, and of this torch and driver."""
    folder = overlay_folder()
    for path in sorted(folder.glob("*.yaml")) if folder.is_dir() else ():
        try:
            overlay = read_overlay(path.stem)
        except GptfitError as error:
            yield Check("measured", "bad", error.message, error.hint)
            continue
        if overlay is not None:
            yield _measured(overlay, torch, seen)


def _measured(overlay: Overlay, torch: Torch | None, seen: Sequence[DriverGpu]) -> Check:
    text = f"{overlay.gpu}: plans use what was measured on {overlay.measured_on}"
    here = [gpu for gpu in seen if _profile_name(gpu) == overlay.gpu]
    old = [f"torch {overlay.torch}"] if torch and overlay.torch != torch.version else []
    old += [f"driver {overlay.driver}"] if any(gpu.driver_version != overlay.driver for gpu in here) else []
    if here and old:
        return Check("measured", "warn", f"{text}, with {' and '.join(old)}", "gptfit measure measures it again")
    return Check("measured", "info", text)


def _profile_name(gpu: DriverGpu) -> str:
    try:
        return shipped_gpu(gpu.name, gpu.total_bytes).name
    except GptfitError:
        return ""


def _nvidia_on_bus() -> bool:
    """Whether a display controller of NVIDIA is there, driver or not; Linux says so."""
    try:
        return any(
            (device / "vendor").read_text().strip() == NVIDIA and (device / "class").read_text().startswith(DISPLAY)
            for device in PCI.iterdir()
        )
    except OSError:
        return False


# ------------------------------------------------------------------------------------------- environment


def check_allocator(environment: Mapping[str, str], platform: str) -> Iterator[Check]:
    """The allocator's settings as torch reads them: PYTORCH_ALLOC_CONF, of which the other name is an alias."""
    given = {name: environment[name] for name in ALLOCATOR if environment.get(name)}
    if len(set(given.values())) > 1:
        yield Check("allocator", "warn", f"{' and '.join(given)} differ: the first counts", f"unset {ALLOCATOR[1]}")
    for name, text in given.items():
        try:
            options = parse_options(text)
        except GptfitError as error:
            yield Check("allocator", "bad", f"{name}={text[:80]}: {error.message}", error.hint)
            continue
        if options.expandable_segments and platform == "win32":
            yield Check("allocator", "warn", f"{name}: expandable segments are not there on Windows", f"unset {name}")
        elif options.expandable_segments and options.max_split_bytes is not None:
            means = f"{name}={text}: max_split_size_mb is for plain segments, and costs memory beside expandable ones"
            yield Check("allocator", "info", means)
        else:
            means = "segments grow in place: little is reserved but unused" if options.expandable_segments else ""
            yield Check("allocator", "ok", f"{name}={text}" + (f": {means}" if means else ""))


def check_environment(environment: Mapping[str, str], seen: Sequence[DriverGpu]) -> Iterator[Check]:
    """Variables that decide which card is taken, what is compiled, and how slow it is."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        yield check_visible(visible, seen)
    if len({gpu.name for gpu in seen}) > 1 and environment.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        text = "of different cards torch takes the fastest as number 0, nvidia-smi the first on the bus"
        yield Check("environment", "warn", text, "export CUDA_DEVICE_ORDER=PCI_BUS_ID")
    for name, text in SLOWING.items():
        if environment.get(name, "0") not in ("", "0"):
            yield Check("environment", "warn", f"{name}={environment[name][:40]}: {text}", f"unset {name}")
    for name in ("TORCH_LOGS", "TORCHINDUCTOR_CACHE_DIR", "NVIDIA_TF32_OVERRIDE", "OMP_NUM_THREADS"):
        if environment.get(name):
            yield Check("environment", "info", f"{name}={environment[name][:80]}")


SLOWING = {
    "CUDA_LAUNCH_BLOCKING": "each kernel is waited for: for finding errors, and slow",
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "memory is not cached: slow, and plans of reserved memory do not hold",
    "TORCH_COMPILE_DISABLE": "nothing is compiled: a run needs the memory of compile=False",
    "TORCHDYNAMO_DISABLE": "nothing is compiled: a run needs the memory of compile=False",
}


def check_visible(visible: str, seen: Sequence[DriverGpu]) -> Check:
    """CUDA reads numbers or beginnings of UUIDs up to the first that is no card."""
    name, called = "environment", "CUDA_VISIBLE_DEVICES"
    first = visible.split(",")[0].strip()
    if not first or first == "-1":
        return Check(name, "warn", f"{called}={visible[:80]} hides all cards", f"unset {called}")
    for one in (part.strip() for part in visible.split(",")):
        if seen and not any(one in (f"{gpu.index}", gpu.uuid[: len(one)]) for gpu in seen):
            cards = f"{len(seen)} card{'s' if len(seen) > 1 else ''}"
            return Check(
                name, "bad", f"{called}={visible[:80]}: there is no {one[:40]} among {cards}", f"unset {called}"
            )
    return Check(name, "info", f"{called}={visible[:80]}")


# ------------------------------------------------------------------------------------------- memory and disk

SHM_FIX = "loader workers end in a bus error: docker run --shm-size=8g, or --ipc=host"


def check_memory(figures: tuple[int, int, int] | None) -> Iterator[Check]:
    """`figures` are total, available and used bytes of the system."""
    if figures is not None:
        total, free, _ = figures
        text = f"{format_bytes(free)} of {format_bytes(total)} available"
        few = free < LITTLE_RAM
        yield Check("RAM", "warn" if few else "ok", text, "loading a checkpoint may end the process" if few else "")


def check_space(name: str, where: str, n_bytes: int | None, little_bytes: int, fix: str) -> Iterator[Check]:
    if n_bytes is not None:
        few = n_bytes < little_bytes
        yield Check(name, "warn" if few else "ok", f"{format_bytes(n_bytes)} at {where}", fix if few else "")


def _total(path: str) -> int | None:
    return shutil.disk_usage(path).total if os.path.isdir(path) else None


def _free(path: Path) -> int | None:
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None
