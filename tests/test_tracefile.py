"""Tracing what a user's file makes: against sums done by hand, against our own runs' traces, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptfit.config import make_run
from gptfit.errors import GptfitError
from gptfit.gpus import load_gpu
from gptfit.memory.reserve import replay_tape
from gptfit.memory.tape import Buffer, Event, Mark, Tape
from gptfit.trace import trace_program
from gptfit.tracefile import TraceReport, grouped, trace_file, with_scratch
from gptfit.tracefit import MAX_BATCH_SIZE, MAX_TRACES, fit_batch, search

MiB = 1 << 20

TOY = """
import torch
from torch import nn

print("a file may print")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(32, 128, bias=False)
        self.outer = nn.Linear(128, 32, bias=False)

    def forward(self, x):
        return self.outer(self.inner(x).exp()).sum()


def make(batch_size=64):
    net = Net()
    return net, torch.empty(batch_size, 32), torch.optim.SGD(net.parameters(), lr=0.1)


def bare(batch_size=64):
    return Net(), torch.empty(batch_size, 32)


def whole(device="cuda"):
    net = Net().to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    x = torch.empty(64, 32, device=device)

    def step():
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = net(x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def loss_only():
    net = Net()
    x = torch.empty(64, 32)
    return (lambda: net(x)), net, torch.optim.SGD(net.parameters(), lr=0.1)


class Normed(nn.Module):
    # Two layers with a norm before each; its output is what `form` makes of loss and hidden state.

    def __init__(self, form):
        super().__init__()
        self.form = form
        self.layers = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(nn.functional.rms_norm(x, (64,))).relu().square()
        return self.form(x.square().mean(), x)


def normed():
    return torch.compile(Normed(lambda loss, x: (loss, x))), torch.empty(1024, 64)


def named():
    return torch.compile(Normed(lambda loss, x: {"loss": loss, "x": x})), {"x": torch.empty(1024, 64)}


def cached():
    return torch.compile(Normed(lambda loss, x: {"loss": loss, "cache": object()})), torch.empty(1024, 64)


def chat():
    blocks = nn.ModuleList(nn.Linear(256, 256, bias=False) for _ in range(4))
    table = nn.Embedding(512, 256)
    head = nn.Linear(256, 512, bias=False)
    model = nn.ModuleDict({"blocks": blocks, "table": table, "head": head})
    rest = [*table.parameters(), *head.parameters()]
    optimizers = [torch.optim.Muon(blocks.parameters(), lr=0.02), torch.optim.AdamW(rest)]
    ids = torch.randint(512, (4, 64))

    def step():
        x = model["table"](ids)
        for block in model["blocks"]:
            x = x + block(nn.functional.rms_norm(x, (256,))).relu().square()
        return nn.functional.cross_entropy(model["head"](x).flatten(0, 1), ids.flatten())

    return step, model, optimizers
"""


@pytest.fixture
def toy(tmp_path: Path) -> str:
    path = tmp_path / "toy.py"
    path.write_text(TOY)
    return str(path)


# What is alive, counted by hand

WEIGHT, X, INNER = 4 * 32 * 128, 4 * 64 * 32, 4 * 64 * 128
# The worst instant is exp's backward: its gradient is made from its output and that output's gradient; the outer
# weight has its gradient. Loss, loss over one micro-step and the seed of backward are scalars.
TOY_PEAK = 2 * WEIGHT + X + 3 * INNER + WEIGHT + 3 * 512


def test_a_module_by_hand(toy: str) -> None:
    report = trace_file(f"{toy}:make")
    assert report.live_bytes == TOY_PEAK
    assert report.saved_for_backward_bytes == INNER  # exp keeps what it returned, and so does the outer layer
    assert report.n_params == 2 * 32 * 128
    assert (report.phase, report.op) == ("backward", "ExpBackward0")
    # Clipping has two norms, their stack and its norm; the loss and the loss over one micro-step are variables.
    assert dict(report.phases)["optimizer"] == 4 * WEIGHT + X + 6 * 512


def test_optimizer_state_is_alive_where_the_file_brings_none(toy: str) -> None:
    assert trace_file(f"{toy}:bare").live_bytes == TOY_PEAK + 4 * WEIGHT + 2 * 512  # fused: a step counter on the card
    assert trace_file(f"{toy}:bare", optimizer_impl="foreach").live_bytes == TOY_PEAK + 4 * WEIGHT
    assert trace_file(f"{toy}:bare", optimizer="lion").live_bytes == TOY_PEAK + 2 * WEIGHT


def test_gradients_are_alive_while_micro_steps_accumulate(toy: str) -> None:
    # At exp's backward the outer weight's gradient has been added to the old one, and the inner weight has one, too.
    assert trace_file(f"{toy}:make", gradient_accumulation_steps=4).live_bytes == TOY_PEAK + WEIGHT


def test_a_callable_that_returns_its_loss_is_stepped_as_a_module_is(toy: str) -> None:
    assert trace_file(f"{toy}:loss_only").live_bytes == TOY_PEAK


def test_a_callable_that_does_all_itself_on_cuda_under_autocast(toy: str) -> None:
    report = trace_file(f"{toy}:whole")
    other = trace_file(f"{toy}:make", dtype="bfloat16")
    # Its loss is a variable of one call, so nothing of the step before is there; half a byte an element otherwise.
    assert dict(report.phases)["backward"] == dict(other.phases)["backward"] - 512
    assert report.saved_for_backward_bytes == other.saved_for_backward_bytes
    assert any("takes the optimizer's step itself" in line for line in report.assumptions)


def test_muon_keeps_one_momentum_and_adamw_two(toy: str) -> None:
    report = trace_file(f"{toy}:chat")
    block, table = 4 * 256 * 256, 4 * 512 * 256
    assert dict(report.breakdown())["optimizer state"] == 4 * block + 2 * 2 * table
    momenta = [row for row in report.tensors if "momentum" in row.name]
    assert [(row.name, row.count, row.n_bytes) for row in momenta] == [
        ("blocks.*.weight momentum_buffer", 4, 4 * block)
    ]
    logits = 4 * 4 * 64 * 512
    assert dict(report.breakdown())["logits"] == 3 * logits  # log_softmax's output, its gradient, and the logits'


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own, when it first compiles
def test_a_compiled_module(toy: str) -> None:
    report = trace_file(f"{toy}:normed")
    x = 4 * 1024 * 64
    # A layer keeps its normed input and its output, or what relu's backward reads of it; norms keep statistics.
    assert 3 * x <= report.saved_for_backward_bytes <= 6 * x
    named = trace_file(f"{toy}:named")
    assert (report.live_bytes, report.phases) == (named.live_bytes, named.phases)
    assert any("torch.compile" in line for line in report.assumptions)
    with pytest.raises(GptfitError, match="returns a object with them"):
        trace_file(f"{toy}:cached")
    with pytest.raises(GptfitError, match="compile=True is for a module"):
        trace_file(f"{toy}:whole", compile=True)


def test_ours_and_a_file_of_the_same_step_agree(tmp_path: Path) -> None:
    """In our loop the next batch is there before backward, so that two inputs are alive, and here one; here the
    output is kept as it is, with the loss that is not yet over the micro-steps."""
    path = tmp_path / "nano.py"
    path.write_text(
        "import torch\n"
        "from gptfit.config import make_run\n"
        "from gptfit.nanogpt_reference import NanoGPT\n"
        "from gptfit.optim import build_optimizer\n"
        f"RUN = make_run({VALUES!r})\n"
        "def make():\n"
        "    model = NanoGPT(RUN)\n"
        "    x, y = torch.randint(512, (2, 4, 128))\n"
        "    return model, (x.clone(), y.clone()), build_optimizer(model, RUN)\n"
    )
    ours = trace_program(make_run(VALUES), "nanogpt")
    report = trace_file(f"{path}:make", dtype="bfloat16", gradient_accumulation_steps=4)
    assert report.live_bytes == ours.live_bytes - 8 * 4 * 128 + 512
    assert report.saved_for_backward_bytes == ours.saved_for_backward_bytes
    assert (report.phase, report.n_params) == (ours.peak.phase, ours.n_params)


VALUES = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 64,
    "vocab_size": 512,
    "block_size": 128,
    "batch_size": 4,
    "gradient_accumulation_steps": 4,
    "compile": False,
}


# What the allocator makes of it


def test_kernels_scratch_is_put_where_it_is_taken() -> None:
    grad = Buffer("q.grad", "temporary", (2, 4, 100, 40), "bfloat16", 64_000)
    items = [Mark("forward", "mm"), Mark("backward", "attn: ScaledDotProductFlashAttentionBackward0"), Event(1, grad)]
    added = [item.buffer for item in with_scratch(items, 1024) if isinstance(item, Event) and item.sign > 0]
    assert [buffer.n_bytes for buffer in added] == [1024, 1024, 64_000, 4 * 2 * 4 * 128 * 65]


def test_figures_are_in_order_and_rows_add_up(toy: str) -> None:
    report = trace_file(f"{toy}:make", load_gpu("rtx4070"))
    assert report.live_bytes < report.allocated_bytes <= report.reserved_bytes < report.process_bytes
    assert sum(row.n_bytes for row in report.tensors) == report.allocated_bytes
    assert report.verdict == "fits"
    assert trace_file(f"{toy}:make", load_gpu("rtx4070"), 12_000 * MiB).verdict == "does_not_fit"


def test_a_replay_rounds_as_the_allocator_does() -> None:
    large = Buffer("a", "activation", (), "uint8", 3 * MiB)
    small = Buffer("b", "activation", (), "uint8", 512)
    replayed = replay_tape(Tape([Event(1, large), Event(1, small), Event(-1, large)]), False)
    assert replayed.reserved_bytes == 22 * MiB  # 1 to 10 MiB are cut out of 20, small ones out of 2


@given(st.lists(st.tuples(st.integers(0, 30), st.sampled_from(["mm", "add"])), min_size=1, max_size=30))
def test_grouping_keeps_bytes_and_counts(blocks: list[tuple[int, str]]) -> None:
    from gptfit.estimate import TensorRow

    rows = [
        TensorRow(f"h.{i}.mlp: {op} #{n + 1}", "activation", (4,), "uint8", 1, 512) for n, (i, op) in enumerate(blocks)
    ]
    together = grouped(rows)
    assert sum(row.n_bytes for row in together) == 512 * len(blocks)
    assert sum(row.count for row in together) == len(blocks)
    assert len(together) == len({op for _, op in blocks})


# The largest batch


@given(
    lines=st.lists(st.tuples(st.integers(0, 4000), st.integers(1, 300)), min_size=1, max_size=4),
    usable=st.integers(0, 20_000),
    start=st.integers(1, 200),
)
def test_the_search_finds_the_largest_size(lines: list[tuple[int, int]], usable: int, start: int) -> None:
    """The peak of a step is the largest of lines; the answer is what trying every size would give."""
    traced: list[int] = []

    def needs(size: int) -> int:
        return max(a + b * size for a, b in lines)

    def trace(size: int) -> Any:
        traced.append(size)
        return SimpleNamespace(live_bytes=needs(size), process_bytes=needs(size))

    found = search(trace, start, usable)
    largest = max((size for size in range(1, 20_001) if needs(size) <= usable), default=None)
    assert len(traced) == len(set(traced)) <= MAX_TRACES
    if largest is None or found.is_largest:
        assert found.batch_size == largest
    else:  # out of traces: what it says fits, fits
        assert found.batch_size is None or needs(found.batch_size) <= usable
        assert len(traced) == MAX_TRACES


def test_a_batch_that_nothing_limits_ends_the_search() -> None:
    found = search(lambda size: SimpleNamespace(live_bytes=1, process_bytes=1), 8, 10)  # pyright: ignore[reportArgumentType]
    assert found.batch_size == MAX_BATCH_SIZE and not found.is_largest


def test_the_largest_batch_is_traced_and_the_next_one_too(toy: str) -> None:
    card = load_gpu("rtx4070")
    usable = card.context_bytes + 100 * MiB
    fit = fit_batch(f"{toy}:make", card, card.total_bytes - usable, batch_size=1000)
    assert fit.batch_size is not None and fit.is_largest
    assert fit.report.arguments["batch_size"] == fit.batch_size
    for size, fits in ((fit.batch_size, True), (fit.batch_size + 1, False)):
        report = trace_file(f"{toy}:make", card, card.total_bytes - usable, batch_size=size)
        assert (report.process_bytes <= usable) is fits
    with pytest.raises(GptfitError, match="takes no batch_size"):
        fit_batch(f"{toy}:whole", card)


def test_a_key_that_neither_file_nor_run_knows(toy: str) -> None:
    with pytest.raises(GptfitError, match='unknown key "batchsize"; did you mean batch_size'):
        trace_file(f"{toy}:make", batchsize=8)


# The command


def test_the_command_answers(gptfit: Any, toy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(toy).parent)
    toy = "toy.py"
    result = gptfit("trace", f"{toy}:make", "batch_size=32", "--gpu", "rtx4070", "--json")
    answer = json.loads(result.out)  # the file's own print is not in it
    assert (result.code, answer["schema"], answer["verdict"]) == (0, "gptfit.trace/1", "fits")
    assert answer["arguments"] == {"batch_size": 32}
    assert sum(row["bytes"] for row in answer["breakdown"]) == answer["peak"]["allocated_bytes"]
    shown = gptfit("trace", f"{toy}:make", "-v")
    assert shown.code == 0 and shown.out.startswith("Needs ")
    assert max(map(len, shown.out.splitlines())) <= 80
    assert gptfit("trace", f"{toy}:make", "--gpu", "rtx4070", "--reserve", "11.5GiB").code == 1


def test_the_command_finds_a_batch(gptfit: Any, toy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(toy).parent)
    toy = "toy.py"
    words = ("trace", f"{toy}:make", "--gpu", "rtx4070", "--reserve", "11450MiB", "--fit")
    answer = json.loads(gptfit(*words, "--json").out)
    assert answer["fit"]["is_largest"] and answer["verdict"] == "fits"
    shown = gptfit(*words)
    assert shown.code == 0
    assert shown.out.startswith(f"Fits: batch_size={answer['fit']['batch_size']} on rtx4070\n")
    assert max(len(line) for line in shown.out.splitlines() if not line.startswith("  gptfit ")) <= 80


def test_importing_the_package_leaves_torch_out_until_it_is_asked_for() -> None:
    script = (
        "import sys, gptfit; assert 'torch' not in sys.modules; gptfit.trace_file; assert 'torch' in sys.modules;"
        "assert callable(gptfit.trace_file) and not hasattr(gptfit, 'trace_nothing')"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


# Hugging Face's models, where they are installed

HUGGING_FACE = """
import torch

def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel
    model = GPT2LMHeadModel(GPT2Config(vocab_size=512, n_positions=128, n_embd=64, n_layer=2, n_head=2))
    ids = torch.randint(512, (4, 128))
    return model, {"input_ids": ids, "labels": ids}

def llama():
    from transformers import LlamaConfig, LlamaForCausalLM
    config = LlamaConfig(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)
    ids = torch.randint(512, (4, 128))
    return LlamaForCausalLM(config).to("cuda", torch.bfloat16), {"input_ids": ids, "labels": ids}
"""


@pytest.mark.parametrize(
    ("name", "n_params", "dtype", "logits"),
    [
        # wte (the head, too), wpe; two blocks of matrices, 12·n_embd², biases and two norms; the last norm.
        ("gpt2", 512 * 64 + 128 * 64 + 2 * (12 * 64 * 64 + 13 * 64) + 2 * 64, "bfloat16", 14),
        # table and head; q, o and half-width k, v; three matrices of 64 × 128; two norms; the last norm.
        ("llama", 2 * 512 * 64 + 2 * (3 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64, "float32", 14),
    ],
)
def test_hugging_face(tmp_path: Path, name: str, n_params: int, dtype: str, logits: int) -> None:
    pytest.importorskip("transformers")
    path = tmp_path / "hugging.py"
    path.write_text(HUGGING_FACE)
    report: TraceReport = trace_file(f"{path}:{name}", dtype=dtype)
    assert report.n_params == n_params
    # log_softmax's output, its gradient and nll's in fp32, and the half-precision logits that the output holds.
    assert dict(report.breakdown())["logits"] == logits * 4 * 128 * 512
