"""The model: what it computes, against formulations that share no code with it."""

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gptfit.config import RunConfig, make_run
from gptfit.model import GPT, compile_model, rms_norm, rotate

# Threads that wait for one another on a busy machine take longer than these shapes take on one.
torch.set_num_threads(1)

TINY: dict[str, Any] = {
    "n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 61, "block_size": 16,
    "dtype": "float32", "loss_chunk_size": 10,
}  # fmt: skip

CHOICES = st.fixed_dictionaries(
    {
        "n_kv_head": st.sampled_from([1, 2, 4]),
        "bias": st.booleans(),
        "norm": st.sampled_from(["layernorm", "rmsnorm"]),
        "mlp": st.sampled_from(["gelu", "swiglu", "relu2"]),
        "position": st.sampled_from(["learned", "rope"]),
        "tie_embeddings": st.booleans(),
        "attention": st.sampled_from(["flash", "math"]),
        "qk_norm": st.booleans(),
        "logit_softcap": st.sampled_from([0.0, 5.0]),
        "loss": st.sampled_from(["full", "chunked"]),
    }
)


def build(seed: int = 0, **changes: Any) -> GPT:
    torch.manual_seed(seed)
    model = GPT(make_run({**TINY, **changes}))
    # Away from the initial symmetries, so that norms, biases and heads all matter.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def batch(run: RunConfig, n: int = 3, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(run.vocab_size, (n, run.block_size + 1), generator=g)
    return ids[:, :-1], ids[:, 1:]


def reference_loss(
    run: RunConfig, p: dict[str, torch.Tensor], idx: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """The same GPT in float64, one head and one position at a time where that is what the definition says."""
    p = {name: value.double() for name, value in p.items()}

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        if run.norm == "layernorm":
            x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5) ** 0.5
        else:
            x = x / ((x * x).mean(-1, keepdim=True) + 1e-5) ** 0.5
        return x * p[f"{name}.weight"] + p.get(f"{name}.bias", 0.0)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return torch.einsum("bti,oi->bto", x, p[f"{name}.weight"]) + p.get(f"{name}.bias", 0.0)

    def turn(x: torch.Tensor) -> torch.Tensor:  # [B, T, D] as complex numbers of modulus 1
        if run.position == "learned":
            return x
        half = x.shape[-1] // 2
        angle = torch.arange(x.shape[1]).double()[:, None] * run.rope_theta ** (-torch.arange(half).double() / half)
        z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((z.real, z.imag), -1)

    def unit(x: torch.Tensor) -> torch.Tensor:
        return x / ((x * x).mean(-1, keepdim=True) + 1e-5) ** 0.5 if run.qk_norm else x

    def attention(x: torch.Tensor, name: str) -> torch.Tensor:
        d, heads, kv = run.head_size, run.n_head, run.n_kv_head
        qkv, out = linear(x, f"{name}.c_attn"), []
        for h in range(heads):
            j = h // (heads // kv)
            q = turn(unit(qkv[..., h * d : (h + 1) * d]))
            k = turn(unit(qkv[..., (heads + j) * d : (heads + j + 1) * d]))
            v = qkv[..., (heads + kv + j) * d : (heads + kv + j + 1) * d]
            rows = [
                torch.softmax(q[:, t : t + 1] @ k[:, : t + 1].mT / math.sqrt(d), -1) @ v[:, : t + 1]
                for t in range(q.shape[1])
            ]
            out.append(torch.cat(rows, 1))
        return linear(torch.cat(out, -1), f"{name}.c_proj")

    def mlp(x: torch.Tensor, name: str) -> torch.Tensor:
        up = linear(x, f"{name}.c_fc")
        if run.mlp == "gelu":
            up = up * 0.5 * (1 + torch.erf(up / math.sqrt(2)))
        elif run.mlp == "relu2":
            up = up.clamp(min=0) ** 2
        else:
            gate = linear(x, f"{name}.c_gate")
            up = gate * torch.sigmoid(gate) * up
        return linear(up, f"{name}.c_proj")

    x = p["transformer.wte.weight"][idx]
    if run.position == "learned":
        x = x + p["transformer.wpe.weight"][: idx.shape[1]]
    for i in range(run.n_layer):
        x = x + attention(norm(x, f"transformer.h.{i}.ln_1"), f"transformer.h.{i}.attn")
        x = x + mlp(norm(x, f"transformer.h.{i}.ln_2"), f"transformer.h.{i}.mlp")
    logits = norm(x, "transformer.ln_f") @ p["lm_head.weight"].T
    if run.logit_softcap:
        logits = run.logit_softcap * torch.tanh(logits / run.logit_softcap)
    log_p = logits - torch.logsumexp(logits, -1, keepdim=True)
    return -log_p.gather(-1, targets[..., None]).mean()


