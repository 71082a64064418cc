"""Code that reads the value of a tensor while it is traced."""

from pathlib import Path

import pytest

import gptfit
from gptfit.errors import GptfitError

FILE = """
import torch
from torch import nn

def net():
    return nn.Linear(8, 8), torch.empty(4, 8)

def printed():
    model, x = net()
    optimizer = torch.optim.AdamW(model.parameters())
    def step():
        loss = model(x).sum()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=False)
        optimizer.step()
        optimizer.zero_grad()
        print(loss.item())  # here
    return step, optimizer

def silent():
    model, x = net()
    optimizer = torch.optim.AdamW(model.parameters())
    return (lambda: model(x).sum().backward()), optimizer

def behind():
    model, x = net()
    def step():
        loss = model(x).sum()
        loss.backward()
        if loss.item() > 2:  # here
            torch.empty(1 << 28)
    return step

def before():
    model, x = net()
    def step():
        loss = model(x).sum()
        if loss.item() > 2:  # here
            loss.backward()
    return step
"""


def line_of(function: str) -> int:
    """Of the comment in that function of FILE."""
    head, _, tail = FILE.partition(f"def {function}()")
    return head.count("\n") + tail[: tail.index("# here")].count("\n") + 1


@pytest.fixture
def spec(tmp_path: Path) -> str:
    path = tmp_path / "reads.py"
    path.write_text(FILE, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("function", ["printed", "behind"])
def test_a_value_read_behind_the_backward_is_told_with_its_line(spec: str, function: str) -> None:
    report = gptfit.trace_file(f"{spec}:{function}")
    assert [note.partition(":")[0] for note in report.notes] == [
        f"reads.py line {line_of(function)} reads a tensor's value"
    ]


def test_an_optimizer_that_reads_its_counter_is_no_news(spec: str) -> None:
    report = gptfit.trace_file(f"{spec}:silent")
    assert not report.notes


def test_a_value_that_the_step_hangs_on_is_refused_with_its_line(spec: str) -> None:
    with pytest.raises(GptfitError, match=rf"reads.py line {line_of('before')}: cannot trace .item\(\)"):
        gptfit.trace_file(f"{spec}:before")
