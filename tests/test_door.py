"""The doors by which a config comes in: round trips, layers, and one line for whatever cannot be read."""

import os
import subprocess
import sys

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from config_checks import PUBLISHED, error_of, n_params
from gptfit.config import KEYS, RunConfig, derive, make_run
from gptfit.door import format_run, read_config, save_run
from gptfit.errors import GptfitError
from gptfit.flatfile import parse_yaml
from gptfit.nanogpt_file import PRETRAINED
from gptfit.presets import MODELS, load_preset, preset_names
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
    assert error_of(tmp_path / "loop.yaml") == f'"{tmp_path / "loop.yaml"}" is a link that leads nowhere'
    assert "longer than" in error_of(tmp_path / "long.py")
    assert "not a regular file" in error_of(tmp_path / "pipe.yaml")
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


def test_the_door_imports_neither_torch_nor_numpy():
    code = (
        "import sys; from gptfit.door import read_config; read_config('tiny');"
        "print([m for m in ('torch', 'numpy', 'tiktoken', 'tomllib') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "[]", result.stderr
