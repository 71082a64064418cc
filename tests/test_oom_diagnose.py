"""From a paste to the tensor, the cause and what helps: labelled pastes, and the case that everyone meets."""

import shlex

import pytest

from fuzz_oom import shown
from gptfit.asked import Asked
from gptfit.config import derive
from gptfit.estimate import estimate
from gptfit.oom.diagnose import Diagnosis, diagnose
from gptfit.oom.failed_run import failed_run
from gptfit.oom.read import read_paste
from gptfit.oom.remedies import Remedy
from gptfit.units import format_bytes
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
which 702.00 MiB is free. Including non-PyTorch memory, this process has 8.85 GiB memory in use. Of the allocated \
memory 8.24 GiB is allocated by PyTorch, and 386.00 MiB is reserved by PyTorch but unallocated.
"""
GiB = 1 << 30
WIDE = 16 * 1024 * 50304 * 2  # one tensor of batch × block × vocabulary in bf16


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
    assert "not the logits before the loss" in answer.summary
    changes = {remedy.change: remedy for remedy in answer.remedies}
    zeros = changes["return logits.detach(), loss"]
    assert zeros.saves_bytes == WIDE  # the unused output's gradient, bf16
    assert zeros.enough
    folk = {advice.change: advice.why for advice in answer.not_remedies}
    assert folk["dtype=float16 instead of bfloat16"].endswith("it saves nothing")
    run = failed_run(read_paste(CLASSIC)).run  # pyright: ignore[reportOptionalMemberAccess]
    eager, compiled = (estimate(derive(run, compile=one), "nanogpt").reserved_bytes for one in (False, True))
    costs = f"the whole run costs {format_bytes(eager - compiled)} more"
    assert folk["compile=False"].endswith(costs)
    unplaced = explained(CLASSIC[: CLASSIC.index("Traceback")] + CLASSIC[CLASSIC.index("torch.Out") :], "compile=True")
    assert unplaced.facts.phase == "unknown"
    assert [advice.why for advice in unplaced.not_remedies if advice.change == "compile=False"] == [
        folk["compile=False"]
    ]
    assert folk["fewer gradient_accumulation_steps"].endswith("it saves nothing")


def test_what_was_alive_adds_up_to_what_is_printed() -> None:
    """Inductor's own plan of this step holds 9,998 MiB at its peak: with the gradient of the logits, without cuBLAS's
    two workspaces of 8.125 MiB."""
    instant = explained(CLASSIC).instant
    assert instant is not None
    rows = {row.name: row.n_bytes for row in instant.rows}
    assert rows["logits"] == rows["zeros for the returned, unused logits"] == WIDE
    assert sum(rows.values()) == instant.alive_bytes
    plan_bytes = (9998 << 20) - WIDE + 2 * 8_519_680
    assert instant.alive_bytes == pytest.approx(plan_bytes, rel=0.003)
    assert instant.adds_up
    n_params = 50304 * 576 + 1024 * 576 + 12 * (12 * 576 * 576 + 2 * 576) + 576
    assert rows["parameters"] == rows["gradients"] == pytest.approx(4 * n_params, rel=1e-4)
    assert rows["optimizer state"] == pytest.approx(8 * n_params, rel=1e-3)
    record = explained(CLASSIC).to_json()
    alive = record["alive"]
    assert isinstance(alive, list)
    assert sum(row["bytes"] for row in alive) == record["alive_bytes"] == instant.alive_bytes


def test_memory_that_the_run_does_not_explain_is_said_and_taken_off_the_room() -> None:
    text = CLASSIC.replace("8.24 GiB is", "9.44 GiB is")
    answer = explained(text)
    assert answer.instant is not None
    assert (answer.instant.adds_up, "another 1.20 GiB" in answer.instant.sentence()) == (False, True)
    assert "9.44 GiB printed" in answer.instant.sentence()


def fitting_bytes(text: str) -> int:
    """What the allocator held and what was free."""
    facts = read_paste(text)
    return (facts.allocated_bytes or 0) + (facts.reserved_unallocated_bytes or 0) + (facts.free_bytes or 0)


def test_the_micro_batch_is_the_largest_that_an_estimate_fits() -> None:
    best = next(remedy.micro_batch for remedy in explained(CLASSIC).remedies if remedy.micro_batch)
    failed = failed_run(read_paste(CLASSIC))
    assert failed is not None
    reserved = [
        estimate(derive(failed.run, batch_size=size, loss="full"), "nanogpt").reserved_bytes
        for size in (best, best + 1)
    ]
    assert reserved[0] <= fitting_bytes(CLASSIC) < reserved[1]
    assert f"--batch_size={best} --gradient_accumulation_steps={round(640 / best)}" in {
        remedy.change for remedy in explained(CLASSIC).remedies
    }


PAIRS = CLASSIC
for old, new in (
    *(("of 11.58 GiB", "of 5.30 GiB"), ("702.00 MiB is free", "10.00 MiB is free"), ("1.54 GiB", "788.00 MiB")),
    *(("8.24 GiB is allocated", "4.60 GiB is allocated"), ("8.85 GiB", "5.20 GiB"), ("386.00 MiB", "10.00 MiB")),
    *(("batch_size = 16", "batch_size = 1"), ("16, 1024, 50304", "1, 8192, 50304"), ("n_layer = 12", "n_layer = 24")),
):
    PAIRS = PAIRS.replace(old, new)


def test_where_no_change_is_enough_pairs_are() -> None:
    answer = explained(PAIRS, "block_size=8192")
    enough = [remedy for remedy in answer.remedies if remedy.enough]
    alone = [remedy for remedy in answer.remedies if " and " not in remedy.change]
    assert enough and alone and all(" and " in remedy.change for remedy in enough)
    saves = [remedy.saves_bytes or 0 for remedy in enough]
    assert saves == sorted(saves, reverse=True)
    assert min(saves) > max(remedy.saves_bytes or 0 for remedy in alone if remedy.change in enough[0].change)


def test_savings_are_those_of_estimating_again() -> None:
    answer = explained(CLASSIC)
    facts = read_paste(CLASSIC)
    failed = failed_run(facts)
    assert failed is not None
    before = estimate(failed.run, "nanogpt")
    after = estimate(derive(failed.run, loss="chunked"), "gptfit")
    ours = next(remedy for remedy in answer.remedies if remedy.change.startswith("gptfit train"))
    assert ours.saves_bytes == before.live_bytes - after.live_bytes
    assert ours.enough is (after.reserved_bytes <= fitting_bytes(CLASSIC))


def test_a_model_that_nobody_told_is_not_held_against_the_figures() -> None:
    text = CLASSIC.replace("Overriding: n_embd = 576\n", "").replace("8.24 GiB is", "40.00 GiB is")
    answer = explained(text)
    assert "from step to step" not in answer.cause
    assert all(
        remedy.enough is None
        for remedy in answer.remedies
        if not remedy.change.startswith(("nvidia-smi", "CUDA - Sys"))
    )
    assert any("taken from GPT-2" in warning for warning in answer.warnings)


def test_another_process_and_fragmentation_are_told_apart() -> None:
    other = CLASSIC.replace("Including non", "Process 7 has 3.00 GiB memory in use. Including non")
    assert "other processes hold 3.00 GiB" in explained(other).cause
    assert "fragmentation" in explained(CLASSIC.replace("386.00 MiB is", "2.50 GiB is")).cause


@pytest.mark.parametrize("name", [name for name, label in LABELS.items() if label["kind"] != "cuda_caching_allocator"])
def test_other_kinds_get_a_cause_and_no_tensor_of_the_card(name: str) -> None:
    answer = explained(paste(name))
    assert answer.cause
    if LABELS[name]["kind"] not in ("mps", "xpu", "hip"):
        assert answer.tensor is None
    if LABELS[name]["kind"] != "not_oom":
        assert answer.remedies or answer.not_remedies


@pytest.mark.parametrize("name", sorted(LABELS))
def test_an_answer_fits_eighty_columns(name: str) -> None:
    lines = shown(explained(paste(name))).splitlines()
    assert [line for line in lines if len(line) > 80] == []


def test_pairs_of_changes_fit_eighty_columns() -> None:
    answer = explained(PAIRS, "block_size=8192")
    assert any(len(remedy.change) > 80 for remedy in answer.remedies)
    assert max(map(len, shown(answer).splitlines())) <= 80


def change_of(text: str, begins: str, *overrides: str) -> Remedy:
    return next(remedy for remedy in explained(text, *overrides).remedies if remedy.change.startswith(begins))


def test_memory_that_nobody_accounts_for_is_named() -> None:
    """11.58 GiB less 702 MiB free and 8.85 GiB of this process: a desktop's."""
    hidden = change_of(CLASSIC, "nvidia-smi")
    assert hidden.saves_bytes == pytest.approx(11.58 * GiB - (702 << 20) - 8.85 * GiB, abs=2)
    assert hidden.enough


