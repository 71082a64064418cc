"""`gptfit train`: what is decided before training, and the whole way from text to a sample; `gptfit verify`."""

import json
from pathlib import Path
from typing import Any

import pytest


def test_a_run_is_prepared_trained_resumed_and_sampled(gptfit: Any, tmp_path: Path) -> None:
    text, data, out = tmp_path / "text.txt", tmp_path / "data", tmp_path / "out"
    text.write_text("to be or not to be, that is the question\n" * 50)
    assert gptfit("data", "prepare", str(text), "--out", str(data)).code == 0
    small = [f"{key}={value}" for key, value in SMALL.items()]
    words = ("train", "tiny", *small, f"dataset={data}", "--out", str(out), "--device", "cpu")
    first = gptfit(*words, "max_iters=2")
    assert first.code == 0 and "done at step 2" in first.err
    assert gptfit(*words, "max_iters=3").code == 2, "a folder that holds a run is not overwritten"
    # Without a CONFIG the run in the folder goes on.
    again = gptfit("train", "--resume", "max_iters=3", "--out", str(out), "--device", "cpu")
    assert again.code == 0 and "done at step 3" in again.err
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]
    (out / "run.yaml").rename(tmp_path / "run.yaml")
    lost = gptfit("train", "--resume", "max_iters=4", "--out", str(out), "--device", "cpu")
    assert (lost.code, lost.err.splitlines()[0]) == (2, f'error: "{out}" has lost its run.yaml')
    drawn = gptfit("sample", "--out", str(out), "--prompt", "to be", "--tokens", "5", "--device", "cpu")
    assert drawn.code == 0 and drawn.out.startswith("to be")


SMALL = {
    "n_layer": 1,
    "n_head": 1,
    "n_embd": 16,
    "block_size": 16,
    "batch_size": 2,
    "eval_interval": 0,
    "warmup_iters": 1,
    "compile": False,
}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with an RTX 4070 of which 10.5 GiB are free, as far as deciding what to train goes."""
    import torch

    from gptfit import launch
    from gptfit.driver import DriverGpu

    seen = DriverGpu(0, "GPU-12ab", "NVIDIA GeForce RTX 4070", 12282 << 20, 10752 << 20, 1530 << 20, "580.1")
    monkeypatch.setattr(launch, "detect", lambda: [seen])
    monkeypatch.setattr(launch, "pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(launch, "gpu_uuid", lambda device: "12ab")
    monkeypatch.setattr(launch, "adapt", lambda run, device: (run, ()))


def test_a_run_that_cannot_fit_is_refused_with_what_would_help(
    gptfit: Any, gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[Any] = []
    monkeypatch.setattr("gptfit.train.train", lambda run, *rest: trained.append(run) or Finished())
    words = ("train", "gpt2", "batch_size=16", "loss=full", "compile=False", "--out", str(tmp_path))
    refused = gptfit(*words)
    assert (refused.code, trained) == (1, [])
    assert refused.out.startswith("Does not fit: ") and " of 10.50 GiB on rtx4070" in refused.out
    assert "loss=chunked" in refused.out and "--auto-fit" in refused.out
    forced = gptfit(*words, "--force")
    assert (forced.code, trained[-1].batch_size) == (0, 16)
    assert "10.50 GiB are free now" in forced.err


def test_auto_fit_on_a_gpu_trains_the_plan(
    gptfit: Any, gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[Any] = []
    monkeypatch.setattr("gptfit.train.train", lambda run, *rest: trained.append((run, rest)) or Finished())
    monkeypatch.setattr("gptfit.sample.sample", lambda *_, **__: "some text")
    result = gptfit("train", "gpt2", "batch_size=64", "--auto-fit", "--out", str(tmp_path))
    assert (result.code, result.out) == (0, "some text\n")
    run, (_, _, predicted, _, _, refit, _) = trained[0]
    assert run.batch_size * run.gradient_accumulation_steps * 1024 == pytest.approx(64 * 40 * 1024, rel=0.05)
    assert set(predicted) == {"allocated_bytes", "reserved_bytes", "process_bytes"}
    assert refit.run == run and refit.before.free_bytes == 10752 << 20


class Finished:
    stopped_by = ""


def test_auto_fit_on_a_cpu_takes_the_small_preset() -> None:
    from gptfit.asked import Asked
    from gptfit.launch import prepare_launch
    from gptfit.presets import load_preset

    launch = prepare_launch(Asked(), auto_fit=True, device_name="cpu")
    assert launch.run == load_preset("tiny").run
    assert launch.predicted is None and not launch.refused
    assert prepare_launch(Asked("gpt2"), auto_fit=True, device_name="cpu").run == load_preset("gpt2").run


def test_verify_agrees_and_says_so_in_its_exit_code(gptfit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("verify", "gpt2", "n_layer=1", "batch_size=1", "block_size=64")
    result = gptfit(*words, "--json")
    answer = json.loads(result.out)
    assert (result.code, answer["schema"], answer["passed"]) == (0, "gptfit.verify/1", True)
    assert answer["traced"]["n_params"] == answer["estimate"]["n_params"]
    monkeypatch.setattr("gptfit.verify.TOLERANCE", -1.0)
    failed = gptfit(*words)
    assert failed.code == 1 and failed.out.startswith("Differs: ")
