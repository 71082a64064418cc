"""What is exported computes the same elsewhere: in transformers' own models, and in nanoGPT's."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gptfit.checkpoint import Checkpoint, rng_state, save
from gptfit.config import RunConfig, derive, make_run
from gptfit.errors import GptfitError
from gptfit.export import export
from gptfit.model import GPT
from gptfit.optim import build_optimizer

torch.set_num_threads(1)

SMALL = {
    "n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 260, "block_size": 16, "dtype": "float32", "dropout": 0.0,
    "optimizer_impl": "foreach", "compile": False, "attention": "math",
}  # fmt: skip
LLAMA = {"norm": "rmsnorm", "mlp": "swiglu", "position": "rope", "n_kv_head": 2, "rope_theta": 500.0}

EXPRESSIBLE = {
    "gpt2": {"bias": True},
    "gpt2 without biases": {"bias": False},
    "gpt2, untied and narrow": {"bias": True, "tie_embeddings": False, "n_hidden": 48},
    "llama": {**LLAMA, "tie_embeddings": False},
    "llama, tied, biases": {**LLAMA, "bias": True, "n_kv_head": 4},
    "llama in bfloat16": {**LLAMA, "param_dtype": "bfloat16", "dtype": "bfloat16"},
}


def checkpointed(folder: Path, **keys: Any) -> tuple[RunConfig, GPT]:
    """A checkpoint in `folder` of a model whose every parameter counts: none is zero or one. Small embeddings let
    the norms' epsilon count too, large matrices the form of the activation."""
    run = make_run({**SMALL, **keys})
    torch.manual_seed(5)
    model = GPT(run)
    for name, parameter in model.named_parameters():
        small = "wte" in name or "wpe" in name
        torch.nn.init.normal_(parameter, mean=0.0 if small else 0.1, std=0.01 if small else 0.4)
    optimizer = build_optimizer(model, run)
    model(*batch()).backward()
    optimizer.step()
    save(folder, Checkpoint(3, run, model.state_dict(), optimizer.state_dict(), {}, rng_state(), "byte", "f00"))
    if run.param_dtype != "float32":  # what others make of the weights is computed in float32
        exact = GPT(derive(run, dtype="float32", param_dtype="float32"))
        exact.load_state_dict(model.state_dict())
        model = exact
    return run, model.eval()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids_BT = torch.randint(0, 260, (2, 17), generator=torch.Generator().manual_seed(1))
    return ids_BT[:, :-1].contiguous(), ids_BT[:, 1:].contiguous()


@torch.no_grad()
def logits(model: GPT) -> torch.Tensor:
    return model.lm_head(model.hidden(batch()[0])).float()


@pytest.fixture
def transformers(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("transformers")


def difference(folder: Path, ours: GPT, transformers: Any) -> float:
    """The largest difference between transformers' logits and ours, over the largest of ours."""
    theirs, told = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    expected = logits(ours.float())
    with torch.no_grad():
        return float((theirs.eval()(batch()[0]).logits - expected).abs().max() / expected.abs().max())


# Rounding in float32 leaves less, a wrong key of the config more: the test after the next.
TOLERANCE = 2e-5


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_transformers_computes_the_same_logits(name: str, tmp_path: Path, transformers: Any, gptfit: Any) -> None:
    _, ours = checkpointed(tmp_path, **EXPRESSIBLE[name])
    done = gptfit("export", "--out", str(tmp_path), "--to", str(tmp_path / "hf"))
    told = json.loads(gptfit("export", "--out", str(tmp_path), "--to", str(tmp_path / "hf"), "--json").out)
    assert told["schema"] == "gptfit.export/1" and f"{told['model']}, step {told['step']}" == done.out.splitlines()[0]
    assert told["files"] == done.out.splitlines()[1:]
    assert done.code == 0 and "step 3" in done.out
    assert difference(tmp_path / "hf", ours, transformers) < TOLERANCE
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == 256


WRONG = [
    ("gpt2", {"activation_function": "gelu_new"}),
    ("gpt2", {"layer_norm_epsilon": 1e-6}),
    ("gpt2", {"n_head": 2}),
    ("llama", {"rms_norm_eps": 1e-6}),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 600.0}, "rope_theta": 600.0}),
    ("llama", {"hidden_act": "gelu"}),
]