@given(choices=CHOICES)
@settings(max_examples=40, deadline=None)
def test_loss_and_gradients_are_those_of_the_definition(choices):
    model = build(**choices)
    idx, targets = batch(model.run)
    loss = model(idx, targets)
    loss.backward()
    leaves = {name: value.detach().double().requires_grad_() for name, value in model.named_parameters()}
    full = (
        {**leaves, "lm_head.weight": leaves.get("lm_head.weight", leaves["transformer.wte.weight"])}
        if model.run.tie_embeddings
        else leaves
    )
    expected = reference_loss(model.run, full, idx, targets)
    expected.backward()
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert loss.item() == pytest.approx(expected.item(), rel=2e-6)
    for name, parameter in model.named_parameters():
        grad, want = parameter.grad, leaves[name].grad
        assert grad is not None and want is not None
        assert (grad.double() - want).norm() <= 2e-5 * want.norm() + 1e-9, name


@given(choices=CHOICES, data=st.data())
@settings(max_examples=20, deadline=None)
def test_a_position_sees_itself_and_the_past_alone(choices, data):
    model = build(**choices)
    t = data.draw(st.integers(0, model.run.block_size - 1))
    seen: list[torch.Tensor] = []

    def keep(_module: object, _inputs: object, out: torch.Tensor) -> None:
        out.retain_grad()
        seen.append(out)

    model.transformer["wte"].register_forward_hook(keep)
    model.hidden(batch(model.run, 1)[0])[0, t].pow(2).sum().backward()
    reach = seen[0].grad[0].abs().sum(-1)
    assert (reach[: t + 1] > 0).all() and (reach[t + 1 :] == 0).all()


@pytest.mark.parametrize(("param_dtype", "loss"), list(product(["float32", "bfloat16"], ["full", "chunked"])))
def test_half_precision_stays_near_float32(param_dtype, loss):
    model = build(dtype="bfloat16", param_dtype=param_dtype, loss=loss, n_kv_head=2, norm="rmsnorm", mlp="swiglu")
    exact = build(n_kv_head=2, norm="rmsnorm", mlp="swiglu")
    idx, targets = batch(model.run)
    got, want = model(idx, targets), exact(idx, targets)
    got.backward(), want.backward()
    assert got.dtype == torch.float32 and got.item() == pytest.approx(want.item(), rel=0.02)
    for (name, parameter), other in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert parameter.grad is not None and other.grad is not None and parameter.grad.dtype == parameter.dtype
        assert (parameter.grad.float() - other.grad).norm() < 0.1 * other.grad.norm(), name


