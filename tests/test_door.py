"""The doors by which a config comes in: round trips, layers, and one line for whatever cannot be read."""

import ast
import json
import os
import subprocess
import sys

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptfit.config import KEYS, RunConfig, derive, make_run
from gptfit.door import format_run, read_config, save_run
from gptfit.errors import GptfitError
from gptfit.flatfile import parse_yaml
from gptfit.nanogpt_file import OTHER_TRAIN_PY, PRETRAINED, TRAIN_PY
from gptfit.presets import MODELS, load_preset, preset_names
from gptfit.pyconst import NotConstant, evaluate
from gptfit.scalars import parse_override

FREE_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
RATES = st.floats(1e-9, 1.0, exclude_min=True)


@st.composite
def runs(draw):
    """Any valid run: some keys set, the others following."""
    n_head = draw(st.sampled_from([1, 2, 4, 12]))
    n_gpus = draw(st.sampled_from([1, 2, 4]))
    optional = st.fixed_dictionaries(
        {"n_head": st.just(n_head), "n_embd": st.just(n_head * draw(st.sampled_from([2, 64, 80])))},
        optional={
            "n_layer": st.integers(1, 200),
            "n_kv_head": st.sampled_from([k for k in (1, 2, 4, 12) if n_head % k == 0]),
            "vocab_size": st.integers(2, 300000),
            "bias": st.booleans(),
            "dropout": st.floats(0, 0.99),
            "mlp": st.sampled_from(["gelu", "swiglu", "relu2"]),
            "n_hidden": st.integers(1, 99999),
            "position": st.sampled_from(["learned", "rope"]),
            "rope_theta": st.floats(1e-3, 1e9),
            "batch_size": st.integers(1, 4096),
            "gradient_accumulation_steps": st.integers(1, 50).map(lambda n: n * n_gpus),
            "n_gpus": st.just(n_gpus) if draw(st.booleans()) else st.just(1),
            "optimizer_impl": st.sampled_from(["fused", "foreach", "for-loop"]),
            "compile": st.booleans(),
            "learning_rate": RATES,
            "min_lr": RATES,
            "eval_batch_size": st.integers(1, 4096),
            "eval_interval": st.integers(0, 10**6),
            "seed": st.integers(-5, 10**9),
            "dataset": FREE_TEXT,
            "tokenizer": FREE_TEXT,
        },
    )
    return make_run(draw(optional))


def error_of(config, *overrides) -> str:
    """The one line that reading `config` ends with."""
    with pytest.raises(GptfitError) as caught:
        read_config(None if config is None else str(config), overrides)
    assert len(caught.value.message.splitlines()) == 1 and len(caught.value.message) < 500
    return caught.value.message


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(runs(), FREE_TEXT)
def test_a_saved_run_comes_back_exactly(tmp_path, run, header):
    path = tmp_path / "run.yaml"
    save_run(run, path, header)
    back = read_config(str(path)).run
    assert back == run
    assert os.listdir(tmp_path) == ["run.yaml"]
    # What followed other keys still does.
    assert derive(back, batch_size=7).eval_batch_size == derive(run, batch_size=7).eval_batch_size
    # Another YAML reader sees the same values.
    for key, value in yaml.safe_load(path.read_text()).items():
        assert getattr(run, key) == value and type(getattr(run, key)) is type(value)


def test_a_saved_run_names_every_key_and_its_header():
    text = format_run(RunConfig(), "planned for\n an RTX 4070")
    assert text.startswith("# planned for\n#  an RTX 4070\n")
    assert all(f"\n{key}: " in text or f"\n# {key}: " in text for key in KEYS)


def test_saving_where_it_cannot_be_is_one_line(tmp_path):
    (tmp_path / "dir.yaml").mkdir()
    for path in (tmp_path / "run.txt", tmp_path / "absent" / "run.yaml", tmp_path / "dir.yaml"):
        with pytest.raises(GptfitError) as caught:
            save_run(RunConfig(), path)
        assert len(caught.value.message.splitlines()) == 1
    assert os.listdir(tmp_path) == ["dir.yaml"]


# --- presets ---

