"""Optimizers against their papers' formulas, and the learning rate against nanoGPT's function."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptfit.config import RunConfig, make_run
from gptfit.errors import GptfitError
from gptfit.model import GPT
from gptfit.optim import OPTIMIZERS, AdamW16bit, Lion, build_optimizer, learning_rate_at, set_learning_rate

TINY: dict[str, Any] = {
    "n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 31, "block_size": 8, "dtype": "float32", "bias": True,
    "learning_rate": 1e-2,
}  # fmt: skip


def stepped(run: RunConfig, optimizer: Any, model: GPT, n: int, seed: int = 0) -> list[float]:
    """`n` steps on one batch; the losses."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(run.vocab_size, (4, run.block_size + 1), generator=g)
    losses = []
    for _ in range(n):
        loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def build(name: str, **changes: Any) -> tuple[RunConfig, GPT, Any]:
    run = make_run({**TINY, "optimizer": name, **changes})
    torch.manual_seed(0)
    model = GPT(run)
    try:
        return run, model, build_optimizer(model, run)
    except GptfitError as error:
        if "needs the package" in error.message:
            pytest.skip(error.message)
        raise


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "sgd"])
def test_stepping_in_backward_is_stepping_after_it(name):
    runs = [
        build(name, grad_clip=0.0, gradient_accumulation_steps=1, compile=False, optimizer_in_backward=at_once)
        for at_once in (False, True)
    ]
    losses = [stepped(run, optimizer, model, 5) for run, model, optimizer in runs]
    assert losses[0] == losses[1]
    for after, at_once in zip(runs[0][1].parameters(), runs[1][1].parameters(), strict=True):
        assert torch.equal(after, at_once) and at_once.grad is None


@pytest.mark.parametrize("impl", ["fused", "foreach", "for-loop"])
@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_each_learns_and_each_parameter_is_in_one_group(name, impl):
    run, model, optimizer = build(name, optimizer_impl=impl)
    owned = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, owned)) == sorted(map(id, model.parameters()))
    losses = stepped(run, optimizer, model, 20)
    assert losses[-1] < losses[0] - 0.1
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_state_comes_back_from_its_dictionary(name, tmp_path):
    run, model, optimizer = build(name)
    stepped(run, optimizer, model, 3)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    expected = stepped(run, optimizer, model, 3)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    _, model2, optimizer2 = build(name)
    model2.load_state_dict(state["model"])
    optimizer2.load_state_dict(state["optimizer"])
    assert stepped(run, optimizer2, model2, 3) == expected


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_a_rate_of_zero_changes_nothing_and_vectors_never_decay(name):
    _, model, optimizer = build(name, weight_decay=0.5)
    for group in optimizer.param_groups:
        assert {p.dim() >= 2 for p in group["params"]} == {group["weight_decay"] == 0.5}
    before = [p.detach().clone() for p in model.parameters()]
    set_learning_rate(optimizer, 0.0)
    stepped(make_run({**TINY}), optimizer, model, 2)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_lion_is_its_paper():
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    lion = Lion([{"params": [p]}], lr=0.1, betas=(0.9, 0.99), weight_decay=0.5)
    x, m = [1.0, -2.0], [0.0, 0.0]
    for grad in ([0.3, 0.0], [-0.5, 2.0], [0.1, -1.0]):
        p.grad = torch.tensor(grad)
        lion.step()
        for i, g in enumerate(grad):
            c = 0.9 * m[i] + 0.1 * g
            x[i] -= 0.1 * ((c > 0) - (c < 0) + 0.5 * x[i])
            m[i] = 0.99 * m[i] + 0.01 * g
    torch.testing.assert_close(p.detach(), torch.tensor(x))


def test_16_bit_states_follow_adamw_to_their_precision():
    g = torch.Generator().manual_seed(1)
    start = torch.randn(64, 32, generator=g)
    exact, ours = (torch.nn.Parameter(start.clone()) for _ in range(2))
    settings: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1}
    optimizers = (torch.optim.AdamW([exact], **settings), AdamW16bit([{"params": [ours]}], **settings))
    for _ in range(50):
        grad = torch.randn(64, 32, generator=g)
        for parameter, optimizer in zip((exact, ours), optimizers, strict=True):
            parameter.grad = grad.clone()
            optimizer.step()
    moved = (exact - start).norm()
    assert 0 < (exact - ours).norm() < 0.01 * moved  # a state is right to 1/256
    assert {tensor.dtype for tensor in optimizers[1].state[ours].values()} == {torch.float32, torch.bfloat16}


def test_16_bit_states_refuse_a_beta2_at_which_they_would_stand_still():
    with pytest.raises(GptfitError, match=r"beta2 of at most 0\.99"):
        make_run({**TINY, "optimizer": "adamw16bit", "beta2": 0.999})


def test_muon_orthogonalises_blocks_alone():
    run, model, optimizer = build("muon", weight_decay=0.0, momentum=0.0, learning_rate=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    stepped(run, optimizer, model, 1)
    moved = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    # All singular values of a Muon step are near 0.2·lr·sqrt(larger side).
    singular = torch.linalg.svdvals(moved["transformer.h.0.mlp.c_fc.weight"]) / (0.2 * 0.1 * math.sqrt(64))
    # (The last is that of the constant input, which layer norm takes away.)
    assert singular[-2] > 0.5 and singular.max() < 1.4
    # AdamW's first step moves every coordinate by the learning rate.
    assert moved["transformer.wpe.weight"].abs().median().item() == pytest.approx(0.1, rel=1e-3)


@given(
    st.integers(0, 300), st.integers(1, 120), st.integers(0, 100), st.floats(1e-5, 1e-1), st.booleans()
)  # fmt: skip
def test_learning_rate_is_nanogpts(step, length, warmup, rate, decay):
    decay_iters = warmup + length
    run = make_run(
        {"learning_rate": rate, "warmup_iters": warmup, "lr_decay_iters": decay_iters, "decay_lr": decay}
    )  # fmt: skip
    if not decay:
        expected = rate
    elif step < warmup:
        expected = rate * (step + 1) / (warmup + 1)
    elif step > decay_iters:
        expected = rate / 10
    else:
        expected = rate / 10 + 0.5 * (1 + math.cos(math.pi * (step - warmup) / length)) * (rate - rate / 10)
    assert learning_rate_at(step, run) == pytest.approx(expected)


def test_missing_8_bit_packages_are_named(monkeypatch):
    import sys

    for package in ("torchao", "torchao.optim", "bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, package, None)
    run = make_run({**TINY, "optimizer": "adamw8bit"})
    with pytest.raises(GptfitError, match="torchao or bitsandbytes"):
        build_optimizer(GPT(run), run)
