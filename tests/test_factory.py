"""A user's file: how it is found, what its function may return, and what is refused in one line."""

from pathlib import Path
from typing import Any

import pytest

from gptfit.errors import GptfitError
from gptfit.tracefile import trace_file

BAD = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.first, self.act = nn.Linear(8, 8), act
    def forward(self, x):
        return self.act(self.first(x)).sum()

@torch.library.custom_op("tests_tracefile::double", mutates_args=())
def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2

def launch(x):
    x.data_ptr()
    return x

X = torch.ones(4, 8)
number = 3
def item(): return Net(lambda h: h if h.sum().item() > 0 else -h), X
def selects(): return Net(lambda h: h[h > 0]), X
def custom(): return Net(double), X
def kernel(): return Net(launch), X
def numpy(): return Net(lambda h: h * float(h.detach().numpy()[0, 0])), X
def raises(): raise ValueError("no such\\nthing")
def exits(): raise SystemExit(3)
def driver(): torch.cuda.get_device_properties(0)
def three(): return 3
def nothing(): return None
def alone(): return Net(double)
def lossless(): return nn.Linear(8, 8), X
def empty(): return lambda: 3
def needs(width): return 3
def shapes(): return nn.Linear(8, 8), torch.ones(4, 9)
"""


@pytest.fixture
def bad(tmp_path: Path) -> str:
    path = tmp_path / "bad.py"
    path.write_text(BAD)
    return str(path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("item", r"bad.py line 22: cannot trace \.item\(\)"),
        ("selects", r"bad.py line 23: cannot trace aten\.nonzero"),
        ("custom", r"cannot trace tests_tracefile::double: it has no fake kernel"),
        ("kernel", r"bad.py line 17: .*data_ptr"),
        ("numpy", r"bad.py line 26: .*numpy"),
        ("raises", r"bad.py line 27: ValueError: no such thing"),
        ("exits", r"bad.py line 28: SystemExit: 3"),
        ("driver", r"bad.py line 29: .*asks CUDA itself"),
        ("three", r"three\(\) in bad.py returned \(int\)"),
        ("nothing", r"returned \(NoneType\)"),
        ("alone", r"returned \(Net\)"),
        ("lossless", "output of Linear has no loss"),
        ("empty", "holds no module"),
        ("needs", "has to be told width"),
        ("shapes", "bad.py: RuntimeError: .*reduction dim"),
        ("itme", "itme is not in it; did you mean item"),
        ("number", "number is not a function"),
    ],
)
def test_what_cannot_be_traced_is_said_in_a_line(bad: str, name: str, words: str) -> None:
    with pytest.raises(GptfitError, match=words) as caught:
        trace_file(f"{bad}:{name}")
    assert "\n" not in caught.value.message and caught.value.hint


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("{}", "names no function"),
        ("{}:", "names no function"),
        ("{}x:item", "there is no file .*did you mean"),
        (":item", "names no function"),
    ],
)
def test_a_file_that_is_not_there(bad: str, spec: str, words: str) -> None:
    with pytest.raises(GptfitError, match=words):
        trace_file(spec.format(bad))


def test_a_file_that_is_not_python(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("x = 1\ndef make(:\n")
    with pytest.raises(GptfitError, match=r"broken\.py line 2: SyntaxError"):
        trace_file(f"{path}:make")


def test_arguments_of_any_name_reach_the_function(tmp_path: Path) -> None:
    path = tmp_path / "names.py"
    path.write_text(
        "import torch\ndef make(spec, profile, reserve_bytes, dtype):\n"
        "    net = torch.nn.Sequential(torch.nn.Linear(spec, 1), torch.nn.Flatten(0))\n"
        "    return net.to(getattr(torch, dtype)), torch.ones(1, profile * reserve_bytes).to(getattr(torch, dtype))\n"
    )
    report = trace_file(f"{path}:make", **{"spec": 6, "profile": 2, "reserve_bytes": 3, "dtype": "bfloat16"})
    assert {row.dtype for row in report.tensors if row.category == "parameter"} == {"bfloat16"}
    assert "no autocast" in report.assumptions  # the function's own dtype, not autocast's


def test_a_refused_trace_leaves_torch_as_it_was(bad: str) -> None:
    import torch

    autograd: Any = torch.autograd
    before = (torch.nn.Module._apply, torch.autocast.__init__, autograd._engine_run_backward)
    with pytest.raises(GptfitError):
        trace_file(f"{bad}:item")
    assert before == (torch.nn.Module._apply, torch.autocast.__init__, autograd._engine_run_backward)
    assert torch.ones(2).sum().item() == 2


def test_the_command_refuses(gptfit: Any, bad: str) -> None:
    result = gptfit("trace", f"{bad}:custom")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: bad.py line 10: cannot trace tests_tracefile::double")