@pytest.mark.parametrize("name, change", WRONG, ids=[next(iter(change)) for _, change in WRONG])
def test_a_wrong_config_would_be_noticed(name: str, change: dict[str, Any], tmp_path: Path, transformers: Any) -> None:
    _, ours = checkpointed(tmp_path, **EXPRESSIBLE[name])
    path = export(tmp_path).files[1]
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert difference(tmp_path / "hf", ours, transformers) > 3 * TOLERANCE


REFUSED = {
    "relu2": {"mlp": "relu2"},
    "qk_norm": {**LLAMA, "qk_norm": True},
    "soft cap": {**LLAMA, "logit_softcap": 15.0},
    "rope": {"position": "rope"},
    "grouped heads": {"n_kv_head": 2},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_transformers_has_no_word_for_is_one_line(name: str, tmp_path: Path, gptfit: Any) -> None:
    checkpointed(tmp_path, **REFUSED[name])
    key, value = list(REFUSED[name].items())[-1]
    done = gptfit("export", "--out", str(tmp_path))
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"error: {key}={value} ") and not (tmp_path / "hf").exists()


def test_nanogpt_loads_model_and_optimizer(tmp_path: Path) -> None:
    from gptfit.nanogpt_reference import NanoGPT

    run, ours = checkpointed(tmp_path, bias=True, tie_embeddings=True)
    (path,) = export(tmp_path, format="nanogpt").files
    assert path == tmp_path / "nanogpt" / "ckpt.pt"
    loaded = torch.load(path, weights_only=True)
    theirs = NanoGPT(make_run({**loaded["model_args"]}))
    theirs.load_state_dict(loaded["model"])
    with torch.no_grad():
        got, _ = theirs.eval()(*batch())
    expected = logits(ours)
    assert (got - expected).abs().max() < TOLERANCE * expected.abs().max()
    assert loaded["config"]["learning_rate"] == run.learning_rate and loaded["iter_num"] == 3
    # model.py, configure_optimizers: matrices, then vectors.
    groups = [[p for p in theirs.parameters() if (p.dim() < 2) == vectors] for vectors in (False, True)]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups])
    optimizer.load_state_dict(loaded["optimizer"])
    for parameter in theirs.parameters():
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape


def test_nanogpt_is_not_given_what_it_cannot_be(tmp_path: Path) -> None:
    checkpointed(tmp_path, **LLAMA)
    with pytest.raises(GptfitError, match="norm=rmsnorm has no form in nanoGPT"):
        export(tmp_path, format="nanogpt")


def test_bad_words_are_one_line(tmp_path: Path, gptfit: Any) -> None:
    assert "there is no checkpoint" in gptfit("export", "--out", str(tmp_path)).err
    checkpointed(tmp_path)
    assert 'unknown format "hff"; did you mean hf?' in gptfit("export", "--out", str(tmp_path), "--format", "hff").err
    (tmp_path / "file").write_text("")
    there = gptfit("export", "--out", str(tmp_path), "--to", str(tmp_path / "file"))
    assert there.code == 2 and "cannot make the folder" in there.err


def test_the_config_reads_back_as_the_same_model(tmp_path: Path) -> None:
    from gptfit.door import read_config

    run, _ = checkpointed(tmp_path, **LLAMA)
    export(tmp_path)
    again = read_config(str(tmp_path / "hf" / "config.json")).run
    for key in ("n_layer", "n_head", "n_kv_head", "n_embd", "n_hidden", "vocab_size", "block_size", "rope_theta"):
        assert getattr(again, key) == getattr(run, key), key
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == "llama"
