"""gptfit doctor: each check with inputs as other machines have them."""

import json
from pathlib import Path
from typing import Any

import pytest

from gptfit import doctor
from gptfit.doctor import Torch
from gptfit.driver import DriverGpu, DriverProcess
from gptfit.units import GiB

CPU = Torch("2.13.0+cpu", None)
CUDA = Torch("2.13.0+cu130", "13.0")


def card(
    name: str = "NVIDIA GeForce RTX 4070", driver: str = "580.65.06", free: float = 11.0, **more: Any
) -> DriverGpu:
    total = 12282 << 20
    free_bytes = int(free * GiB)
    return DriverGpu(more.pop("index", 0), "GPU-abc", name, total, free_bytes, total - free_bytes, driver, **more)


def states(checks: Any) -> list[str]:
    return [check.state for check in checks]


def test_torch_is_read_without_importing_it() -> None:
    import importlib.metadata

    seen = doctor.installed_torch()
    assert seen is not None
    assert seen.version.startswith(importlib.metadata.version("torch"))
    text = "__version__ = '2.13.0+cu130'\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n"
    assert doctor.read_torch("2.13.0", text) == CUDA
    assert doctor.read_torch("2.13.0+cu126", "").cuda == "12.6"
    assert doctor.read_torch("2.13.0+cpu", "cuda: Optional[str] = None\n").cuda is None
    assert doctor.read_torch("2.13.0", "cuda = None\nhip = '7.1'").hip


@pytest.mark.parametrize(
    ("torch", "state", "words"),
    [
        (None, "bad", "not installed"),
        (CUDA, "ok", "built for CUDA 13.0"),
        (CPU, "ok", "built without CUDA"),
        (Torch("2.14.1+cu130", "13.0"), "warn", "gptfit is for torch<2.14,>=2.13"),
        (Torch("2.9.0", "12.8"), "warn", "gptfit is for"),
    ],
)
def test_torch(torch: Torch | None, state: str, words: str) -> None:
    (check,) = doctor.check_torch(torch, "torch<2.14,>=2.13")
    assert check.state == state and words in check.text
    assert check.fix == ("" if state == "ok" else 'pip install "torch<2.14,>=2.13"')


def test_a_cpu_build_beside_a_card_is_named_with_the_line_to_type() -> None:
    *_, check = doctor.check_build(CPU, [card()], False)
    assert check.state == "bad" and "RTX 4070 is not used" in check.text
    assert check.fix.startswith('pip install --force-reinstall "torch==2.13.*" --index-url') and "cu130" in check.fix
    *_, check = doctor.check_build(CPU, [card(driver="550.54")], False)
    assert check.fix.endswith("/cu126")


@pytest.mark.parametrize(
    ("torch", "seen", "on_bus", "expected"),
    [
        (CUDA, [card()], True, ["ok"]),
        (CUDA, [card(driver="550.54.14")], True, ["bad"]),
        (Torch("2.13.0+cu126", "12.6"), [card(driver="550.54.14")], True, ["ok"]),
        (CUDA, [card("Tesla V100-SXM2-16GB")], True, ["ok", "bad"]),
        (CPU, [], False, ["info"]),
        (CPU, [], True, ["bad"]),
        (None, [card()], True, ["ok"]),
    ],
)
def test_torch_driver_and_card_together(torch: Any, seen: Any, on_bus: bool, expected: list[str]) -> None:
    if "V100" in "".join(gpu.name for gpu in seen):
        seen = [DriverGpu(0, "GPU-v", seen[0].name, 16384 << 20, 15 * GiB, GiB, "580.65")]
    assert states(doctor.check_build(torch, seen, on_bus)) == expected


def test_triton() -> None:
    assert states(doctor.check_triton(CUDA, "3.5.0", True, "linux")) == ["ok"]
    assert states(doctor.check_triton(CPU, None, False, "linux")) == ["info"]
    (check,) = doctor.check_triton(CUDA, None, True, "win32")
    assert check.state == "warn" and "triton-windows" in check.fix


def test_cards_say_who_holds_them() -> None:
    process = DriverProcess(4242, "python", 8 * GiB)
    (check,) = doctor.check_cards([card(free=3, processes=(process,))])
    assert check.state == "warn" and "python (pid 4242) 8.00 GiB" in check.text
    assert states(doctor.check_cards([card()])) == ["ok"]
    assert states(doctor.check_cards([card("NVIDIA Zebra 9")])) == ["ok", "warn"]


@pytest.mark.parametrize(
    ("environment", "platform", "expected"),
    [
        ({}, "linux", []),
        ({"PYTORCH_CUDA_ALLOC_CONF": ""}, "linux", []),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, "linux", ["ok"]),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, "win32", ["warn"]),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:true"}, "linux", ["bad"]),
        ({"PYTORCH_ALLOC_CONF": "max_split_size:128"}, "linux", ["bad"]),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:True,max_split_size_mb:128"}, "linux", ["info"]),
        (
            {"PYTORCH_ALLOC_CONF": "max_split_size_mb:128", "PYTORCH_CUDA_ALLOC_CONF": "backend:native"},
            "linux",
            ["warn", "ok", "ok"],
        ),
    ],
)
def test_allocator_settings(environment: dict[str, str], platform: str, expected: list[str]) -> None:
    assert states(doctor.check_allocator(environment, platform)) == expected