# Parameters as published: nanoGPT's models by its own count (README: 124M, 350M, 774M, 1558M), the others by
# the totals of their safetensors, Qwen's less 24 · (896 + 128 + 128) biases.
PUBLISHED = {
    "tinyllama-1.1b": 1_100_048_384,
    "llama-3.2-1b": 1_235_814_400,
    "qwen2.5-0.5b": 494_032_768 - 24 * (896 + 128 + 128),
}


def n_params(run: RunConfig) -> int:
    kv_width = run.n_kv_head * run.head_size
    matrices = 2 * run.n_embd**2 + 2 * run.n_embd * kv_width
    matrices += (3 if run.mlp == "swiglu" else 2) * run.n_embd * run.n_hidden
    # q, k, v and output, the MLP, and the block's two norms.
    biases = (3 * run.n_embd + 2 * kv_width + run.n_hidden + 2 * run.n_embd) * run.bias
    tables = run.vocab_size * (1 if run.tie_embeddings else 2) + run.block_size * (run.position == "learned")
    return run.n_layer * (matrices + biases + 2 * run.n_embd) + run.n_embd * (1 + run.bias) + tables * run.n_embd


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_a_run_with_a_title_and_a_source(name):
    preset = load_preset(name)
    assert preset.title and preset.source
    assert read_config(name).run == preset.run
    assert read_config(name).user_keys == frozenset()
    # PyYAML's own reading of the file agrees.
    plain = yaml.safe_load((MODELS / f"{name}.yaml").read_text())
    assert {key: plain[key] for key in preset.values} == preset.values
    assert n_params(preset.run) == PUBLISHED.get(name, n_params(preset.run))
    if name.startswith("gpt2"):
        assert preset.run.tokens_per_step == 12 * 1024 * 40
        assert (preset.run.n_layer, preset.run.n_head, preset.run.n_embd) == PRETRAINED[name]


def test_only_the_preset_asked_for_is_read(monkeypatch):
    read = []
    real = parse_yaml
    monkeypatch.setattr("gptfit.presets.parse_yaml", lambda text, name: read.append(name) or real(text, name))
    read_config("tiny")
    assert read == ["tiny.yaml"]


# --- overrides ---


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("batch_size=8", "batch_size", 8),
        ("--batch_size=8", "batch_size", 8),
        ("--batch-size=8", "batch_size", 8),
        ("batch_size=1_024", "batch_size", 1024),
        ("learning_rate=3e-4", "learning_rate", 3e-4),
        ("learning_rate=.5", "learning_rate", 0.5),
        ("compile=False", "compile", False),
        ("compile=true", "compile", True),
        ("compile=off", "compile", "off"),
        ("--dtype='float16'", "dtype", "float16"),
        ("dataset=3e-4", "dataset", "3e-4"),
        ("dataset=a=b", "dataset", "a=b"),
    ],
)
def test_an_override_is_read_as_a_python_user_means_it(text, key, value):
    assert parse_override(text) == (key, value)
    assert type(parse_override(text)[1]) is type(value)


