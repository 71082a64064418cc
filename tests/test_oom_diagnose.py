"""From a paste to the tensor, the cause and what helps: labelled pastes, and the case that everyone meets."""

import pytest

from gptfit.config import derive
from gptfit.estimate import estimate
from gptfit.oom.diagnose import Diagnosis, diagnose
from gptfit.oom.failed_run import failed_run
from gptfit.oom.read import read_paste
from oom_pastes import DATA, LABELS

NAMED = [name for name, label in LABELS.items() if label.get("tensor")]

CLASSIC = """Overriding: batch_size = 16
Overriding: n_embd = 576
Overriding: n_layer = 12
tokens per iteration will be: 524,288
Traceback (most recent call last):
  File "/home/me/nanoGPT/train.py", line 301, in <module>
    scaler.scale(loss).backward()
  File "/tmp/torchinductor_me/ab/cab.py", line 1040, in call
    buf1 = empty_strided_cuda((16, 1024, 50304), (51511296, 50304, 1), torch.bfloat16)
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.54 GiB. GPU 0 has a total capacity of 11.58 GiB of \
which 414.00 MiB is free. Including non-PyTorch memory, this process has 9.85 GiB memory in use. Of the allocated \
memory 9.34 GiB is allocated by PyTorch, and 86.00 MiB is reserved by PyTorch but unallocated.
"""


def explained(text: str, *overrides: str) -> Diagnosis:
    facts = read_paste(text)
    return diagnose(facts, failed_run(facts, None, overrides))


def paste(name: str) -> str:
    return (DATA / f"{name}.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMED)
def test_the_tensor_with_the_config_told(name: str) -> None:
    label = LABELS[name]
    found = explained(paste(name), *(f"{key}={value}" for key, value in label["config"].items())).tensor
    assert found is not None
    assert found.name == label["tensor"]
    if found.confidence == "exact":
        assert list(found.shape) == label["shape"]


def test_the_tensor_from_the_text_alone() -> None:
    wrong = []
    for name in NAMED:
        found = explained(paste(name)).tensor
        if found is None or found.name != LABELS[name]["tensor"]:
            wrong.append(name)
        elif found.confidence == "exact":
            assert list(found.shape) == LABELS[name]["shape"], "what is stated as sure has to be right"
    assert len(wrong) <= len(NAMED) // 20, wrong


def test_the_classic_case() -> None:
    answer = explained(CLASSIC)
    assert answer.tensor is not None
    assert (answer.tensor.name, answer.tensor.shape) == ("logits gradient", (16, 1024, 50304))
    assert answer.tensor.confidence == "exact"
    changes = {remedy.change: remedy for remedy in answer.remedies}
    zeros = changes["return logits.detach(), loss"]
    assert zeros.saves_bytes == 16 * 1024 * 50304 * 2  # the unused output's gradient, bf16
    assert zeros.enough
    folk = {advice.change: advice.why for advice in answer.not_remedies}
    assert folk["dtype=float16 instead of bfloat16"] == "saves nothing"
    assert folk["compile=False"].startswith("costs")


def test_savings_are_those_of_estimating_again() -> None:
    answer = explained(CLASSIC)
    facts = read_paste(CLASSIC)
    failed = failed_run(facts)
    assert failed is not None
    before = estimate(failed.run, "nanogpt")
    after = estimate(derive(failed.run, loss="chunked"), "gptfit")
    ours = next(remedy for remedy in answer.remedies if remedy.change.startswith("gptfit train"))
    assert ours.saves_bytes == before.allocated_bytes - after.allocated_bytes


def test_a_model_that_nobody_told_is_not_held_against_the_figures() -> None:
    text = CLASSIC.replace("Overriding: n_embd = 576\n", "").replace("9.34 GiB is", "40.00 GiB is")
    answer = explained(text)
    assert "from step to step" not in answer.cause
    assert all(remedy.enough is None for remedy in answer.remedies if remedy.saves_bytes)
    assert any("taken from GPT-2" in warning for warning in answer.warnings)


def test_another_process_and_fragmentation_are_told_apart() -> None:
    other = CLASSIC.replace("Including non", "Process 7 has 3.00 GiB memory in use. Including non")
    assert "other processes hold 3.00 GiB" in explained(other).cause
    assert "fragmentation" in explained(CLASSIC.replace("86.00 MiB is", "2.50 GiB is")).cause


@pytest.mark.parametrize("name", [name for name, label in LABELS.items() if label["kind"] != "cuda_caching_allocator"])
def test_other_kinds_get_a_cause_and_no_tensor_of_the_card(name: str) -> None:
    answer = explained(paste(name))
    assert answer.cause
    if LABELS[name]["kind"] not in ("mps", "xpu", "hip"):
        assert answer.tensor is None
    if LABELS[name]["kind"] != "not_oom":
        assert answer.remedies or answer.not_remedies
