"""The commands as functions: the same answers, without torch where none is needed, and never a run stopped."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import gptfit
from gptfit.cli import main
from gptfit.config import make_run
from gptfit.door import read_config

HEAVY = ("torch", "numpy", "tiktoken", "safetensors")


def fresh(code: str) -> Any:
    """What `code` prints as JSON in an interpreter of its own."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def command(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    with pytest.raises(SystemExit):
        main([*words, "--json"])
    return json.loads(capsys.readouterr().out)


def test_no_function_that_plans_imports_torch_or_numpy() -> None:
    code = f"""
import json, sys
import gptfit
at_import = sorted(sys.modules.keys() & {{"pydantic", "rich", "yaml", "typer", "gptfit.api"}})
gptfit.plan("gpt2", gpu="rtx4070", batch_size=8)
gptfit.estimate("gpt2", gpu="rtx4070")
gptfit.explain_oom("CUDA out of memory. Tried to allocate 1.53 GiB.", batch_size=16)
gptfit.check({{"batch_size": 16}}, gpu="rtx4070")
try:
    with gptfit.guard("gpt2"):
        raise RuntimeError("CUDA out of memory. Tried to allocate 1.53 GiB.")
except RuntimeError:
    pass
print(json.dumps([at_import, sorted(sys.modules.keys() & set({HEAVY}))]))
"""
    assert fresh(code) == [[], []]


@pytest.mark.parametrize("first", ["import gptfit.plan, gptfit.estimate", "from gptfit.plan import plan", "pass"])
def test_a_function_stays_one_when_its_module_is_imported(first: str) -> None:
    code = f"""
import json
{first}
import gptfit
from gptfit.estimate import estimate
answers = [gptfit.estimate("gpt2").verdict, gptfit.estimate("gpt2").verdict, gptfit.plan("gpt2", gpu="l4").verdict]
import gptfit.plan as module
print(json.dumps([answers[0] == answers[1], answers[2], module.plan.__module__, estimate.__module__]))
"""
    assert fresh(code) == [True, "fits", "gptfit.plan", "gptfit.estimate"]


def test_all_names_are_there() -> None:
    assert all(hasattr(gptfit, name) for name in gptfit.__all__)
    assert set(gptfit.__all__) <= set(dir(gptfit))
    with pytest.raises(AttributeError, match="no attribute 'plam'"):
        gptfit.plam  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


def test_a_plan_is_that_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    answer = gptfit.plan("gpt2", gpu="rtx4070", reserve="2GiB", batch_size=8, keep=["compile"], program="nanogpt")
    words = ("plan", "gpt2", "batch_size=8", "--gpu", "rtx4070", "--reserve", "2GiB", "--keep", "compile")
    printed = command(capsys, *words, "--program", "nanogpt")
    assert json.loads(json.dumps(answer.to_json())) == {key: printed[key] for key in answer.to_json()}
    assert answer.as_given is not None and answer.as_given.program == "nanogpt"


def test_a_config_comes_in_every_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.py"
    file.write_text("batch_size = 3\nn_layer = 4\n")
    printed = command(capsys, "estimate", str(file), "dtype=float16", "--gpu", "t4", "--reserve", "512MiB")
    run = read_config(str(file), ["dtype=float16"]).run
    keys = {**run.model_dump(), "loss": "full"}
    more = {"gpu": "t4", "reserve": 1 << 29, "program": "nanogpt"}
    for answer in (
        gptfit.estimate(str(file), gpu="t4", reserve=1 << 29, dtype="float16"),
        gptfit.estimate(file, **more, dtype="float16"),
        gptfit.estimate(run, **more),
        gptfit.estimate(make_run({**keys, "batch_size": 5}), **more, batch_size=3),
        gptfit.estimate(keys, **more),
        gptfit.estimate({**keys, "dtype": "bfloat16"}, **more, dtype="float16"),
    ):
        assert answer.verdict == printed["verdict"] == "fits"
        assert answer.process_bytes == printed["peak"]["process_bytes"]
        assert answer.margin_bytes == printed["margin_bytes"]
    assert gptfit.estimate(compile=False).config["compile"] is False


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: gptfit.estimate("gtp2"), "gpt2"),
        (lambda: gptfit.estimate("gpt2", gpu="rtx407"), "did you mean rtx4070"),
        (lambda: gptfit.estimate("gpt2", batchsize=3), "did you mean batch_size"),
        (lambda: gptfit.estimate("gpt2", batch_size=0), "batch_size=0"),
        (lambda: gptfit.estimate("gpt2", batch_size=[1]), r"\[1\] is no value"),
        (lambda: gptfit.estimate("gpt2", dtype=""), "dtype"),
        (lambda: gptfit.estimate(3), "a config of type int"),  # pyright: ignore[reportArgumentType]
        (lambda: gptfit.estimate({"n_layer": None}), "None is no value"),
        (lambda: gptfit.estimate("gpt2", program="nanogtp"), "did you mean nanogpt"),
        (lambda: gptfit.plan("gpt2", gpu="rtx4070", reserve="2GB"), 'unknown unit "GB"'),
        (lambda: gptfit.plan("gpt2", gpu="rtx4070", allow=["magic"]), "magic"),
        (lambda: gptfit.explain_oom(""), "empty"),
    ],
)
def test_what_cannot_be_read_is_one_line(call: Any, message: str) -> None:
    with pytest.raises(gptfit.GptfitError, match=message):
        call()


