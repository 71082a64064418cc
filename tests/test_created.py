"""What is created before the first forward: the same states and numbers, as the trace has it, chosen by replay."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gptfit import launch
from gptfit.asked import Asked
from gptfit.checkpoint import latest_valid
from gptfit.config import RunConfig, derive, make_run
from gptfit.created import CREATED, as_resumed, created_least, held_bytes
from gptfit.device import ALLOCATOR_VARIABLES
from gptfit.door import read_config
from gptfit.driver import DriverGpu
from gptfit.errors import GptfitError
from gptfit.gpus import load_gpu
from gptfit.launch import Launch
from gptfit.memory.overhead import cublas_workspace_bytes
from gptfit.memory.reserve import replay_tape, with_workspaces
from gptfit.memory.step import first_steps, pieces, setup_items
from gptfit.memory.tape import Tape
from gptfit.model import GPT
from gptfit.optim import OPTIMIZERS, build_optimizer, create_first
from gptfit.plan import Plan, plan
from gptfit.recorder import Recorder
from gptfit.trace import as_on_cuda, gptfit_job, trace_program
from gptfit.train import train

# Threads that wait for one another on a busy machine take longer than these shapes take on one.
torch.set_num_threads(1)

TINY: dict[str, Any] = {
    "n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 257, "block_size": 16, "batch_size": 2, "bias": True,
    "gradient_accumulation_steps": 2, "dtype": "float32", "compile": False, "learning_rate": 1e-2, "warmup_iters": 0,
}  # fmt: skip
IMPLS = ("fused", "foreach", "for-loop")
PLAIN = "expandable_segments=False"
OURS = sorted(set(OPTIMIZERS) - {"adamw8bit"})


def losses(run: RunConfig, n_steps: int = 3) -> tuple[list[float], GPT, Any]:
    """Those of some steps, the model and the optimizer after them."""
    torch.manual_seed(1)
    model = GPT(run)
    optimizer = build_optimizer(model, run)
    create_first(model, optimizer, run)
    ids = torch.randint(run.vocab_size, (run.batch_size, run.block_size + 1))
    found = []
    for _ in range(n_steps):
        for _ in range(run.gradient_accumulation_steps):
            loss = model(ids[:, :-1], ids[:, 1:])
            loss.backward()
            found.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return found, model, optimizer


def states_of(optimizer: Any) -> list[dict[str, Any]]:
    """The states of each parameter, in the order of the groups."""
    parts = getattr(optimizer, "parts", (optimizer,))
    return [part.state.get(p, {}) for part in parts for group in part.param_groups for p in group["params"]]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", OURS)
def test_states_are_those_of_a_first_step_before_it(name: str, impl: str) -> None:
    run = make_run({**TINY, "optimizer": name, "optimizer_impl": impl})
    first = derive(run, created_first="states")
    ours = states_of(losses(first, n_steps=0)[2])
    theirs = states_of(losses(run, n_steps=1)[2])
    assert [list(state) for state in ours] == [list(state) for state in theirs]  # names, in their order
    for ours_one, theirs_one in zip(ours, theirs, strict=True):
        for key, tensor in ours_one.items():
            other = theirs_one[key]
            assert not tensor.any() and not tensor.requires_grad
            assert (tensor.shape, tensor.dtype, tensor.stride()) == (other.shape, other.dtype, other.stride())


@pytest.mark.parametrize("name", OURS)
def test_numbers_are_the_same_bit_for_bit(name: str) -> None:
    run = make_run({**TINY, "optimizer": name})
    usual, model, optimizer = losses(run)
    other, other_model, other_optimizer = losses(derive(run, created_first="both"))
    assert usual == other
    assert all(map(torch.equal, model.parameters(), other_model.parameters()))
    for a, b in zip(states_of(optimizer), states_of(other_optimizer), strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_states_that_are_there_are_kept_and_sgd_without_momentum_has_none() -> None:
    run = make_run({**TINY, "created_first": "both"})
    _, model, optimizer = losses(run)
    before = [state["exp_avg"].clone() for state in states_of(optimizer)]
    create_first(model, optimizer, run)
    assert all(map(torch.equal, before, (state["exp_avg"] for state in states_of(optimizer))))
    plain = losses(derive(run, optimizer="sgd", momentum=0.0), n_steps=0)[2]
    assert plain.state_dict()["state"] == {}


@pytest.fixture
def words(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("train", "val"):
        rng.integers(97, 105, 3000).astype(np.uint16).tofile(tmp_path / f"{name}.bin")
    (tmp_path / "meta.json").write_text(json.dumps({"dtype": "uint16", "vocab_size": 257, "tokenizer": "byte"}))
    return tmp_path


def test_a_run_and_its_resumption_are_the_same(words: Path) -> None:
    """The trainer itself: creating first, and going on with the other order from a checkpoint, changes no weight."""
    keys = {**TINY, "dataset": str(words), "max_iters": 6, "lr_decay_iters": 6, "eval_interval": 0}
    run = make_run({**keys, "checkpoint_interval": 3})
    first = derive(run, created_first="both")
    train(run, words / "usual")
    train(first, words / "first")
    train(derive(first, max_iters=3), words / "parts")
    train(run, words / "parts", resume=True)
    usual, *others = (latest_valid(words / name) for name in ("usual", "first", "parts"))
    assert usual is not None and usual.checkpoint.step == 6
    for other in others:
        assert other is not None and other.checkpoint.step == 6
        for a, b in ((usual.checkpoint.model, other.checkpoint.model),):
            assert all(torch.equal(a[key], b[key]) for key in a)
        moments, theirs = (found.checkpoint.optimizer["state"] for found in (usual, other))
        assert all(torch.equal(moments[i]["exp_avg_sq"], theirs[i]["exp_avg_sq"]) for i in moments)


def traced(run: RunConfig, n_steps: int) -> Tape:
    """The real code from the start of a run on."""
    recorder = Recorder((run.vocab_size, run.batch_size * run.block_size * run.vocab_size))
    with as_on_cuda(recorder):
        job = gptfit_job(run, recorder)
        recorder.label_model(job.model)
        for _ in range(n_steps):
            job.step()
    return Tape(recorder.items(0, len(recorder.notes)))


@pytest.mark.parametrize("choice", CREATED)
@pytest.mark.parametrize("name", OURS)
def test_what_comes_before_the_first_forward_is_the_trace(name: str, choice: str) -> None:
    """Allocation for allocation, and free for free; counters of steps live on the host in CUDA, but for fused ones."""
    changes = {"optimizer": name, "created_first": choice, "tie_embeddings": False, "bias": False, "eval_interval": 0}
    run = make_run({**TINY, **changes})
    expected = [(sign, b.n_bytes) for sign, _, b in Tape(setup_items(run, pieces(run, "gptfit"))).expand()]
    is_fused = name in ("adamw", "muon")
    found = [(s, b.n_bytes) for s, _, b in traced(run, 0).expand() if is_fused or not b.name.endswith(" step")]
    assert found == expected


@pytest.mark.parametrize("choice", CREATED)
@pytest.mark.parametrize("changes", [{}, {"loss": "full", "optimizer": "muon"}, {"gradient_accumulation_steps": 1}])
def test_the_peak_of_the_first_step_is_the_traces(choice: str, changes: dict[str, Any]) -> None:
    run = make_run({**TINY, "n_embd": 64, "vocab_size": 3000, "created_first": choice, "eval_interval": 0, **changes})
    twin = first_steps(run, pieces(run, "gptfit"), n_steps=1).peak().live_bytes
    assert twin == pytest.approx(trace_program(run, steps=1).live_bytes, rel=1e-3)
    if choice == "states":  # they are beside all of the first forward, in which the usual first step has none
        usual = derive(run, created_first="nothing")
        assert twin > first_steps(usual, pieces(usual, "gptfit"), n_steps=1).peak().live_bytes


# A run whose allocator holds a tenth less when states are there first, after either start.
FRAGMENTED: dict[str, Any] = {
    "n_layer": 4, "n_head": 8, "n_embd": 512, "block_size": 512, "batch_size": 8, "loss": "full", "compile": False,
    "gradient_accumulation_steps": 2, "expandable_segments": False,
}  # fmt: skip


def test_the_replay_of_the_real_code_has_the_saving_that_the_twins_has() -> None:
    held: dict[str, list[int]] = {"twin": [], "trace": []}
    for choice in ("nothing", "states"):
        run = make_run({**FRAGMENTED, "created_first": choice, "eval_interval": 0})
        tapes = {"twin": first_steps(run, pieces(run, "gptfit", kernels=True)), "trace": traced(run, 3)}
        for name, tape in tapes.items():
            held[name].append(replay_tape(with_workspaces(tape, cublas_workspace_bytes(None)), False).reserved_bytes)
    for usual, first in held.values():
        assert first < 0.92 * usual
    assert held["twin"] == pytest.approx(held["trace"], rel=0.01)


def test_the_least_is_chosen_and_nothing_where_nothing_is_gained() -> None:
    workspace = cublas_workspace_bytes(None)
    run = make_run(FRAGMENTED)
    best = created_least(run, workspace)
    each = {choice: held_bytes(derive(run, created_first=choice), workspace) for choice in CREATED}
    assert max(each[best.created_first]) == min(map(max, each.values()))
    assert all(now < 0.92 * usual for now, usual in zip(each[best.created_first], each["nothing"], strict=True))
    calm = derive(run, expandable_segments=True)
    assert created_least(calm, workspace) is calm
    alone = derive(run, n_gpus=2, strategy="ddp")
    assert created_least(alone, workspace) is alone


def planned(*overrides: str) -> Plan:
    shape = [f"{key}={value}" for key, value in FRAGMENTED.items() if key != "expandable_segments"]
    source = read_config(None, (*shape, "activation_checkpointing=none", *overrides))
    return plan(source, load_gpu("rtx4070"), keep=("batch_size",))


def test_a_plan_takes_it_says_so_and_can_be_told_not_to() -> None:
    found, kept, expandable = planned(PLAIN), planned(PLAIN, "created_first=nothing"), planned()
    assert found.run and found.choice and found.estimate and kept.run and kept.choice and kept.estimate
    assert found.run.created_first == found.choice["created_first"] != "nothing"
    (note,) = (note for note in found.notes if "created_first" in note)
    assert "less than in torch's order" in note
    assert kept.run.created_first == "nothing" and "created_first" not in kept.choice
    assert found.estimate.reserved_bytes < 0.92 * kept.estimate.reserved_bytes
    assert found.estimate.live_bytes == kept.estimate.live_bytes
    assert expandable.run and expandable.run.created_first == "nothing"
    assert not any("created" in note for note in expandable.notes)


def launched(monkeypatch: pytest.MonkeyPatch, *overrides: str, **how: Any) -> Launch:
    """What auto-fit decides on a machine with an RTX 4070, as far as deciding goes."""
    seen = DriverGpu(0, "GPU-12ab", "NVIDIA GeForce RTX 4070", 12282 << 20, 10752 << 20, 1530 << 20, "580.1")
    for name, fake in {
        "detect": lambda: [seen],
        "gpu_uuid": lambda _: "12ab",
        "adapt": lambda run, _: (run, ()),
    }.items():
        monkeypatch.setattr(launch, name, fake)
    monkeypatch.setattr(launch, "pick_device", lambda _: torch.device("cuda"))
    shape = tuple(f"{key}={value}" for key, value in FRAGMENTED.items() if key not in ("expandable_segments", "loss"))
    return launch.prepare_launch(Asked("gpt2", (*shape, *overrides)), **how)


def test_auto_fit_plans_for_the_segments_that_there_will_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    for name in ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert launched(monkeypatch, auto_fit=True).run.expandable_segments
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64, expandable_segments:False")
    found = launched(monkeypatch, auto_fit=True)
    assert not found.run.expandable_segments and any("expandable_segments=False" in note for note in found.notes)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setattr("sys.platform", "win32")
    assert not launched(monkeypatch, auto_fit=True).run.expandable_segments


def test_a_resumed_run_is_predicted_with_its_states(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    begun = launched(monkeypatch, PLAIN, "loss=full")
    resumed = launched(monkeypatch, PLAIN, "loss=full", resume_from=tmp_path)
    assert begun.run == resumed.run and begun.estimate and resumed.estimate
    assert resumed.estimate.reserved_bytes < 0.92 * begun.estimate.reserved_bytes


def test_a_resumed_run_has_its_states_from_the_start() -> None:
    run = make_run(TINY)
    assert as_resumed(run).created_first == "states"
    assert as_resumed(derive(run, created_first="gradients")).created_first == "both"
    several = derive(run, n_gpus=2, strategy="ddp")
    assert as_resumed(several) is several


@pytest.mark.parametrize("changes", [{"n_gpus": 2}, {"optimizer": "adamw8bit"}])
def test_what_cannot_be_created_first_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(GptfitError, match="created_first=states does not go with"):
        make_run({**TINY, "created_first": "states", **changes})