@pytest.mark.parametrize(
    ("visible", "state"), [("", "warn"), ("-1", "warn"), ("0", "info"), ("GPU-a", "info"), ("1", "bad"), ("0,7", "bad")]
)
def test_visible_cards(visible: str, state: str) -> None:
    assert states(doctor.check_environment({"CUDA_VISIBLE_DEVICES": visible}, [card()])) == [state]


def test_other_variables() -> None:
    slow = {"CUDA_LAUNCH_BLOCKING": "1", "TORCHDYNAMO_DISABLE": "0", "TORCH_LOGS": "recompiles"}
    assert states(doctor.check_environment(slow, [])) == ["warn", "info"]
    mixed = [card(), card("NVIDIA GeForce RTX 3060", index=1)]
    assert states(doctor.check_environment({}, mixed)) == ["warn"]
    assert states(doctor.check_environment({"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, mixed)) == []


OVERLAY = """gpu: rtx4070
measured_on: "2026-11-20"
torch: "2.13.0+cu130"
driver: "580.65.06"
n_runs: 4
total_bytes: 11.58 GiB
driver_bytes: 400 MiB
context_bytes: 300 MiB
context_low_bytes: 290 MiB
context_high_bytes: 310 MiB
speed_factor: 1.1
"""


def test_an_overlay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTFIT_PROFILES", str(tmp_path))
    assert list(doctor.check_overlays(CUDA, [card()])) == []
    (tmp_path / "rtx4070.yaml").write_text(OVERLAY)
    assert states(doctor.check_overlays(CUDA, [card()])) == ["info"]
    assert states(doctor.check_overlays(CUDA, [])) == ["info"]
    (check,) = doctor.check_overlays(CPU, [card(driver="590.1")])
    assert check.state == "warn" and "torch 2.13.0+cu130 and driver 580.65.06" in check.text
    (tmp_path / "rtx4070.yaml").write_text("gpu: [")
    assert states(doctor.check_overlays(CUDA, [])) == ["bad"]


def test_memory_and_space() -> None:
    assert states(doctor.check_memory((16 * GiB, 8 * GiB, 8 * GiB))) == ["ok"]
    assert states(doctor.check_memory((16 * GiB, GiB, 15 * GiB))) == ["warn"]
    assert states(doctor.check_memory(None)) == []
    (check,) = doctor.check_space("shared memory", "/dev/shm", 64 << 20, doctor.LITTLE_SHM, doctor.SHM_FIX)
    assert check.state == "warn" and "--shm-size" in check.fix
    assert states(doctor.check_space("disk", ".", 10 * GiB, 5 * GiB, "")) == ["ok"]
    assert states(doctor.check_space("disk", ".", None, 5 * GiB, "")) == []


def faked(monkeypatch: pytest.MonkeyPatch, seen: list[DriverGpu], torch: Torch) -> None:
    monkeypatch.setattr(doctor, "detect", lambda: seen)
    monkeypatch.setattr(doctor, "installed_torch", lambda: torch)
    monkeypatch.setattr(doctor, "_nvidia_on_bus", lambda: bool(seen))
    monkeypatch.setattr(doctor, "_version", lambda *names: "3.5.0")
    monkeypatch.setattr(doctor, "_total", lambda path: 8 * GiB)
    monkeypatch.setattr(doctor, "_free", lambda path: 80 * GiB)
    monkeypatch.setattr(doctor, "system_memory", lambda: (32 * GiB, 16 * GiB, 16 * GiB))
    monkeypatch.setattr(doctor, "platform_notes", lambda: ("Windows' driver lets a program take more",))
    for name in ("CUDA_VISIBLE_DEVICES", *doctor.ALLOCATOR, *doctor.SLOWING):
        monkeypatch.delenv(name, raising=False)


def test_the_command(gptfit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    faked(monkeypatch, [card()], CUDA)
    result = gptfit("doctor")
    assert (result.code, result.out.splitlines()[0]) == (0, "Nothing is wrong.")
    assert "Windows' driver lets" in result.out
    faked(monkeypatch, [card(free=2)], CPU)
    result = gptfit("doctor")
    lines = result.out.splitlines()
    assert (result.code, lines[0]) == (1, "2 things to look at")
    assert lines[2].strip().startswith("bad: CUDA build"), "the worst first"
    assert any(line.strip().startswith("pip install") for line in lines)
    assert all(len(line) <= 80 or "pip install" in line for line in lines)
    result = gptfit("doctor", "--json")
    answer = json.loads(result.out)
    assert (result.code, answer["schema"]) == (1, "gptfit.doctor/1")
    assert {frozenset(check) for check in answer["checks"]} == {frozenset(("name", "state", "text", "fix"))}


def test_one_thing(gptfit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    faked(monkeypatch, [card(free=2)], CUDA)
    assert gptfit("doctor").out.splitlines()[0] == "1 thing to look at"


def test_it_imports_nothing_heavy() -> None:
    from test_imports import heavy_after

    ((code, heavy),) = heavy_after([["doctor"]]).values()
    assert (code in (0, 1), heavy) == (True, [])
