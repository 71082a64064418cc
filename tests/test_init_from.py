"""Weights that go out and come back compute the same; what does not suit the run is said by its first key."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from gptfit.checkpoint import latest_valid
from gptfit.config import make_run
from gptfit.door import read_config
from gptfit.errors import GptfitError
from gptfit.export import export
from gptfit.init_from import start_weights
from gptfit.model import GPT
from test_export import EXPRESSIBLE, LLAMA, SMALL, batch, checkpointed, logits

torch.set_num_threads(1)


FORMS = [(form, name) for form in ("hf", "own") for name in EXPRESSIBLE]
FORMS += [("nanogpt", "gpt2"), ("nanogpt", "gpt2 without biases")]


def started(init_from: Path | str, **keys: Any) -> tuple[GPT, tuple[str, ...]]:
    run = make_run({**SMALL, **keys, "init_from": str(init_from)})
    torch.manual_seed(99)
    model = GPT(run)
    notes = start_weights(model, run)
    return model.eval(), notes


@pytest.mark.parametrize("form, name", FORMS)
def test_what_was_exported_comes_back(name: str, form: str, tmp_path: Path) -> None:
    keys = EXPRESSIBLE[name]
    _, model = checkpointed(tmp_path, **keys)
    source = {"hf": tmp_path / "hf", "nanogpt": tmp_path / "nanogpt" / "ckpt.pt", "own": tmp_path}[form]
    if form != "own":
        export(tmp_path, format=form)
    exact = {**keys, "dtype": "float32", "param_dtype": "float32"}  # as `checkpointed` gives the model
    again, notes = started(source, **exact)
    assert torch.equal(logits(again), logits(model)) and notes[0].startswith("weights from ")
    fresh = GPT(make_run({**SMALL, **keys})).eval()
    assert not torch.equal(logits(fresh), logits(model))


def test_a_compiled_nanogpt_checkpoint_and_fewer_positions(tmp_path: Path) -> None:
    _, model = checkpointed(tmp_path, bias=True)
    (path,) = export(tmp_path, format="nanogpt").files
    plain = torch.load(path, weights_only=True)
    plain["model"] = {f"_orig_mod.{name}": tensor for name, tensor in plain["model"].items()}
    plain["model"]["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
    torch.save(plain, path)
    again, _ = started(path, bias=True, block_size=9)
    with torch.no_grad():
        got, expected = (m.lm_head(m.hidden(batch()[0][:, :9])) for m in (again, model))
    assert torch.equal(got, expected)


def test_biases_appear_where_the_run_has_them(tmp_path: Path) -> None:
    """A Llama with biases on q, k and v alone, as Qwen2 is: the others start at zero."""
    _, model = checkpointed(tmp_path, **LLAMA, bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and "c_attn" not in name:
            torch.nn.init.zeros_(parameter)
    from safetensors.torch import load_file, save_file

    export(tmp_path)
    path = tmp_path / "hf" / "model.safetensors"
    kept = {name: t for name, t in load_file(path).items() if not name.endswith("bias") or name[-11:-5] in QKV}
    assert len(kept) < len(load_file(path))
    save_file(kept, path)
    assert torch.equal(logits(started(tmp_path / "hf", **LLAMA, bias=True)[0]), logits(model))
    with pytest.raises(GptfitError, match=r"bias=False, but .* has biases, as transformer\.h\.0\.attn\.c_attn\.bias"):
        started(tmp_path / "hf", **LLAMA)


QKV = ("q_proj", "k_proj", "v_proj")


@pytest.mark.parametrize("key, value", [("n_layer", 3), ("n_head", 2), ("n_embd", 64), ("vocab_size", 300)])
@pytest.mark.parametrize("form", ["hf", "nanogpt", "own"])
def test_the_first_key_that_differs_is_named(key: str, value: int, form: str, tmp_path: Path) -> None:
    checkpointed(tmp_path)
    source = tmp_path if form == "own" else export(tmp_path, format=form).files[0]
    with pytest.raises(GptfitError, match=f"^{key}={value}, but .* has {key}={SMALL[key]}$"):
        started(source.parent if form == "hf" else source, **{key: value})
    with pytest.raises(GptfitError, match=r"block_size=32, but .* has positions for 16"):
        started(source.parent if form == "hf" else source, block_size=32)


def test_gpt2_is_looked_for_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(GptfitError, match=r"gpt2 is not in .*hub, and nothing is downloaded") as caught:
        started("gpt2")
    assert caught.value.hint.startswith("hf download openai-community/gpt2 ")
    _, model = checkpointed(tmp_path, bias=True)
    export(tmp_path)
    folder = tmp_path / "hub" / "models--gpt2"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("607a30d783dfa663caf39e06633721c8d4cfcd7e")
    shutil.copytree(tmp_path / "hf", folder / "snapshots" / "607a30d783dfa663caf39e06633721c8d4cfcd7e")
    config = folder / "snapshots" / "607a30d783dfa663caf39e06633721c8d4cfcd7e" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "activation_function": "gelu_new"}))
    again, notes = started("gpt2", bias=True)
    assert torch.equal(logits(again), logits(model)) and "tanh" in notes[1]


def test_a_huggingface_folder_gives_its_shape(tmp_path: Path, gptfit: Any) -> None:
    checkpointed(tmp_path, **LLAMA)
    export(tmp_path)
    run = read_config(None, [f"init_from={tmp_path / 'hf'}", "batch_size=2"]).run
    assert (run.n_layer, run.n_kv_head, run.vocab_size, run.norm, run.batch_size) == (2, 2, 260, "rmsnorm", 2)
    words = ("gradient_accumulation_steps=1", "max_iters=1", "eval_interval=0", "warmup_iters=0", "learning_rate=1e-9")
    words += ("compile=False", "dtype=float32", "min_lr=0", "weight_decay=0")
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question\n" * 50)
    assert gptfit("data", "prepare", str(text), "--out", str(tmp_path / "data")).code == 0
    done = gptfit(
        "train", f"init_from={tmp_path / 'hf'}", *words, f"dataset={tmp_path / 'data'}",
        "--out", str(tmp_path / "more"), "--device", "cpu",
    )  # fmt: skip
    assert done.code == 0 and f"weights from {tmp_path / 'hf'}" in done.err
    before, after = latest_valid(tmp_path), latest_valid(tmp_path / "more")
    assert before is not None and after is not None and after.checkpoint.step == 1
    for name, tensor in before.checkpoint.model.items():
        assert torch.allclose(after.checkpoint.model[name], tensor, atol=1e-6), name


class Evil:
    def __reduce__(self):
        return (os.system, ("touch gptfit-was-here",))


@pytest.mark.parametrize("given", [".", "checkpoint-*"])
def test_a_run_gives_its_shape(given: str, tmp_path: Path) -> None:
    from gptfit.door import save_run

    _, model = checkpointed(tmp_path, **LLAMA)
    trained = make_run({**SMALL, **LLAMA, "dropout": 0.25})
    save_run(trained, tmp_path / "run.yaml")
    start = next(tmp_path.glob(given)) if "*" in given else tmp_path
    source = read_config(None, [f"init_from={start}", "dtype=float32", "learning_rate=0.5"])
    shape = set(type(trained).__mro__[1].model_fields) - {"dropout"}
    assert source.run.model_dump(include=shape) == trained.model_dump(include=shape)
    assert (source.run.dropout, source.run.learning_rate) == (0.0, 0.5)
    assert f"init_from {start}: its shape" in source.notes
    again = GPT(source.run)
    start_weights(again, source.run)
    assert torch.equal(logits(again.eval()), logits(model))
    with pytest.raises(GptfitError, match="n_layer=5, but "):
        five = read_config("tiny", [f"init_from={start}", "n_layer=5"]).run
        start_weights(GPT(five), five)


def test_what_is_no_model_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for content in (Evil(), {"model": {}}, [1]):
        torch.save(content, tmp_path / "ckpt.pt")
        with pytest.raises(GptfitError, match=r"is neither a nanoGPT ckpt\.pt nor a checkpoint"):
            started(tmp_path / "ckpt.pt")
    assert not (tmp_path / "gptfit-was-here").exists()
    with pytest.raises(GptfitError, match=r"holds neither config\.json nor a checkpoint"):
        started(tmp_path)
    with pytest.raises(GptfitError, match='there is no "skratch" to start from; did you mean scratch'):
        started("skratch")
    with pytest.raises(GptfitError, match="init_from=resume"):
        started("resume")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(GptfitError, match="n_embd"):
        started(tmp_path)


def test_stretched_positions_are_refused(tmp_path: Path) -> None:
    checkpointed(tmp_path, **LLAMA)
    export(tmp_path)
    config = tmp_path / "hf" / "config.json"
    plain = json.loads(config.read_text())
    config.write_text(json.dumps({**plain, "rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0}}))
    with pytest.raises(GptfitError, match="rope of type llama3"):
        started(tmp_path / "hf", **LLAMA)
    config.write_text(json.dumps({**plain, "rms_norm_eps": 1e-6}))
    assert "1e-06" in started(tmp_path / "hf", **LLAMA)[1][1]
