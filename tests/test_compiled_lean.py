"""The lean backward against inductor's own plans of runs that were drawn at random, recorded with torch 2.13.0 by
trace.py; its sums and its fusions by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from compiled_runs import measured, run_of
from gptfit.config import make_run
from gptfit.memory.autograd import Writer
from gptfit.memory.compiled_budget import LeanOurs, compiled_twin
from gptfit.memory.compiled_lean import Lean
from gptfit.memory.compiled_lean_fusion import fuse_alike
from gptfit.memory.compiled_plan import Kernel, Slot

# 38 of 47 runs drawn at random, each key by itself: those that have an estimate, none of them left out.
DRAWN = [json.loads(line) for line in (Path(__file__).parent / "data/compiled_lean.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("row", DRAWN)
def test_recorded_plans(row: dict[str, Any]) -> None:
    """Where the usual cut is no larger than the parameters it is taken: in most of those runs tokens are few."""
    run = make_run(row["run"])
    found = measured(run)
    lean = isinstance(compiled_twin("gptfit", Writer(run.n_layer), run), LeanOurs)
    assert found[0] == pytest.approx(row["saved_bytes"], rel=0.005)
    assert found[1] == pytest.approx(row["live_bytes"], rel=0.015 if lean else 0.03)


def test_a_sum_that_would_read_five_tensors_is_written_down() -> None:
    """By hand: rows of the embedding and of positions, and two projections a block: the third is the fifth."""
    listing = Lean(run_of((4, 2, 64, 256, 64, 8)))
    blocks = [{part: f"{i} {part}" for part in ("attn.c_proj", "mlp.c_proj")} for i in range(4)]
    listing.sums(["embedding", "positions"], blocks)
    assert [kernel.writes for kernel in listing.kernels] == [("1+0/x at ln_2",), ("3+0/x at ln_2",)]
    assert listing.kernels[1].reads == (
        "1+0/x at ln_2",
        "1 mlp.c_proj",
        "2 attn.c_proj",
        "2 mlp.c_proj",
        "3 attn.c_proj",
    )
    assert listing.stream_reads[-1] == ["3+0/x at ln_2", "3 mlp.c_proj"]


@pytest.mark.parametrize(("n_between", "groups"), [(10, 1), (70, 2)])
def test_kernels_of_a_kind_are_one_unless_they_are_far_apart(n_between: int, groups: int) -> None:
    kinds = [Kernel((name,), ("x",), group=f"{name}/of norm") for name in "ab"]
    kernels = [kinds[0], *(Kernel((f"c{i}",), ("x",)) for i in range(n_between)), kinds[1]]
    fuse_alike(kernels, {"x": Slot(1024, "float32")}, "/of norm")
    assert len({kernel.group for kernel in kinds}) == groups