def test_overrides_win_and_are_the_users_keys(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("batch_size: 4\nlearning_rate: 3e-4\ncompile: off\nloss: 'full'\n")
    source = read_config(str(path), ["--batch_size=8", "batch_size=6", "--device=cpu"])
    assert (source.run.batch_size, source.run.learning_rate, source.run.compile) == (6, 3e-4, False)
    assert source.user_keys == {"batch_size", "learning_rate", "compile", "loss"}
    assert source.program == "gptfit" and source.ignored == {"device": "device=cpu"}
    assert read_config("batch_size=5", ["n_layer=3"]).run.n_layer == 3


def test_what_an_override_cannot_be():
    assert 'unknown key "batchsize"; did you mean batch_size?' in error_of(None, "batchsize=3")
    assert "expected KEY=VALUE" in error_of(None, "compile")
    assert "has no value" in error_of(None, "compile=")
    assert "expected full or chunked" in error_of(None, "loss=off")
    assert 'unknown preset "gpt2-xxl"; did you mean gpt2-xl' in error_of("gpt2-xxl")


# --- YAML and TOML ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty"),
        ("  \n\n", "is empty"),
        ("# nothing\n", "holds no keys"),
        ("- 1\n- 2\n", "expected keys and values"),
        ("batch_size\n", "expected keys and values"),
        ("n_layer: 2\nbatch_size: 3\nn_layer: 4\n", 'a.yaml:3: duplicate key "n_layer"'),
        ("n_layer: 2\n\nbatchsize: 3\n", 'a.yaml:3: unknown key "batchsize"; did you mean batch_size?'),
        ("n_layer: !!python/object/apply:os.system ['true']\n", "a.yaml:1: the tag"),
        ("!!python/object:os.x\nn_layer: 2\n", "the tag"),
        ("n_layer: !!int '2'\n", "the tag"),
        ("n_layer: [1, 2]\n", "n_layer is a list"),
        ("model:\n  n_layer: 2\n", "model is a mapping"),
        ("? [1]\n: 2\n", "a key is a list"),
        ("n_layer: 2\n---\nn_head: 2\n", "second document"),
        ("n_layer: *who\n", "a.yaml:1"),
        ("n_layer: 2\n\tbad: [\n", "not YAML"),
        ("n_layer: \x01\n", "not YAML"),
        ("n_layer: " + "[" * 50000, "n_layer is a list"),
        ("n_layer:\n", "n_layer=None: expected a valid integer"),
        ("batch_size: 9" + "9" * 5000 + "\n", "batch_size=9"),
    ],
)
def test_yaml_that_is_no_config_is_one_line(tmp_path, text, expected):
    path = tmp_path / "a.yaml"
    path.write_bytes(text.encode())
    assert expected in error_of(path)


def test_yaml_anchors_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.YML"
    path.write_bytes(b"\xef\xbb\xbfmax_iters: &n 500\nlr_decay_iters: *n\n")
    assert read_config(str(path)).run.lr_decay_iters == 500


