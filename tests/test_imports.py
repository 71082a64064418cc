"""What answers at once imports nothing heavy: checked in a fresh interpreter, command by command."""

import json
import subprocess
import sys
from pathlib import Path

HEAVY = ("torch", "numpy", "tiktoken", "safetensors")

# Runs each command line, then says which heavy modules are there.
SCRIPT = """
import json, sys
from gptfit.cli import main

heavy, lines = json.loads(sys.argv[1])
seen = {}
for line in lines:
    try:
        main(line)
    except SystemExit as end:
        code = end.code
    seen[" ".join(line)] = [code, [name for name in heavy if name in sys.modules]]
print(json.dumps(seen), file=sys.stderr)
"""

PASTE = """Traceback (most recent call last):
  File "train.py", line 301, in <module>
    scaler.scale(loss).backward()
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 11.60 GiB of \
which 1.02 GiB is free. Including non-PyTorch memory, this process has 10.50 GiB memory in use. Of the allocated \
memory 9.90 GiB is allocated by PyTorch, and 299.12 MiB is reserved by PyTorch but unallocated.
"""


def heavy_after(lines: list[list[str]], heavy: tuple[str, ...] = HEAVY) -> dict[str, tuple[int, list[str]]]:
    """For each command line its exit code and the heavy modules that are imported once it has run."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([heavy, lines])], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stderr.splitlines()[-1])


def test_commands_that_answer_at_once_import_nothing_heavy(tmp_path: Path) -> None:
    paste, trace = tmp_path / "paste.txt", tmp_path / "trace.json"
    paste.write_text(PASTE)
    trace.write_text(json.dumps({"format": "cuda-caching-allocator-trace/1", "events": [["A", 4096, 512, 0, 0, -1]]}))
    lines = [
        ["--help"],
        ["models"],
        ["gpus"],
        ["gpus", "rtx4070"],
        ["estimate", "gpt2"],
        ["estimate", "gpt2", "--gpu", "rtx4070", "--json"],
        ["plan", "--gpu", "rtx4070"],
        ["plan", "--gpu", "rtx4070", "--json"],
        ["plan", "--gpu", "rtx4070,l4", "--tokens", "1B", "--price-per-kwh", "0.3"],
        ["explain-oom", str(paste)],
        ["replay", str(trace)],
    ]
    seen = heavy_after(lines)
    assert {line: names for line, (_, names) in seen.items() if names} == {}
    failed = {line: code for line, (code, _) in seen.items() if code not in (0, 1)}
    assert failed == {}, "a command that fails early proves nothing"


def test_what_is_not_there_is_told_before_torch_is_loaded(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    lines = [
        ["sample", "--out", missing],
        ["export", "--out", missing],
        ["export", "--format", "gguf"],
        ["trace", f"{missing}.py:make"],
        ["trace", missing],
        ["train", f"{missing}.yaml"],
        ["verify", f"{missing}.yaml"],
    ]
    assert list(heavy_after(lines).values()) == [[2, []]] * len(lines)


def test_this_check_can_fail() -> None:
    seen = heavy_after([["models"]], heavy=("typer",))
    assert [names for _, names in seen.values()] == [["typer"]]


def test_help_imports_typer_alone() -> None:
    seen = heavy_after([["--help"]], heavy=("pydantic", "rich", "yaml", "gptfit.config", "gptfit.estimate"))
    assert seen == {"--help": [0, []]}
