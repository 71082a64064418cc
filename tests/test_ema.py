"""The average of the weights: by hand, through a resume, in what is evaluated and exported, and in the estimate."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from gptfit import checkpoint, metrics
from gptfit.cli import app
from gptfit.config import RunConfig, make_run
from gptfit.data import VAL, sequence_starts
from gptfit.ema import Ema
from gptfit.errors import GptfitError
from gptfit.estimate import estimate
from gptfit.export import export
from gptfit.memory.step import pieces, steady_step
from gptfit.model import GPT
from gptfit.sample import load_model
from gptfit.trace import trace_program
from gptfit.train import train
from ranks import Job, train_together
from tokens import few_tokens

torch.set_num_threads(1)

DECAY = 0.5


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("steps")
    few_tokens(folder)
    return {
        "n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 257, "block_size": 16, "dataset": str(folder),
        "batch_size": 3, "gradient_accumulation_steps": 4, "dtype": "float32", "compile": False, "ema_decay": DECAY,
        "learning_rate": 1e-2, "max_iters": 6, "warmup_iters": 2, "eval_interval": 6, "eval_iters": 3,
        "checkpoint_interval": 1, "dropout": 0.1,
    }  # fmt: skip


@pytest.fixture(scope="module")
def trained(keys, tmp_path_factory) -> Path:
    """Six steps with an average, and the same without."""
    folder = tmp_path_factory.mktemp("trained")
    train(make_run(keys), folder / "ema")
    train(make_run({**keys, "ema_decay": 0.0}), folder / "plain")
    return folder


def newest(folder: Path) -> checkpoint.Checkpoint:
    return checkpoint.load(checkpoint.checkpoint_paths(folder)[0])


def test_the_average_is_that_of_the_weights_after_each_step(keys, tmp_path):
    """Made again in float64 from the weights that a run left at each of its steps."""
    want, run = {}, {**keys, "eval_interval": 0}
    for step in range(1, 7):
        train(make_run({**run, "max_iters": step, "lr_decay_iters": 6}), tmp_path / "run", resume=step > 1)
        weights = newest(tmp_path / "run").model
        if step == 1:  # a run that has made no step has no checkpoint: its start is that of the same seed
            torch.manual_seed(1337)
            want = {name: value.double() for name, value in GPT(make_run(run)).state_dict().items()}
        decay = min(DECAY, step / (9 + step))
        for name, value in weights.items():
            want[name] = decay * want[name] + (1 - decay) * value.double()
    found = newest(tmp_path / "run")
    assert found.ema.keys() == found.model.keys()
    for name, value in found.ema.items():
        torch.testing.assert_close(value.double(), want[name], rtol=0, atol=1e-6)
    assert any((found.ema[name] - found.model[name]).abs().max() > 1e-3 for name in want)


@torch.no_grad()
def loss_of(weights: Mapping[str, Any], run: RunConfig) -> float:
    """The mean loss of those weights over the sequences that an evaluation of `run` takes."""
    model = GPT(run).eval()
    model.load_state_dict(dict(weights))
    tokens = np.fromfile(Path(run.dataset) / "val.bin", np.uint16).astype(np.int64)
    starts = sequence_starts(len(tokens), run.block_size, run.eval_iters * run.eval_batch_size, run.seed, 0, VAL)
    rows = torch.tensor(np.stack([tokens[start : start + run.block_size + 1] for start in starts]))
    return float(model(rows[:, :-1], rows[:, 1:]))


def test_training_is_the_same_with_an_average_and_evaluation_is_of_it(trained):
    ema, plain = newest(trained / "ema"), newest(trained / "plain")
    assert [e["loss"] for e in metrics.read(trained / "ema")] == [e["loss"] for e in metrics.read(trained / "plain")]
    assert all(torch.equal(ema.model[name], value) for name, value in plain.model.items()) and not plain.ema
    for name, weights in (("ema", ema.ema), ("plain", ema.model)):
        assert metrics.read(trained / name)[-1]["val_loss"] == pytest.approx(loss_of(weights, ema.run), abs=1e-5)
    assert abs(loss_of(ema.ema, ema.run) - loss_of(ema.model, ema.run)) > 1e-3


def test_a_resumed_run_is_the_same_bit_for_bit(trained, keys, tmp_path):
    train(make_run({**keys, "max_iters": 3, "lr_decay_iters": 6}), tmp_path / "run")
    train(make_run(keys), tmp_path / "run", resume=True)
    once, twice = newest(trained / "ema"), newest(tmp_path / "run")
    assert all(torch.equal(twice.ema[name], value) for name, value in once.ema.items())
    assert metrics.read(trained / "ema")[-1]["val_loss"] == metrics.read(tmp_path / "run")[-1]["val_loss"]


def test_a_checkpoint_without_an_average_begins_one_from_its_weights(trained, keys, tmp_path):
    old = newest(trained / "plain")
    plain = {key: value for key, value in old.as_plain().items() if key != "ema"}
    (tmp_path / "run").mkdir()
    torch.save(plain, checkpoint.checkpoint_path(tmp_path / "run", 6))
    assert newest(tmp_path / "run").ema == {}
    train(make_run({**keys, "max_iters": 7}), tmp_path / "run", resume=True)
    found = newest(tmp_path / "run")
    for name, value in found.ema.items():
        decay = min(DECAY, 7 / 16)
        torch.testing.assert_close(value, decay * old.model[name] + (1 - decay) * found.model[name])


def test_sample_and_export_take_the_average_or_the_weights(trained, tmp_path):
    found = newest(trained / "ema")
    name = "transformer.wte.weight"
    for given, weights in ((found, found.ema), (replace(found, ema={}), found.model)):
        assert torch.equal(load_model(given, torch.device("cpu")).state_dict()[name], weights[name])
    for raw, weights in ((False, found.ema), (True, found.model)):
        path = export(trained / "ema", tmp_path / str(raw), "nanogpt", raw).files[0]
        written = torch.load(path, weights_only=True)
        assert torch.equal(written["model"][name], weights[name]) and ("optimizer" in written) == raw
    draw = ["sample", "--out", str(trained / "ema"), "--tokens", "400", "--device", "cpu"]
    averaged, raw = (CliRunner().invoke(app, [*draw, *more]) for more in ([], ["--raw"]))
    assert averaged.exit_code == raw.exit_code == 0 and averaged.stdout != raw.stdout


def test_an_exchange_leaves_everything_as_it_was():
    model = GPT(make_run({"n_layer": 1, "n_head": 1, "n_embd": 8, "vocab_size": 16, "block_size": 4}))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ema = Ema(model, 0.9)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    with pytest.raises(KeyError), ema.exchanged():
        assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
        raise KeyError
    assert torch.equal(model.lm_head.weight, before["lm_head.weight"] + 1)


@pytest.mark.parametrize(
    "changes",
    [{}, {"optimizer": "sgd", "momentum": 0.0, "grad_clip": 0.0}, {"optimizer_in_backward": True, "grad_clip": 0.0}],
)
def test_the_estimate_has_what_the_trace_has(changes):
    run = make_run(
        {
            "n_layer": 3, "n_head": 2, "n_embd": 64, "vocab_size": 300, "block_size": 32, "batch_size": 1,
            "gradient_accumulation_steps": 1, "compile": False, "ema_decay": 0.999, **changes,
        }
    )  # fmt: skip
    traced, parts = trace_program(run), pieces(run, "gptfit", whole=False)
    assert steady_step(run, parts).peak().live_bytes == pytest.approx(traced.live_bytes, abs=16 * 512)
    without = make_run({**run.model_dump(), "ema_decay": 0.0})
    more = estimate(run, "gptfit", None).live_bytes - estimate(without, "gptfit", None).live_bytes
    assert more == pytest.approx(4 * parts.n_params, rel=0.01)
    own = sum(buffer.n_bytes * n for buffer, n in traced.live_set().items() if buffer.name.endswith(" ema"))
    assert own == more


def test_what_no_average_can_be_made_of_is_refused():
    with pytest.raises(GptfitError, match=r"ema_decay=0\.99 needs param_dtype=float32"):
        make_run({"ema_decay": 0.99, "param_dtype": "bfloat16"})
    with pytest.raises(GptfitError, match="ema_decay=1"):
        make_run({"ema_decay": 1.0})
    with pytest.raises(GptfitError, match="nanoGPT's code has no ema_decay"):
        estimate(make_run({"ema_decay": 0.9}), "nanogpt", None)


def test_two_processes_keep_the_average_of_one(keys, tmp_path):
    """Under fsdp each keeps its part of it; a checkpoint has it whole, and goes on as it was."""
    keys = {**keys, "dropout": 0.0}
    train(make_run(keys), tmp_path / "one")
    jobs = [Job(name, {**keys, "n_gpus": 2, "strategy": name}) for name in ("ddp", "fsdp")]
    half = [Job(f"{j.out}-resumed", {**j.run, "max_iters": 3, "lr_decay_iters": 6}) for j in jobs]
    rest = [Job(f"{j.out}-resumed", j.run, resume=True) for j in jobs]
    train_together(tmp_path, 2, [*jobs, *half, *rest])
    one = newest(tmp_path / "one")
    for name in ("ddp", "fsdp"):
        two, resumed = newest(tmp_path / name), newest(tmp_path / f"{name}-resumed")
        torch.testing.assert_close(dict(two.ema), dict(one.ema), rtol=0, atol=1e-3)
        assert all(torch.equal(resumed.ema[key], value) for key, value in two.ema.items())
        assert metrics.read(tmp_path / name)[-1]["val_loss"] == pytest.approx(
            metrics.read(tmp_path / "one")[-1]["val_loss"], abs=1e-3
        )
