"""The published measurements: every gate holds, and a gate can be missed."""

import json
from pathlib import Path

import pytest

from gptfit.accuracy import GATES, ROWS, Accuracy, accuracy
from gptfit.errors import GptfitError


@pytest.fixture(scope="module")
def shipped() -> Accuracy:
    return accuracy()


def test_no_gate_is_missed(shipped: Accuracy) -> None:
    assert shipped.missed() == []


def test_rows_have_a_role_and_the_excluded_a_reason(shipped: Accuracy) -> None:
    assert {row.role for row in shipped.rows} <= {"calibration", "holdout", "excluded"}
    assert all(row.reason for row in shipped.rows if row.role == "excluded")


def test_each_class_has_rows_that_nothing_was_fitted_to(shipped: Accuracy) -> None:
    for kind in ("allocated, eager", "process", "verdict"):
        assert any(row.role == "holdout" for row in shipped.of_kind(kind))


@pytest.mark.parametrize("metric", ["max_memory_allocated", "nvidia_smi_total"])
def test_a_wrong_measurement_misses_its_gate(tmp_path: Path, metric: str) -> None:
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()]
    row = next(row for row in rows if row["metric"] == metric and row["role"] != "excluded")
    row["mib"] *= 1.2
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    assert accuracy(path).missed()


def test_a_wrong_verdict_is_seen(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()]
    row = next(row for row in rows if row["metric"] == "verdict")
    row["verdict"] = {"fits": "oom", "oom": "fits"}[row["verdict"]]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    assert accuracy(path).missed() == [f"{row['id']}: the verdict is wrong"]


def test_unreadable_rows_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("{")
    with pytest.raises(GptfitError, match="not JSON"):
        accuracy(path)
    path.write_text('{"id": 1}')
    with pytest.raises(GptfitError, match="is no measurement"):
        accuracy(path)


def test_every_gate_is_positive_and_each_allows_what_the_mean_does() -> None:
    assert all(0 < gate.mean <= gate.each < 0.05 for gate in GATES.values())
