"""Steps as people write them: what a trace has to know of values, devices and optimizers to follow them."""

from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from gptfit.errors import GptfitError
from gptfit.tracefile import TraceReport, trace_file

FILE = """
import torch
from torch import nn
import torch.nn.functional as F

device = "cuda" if torch.cuda.is_available() else "cpu"

def net():
    return nn.Linear(64, 64, bias=False)

X = dict(size=(256, 64))

def rates():
    model = nn.Sequential(*(nn.Dropout(x.item()) for x in torch.linspace(0, 0.5, 3)), net())
    assert [layer.p for layer in model[:3]] == [0, 0.25, 0.5]
    return (lambda: model(torch.ones(256, 64)).sum()), model

def selected():
    model, labels = net(), torch.arange(256)
    labels[:192] = -100
    def step():
        kept = model(torch.ones(256, 64))[labels != -100]
        assert kept.shape == (64, 64) and labels.unique().numel() == 65
        assert model(torch.ones(4, 64)).masked_select(torch.eye(4, 64) > 0).shape == (4,)
        return F.cross_entropy(kept, labels[labels != -100] % 64)
    return step, model

def views():
    model = net()
    def step():
        x = torch.zeros(4); v = x[:2]; v += 3
        assert x.tolist() == [3, 3, 0, 0] and torch.equal(x, torch.tensor([3.0, 3, 0, 0]))
        x.add_(model(torch.ones(4, 64)).detach().sum(1))
        if v.sum() > 0:  # here
            pass
    return step, model

def layers():
    model = net()
    def step():
        x = torch.ones(256, 64)
        for _ in range(3):
            if torch.rand([]) < 0.9:  # a layer that is left out
                continue
            x = model(x)
        return x.sum()
    return step, model

def loader():
    model = net()
    data = torch.utils.data.TensorDataset(torch.zeros(64, 64))
    batches = iter(torch.utils.data.DataLoader(data, batch_size=16, shuffle=True))
    return (lambda: model(next(batches)[0].pin_memory().to("cuda")).sum()), model

def summed():
    model, total = net(), []
    def step():
        loss = model(torch.ones(256, 64)).sum()
        total.append(0.5 * loss.item() + 1)
        print(f"{sum(total):.2f} {loss:.2f} {total[-1]}", round(total[-1], 2))
        loss.backward()
    return step, model

def decided(act):
    model = net()
    def step():
        loss = model(torch.ones(256, 64)).sum()
        act(-loss.item())  # here
        return loss
    return step, model

def told():
    model = net().to(device)
    def step():
        with torch.autocast(device) if device == "cuda" else torch.no_grad():
            loss = model(torch.ones(256, 64, device=device)).sum()
        torch.cuda.synchronize()
        return loss
    return step, model

def on_meta():
    with torch.device("meta"):
        model = net()
    model = model.to_empty(device="cuda")
    return (lambda: model(torch.ones(256, 64)).sum()), model

def left_on_meta():
    return net().to("meta"), torch.ones(256, 64)

def frozen():
    return net().requires_grad_(False), torch.ones(256, 64)

class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = net()
    def forward(self, batch, scale=1.0):
        return {"loss": scale * self.inner(batch["x"]).sum()}

def nested():
    return Wrapped(), ({"x": torch.ones(256, 64)},)

class Momentum:
    def __init__(self, parameters):
        self.parameters = list(parameters)
        self.kept = [torch.zeros_like(p) for p in self.parameters]
    @torch.no_grad()
    def step(self):
        for p, m in zip(self.parameters, self.kept):
            p.sub_(m.mul_(0.9).add_(p.grad), alpha=0.1)
    def zero_grad(self):
        pass

def own():
    model = net()
    return (lambda: model(torch.ones(256, 64)).sum()), model, Momentum(model.parameters())

def reference():
    model, other = net(), net().requires_grad_(False)
    x = torch.ones(256, 64)
    return (lambda: (model(x) - other(x)).sum()), model, torch.optim.SGD(model.parameters())

def accumulated(n=4):
    model = net()
    def step():
        for _ in range(n):
            (model(torch.ones(256, 64)).exp().sum() / n).backward()
    return step, model

def experts(dtype=torch.float32):
    model = nn.ParameterList([torch.zeros(4, 64, 128), torch.zeros(64, 64)]).to(dtype)
    x, ends = torch.ones(256, 64, dtype=dtype), torch.tensor([64, 128, 192, 256], dtype=torch.int32)
    return (lambda: F.grouped_mm(x @ model[1], model[0], offs=ends).exp().sum()), model

def truncated():
    model = net()
    nn.init.trunc_normal_(model.weight, std=0.02)
    return (lambda: model(torch.ones(256, 64)).sum()), model

class Cached(nn.Module):
    # A plain tensor, and one that the first forward makes, as rotary embeddings have them.
    def __init__(self):
        super().__init__()
        self.inner, self.scale, self.cache = net(), torch.ones(64), None
    def forward(self, x):
        if self.cache is None:
            self.cache = torch.outer(torch.arange(256) * 1.0, self.scale).cos()
        return ((self.inner(x) * self.cache).exp() * self.scale).sum()

def caching():
    return torch.compile(Cached()), torch.ones(256, 64)

def caching_part():
    model = torch.compile(Cached())
    x = torch.ones(256, 64)
    return (lambda: model(x)), model

def in_place():
    model = Cached()
    model.compile()
    x = torch.ones(256, 64)
    return (lambda: model(x)), model

def plain():
    model, x = Cached(), torch.ones(256, 64)
    return (lambda: model(x)), model

class Outputs(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.inner, self.kind = net(), kind
    def forward(self, x):
        return self.kind(logits=None, loss=self.inner(x).exp().sum())

def outputs(kind):
    model = torch.compile(Outputs(kind))
    x = torch.ones(256, 64)
    def step():
        out = model(x)
        loss = out["loss"] if isinstance(out, dict) else out[1]
        assert len(out) == 2 and type(out) is type(kind(0, 0) if kind is not dict else {})
        return loss
    return step, model

def keywords():
    model = net()
    @torch.compile
    def scaled(x, *, by):
        return x * by
    def step():
        with torch.no_grad():
            x = scaled(torch.ones(256, 64), by=2)
        return model(x).sum()
    return step, model

def sparse():
    table = nn.Embedding(64, 64, sparse=True)
    return (lambda: table(torch.ones(8, dtype=torch.int64)).sum()), table

def attends(half=False, padded=False):
    model, x = nn.MultiheadAttention(64, 4, dropout=0.1, batch_first=True), torch.ones(2, 128, 64)
    padding = torch.zeros(2, 128, dtype=torch.bool) if padded else None
    def step():
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            return model(x, x, x, need_weights=False, key_padding_mask=padding)[0].sum()
    return step, model

def copied():
    import copy
    model = copy.deepcopy(net()).to("cuda")
    x = torch.ones(256, 64)
    return (lambda: model(x).exp().sum()), model

def not_copied():
    model, x = net(), torch.ones(256, 64)
    return (lambda: model(x).exp().sum()), model

def processes():
    return torch.distributed.get_rank()
"""