OOM = (
    "CUDA out of memory. Tried to allocate 1.54 GiB. GPU 0 has a total capacity of 11.60 GiB of which 1.02 GiB is "
    "free. Including non-PyTorch memory, this process has 10.50 GiB memory in use. Of the allocated memory 9.90 GiB "
    "is allocated by PyTorch, and 299.12 MiB is reserved by PyTorch but unallocated."
)


def test_an_explanation_is_that_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log.txt"
    log.write_text(f"torch.OutOfMemoryError: {OOM}\n")
    printed = command(capsys, "explain-oom", str(log), "--config", "gpt2")
    assert json.loads(json.dumps(gptfit.explain_oom(log.read_text(), config="gpt2").to_json())) == printed
    told = gptfit.explain_oom(torch.OutOfMemoryError(OOM), config="gpt2", batch_size=2)
    assert told.facts.tried_bytes == round(1.54 * 2**30) and not told.missing


def linear(batch_size: int = 8, width: int = 64) -> Any:
    model = torch.nn.Linear(1024, width)
    return lambda: model(torch.randn(batch_size, 1024)).square().mean(), model


def test_a_step_is_traced_as_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "import torch\n\ndef linear(batch_size=8, width=64):\n    model = torch.nn.Linear(1024, width)\n"
        "    return lambda: model(torch.randn(batch_size, 1024)).square().mean(), model\n"
    )
    printed = command(capsys, "trace", f"{file}:linear", "width=4096", "optimizer=sgd", "--gpu", "t4")
    answer = gptfit.trace_step(linear, gpu="t4", width=4096, optimizer="sgd")
    assert json.loads(json.dumps(answer.memory_json())) == {key: printed[key] for key in answer.memory_json()}
    assert answer.source == "test_api.py:linear"
    # Parameters and gradients, SGD's momentum with them or not, are 4 bytes for each of 1025 × 4096 numbers.
    assert answer.n_params == 1025 * 4096 and answer.live_bytes >= 2 * 4 * answer.n_params


def test_a_step_without_a_file_is_traced_and_its_errors_are_told() -> None:
    names: dict[str, Any] = {}
    exec("import torch\ndef make():\n    m = torch.nn.Linear(9, 9)\n    return m, (torch.ones(2, 9),)", names)
    with pytest.raises(gptfit.GptfitError, match="loss"):
        gptfit.trace_step(names["make"])

    def broken() -> Any:
        raise ValueError("no such file")

    with pytest.raises(gptfit.GptfitError, match=r"test_api\.py line \d+: ValueError: no such file"):
        gptfit.trace_step(broken)
    with pytest.raises(gptfit.GptfitError, match="unknown key"):
        gptfit.trace_step(linear, hight=3)


NANOGPT = """
out_dir = 'out'
eval_interval = 2000
wandb_log = False
dataset = 'openwebtext'
init_from = 'scratch'
gradient_accumulation_steps = 40
batch_size = 16
block_size = 1024
n_layer = 12
n_head = 12
n_embd = 768
bias = False
dtype = 'bfloat16'
compile = True
"""


def namespace(text: str = NANOGPT) -> dict[str, Any]:
    """The globals of a train.py that has run its first lines, with what it imports and makes later."""
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(f"import os, torch\nfrom contextlib import nullcontext\n{text}\nloss = 0.5\noptimizer = None\nX = [1]", names)
    return names


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)


def test_check_reads_a_train_py_as_the_command_reads_its_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.py"
    file.write_text(NANOGPT)
    printed = command(capsys, "estimate", str(file), "--gpu", "rtx4070")
    answer = gptfit.check(namespace(), gpu="rtx4070")
    assert answer is not None
    assert json.loads(json.dumps(answer.to_json())) == printed
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("gptfit: does not fit: ") and "on rtx4070, short by" in err