def test_toml(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text('n_layer = 3\nlearning_rate = 3e-4\ncompile = false\ndataset = "x"\n')
    run = read_config(str(path)).run
    assert (run.n_layer, run.learning_rate, run.compile, run.dataset) == (3, 3e-4, False, "x")
    for text, expected in [
        ("n_layer = 3\nn_layer = 4\n", "not TOML"),
        ("[model]\nn_layer = 3\n", "model is not a single value"),
        ("nlayer = 3\n", "did you mean n_layer?"),
        ("n_layer = " + "9" * 5000, "a.toml: "),
        ("n_layer = " + "[" * 20000, "a.toml: "),
        ("# only\n", "holds no keys"),
    ]:
        path.write_text(text)
        assert expected in error_of(path)


def test_files_that_are_something_else(tmp_path):
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").write_text("{}")
    (tmp_path / "run.yaml").write_text("n_layer: 2\n")
    (tmp_path / "notes.txt").write_text("hello\n")
    (tmp_path / "weights.yaml").write_bytes(bytes(range(256)))
    (tmp_path / "zeros.py").write_bytes(b"batch_size = 1\0\n")
    (tmp_path / "long.py").write_bytes(b"batch_size = 1\n" * 100000)
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    assert "is a directory" in error_of(tmp_path / "hub")
    assert "did you mean run.yaml" in error_of(tmp_path / "rum.yaml")
    assert "did you mean gpt2?" in error_of(tmp_path / "gpt2.yaml")
    assert "another kind, expected .yaml" in error_of(tmp_path / "notes.txt")
    assert "not UTF-8 text" in error_of(tmp_path / "weights.yaml")
    assert "binary" in error_of(tmp_path / "zeros.py")
    assert "longer than" in error_of(tmp_path / "long.py")
    assert "not a regular file" in error_of(tmp_path / "pipe.yaml")
    error_of(tmp_path / "loop.yaml")
    for odd in ("", "a\0b.yaml", "x" * 5000 + ".yaml", "\n", "é\ud800.yaml", "/", "no/such/dir"):
        error_of(odd)


PIECES = st.sampled_from(
    [
        *(
            "n_layer",
            "batch_size",
            "loss",
            ": ",
            " = ",
            "\n",
            "3",
            "-",
            "[",
            "]",
            "{",
            "}",
            '"',
            "'",
            "!!int ",
            "&a ",
            "*a",
        ),
        *(
            "#",
            "true",
            "(",
            ")",
            ",",
            "def f():\n  ",
            "if ",
            " else ",
            "**",
            "\t",
            "%",
            "\\",
            "\x7f",
            "é",
            "---\n",
            "x",
        ),
    ]
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.sampled_from([".yaml", ".toml", ".py", ".json"]), st.lists(PIECES).map("".join) | st.binary())
def test_any_file_is_a_run_or_one_line(tmp_path, suffix, content):
    path = tmp_path / f"any{suffix}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        assert isinstance(read_config(str(path)).run, RunConfig)
    except GptfitError as error:
        assert len(error.message.splitlines()) == 1 and len(error.message) < 500


# --- nanoGPT ---

SMALL = """
# a small run on one card
import time

out_dir = 'out-small'
wandb_run_name = 'small-' + str(time.time())
wandb_log, always_save_checkpoint = False, True
dataset = 'shakespeare_char'
seed = int(time.time())

width = 64  # of one head
n_layer = n_head = 4
n_embd = n_head * width
batch_size: int = 2 ** 5
block_size = 1 << 8
batch_size //= 2
gradient_accumulation_steps = (5 * 8) if batch_size < 20 else 1
learning_rate = 1e-3; min_lr = learning_rate / 10
compile = not True
"""


def test_a_nanogpt_config_is_read_as_data(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(SMALL)
    source = read_config(str(path), ["--n_layer=3"])
    run = source.run
    assert (run.n_layer, run.n_head, run.n_embd, run.batch_size, run.block_size) == (3, 4, 256, 16, 256)
    assert (run.gradient_accumulation_steps, run.learning_rate, run.min_lr, run.compile) == (40, 1e-3, 1e-4, False)
    assert (run.vocab_size, run.seed, run.dataset) == (65, 1337, "shakespeare_char")
    assert any("65" in note for note in source.notes)
    assert source.program == "nanogpt"
    assert source.ignored["wandb_run_name"] == "wandb_run_name = 'small-' + str(time.time())"
    assert set(source.ignored) == {"out_dir", "wandb_run_name", "wandb_log", "always_save_checkpoint", "seed"}
    assert "width" not in source.user_keys and "n_embd" in source.user_keys


@given(st.dictionaries(st.sampled_from(sorted(TRAIN_PY)), st.integers(1, 9), max_size=6))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_reading_agrees_with_executing(tmp_path, picks):
    numeric = {k: v for k, v in picks.items() if isinstance(TRAIN_PY[k], int) and not isinstance(TRAIN_PY[k], bool)}
    lines = ["factor = 2 ** 3 - 6", "n_head = 1", "log_interval = 5 * factor"]
    lines += [f"{key} = {value} * factor + (n_head // 1) % 7" for key, value in numeric.items() if key != "n_head"]
    path = tmp_path / "a.py"
    path.write_text("\n".join(lines))
    executed = {**TRAIN_PY, **OTHER_TRAIN_PY}
    exec(path.read_text(), executed)
    run = read_config(str(path)).run
    assert {key: getattr(run, key) for key in TRAIN_PY} == {key: executed[key] for key in TRAIN_PY}


@pytest.mark.parametrize("size", PRETRAINED)
def test_init_from_gpt2_is_that_models_shape(tmp_path, size):
    path = tmp_path / "finetune.py"
    path.write_text(f"init_from = '{size}'\nbatch_size = 1\ndataset = 'shakespeare_char'\nblock_size = 256\n")
    run = read_config(str(path)).run
    # Parameters of OpenAI's checkpoints, positions cropped to 256.
    published = dict(zip(PRETRAINED, (124_439_808, 354_823_168, 774_030_080, 1_557_611_200), strict=True))
    assert n_params(derive(run, block_size=1024)) == published[size]
    assert (run.bias, run.vocab_size, run.block_size) == (True, 50257, 256)
    assert read_config(str(path), ["--init_from=scratch"]).run.n_layer == 12
    other = read_config(str(path), ["n_layer=3"])
    assert other.run.n_layer == 3 and any("n_layer=3 is kept" in note for note in other.notes)
    assert 'unknown init_from "gpt2-huge"' in error_of(path, "init_from=gpt2-huge")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("batch_size = compute()\n", 'a.py:1: "batch_size = compute()" would have to be executed'),
        ("\nbatch_size = int('8')\n", "a.py:2: "),
        ("import math\nn_layer = math.pi\n", "a.py:2: "),
        ("n_embd = [64][0]\n", "a.py:1: "),
        ("n_embd = (lambda: 3)()\n", "a.py:1: "),
        ("n_layer, n_head = 2, 3, 4\n", "a.py:1: "),
        ("n_layer = undefined_name\n", "a.py:1: "),
        ("max_iters = 10**10**10\n", "a.py:1: "),
        ("max_iters = 2 ** 99999999999\n", "a.py:1: "),
        ("max_iters = 1 << 10**9\n", "a.py:1: "),
        ("max_iters = 1 // 0\n", "a.py:1: "),
        ("dropout = 1e300 ** 10\n", "a.py:1: "),
        ("n_layer = 'a' * 10**10\n", "a.py:1: "),
        ("n_layer = (-1) ** 0.5\n", "a.py:1: "),
        ("n_layer = " + "-" * 3000 + "1\n", "a.py"),
        ("n_layer = " + "(" * 3000 + "1" + ")" * 3000 + "\n", "a.py"),
        ("n_layer = " + "1+" * 50000 + "1\n", "a.py"),
        ("n_layer = " + "a." * 50000 + "b\n", "a.py"),
        ("if 0:\n n_layer = 1\n" + "elif 0:\n n_layer = 2\n" * 5000, "a.py"),
        ("n_layer = " + "9" * 5000 + "\n", "a.py"),
        ("for n_layer in range(3):\n    pass\n", "a.py:1: "),
        ("with open('x') as f:\n    batch_size = 3\n", "a.py:1: "),
        ("if big():\n    batch_size = 3\n", "a.py:1: "),
        ("from base import *\n", "a.py:1: "),
        ("exec(open('base.py').read())\n", "a.py:1: "),
        ("globals()['batch_size'] = 3\n", "a.py:1: "),
        ("wandb_run_name = str(batch_size := 3)\n", "a.py:1: "),
        ("batch_size = 3\ndel batch_size\n", "a.py:2: "),
        ("def f():\n    global batch_size\n    batch_size = 2\nf()\n", "a.py:1: "),
        ("batchsize = 8\n", 'a.py:1: unknown key "batchsize"; did you mean batch_size?'),
        ("batch_size = \n", "a.py:1: not Python"),
        ("batch_size = 0\n", "batch_size=0"),
        ("batch_size = None\n", "batch_size=None"),
        ("batch_size = (1, 2)\n", "batch_size=(1, 2)"),
        ("x = 1\nprint(x)\n", "sets no key"),
        ("# nothing\n", "sets no key"),
    ],
)
def test_a_nanogpt_config_that_needs_execution_is_refused(tmp_path, text, expected):
    path = tmp_path / "a.py"
    path.write_text(text)
    assert expected in error_of(path)


