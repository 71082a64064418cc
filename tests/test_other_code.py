"""Programs that gptfit does not mirror: what is recorded of them is what a trace says now, and what the tracer had to
learn for them."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gptfit.accuracy import GATES, TRACED, accuracy
from gptfit.errors import GptfitError
from gptfit.tracefile import trace_file
from gptfit.units import MiB

ROOT = Path(__file__).parents[1]
RECORDS: dict[str, dict[str, Any]] = {row["id"]: row for row in map(json.loads, TRACED.read_text().splitlines())}


def programs() -> dict[str, Any]:
    spec = importlib.util.spec_from_file_location("real_cards", ROOT / "benchmarks" / "real_cards.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.PROGRAMS


def test_each_record_is_of_a_program_that_is_there() -> None:
    found = programs()
    for name, row in RECORDS.items():
        program, arguments = found[name]
        assert row["program"] == f"benchmarks/other_code/{program}" and row["arguments"] == arguments
        assert (ROOT / row["program"].split(":")[0]).is_file()


def test_records_are_compared_under_gates() -> None:
    rows = [row for row in accuracy().rows if row.id in RECORDS and row.role != "excluded"]
    assert {row.kind for row in rows} == {"other code, eager", "other code, compiled"} <= GATES.keys()
    assert all(row.role == "holdout" and row.predicted_bytes == round(RECORDS[row.id]["mib"] * MiB) for row in rows)


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # of what inductor imports
@pytest.mark.parametrize("name", ["cs336-linyun-xl-ctx128-fwd-fp32", "dickles-4090-2x64-compile-peak"])
def test_a_record_is_what_a_trace_says_now(name: str) -> None:
    row = RECORDS[name]
    report = trace_file(str(ROOT / row["program"]), **row["arguments"])
    assert report.allocated_bytes / MiB == pytest.approx(row["mib"], abs=0.01)


def traced(tmp_path: Path, body: str) -> Any:
    path = tmp_path / "step.py"
    path.write_text("import torch\nfrom torch import nn\n\n\n" + body)
    return trace_file(f"{path}:make")


def live(report: Any, dtype: str, *shape: int) -> int:
    return sum(row.count for row in report.tensors if row.shape == shape and row.dtype == dtype)


def test_a_gradient_is_scattered_into_its_zeros(tmp_path: Path) -> None:
    """torch makes a second tensor for fake ones, and none on a GPU."""
    report = traced(
        tmp_path,
        """
def make():
    x = nn.Parameter(torch.empty(1024, 1024))
    holder = nn.Module()
    holder.x = x
    index = torch.zeros(1024, 1, dtype=torch.int64)

    def step():
        x.gather(1, index).sum().backward()
        x.grad = None

    return step, holder
""",
    )
    assert report.phase == "backward"
    assert live(report, "float32", 1024, 1024) == 2  # the parameter and its gradient


def test_autocast_keeps_the_copies_of_weights_that_einsum_reads(tmp_path: Path) -> None:
    report = traced(
        tmp_path,
        """
def make():
    model = nn.Module()
    model.weights = nn.ParameterList(torch.empty(1024, 1024) for _ in range(4))
    x = torch.empty(8, 1024)

    def step():
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            y = x
            for weight in model.weights:
                y = torch.einsum("bi,oi->bo", y, weight)
                y = torch.einsum("bi,oi->bo", y, weight)

    return step, model
""",
    )
    assert live(report, "bfloat16", 1024, 1024) == 4


COMPILED = """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 4096, bias=False)

    def forward(self, x, scale, targets=None):
        logits = torch.tanh(self.head(x) / scale) * scale
        return nn.functional.cross_entropy(logits, targets)


def make():
    model = Model()
    run = torch.compile(model) if COMPILED else model
    x, targets = torch.empty(512, 16), torch.zeros(512, dtype=torch.int64)

    def step():
        run(x, 15.0, targets=targets).backward()
        model.zero_grad()

    return step, model
"""


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # of what inductor imports
def test_a_callable_runs_what_it_compiles_by_the_plan(tmp_path: Path) -> None:
    """Logits once, and over them their gradient; tanh is computed again, as on a GPU, not kept, as on a CPU."""
    compiled, eager = (traced(tmp_path, f"COMPILED = {flag}\n{COMPILED}") for flag in (True, False))
    assert live(compiled, "float32", 512, 4096) == 1
    assert live(eager, "float32", 512, 4096) >= 4
    assert "inductor's plan" in compiled.notes[0] and not eager.notes


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # of what inductor imports
def test_torch_compile_is_given_back(tmp_path: Path) -> None:
    before = torch.compile
    with pytest.raises(GptfitError, match="ZeroDivisionError"):
        traced(tmp_path, "def make():\n    torch.compile(nn.Linear(1, 1))\n    1 / 0\n")
    assert torch.compile is before


def test_norm_of_the_programs_is_that_of_their_torch() -> None:
    """In bf16 under autocast, which torch 2.12 changed."""
    spec = importlib.util.spec_from_file_location("common", ROOT / "benchmarks" / "other_code" / "common.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    x: Tensor = nn.Parameter(torch.ones(2, 8, dtype=torch.bfloat16))
    assert module.norm(x).dtype == torch.bfloat16