def test_the_change_that_check_names_fits_and_one_more_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    gptfit.check(namespace(), gpu="rtx4070")
    found = re.search(
        r"; batch_size=(\d+) gradient_accumulation_steps=(\d+) would fit$", capsys.readouterr().err.strip()
    )
    assert found is not None
    size, steps = map(int, found.groups())
    for batch_size, verdict in ((size, "fits"), (size + 1, "does_not_fit")):
        text = f"{NANOGPT}\nbatch_size = {batch_size}\ngradient_accumulation_steps = {steps}"
        answer = gptfit.check(namespace(text), gpu="rtx4070")
        assert answer is not None and answer.verdict == verdict
    assert capsys.readouterr().err.startswith("gptfit: fits: ")


def test_check_sees_the_ranks_the_allocator_and_the_data_set(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    answer = gptfit.check(namespace(NANOGPT + "dataset = 'shakespeare_char'"), gpu="a100-80gb")
    assert answer is not None
    seen = {key: answer.config[key] for key in ("n_gpus", "expandable_segments", "vocab_size", "loss")}
    assert seen == {"n_gpus": 8, "expandable_segments": True, "vocab_size": 65, "loss": "full"}
    assert capsys.readouterr().err.count("\n") == 1
    pretrained = gptfit.check(namespace(NANOGPT + "init_from = 'gpt2-xl'"), gpu="a100-80gb")
    assert pretrained is not None
    shape = {key: pretrained.config[key] for key in ("n_layer", "n_head", "n_embd", "bias", "vocab_size")}
    assert shape == {"n_layer": 48, "n_head": 25, "n_embd": 1600, "bias": True, "vocab_size": 50257}
    capsys.readouterr()
    monkeypatch.setenv("RANK", "3")
    assert gptfit.check(namespace(), gpu="a100-80gb") is not None
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "names, gpu, said",
    [
        ({}, "rtx4070", "no key of a run is set here"),
        ({"batch_size": 0}, "rtx4070", "batch_size=0"),
        ({"batch_size": 4}, "rtx407", "did you mean rtx4070"),
        ({"batch_size": 4, "n_head": 5}, "rtx4070", "n_embd 768 is not divisible by n_head 5"),
        ({"batch_size": 4, "init_from": "gpt2-huge"}, "rtx4070", "gpt2-huge"),
    ],
)
def test_check_never_stops_a_run(
    names: dict[str, Any], gpu: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gptfit.check(names, gpu=gpu) is None
    err = capsys.readouterr().err
    assert err.startswith("gptfit: no answer: ") and said in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "config", ["gpt2", {"batch_size": 16}, namespace(), None], ids=("name", "keys", "globals", "-")
)
def test_guard_explains_an_out_of_memory_and_raises_it_again(config: Any, capsys: pytest.CaptureFixture[str]) -> None:
    error = torch.OutOfMemoryError(OOM)
    with pytest.raises(torch.OutOfMemoryError) as raised, gptfit.guard(config):
        raise error
    assert raised.value is error
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("What could not be allocated:") and "What helps" in err
    assert ("saves" in err) == (config is not None), "the run is known, so its changes are estimated"


def test_guard_explains_a_real_failure_of_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError), gptfit.guard("gpt2"):
        torch.empty(1 << 55)
    assert gptfit.explain_oom(caught(lambda: torch.empty(1 << 55))).facts.kind == "host_ram"
    assert capsys.readouterr().err


def caught(call: Any) -> BaseException:
    with pytest.raises(Exception) as raised:
        call()
    return raised.value


@pytest.mark.parametrize(
    "error", [RuntimeError("size mismatch"), ValueError("CUDA out of memory"), KeyboardInterrupt()]
)
def test_guard_is_silent_about_everything_else(error: BaseException, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(type(error)), gptfit.guard("gpt2"):
        raise error
    with gptfit.guard("gpt2"):
        pass
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("config", ["no-such-model", 3, {"batch_size": object()}])
def test_guard_raises_the_failure_even_where_it_cannot_explain(config: Any, capsys: pytest.CaptureFixture[str]) -> None:
    error = torch.OutOfMemoryError(OOM)
    with pytest.raises(torch.OutOfMemoryError) as raised, gptfit.guard(config):
        raise error
    assert raised.value is error and raised.value.__context__ is None
    assert capsys.readouterr().err.startswith("gptfit: this cannot be explained: ")


def test_guard_can_be_a_decorator(capsys: pytest.CaptureFixture[str]) -> None:
    @gptfit.guard("gpt2")
    def train() -> None:
        raise torch.OutOfMemoryError(OOM)

    with pytest.raises(torch.OutOfMemoryError):
        train()
    assert "What helps" in capsys.readouterr().err
