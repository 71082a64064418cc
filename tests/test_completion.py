"""Completion as a shell asks for it: through the environment, one line a candidate."""

import subprocess
import sys

import pytest

from gptfit.config import KEYS
from gptfit.gpus import gpu_names
from gptfit.presets import preset_names

MAIN = "from gptfit.cli import main; main()"


def offered(line: str, at: int, shell: str = "bash") -> list[str]:
    """What is offered for the word number `at` of `line`, words as bash splits them."""
    environment = {"COMP_WORDS": line, "COMP_CWORD": str(at), "_TYPER_COMPLETE_ARGS": line}
    environment["_TYPER_COMPLETE_FISH_ACTION"] = "get-args"
    environment["_GPTFIT_COMPLETE"] = f"complete_{shell}"
    done = subprocess.run([sys.executable, "-c", MAIN], capture_output=True, text=True, timeout=30, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


def test_config_is_a_preset_or_a_key() -> None:
    assert offered("gptfit plan ", 2) == [*preset_names(), *(f"{key}=" for key in KEYS)]
    assert offered("gptfit plan gpt2 b", 3) == [f"{key}=" for key in KEYS if key.startswith("b")]


@pytest.mark.parametrize(
    ("line", "at", "expected"),
    [
        ("gptfit pl", 1, ["plan"]),
        ("gptfit estimate batch_s", 2, ["batch_size=", "batch_size=12"]),
        ("gptfit plan gpt2 n_kv", 3, ["n_kv_head="]),  # its default follows n_head
        ("gptfit plan gpt2 dtype =", 4, ["float32", "bfloat16", "float16"]),
        ("gptfit plan gpt2 dtype = b", 5, ["bfloat16"]),
        ("gptfit plan gpt2 compile = ", 5, ["True", "False"]),
        ("gptfit plan no_such_key = ", 4, []),
        ("gptfit estimate --program n", 3, ["nanogpt"]),
        ("gptfit estimate --gpu au", 3, ["auto"]),
        ("gptfit plan --gpu rtx4070,a100-8", 3, ["rtx4070,a100-80gb", "rtx4070,a100-80gb-pcie"]),
        ("gptfit explain-oom ", 2, []),  # the shell offers files
        ("gptfit explain-oom train.log batch_s", 3, ["batch_size=", "batch_size=12"]),
        ("gptfit explain-oom --config gpt2-x", 3, ["gpt2-xl"]),
    ],
)  # fmt: skip
def test_what_bash_is_offered(line: str, at: int, expected: list[str]) -> None:
    assert offered(line, at) == expected


def test_cards() -> None:
    assert offered("gptfit estimate --gpu ", 3) == [*gpu_names(), "auto"]
    assert set(offered("gptfit plan --gpu ", 3)) == {*gpu_names(), "auto", "all"}
    assert offered("gptfit gpus rtx4070t", 2) == [name for name in gpu_names() if name.startswith("rtx4070t")]


def test_a_shell_that_keeps_the_word_whole() -> None:
    assert offered("gptfit plan gpt2 dtype=b", 3, "fish") == ["dtype=bfloat16"]
    assert offered("gptfit plan gpt2 nokey=", 3, "fish") == []


def test_it_imports_nothing_heavy() -> None:
    script = (
        "import sys, gptfit.cli as cli\ntry:\n cli.main([])\nexcept SystemExit: pass\n"
        "print([name for name in ('torch', 'numpy', 'tiktoken', 'gptfit.estimate') if name in sys.modules])"
    )
    environment = {"COMP_WORDS": "gptfit plan ", "COMP_CWORD": "2", "_GPTFIT_COMPLETE": "complete_bash"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, env=environment)
    assert "gpt2-xl" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_script_of_bash() -> None:
    done = subprocess.run(
        ["bash", "-c", f"'{sys.executable}' -c '{MAIN}' --show-completion; :"],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert "complete -o default -F _gptfit_completion gptfit" in done.stdout, done.stderr