WEIGHT, X = 4 * 64 * 64, 4 * 256 * 64


@pytest.fixture
def spec(tmp_path: Path) -> str:
    path = tmp_path / "own.py"
    path.write_text(FILE, encoding="utf-8")
    return str(path)


def rows(report: TraceReport, category: str) -> int:
    return dict(report.breakdown()).get(category, 0)


@pytest.mark.parametrize("name", ["rates", "selected", "nested", "on_meta", "summed", "told", "truncated"])
def test_a_step_is_followed(spec: str, name: str) -> None:
    report = trace_file(f"{spec}:{name}")  # what the code asserts of its values has held
    assert report.n_params == 64 * 64 and rows(report, "parameter") == WEIGHT


def test_batches_of_a_loader_are_followed(spec: str) -> None:
    assert trace_file(f"{spec}:loader").n_params == 64 * 64


def line(mark: str) -> int:
    return FILE[: FILE.index("# here", FILE.index(mark))].count("\n") + 1


def test_what_is_written_by_weights_is_no_longer_known_nor_are_its_views(spec: str) -> None:
    with pytest.raises(GptfitError, match=rf"own.py line {line('def views')}: cannot trace .item\(\)"):
        trace_file(f"{spec}:views")


def test_a_layer_that_is_left_out_at_random_stays(spec: str) -> None:
    assert trace_file(f"{spec}:layers").saved_for_backward_bytes == 3 * X  # the input, and that of two more layers


