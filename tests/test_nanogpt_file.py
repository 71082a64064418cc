"""nanoGPT configs: read as data, in agreement with executing them, and refused where they need execution."""

import ast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from config_checks import error_of, n_params
from gptfit.config import derive
from gptfit.door import read_config
from gptfit.nanogpt_file import OTHER_TRAIN_PY, PRETRAINED, TRAIN_PY
from gptfit.pyconst import NotConstant, evaluate

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