def test_what_bears_on_nothing_may_be_anything(tmp_path):
    path = tmp_path / "a.py"
    path.write_text(
        "'''about'''\nimport os, time as clock\nwandb_notes = [x for x in os.listdir('.')]\n"
        "def helper(batch_size):\n    batch_size = 3\n    return batch_size\n"
        "print('hi')\nos.environ['A'] = 'b'\nout_dir = helper(2)\n_private = object()\n"
        "name = '\\d'\nout_dir = name + dataset\nbatch_size = compute()\nbatch_size = 7\n"
    )
    source = read_config(str(path))
    assert source.run.batch_size == 7
    assert set(source.ignored) == {"wandb_notes", "out_dir"}


def test_an_override_stands_in_for_an_expression(tmp_path):
    path = tmp_path / "a.py"
    path.write_text("import torch\ndtype = 'bfloat16' if torch.cuda.is_available() else 'float16'\n")
    assert "a.py:2: " in error_of(path)
    assert read_config(str(path), ["dtype=float16"]).run.dtype == "float16"


def test_defaults_are_nanogpts_not_ours(tmp_path):
    path = tmp_path / "a.py"
    path.write_text("learning_rate = 3e-5\nmax_iters = 20\n")
    run = read_config(str(path)).run
    assert (run.min_lr, run.lr_decay_iters, run.loss, run.expandable_segments) == (6e-5, 600000, "full", False)


