"""Asking the driver: a fake nvidia-smi on PATH and a fake pynvml say what real ones say, or fail as they do."""

import stat
import subprocess
import sys
import time
import types
import warnings

import pytest

from gptfit import driver
from gptfit.driver import HIDDEN, SPILLS, UNIFIED, DriverGpu, DriverProcess, detect
from gptfit.gpus import load_gpu
from gptfit.units import GiB, MiB

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the fake nvidia-smi is a shell script")

# As an RTX 4070 with a desktop on it prints them (--format=csv,noheader,nounits).
GPU_LINE = "0, GPU-aaaa, NVIDIA GeForce RTX 4070, 12282, 10411, 1415, 535.247.01"
SECOND_LINE = "1, GPU-bbbb, NVIDIA GeForce RTX 3060, 12288, 11903, 5, 535.247.01"
APPS = "GPU-aaaa, 4242, 1708, python3.10\nGPU-aaaa, 77, [N/A], /opt/a, b/comma"


MEMINFO = (
    "MemTotal:       125534208 kB\nMemFree:        20000000 kB\nMemAvailable:   104857600 kB\nHugePages_Total: 0\n"
)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """No pynvml, an empty PATH but for the shell, and plain Linux; returns a way to install a fake nvidia-smi."""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    binaries = tmp_path / "bin"
    binaries.mkdir()
    monkeypatch.setenv("PATH", str(binaries))
    monkeypatch.setattr(driver, "WSL_NVIDIA_SMI", tmp_path / "absent")
    monkeypatch.setattr(driver, "PROC_VERSION", tmp_path / "version")
    monkeypatch.setattr(driver, "PROC_MEMINFO", tmp_path / "meminfo")
    (tmp_path / "version").write_text("Linux version 6.8.0-31-generic (gcc 13) #31-Ubuntu SMP")

    def install(gpus: str = "", apps: str = "", body: str | None = None, path=binaries / "nvidia-smi"):
        script = body or (
            'case "$1" in --query-gpu=*) printf "%s\\n" "$GPUS";; --query-compute-apps=*) printf "%s\\n" "$APPS";;\n'
            "*) exit 1;; esac\n"
        )
        path.write_text(f"#!/bin/sh\nGPUS='{gpus}'\nAPPS='{apps}'\n{script}")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    return install


def test_without_a_driver_there_is_no_gpu(machine):
    assert detect() == []


def test_nvidia_smi_says_all(machine):
    machine(f"{GPU_LINE}\n{SECOND_LINE}", APPS)
    first, second = detect()
    assert first == DriverGpu(
        index=0,
        uuid="GPU-aaaa",
        name="NVIDIA GeForce RTX 4070",
        total_bytes=12282 * MiB,
        free_bytes=10411 * MiB,
        used_bytes=1415 * MiB,
        driver_version="535.247.01",
        processes=(DriverProcess(4242, "python3.10", 1708 * MiB), DriverProcess(77, "/opt/a, b/comma", None)),
        notes=(),
    )
    assert (second.index, second.processes) == (1, ())
    # The driver's name and total are enough to find the profile.
    assert load_gpu(second.name, box_bytes=second.total_bytes).name == "rtx3060"


@pytest.mark.parametrize(
    "body",
    [
        "echo 'NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.'; exit 9",
        "echo 'No devices were found'; exit 0",
        "echo 'No devices were found'; exit 6",
        "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18",
        "printf '\\377\\376, garbage\\n'",
        "exit 0",
    ],
)
def test_a_failing_nvidia_smi_is_no_gpu(machine, body):
    machine(body=body)
    assert detect() == []


def test_an_nvidia_smi_that_is_not_a_program_is_no_gpu(machine):
    machine(GPU_LINE).write_bytes(b"\x7fELF not really")
    assert detect() == []


def test_a_hanging_nvidia_smi_is_given_up(machine, monkeypatch):
    machine(body="exec /bin/sleep 30")
    monkeypatch.setattr(driver, "TIMEOUT_SECONDS", 0.2)
    began = time.monotonic()
    assert detect() == []
    assert time.monotonic() - began < 5


def test_a_gpu_in_need_of_a_reset_is_left_out(machine, tmp_path):
    (tmp_path / "meminfo").write_text(MEMINFO)
    lost = "0, GPU-aaaa, NVIDIA GeForce RTX 4070, [GPU requires reset], [GPU requires reset], [N/A], 535.1"
    machine(f"{lost}\n{SECOND_LINE}")
    assert [gpu.index for gpu in detect()] == [1]


def test_a_failing_list_of_processes_leaves_the_gpu(machine):
    machine(body=f"case \"$1\" in --query-gpu=*) echo '{GPU_LINE}';; *) exit 2;; esac")
    assert [gpu.processes for gpu in detect()] == [()]


def test_unified_memory_is_the_system_s(machine, tmp_path):
    (tmp_path / "meminfo").write_text(MEMINFO)
    machine("0, GPU-gb10, NVIDIA GB10, [N/A], [N/A], [N/A], 580.95.05")
    (gpu,) = detect()
    assert (gpu.total_bytes, gpu.free_bytes) == (125534208 * 1024, 100 * GiB)
    assert gpu.used_bytes == gpu.total_bytes - gpu.free_bytes
    assert gpu.notes == (UNIFIED,)


def test_unified_memory_needs_a_system_that_says(machine):
    machine("0, GPU-gb10, NVIDIA GB10, [N/A], [N/A], [N/A], 580.95.05")
    assert detect() == []