@pytest.mark.parametrize("changes", [
    {"activation_checkpointing": "block"},
    {"activation_checkpointing": "block", "checkpoint_every": 2},
    {"activation_checkpointing": "attention"},
    {"activation_offload": True},
    {"activation_offload": True, "activation_checkpointing": "attention", "position": "rope", "norm": "rmsnorm"},
    {"recompute_cheap": True, "bias": True},
    {"recompute_cheap": True, "norm": "rmsnorm", "mlp": "relu2", "activation_offload": True},
    {"recompute_cheap": True, "mlp": "swiglu", "bias": True, "activation_checkpointing": "block"},
    {"recompute_cheap": True, "mlp": "swiglu", "norm": "rmsnorm", "activation_checkpointing": "attention"},
    {"recompute_cheap": True, "dtype": "bfloat16", "bias": True},
])  # fmt: skip
def test_keeping_less_changes_no_number(changes, monkeypatch):
    monkeypatch.setattr("gptfit.offload.OFFLOAD_MIN_BYTES", 0)
    shared = {key: changes[key] for key in ("position", "norm", "mlp", "bias", "dtype") if key in changes}
    plain, saved = (build(dropout=0.1, compile=False, **keys) for keys in (shared, changes))
    idx, targets = batch(plain.run)
    for model in (plain, saved):
        torch.manual_seed(3)
        model(idx, targets).backward()
    for a, b in zip(plain.parameters(), saved.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("changes", [
    {"loss": "chunked", "dropout": 0.1},
    {"loss": "full", "norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "qk_norm": True, "n_kv_head": 2},
    {"loss": "chunked", "norm": "rmsnorm", "activation_checkpointing": "block", "attention": "math"},
])  # fmt: skip
# Dynamo itself makes an instance of autograd.Function while it traces one.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiling_breaks_no_graph_and_changes_no_number(changes):
    plain, compiled = build(**changes), build(**changes)
    compile_model(compiled, backend="aot_eager", fullgraph=True)
    idx, targets = batch(plain.run)
    for model in (plain, compiled):
        torch.manual_seed(3)
        model(idx, targets).backward()
    for (name, a), b in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    compiled.eval()
    assert compiled.logits(idx).shape == (3, plain.run.vocab_size)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # of what inductor imports
@pytest.mark.parametrize("loss", ["chunked", "full"])
def test_a_memory_budget_keeps_less_and_changes_no_number(loss):
    """Under torch.compile's own front end and partitioner."""
    kept, grads = [], []
    for budget in (1.0, 0.9):
        torch._dynamo.reset()
        model = build(loss=loss, activation_memory_budget=budget, block_size=64)
        compile_model(model, backend="aot_eager_decomp_partition", fullgraph=True)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        sizes: dict[int, int] = {}

        def pack(tensor, own=own, sizes=sizes):
            if tensor.untyped_storage().data_ptr() not in own:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = model(*batch(model.run, n=16))
        result.backward()
        kept.append(sum(sizes.values()))
        grads.append([p.grad for p in model.parameters()])
    assert kept[1] < 0.8 * kept[0]
    for usual, lean in zip(*grads, strict=True):
        torch.testing.assert_close(lean, usual, rtol=1e-4, atol=1e-6)


def test_parameters_are_named_and_shaped_as_nanogpt_names_them():
    model = GPT(make_run({**TINY, "bias": True}))
    c, v, t = 32, 61, 16
    block = {
        "ln_1.weight": (c,), "ln_1.bias": (c,), "attn.c_attn.weight": (3 * c, c), "attn.c_attn.bias": (3 * c,),
        "attn.c_proj.weight": (c, c), "attn.c_proj.bias": (c,), "ln_2.weight": (c,), "ln_2.bias": (c,),
        "mlp.c_fc.weight": (4 * c, c), "mlp.c_fc.bias": (4 * c,),
        "mlp.c_proj.weight": (c, 4 * c), "mlp.c_proj.bias": (c,),
    }  # fmt: skip
    expected = {f"transformer.h.{i}.{name}": shape for i in range(2) for name, shape in block.items()}
    expected |= {"transformer.wte.weight": (v, c), "transformer.wpe.weight": (t, c), "lm_head.weight": (v, c)}
    expected |= {"transformer.ln_f.weight": (c,), "transformer.ln_f.bias": (c,)}
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == expected
    assert model.lm_head.weight is model.transformer["wte"].weight


def test_a_new_model_knows_nothing():
    run = make_run(TINY)
    torch.manual_seed(0)
    assert GPT(run)(*batch(run, 32)).item() == pytest.approx(math.log(run.vocab_size), abs=0.05)


def test_logits_are_those_of_the_last_position():
    model = build(logit_softcap=5.0)
    idx, _ = batch(model.run)
    logits = model.logits(idx[:, :9])
    assert logits.shape == (3, model.run.vocab_size) and logits.dtype == torch.float32 and not logits.requires_grad
    loss = F.cross_entropy(logits, idx[:, 9])
    targets = torch.full((3, 9), -1)
    targets[:, -1] = idx[:, 9]
    assert model(idx[:, :9], targets).item() == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("weighted", [True, False])
def test_rms_norm_is_torchs(weighted):
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(2, 5, 8, generator=g).requires_grad_(), torch.randn(8, generator=g).requires_grad_()
    upstream = torch.randn(2, 5, 8, generator=g)
    results: list[list[torch.Tensor]] = []
    ways: list[Callable[[torch.Tensor | None], torch.Tensor]] = [
        lambda weight: rms_norm(x, weight, torch.float32),
        lambda weight: F.rms_norm(x, (8,), weight, 1e-5),
    ]
    for way in ways:
        y = way(w if weighted else None)
        results.append([y, *torch.autograd.grad(y, (x, w) if weighted else (x,), upstream)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_rope_scores_depend_on_distance_alone():
    model = build(position="rope")
    assert model.cos_TD is not None and model.sin_TD is not None
    q, k = torch.randn(8), torch.randn(8)
    scores = rotate(q.expand(1, 1, 16, 8), model.cos_TD, model.sin_TD)[0, 0] @ rotate(
        k.expand(1, 1, 16, 8), model.cos_TD, model.sin_TD
    )[0, 0].mT  # fmt: skip
    for distance in range(-15, 16):
        along = scores.diagonal(distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), rtol=1e-4, atol=1e-4)