@pytest.mark.parametrize(
    ("text", "change"),
    [
        (CLASSIC.replace("386.00 MiB is", "2.50 GiB is"), "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"),
        (CLASSIC.replace("386.00 MiB is", "2.50 GiB is") + " try setting PYTORCH_ALLOC_CONF=x", "PYTORCH_ALLOC_CONF="),
        (
            "RuntimeError: CUDA out of memory. Tried to allocate 1.54 GiB (GPU 0; 11.58 GiB total capacity; 6.24 GiB "
            "already allocated; 0.50 GiB free; 9.24 GiB reserved in total by PyTorch)",
            "PYTORCH_CUDA_ALLOC_CONF=max_split_size_mb:512",
        ),
    ],
)
def test_fragmentation_is_answered_as_that_torch_spells_it(text: str, change: str) -> None:
    assert change_of(text, change).saves_bytes in (5 * GiB // 2, 3 * GiB)


def test_a_checkpoint_on_the_card_costs_what_it_has() -> None:
    frames = """  File "/home/me/nanoGPT/train.py", line 170, in <module>
    checkpoint = torch.load(ckpt_path, map_location=device)
  File "/usr/lib/python3.12/site-packages/torch/serialization.py", line 1500, in load
    return _load(
"""
    message = CLASSIC[CLASSIC.index("torch.OutOf") :]
    text = f"Overriding: batch_size = 16\nTraceback (most recent call last):\n{frames}{message}"
    saves = change_of(text, "torch.load(path, map_location='cpu')", "n_layer=12", "n_embd=768", "block_size=1024")
    n_params = 50304 * 768 + 1024 * 768 + 12 * (12 * 768 * 768 + 2 * 768) + 768
    assert saves.saves_bytes == pytest.approx(3 * 4 * n_params, rel=1e-3)  # and AdamW's two moments, in fp32


def test_a_foreach_optimizer_is_answered_by_the_fused_one() -> None:
    frames = """  File "/home/me/nanoGPT/train.py", line 314, in <module>
    scaler.step(optimizer)
  File "/usr/lib/python3.12/site-packages/torch/optim/adamw.py", line 600, in _multi_tensor_adamw
    exp_avg_sq_sqrt = torch._foreach_sqrt(device_exp_avg_sqs)
"""
    message = "CUDA out of memory. Tried to allocate 148.00 MiB. GPU 0 has a total capacity of 2.40 GiB of which "
    text = f"Traceback (most recent call last):\n{frames}torch.OutOfMemoryError: {message}60.00 MiB is free."
    fused = change_of(text, "torch.optim.AdamW(..., fused=True)", "n_layer=12", "n_embd=768", "batch_size=2")
    n_matrices = 50304 * 768 + 1024 * 768 + 12 * 12 * 768 * 768
    assert fused.saves_bytes == pytest.approx(4 * n_matrices, rel=1e-3)  # a list as large as the parameters


EVALUATION = """Traceback (most recent call last):
  File "/home/me/gptfit/train.py", line 301, in train
    losses = evaluate(model)
  File "/home/me/gptfit/train.py", line 90, in evaluate
    logits = self.lm_head(x)
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 4.00 GiB. GPU 0 has a total capacity of 5.00 GiB of \
which 1.50 GiB is free. Including non-PyTorch memory, this process has 3.50 GiB memory in use. Of the allocated \
memory 3.00 GiB is allocated by PyTorch, and 100.00 MiB is reserved by PyTorch but unallocated.
"""


def test_an_evaluation_gets_a_batch_of_its_own() -> None:
    keys = ("n_layer=12", "n_embd=768", "batch_size=2", "block_size=1024", "eval_batch_size=64", "loss=full")
    text = "gptfit train\n" + EVALUATION
    failed = failed_run(read_paste(text), None, keys)
    assert failed is not None
    best = change_of(text, "eval_batch_size=", *keys)
    size = int(best.change.partition("=")[2])
    sizes = [estimate(derive(failed.run, eval_batch_size=n), "gptfit").reserved_bytes for n in (size, size + 1)]
    assert best.enough
    assert 1 < size < 64
    assert sizes[0] <= fitting_bytes(text) < sizes[1]


@pytest.mark.parametrize("kind", ["host_ram", "host_killed", "shm", "triton_shared_memory"])
def test_what_frees_the_card_does_not_help_elsewhere(kind: str) -> None:
    answer = explained(paste(next(name for name, label in LABELS.items() if label["kind"] == kind)))
    assert {advice.change for advice in answer.not_remedies} == {"torch.cuda.empty_cache()", "float16"}
    assert not any("batch_size" in remedy.change for remedy in answer.remedies)


def test_a_limit_of_the_process_itself_is_lifted_first() -> None:
    text = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.00 GiB. GPU 0 has a total capacity of "
    text += "16.00 GiB of which 11.00 GiB is free. 4.00 GiB allowed; Of the allocated memory 3.50 GiB is allocated by "
    text += "PyTorch, and 100.00 MiB is reserved by PyTorch but unallocated."
    assert explained(text).remedies[0].change == "torch.cuda.set_per_process_memory_fraction(1.0)"
    assert explained(text).remedies[0].saves_bytes == 12 * GiB


def test_what_to_type_next_is_a_command_of_this_log_as_it_stands() -> None:
    text = CLASSIC.replace("Overriding: n_embd = 576\n", "").replace("Overriding: n_layer = 12\n", "")
    asked = Asked("my run/train.log", ("block_size=1024",))
    lines = [line.strip() for line in shown(explained(text, *asked.overrides), asked).splitlines()]
    note, command = lines[lines.index("Next") + 1 :]
    assert note.startswith("# ")
    assert shlex.split(command) == [
        "gptfit",
        "explain-oom",
        "my run/train.log",
        *asked.overrides,
        "n_layer=12",
        "n_embd=768",
    ]


@pytest.mark.parametrize("batch_size", [8, 32])
def test_a_size_that_contradicts_a_printed_shape_is_said_and_not_used(batch_size: int) -> None:
    text = CLASSIC.replace("Overriding: batch_size = 16\n", "").replace("tokens per iteration will be: 524,288\n", "")
    answer = explained(text, f"batch_size={batch_size}")
    assert any(f"the text says batch_size 16, you said {batch_size}" in warning for warning in answer.warnings)
    assert "from step to step" not in answer.cause
    assert answer.instant is not None and answer.instant.adds_up
    assert not any("you said" in warning for warning in explained(text, "batch_size=16").warnings)


STEP_0 = "step 0: train loss 10.9351, val loss 10.9342\n"
ITER_0 = "iter 0: loss 10.9361, time 9120.11ms, mfu -100.00%\n"


def alive(text: str) -> set[str]:
    instant = explained(text).instant
    assert instant is not None, explained(text).warnings
    return {row.name for row in instant.rows}


def test_before_the_first_optimizer_step_there_is_no_optimizer_state() -> None:
    """nanoGPT's train.py prints `step 0` after its first evaluation, and `iter 0` after its first step."""
    header, traceback = CLASSIC[: CLASSIC.index("Traceback")], CLASSIC[CLASSIC.index("Traceback") :]
    first = traceback.replace("8.24 GiB is", "7.67 GiB is")
    assert "optimizer state" not in alive(header + STEP_0 + first)
    assert "optimizer state" not in alive(header + STEP_0 + traceback), "whatever the figures would rather have"
    assert "optimizer state" in alive(header + STEP_0 + ITER_0 + traceback)


def test_an_evaluation_before_the_first_step_has_parameters_alone() -> None:
    frames = """Traceback (most recent call last):
  File "/home/me/nanoGPT/train.py", line 264, in <module>
    losses = estimate_loss()
  File "/home/me/nanoGPT/model.py", line 187, in forward
    loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)
"""
    text = (
        frames
        + "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.30 GiB. GPU 0 has a total capacity of "
    )
    begun = "tokens per iteration will be: 491,520\nnumber of parameters: 123.59M\n"
    start = begun + text + "3.80 GiB of which 1.65 GiB is free."
    assert not {"optimizer state", "gradients", "activations kept for backward"} & alive(start)
    assert not any(remedy.change == "return None, loss" for remedy in explained(start).remedies)
    later = begun + STEP_0 + ITER_0 + text + "6.80 GiB of which 1.65 GiB is free."
    assert "optimizer state" in alive(later) and "activations kept for backward" not in alive(later)


def test_that_no_process_is_named_does_not_say_that_there_is_none() -> None:
    """Beside the 2.04 GiB that the same answer says are neither free nor this process's."""
    lines = shown(explained(CLASSIC)).splitlines()
    assert next(line.split() for line in lines if "other processes" in line) == ["other", "processes", "named:", "none"]