def test_wsl_is_told_apart_and_its_nvidia_smi_found(machine, monkeypatch, tmp_path):
    (tmp_path / "version").write_text("Linux version 5.15.153.1-microsoft-standard-WSL2 (root@host)")
    monkeypatch.setattr(driver, "WSL_NVIDIA_SMI", machine(GPU_LINE, path=tmp_path / "wsl-nvidia-smi"))
    (gpu,) = detect()
    assert gpu.notes == (SPILLS, HIDDEN)


def test_windows_spills(machine, monkeypatch):
    monkeypatch.setattr(driver.platform, "system", lambda: "Windows")
    machine(GPU_LINE)
    assert [gpu.notes for gpu in detect()] == [(SPILLS,)]


# ------------------------------------------------------------------------------------------- NVML


class NVMLError(Exception):
    pass


class NVMLError_NotSupported(NVMLError):
    pass


class FakeNvml(types.ModuleType):
    """nvidia-ml-py as far as it is used, for one RTX 4070 and one GPU that is lost."""

    NVMLError = NVMLError
    NVMLError_NotSupported = NVMLError_NotSupported
    nvmlMemory_v2 = 0x2000028

    def __init__(self, *, names_are_bytes=False, has_v2=True, unified=False, init_fails=False):
        super().__init__("pynvml")
        self.names_are_bytes, self.has_v2, self.unified, self.init_fails = names_are_bytes, has_v2, unified, init_fails
        self.is_open = False

    def text(self, value):
        return value.encode() if self.names_are_bytes else value

    def nvmlInit(self):
        if self.init_fails:
            raise NVMLError("Library Not Found")
        self.is_open = True

    def nvmlShutdown(self):
        self.is_open = False

    def nvmlSystemGetDriverVersion(self):
        return self.text("576.80")

    def nvmlDeviceGetCount(self):
        return 2

    def nvmlDeviceGetHandleByIndex(self, index):
        if index == 1:
            raise NVMLError("GPU is lost")
        return f"handle {index}"

    def nvmlDeviceGetName(self, handle):
        return self.text("NVIDIA GeForce RTX 4070")

    def nvmlDeviceGetUUID(self, handle):
        return self.text("GPU-aaaa")

    def nvmlDeviceGetMemoryInfo(self, handle, version=None):
        if self.unified:
            raise NVMLError_NotSupported("Not Supported")
        if version and not self.has_v2:
            raise NVMLError("Function Not Found")
        used = 1415 if version else 1415 + 456
        return types.SimpleNamespace(total=12282 * MiB, free=10411 * MiB, used=used * MiB)

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle):
        return [types.SimpleNamespace(pid=9, usedGpuMemory=814 * MiB), types.SimpleNamespace(pid=5, usedGpuMemory=None)]

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        return [
            types.SimpleNamespace(pid=42, usedGpuMemory=1708 * MiB),
            types.SimpleNamespace(pid=6, usedGpuMemory=(1 << 64) - 1),
        ]

    def nvmlSystemGetProcessName(self, pid):
        if pid == 5:
            raise NVMLError("No Permission")
        return self.text({9: "Xorg", 42: "python3", 6: "ollama"}[pid])


@pytest.mark.parametrize("names_are_bytes", [False, True])
def test_nvml_says_all_and_is_preferred(machine, monkeypatch, names_are_bytes):
    machine(SECOND_LINE)
    nvml = FakeNvml(names_are_bytes=names_are_bytes)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    (gpu,) = detect()
    assert gpu == DriverGpu(
        index=0,
        uuid="GPU-aaaa",
        name="NVIDIA GeForce RTX 4070",
        total_bytes=12282 * MiB,
        free_bytes=10411 * MiB,
        used_bytes=1415 * MiB,
        driver_version="576.80",
        processes=(
            DriverProcess(42, "python3", 1708 * MiB),
            DriverProcess(9, "Xorg", 814 * MiB),
            DriverProcess(5, "", None),
            DriverProcess(6, "ollama", None),
        ),
    )
    assert not nvml.is_open


def test_an_old_driver_has_only_the_first_memory_call(machine, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(has_v2=False))
    assert [gpu.used_bytes for gpu in detect()] == [1871 * MiB]


def test_nvml_of_unified_memory(machine, monkeypatch, tmp_path):
    (tmp_path / "meminfo").write_text(MEMINFO)
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(unified=True))
    assert [(gpu.free_bytes, gpu.notes) for gpu in detect()] == [(100 * GiB, (UNIFIED,))]


def test_where_nvml_fails_nvidia_smi_answers(machine, monkeypatch):
    machine(SECOND_LINE)
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(init_fails=True))
    assert [gpu.uuid for gpu in detect()] == ["GPU-bbbb"]


def test_a_package_that_warns_when_imported_is_no_error(machine, monkeypatch, tmp_path):
    (tmp_path / "pynvml.py").write_text(
        "import warnings\nwarnings.warn('deprecated', FutureWarning)\nnvmlInit = None\n"
    )
    monkeypatch.delitem(sys.modules, "pynvml")
    monkeypatch.syspath_prepend(tmp_path)
    machine(SECOND_LINE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [gpu.uuid for gpu in detect()] == ["GPU-bbbb"]
    sys.modules.pop("pynvml", None)


def test_asking_imports_nothing_heavy():
    program = (
        "import sys; from gptfit.driver import detect; detect();"
        "print({'torch', 'numpy', 'tiktoken', 'pydantic', 'yaml'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "set()"
