"""The chunked loss against F.cross_entropy on logits that exist."""

import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import aot_function
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode

from gptfit.inductor_plan import lower
from gptfit.loss import chunked_cross_entropy, eager_chunk, fused_chunk


def case(n: int, v: int, c: int, dtype: torch.dtype = torch.float32, seed: int = 0, ignored: float = 0.2):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, c, generator=g).to(dtype).requires_grad_()
    w = (torch.randn(v, c, generator=g) * 0.3).requires_grad_()
    targets = torch.randint(v, (n,), generator=g)
    targets[torch.rand(n, generator=g) < ignored] = -1
    return x, w, targets


def plain(x: torch.Tensor, w: torch.Tensor, targets: torch.Tensor, softcap: float = 0.0) -> torch.Tensor:
    """In float64, so that what differs is the chunked loss's own error."""
    logits = x.double() @ w.double().T
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, ignore_index=-1)


inductor = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what it imports
both_forms = pytest.mark.parametrize("chunk_form", [eager_chunk, fused_chunk])


def relative(got: torch.Tensor | None, expected: torch.Tensor | None) -> float:
    assert got is not None and expected is not None and got.shape == expected.shape
    return float((got.double() - expected.double()).norm() / expected.double().norm())


@given(
    n=st.integers(1, 40), v=st.integers(2, 50), c=st.integers(1, 12), chunk=st.integers(1, 64), seed=st.integers(0, 99),
    softcap=st.sampled_from([0.0, 5.0]), scale=st.sampled_from([1.0, 0.25, 65536.0]),
    form=st.sampled_from([eager_chunk, fused_chunk]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_loss_and_gradients_are_the_plain_ones(n, v, c, chunk, seed, softcap, scale, form):
    x, w, targets = case(n, v, c, seed=seed)
    targets[0] = v - 1
    expected = plain(x, w, targets, softcap)
    grads = torch.autograd.grad(expected * scale, (x, w))
    loss = chunked_cross_entropy(x, w, targets, chunk, softcap=softcap, chunk=form)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    for got, want in zip(torch.autograd.grad(loss * scale, (x, w)), grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6 * scale)


@both_forms
@pytest.mark.parametrize(("n", "v"), [(64, 501), (257, 1003)])
def test_bfloat16_loss_is_not_rounded_to_bfloat16(n, v, chunk_form):
    x, w, targets = case(n, v, 32, torch.bfloat16)
    loss = chunked_cross_entropy(x, w, targets, 50, torch.bfloat16, chunk=chunk_form)
    loss.backward()
    x2, w2 = x.detach().requires_grad_(), w.detach().requires_grad_()
    expected = plain(x2, w2, targets)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)  # bf16 logits, each within 2^-9
    assert w.grad is not None and w.grad.dtype == torch.float32
    assert relative(x.grad, x2.grad) < 0.006 and relative(w.grad, w2.grad) < 0.006


def test_float16_gradients_survive_the_mean_over_many_tokens():
    # (p - onehot) / n is under float16's smallest number here; with a GradScaler's scale it is not.
    x, w, targets = case(512, 4000, 16, torch.float16)
    (chunked_cross_entropy(x, w, targets, 100, torch.float16) * 65536.0).backward()
    x2, w2 = x.detach().requires_grad_(), w.detach().requires_grad_()
    (plain(x2, w2, targets) * 65536.0).backward()
    assert relative(x.grad, x2.grad) < 0.002 and relative(w.grad, w2.grad) < 0.002


@both_forms
def test_a_confident_target_keeps_its_gradient_in_bfloat16(chunk_form):
    # p is 1 - 5e-5: rounded to bf16 first, p - 1 would be 0.
    x = torch.tensor([[10.0]]).bfloat16().requires_grad_()
    w = torch.tensor([[1.0], [0.0]]).requires_grad_()
    chunked_cross_entropy(x, w, torch.tensor([0]), 4, torch.bfloat16, chunk=chunk_form).backward()
    assert x.grad is not None and x.grad.item() == pytest.approx(-4.54e-5, rel=0.01)


def test_tied_weights_get_the_sum_of_both_gradients():
    x, w, targets = case(30, 40, 8)
    ids = torch.arange(30)
    chunked_cross_entropy(F.embedding(ids, w) + x, w, targets, 7).backward()
    got, w.grad = w.grad, None
    plain(F.embedding(ids, w) + x, w, targets).backward()
    assert relative(got, w.grad) < 1e-5


def test_all_ignored_adds_nothing():
    x, w, _ = case(10, 20, 4)
    loss = chunked_cross_entropy(x, w, torch.full((10,), -1), 4)
    loss.backward()
    assert loss.item() == 0.0 and x.grad is not None and w.grad is not None
    assert not x.grad.any() and not w.grad.any()


@both_forms
def test_evaluation_equals_training_and_makes_no_graph(chunk_form):
    x, w, targets = case(33, 20, 4)
    with torch.no_grad():
        quiet = chunked_cross_entropy(x, w, targets, 8, chunk=chunk_form)
    assert not quiet.requires_grad
    assert quiet.item() == chunked_cross_entropy(x, w, targets, 8, chunk=chunk_form).item()


def test_a_second_backward_is_refused():
    x, w, targets = case(8, 9, 4)
    loss = chunked_cross_entropy(x, w, targets, 8)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("with_grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_is_larger_than_a_chunk_of_logits(dtype, with_grad):
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    x, w, targets = case(512, 300, 4, dtype)
    with Sizes(), torch.set_grad_enabled(with_grad):
        loss = chunked_cross_entropy(x, w, targets, 64, dtype)
        if with_grad:
            loss.backward()
    assert largest == 64 * 300 * 4


def inductor_source(softcap: float, dtype: torch.dtype, with_grad: bool) -> str:
    """The function that inductor writes for a chunk of 256 rows and 3,000 columns."""
    sources = []

    def compiler(graph, inputs):
        sources.append(lower(graph, inputs, backward=False, inference=True))
        return graph

    with FakeTensorMode(), torch.no_grad():
        columns = torch.empty(256, 1, dtype=torch.int64)
        aot_function(
            lambda logits, targets: fused_chunk(logits, targets, targets >= 0, softcap, with_grad),
            fw_compiler=compiler,
            inference_compiler=compiler,
            decompositions=select_decomp_table(),
            keep_inference_input_mutations=True,
        )(torch.empty(256, 3000, dtype=dtype), columns)
    (source,) = sources
    return source[source.index("def call(") : source.index("runner = ")]


@inductor
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_inductor_allocates_nothing_of_the_size_of_the_logits_and_writes_the_gradient_over_them(softcap, dtype):
    training, evaluation = (inductor_source(softcap, dtype, with_grad) for with_grad in (True, False))
    for source in (training, evaluation):
        assert set(re.findall(r"empty_strided_cpu\(\((\d+), (\d+)\)", source)) == {("256", "1")}
    kernel = re.findall(r"cpp_fused\w*\((.*)\)", training)
    assert [call.split(", ").count("arg0_1") for call in kernel] == [2]  # read, and written
    assert "return (buf" in training and "arg0_1" not in training.partition("return (")[2]


@inductor
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor builds its kernels with g++")
def test_the_compiled_chunk_is_the_plain_loss_and_is_compiled_once_a_shape():
    torch._dynamo.reset()
    compiled = torch.compile(fused_chunk, dynamic=False)
    counters.clear()
    for seed in range(2):
        x, w, targets = case(22, 40, 8, torch.bfloat16, seed)  # chunks of 16 and 6
        loss = chunked_cross_entropy(x, w, targets, 16, torch.bfloat16, chunk=compiled)
        loss.backward()
        x2, w2 = x.detach().requires_grad_(), w.detach().requires_grad_()
        expected = plain(x2, w2, targets)
        expected.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=2e-3)
        assert relative(x.grad, x2.grad) < 0.006 and relative(w.grad, w2.grad) < 0.006
    assert counters["stats"]["unique_graphs"] == 2