EXPRESSIONS = st.recursive(
    st.integers(-20, 20).map(lambda n: f"({n})") | st.floats(0.1, 9.0).map(repr),
    lambda inner: st.tuples(inner, st.sampled_from(["+", "-", "*", "/", "//", "%", "**"]), inner).map(
        lambda parts: f"({' '.join(parts)})"
    ),
    max_leaves=6,
)


@given(EXPRESSIONS)
def test_arithmetic_is_pythons_or_refused(text):
    try:
        value = evaluate(ast.parse(text, mode="eval").body, {})
    except NotConstant:
        return
    assert repr(value) == repr(eval(text))  # repr: nan differs from itself


# --- Hugging Face ---

GPT2 = {"model_type": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024, "vocab_size": 50257}
LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}


def write_json(tmp_path, *parts, **more):
    path = tmp_path / "config.json"
    data = {key: value for part in parts for key, value in part.items()} | more
    path.write_text(json.dumps({key: value for key, value in data.items() if value != "drop"}))
    return path


def test_hugging_face_shapes(tmp_path):
    run = read_config(str(write_json(tmp_path, GPT2, n_inner=None, architectures=["GPT2LMHeadModel"]))).run
    assert n_params(run) == 124_439_808
    source = read_config(str(write_json(tmp_path, LLAMA, hidden_act="silu", bos_token_id=1)), ["block_size=512"])
    assert n_params(source.run) == PUBLISHED["tinyllama-1.1b"]
    assert source.run.block_size == 512 and source.program == "gptfit" and "bos_token_id" in source.ignored
    assert {"n_layer", "n_kv_head", "block_size"} <= source.user_keys
    run = read_config(str(write_json(tmp_path, LLAMA, rope_parameters={"rope_theta": 5e5, "rope_type": "llama3"}))).run
    assert run.rope_theta == 5e5
    source = read_config(str(write_json(tmp_path, LLAMA, model_type="qwen2", tie_word_embeddings=True)))
    assert source.run.tie_embeddings and any(f"{22 * (2048 + 512):d}" in note for note in source.notes)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({**GPT2, "model_type": "gpt_neox"}, 'model_type "gpt_neox" is not known'),
        ({**GPT2, "model_type": ["x"]}, "is not known"),
        ({**GPT2, "model_type": "drop"}, "no model_type"),
        ({**GPT2, "n_layer": "drop"}, "has no n_layer"),
        ({**GPT2, "n_layer": "12"}, 'n_layer="12": expected an integer'),
        ({**GPT2, "n_layer": True}, "expected an integer"),
        ({**GPT2, "n_layer": 10**4000}, "expected at most"),
        ({**GPT2, "n_head": 0}, "n_head=0"),
        ({**GPT2, "activation_function": "relu"}, "activation_function"),
        ({**LLAMA, "head_dim": 128}, "head_dim 128"),
        ({**LLAMA, "num_attention_heads": 0, "attention_bias": True}, "n_head=0"),
        ({**LLAMA, "hidden_act": "gelu"}, "hidden_act"),
        ({**LLAMA, "rope_theta": "x"}, "rope_theta"),
        ({**LLAMA, "rope_parameters": {"rope_theta": {}}}, "rope_theta"),
        ({**LLAMA, "rope_parameters": []}, "expected an object"),
    ],
)
def test_hugging_face_configs_that_are_refused(tmp_path, parts, expected):
    assert expected in error_of(write_json(tmp_path, parts))


def test_json_that_is_no_config(tmp_path):
    path = tmp_path / "config.json"
    cases = ["[]", "3", "{", '{"a": 1, "a": 2}', "[" * 100000, '{"model_type": ' + "9" * 5000 + "}", "NaN"]
    for text in cases:
        path.write_text(text)
        assert "config.json" in error_of(path) or "duplicate" in error_of(path)


def test_the_door_imports_neither_torch_nor_numpy():
    code = (
        "import sys; from gptfit.door import read_config; read_config('tiny');"
        "print([m for m in ('torch', 'numpy', 'tiktoken', 'tomllib') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "[]", result.stderr