@pytest.mark.parametrize(
    "act", [bool, int, round, range, lambda x: x > 2, lambda x: 1 in [x], lambda x: abs(x - 1) < 2]
)
def test_nothing_is_decided_on_a_number_that_is_unknown(spec: str, act: Any) -> None:
    with pytest.raises(GptfitError, match=rf"own.py line {line('def decided')}: cannot trace .item\(\)"):
        trace_file(f"{spec}:decided", act=act)


def test_code_that_asks_for_a_gpu_hears_that_there_is_one(spec: str) -> None:
    casts = [row for row in trace_file(f"{spec}:told").tensors if row.dtype == "float16"]
    assert casts  # autocast to float16 is CUDA's default


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("left_on_meta", "weight of Linear is on the meta device"),
        ("sparse", "a sparse tensor has as many entries as its values say"),
        ("frozen", "no parameter of Linear requires a gradient"),
        ("processes", "own.py line [0-9]+: cannot trace this step: the code sets up several processes"),
    ],
)
def test_what_no_step_can_be_made_of(spec: str, name: str, words: str) -> None:
    with pytest.raises(GptfitError, match=words) as caught:
        trace_file(f"{spec}:{name}")
    assert caught.value.hint


def test_an_optimizer_of_ones_own_steps_and_what_it_keeps_has_a_name(spec: str) -> None:
    report = trace_file(f"{spec}:own")
    assert rows(report, "optimizer state") == WEIGHT
    assert "weight state" in {row.name for row in report.tensors}


def test_a_model_that_is_not_trained_is_named(spec: str) -> None:
    report = trace_file(f"{spec}:reference")
    assert (report.n_params, rows(report, "parameter")) == (64 * 64, 2 * WEIGHT)


def test_what_one_of_several_micro_steps_in_a_callable_saves(spec: str) -> None:
    # exp's output, and the input that the weight's gradient needs
    assert [trace_file(f"{spec}:accumulated", n=n).saved_for_backward_bytes for n in (1, 4)] == [2 * X, 2 * X]


def test_experts_in_full_precision_take_twice_what_they_take_in_half(spec: str) -> None:
    import torch

    single, half = (trace_file(f"{spec}:experts", dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert single.saved_for_backward_bytes - 512 == 2 * (half.saved_for_backward_bytes - 512)  # and the ends, int32
    assert single.saved_for_backward_bytes == 4 * 256 * (64 + 64 + 128) + 512


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*script_method:DeprecationWarning")
@pytest.mark.parametrize("name", ["caching", "caching_part", "in_place"])
def test_a_compiled_module_that_caches(spec: str, name: str) -> None:
    report = trace_file(f"{spec}:{name}")
    # What exp or its argument is, and the input; the cache is a buffer, as it is uncompiled a tensor that stays.
    assert report.saved_for_backward_bytes in (X, 2 * X)
    assert report.live_bytes <= trace_file(f"{spec}:plain").live_bytes
    assert rows(report, "buffer") >= X


def test_a_compiled_function_with_keywords_runs_as_it_is(spec: str) -> None:
    assert "scaled is compiled, and is traced as it runs without that" in trace_file(f"{spec}:keywords").notes


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*script_method:DeprecationWarning")
@pytest.mark.parametrize("kind", [dict, namedtuple("Out", ["logits", "loss"]), lambda logits, loss: (logits, loss)])
def test_a_compiled_module_returns_what_it_returns_uncompiled(spec: str, kind: Any) -> None:
    assert trace_file(f"{spec}:outputs", kind=kind).saved_for_backward_bytes == 2 * X  # exp's, and x


@pytest.mark.parametrize("how", [{}, {"half": True}, {"padded": True}])
def test_attention_of_torchs_module_is_a_kernel(spec: str, how: dict[str, bool]) -> None:
    """On CUDA no matrix of scores is made for it, in single precision or with dropout or a mask neither."""
    report = trace_file(f"{spec}:attends", **how)
    scores = 2 * 4 * 128 * 128
    assert report.saved_for_backward_bytes < 4 * scores
    ops = {row.name for row in report.tensors}
    assert any("flash" in op if how == {"half": True} else "efficient" in op for op in ops)


def test_a_copied_module_is_there_once(spec: str) -> None:
    """nn.TransformerEncoder copies its layer, and an average of the weights is a copy of the model."""
    copied, plain = (trace_file(f"{spec}:{name}") for name in ("copied", "not_copied"))
    assert (copied.live_bytes, copied.breakdown()) == (plain.live_bytes, plain.breakdown())
