"""The command line as a person or a script meets it: exit codes, pure JSON, one error line with what to type."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from gptfit.errors import GptfitError

NANOGPT_CONFIG = """# config/train_gpt2.py, in short
wandb_log = True
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8
n_layer = 2
"""


@pytest.fixture
def nanogpt_config(tmp_path: Path) -> str:
    path = tmp_path / "train_small.py"
    path.write_text(NANOGPT_CONFIG)
    return str(path)


# Exit codes


@pytest.mark.parametrize(
    ("words", "code", "verdict"),
    [
        (("estimate", "gpt2", "batch_size=1", "--gpu", "rtx4090"), 0, "fits"),
        (("estimate", "gpt2-xl", "--gpu", "gtx1650"), 1, "does_not_fit"),
        (("estimate", "gpt2"), 0, None),
        (("plan", "--gpu", "rtx4090"), 0, "fits"),
        (("plan", "gpt2-xl", "--gpu", "gtx1650"), 1, "does_not_fit"),
    ],
)
def test_the_verdict_is_the_exit_code(gptfit: Any, words: tuple[str, ...], code: int, verdict: str | None) -> None:
    result = gptfit(*words, "--json")
    assert (result.code, json.loads(result.out)["verdict"], result.err) == (code, verdict, "")
    first = {"fits": "Fits: ", "does_not_fit": "Does not fit: ", None: "Needs "}[verdict]
    shown = gptfit(*words)
    assert shown.code == code
    assert shown.out.startswith(first)


# Errors: one line, the nearest choice, a hint, nothing on stdout


@pytest.mark.parametrize(
    ("words", "error", "hint"),
    [
        ("estimate gpt2 --gpu rtx4071", 'unknown GPU "rtx4071"; did you mean rtx4070', "gptfit gpus"),
        ("estimate gpt3", 'unknown preset "gpt3"; did you mean gpt2', "gpt2-medium"),
        ("estimate batchsize=8", 'unknown key "batchsize"; did you mean batch_size?', "n_layer"),
        ("estimate --batchsize=8", 'unknown option "--batchsize"; did you mean --batch_size', "--help"),
        ("estimate batch_size=-4", "batch_size=-4: expected greater than or equal to 1", "KEY=VALUE"),
        ("estimate n_embd=100", "n_embd 100 is not divisible by n_head 12", ""),
        ("estimate dtype=bf16", "dtype=bf16: expected float32, bfloat16 or float16; did you mean bfloat16?", ""),
        ("estimate missing.yaml", 'there is no file "missing.yaml"', ""),
        ("estimate .", '"." is a directory', ""),
        ("estimate gpt2 gpt2-xl", 'unexpected "gpt2-xl"', "KEY=VALUE"),
        ("estimate gpt2 --reserve 2GB", 'unknown unit "GB"', "GiB"),
        ("estimate gpt2 --gpu rtx4070 --reserve -1GiB", 'the size "-1GiB" is negative', ""),
        ("estimate gpt2 --program nanoGPT", 'unknown program "nanoGPT"; did you mean nanogpt?', "nanogpt"),
        ("plan gpt2 --gpuu rtx4070", 'unknown option "--gpuu"; did you mean --gpu', "gptfit plan --help"),
        ("plan gpt2 --batch_size 8", "--batch_size has no value", "batch_size=VALUE"),
        ("plan gpt2 -x", 'unknown option "-x"', "gptfit plan --help"),
        ("plan gpt2 --gpu", "option '--gpu' requires an argument", "--help"),
        ("plan gpt2 --tokens-per-step 10 --gpu rtx4070", "tokens per step 10 is less than", "block_size"),
        ("plan gpt2", "there is no GPU driver here", "--gpu rtx4070"),
        ("estimate gpt2 --gpu auto", "there is no GPU driver to ask", "--gpu rtx4070"),
        ("plan --gpus 0", "invalid value for '--gpus': expected greater than or equal to 1", "gptfit plan --help"),
        ("plan --gpu rtx4070 --keep los", '--keep: unknown key "los"; did you mean loss?', "n_layer"),
        ("estimate gpt2 --gpu rtx4070,l4", '--gpu "rtx4070,l4" names several cards', "gptfit plan --gpu rtx4070,l4"),
        ("estimate gpt2 --gpu all", '--gpu "all" names several cards', "gptfit plan --gpu all"),
        ("estimate n_layer=1000000000", "n_layer=1000000000: expected less than or equal to 2000", "KEY=VALUE"),
        ("explain-oom missing.txt --program nanoGPT", 'unknown program "nanoGPT"; did you mean nanogpt?', "nanogpt"),
        ("accuracy missing.jsonl", "cannot read missing.jsonl: no such file or directory", "JSON object"),
        ("train missing.yaml", 'there is no file "missing.yaml"', ""),
        ("plna gpt2", "no such command 'plna'; did you mean 'plan'", "gptfit --help"),
        ("replay missing.json", "cannot read missing.json: ", "path of a recording"),
        ("explain-oom missing.txt", 'cannot read "missing.txt": no such file', "gptfit explain-oom"),
        ("sample --out missing", 'there is no checkpoint in "missing"', "--out"),
        ("estimate gpt2 --reserve 2GiB", "--reserve 2GiB is what others hold on a card", "--gpu rtx4070"),
        ("data prepare missing.txt --out d", 'there is no file or folder "missing.txt"', ""),
    ],
)
def test_an_error_is_one_line_and_a_hint(
    gptfit: Any, words: str, error: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = gptfit(*words.split())
    lines = result.err.splitlines()
    assert (result.code, result.out) == (2, "")
    assert lines[0].startswith(f"error: {error}"), result.err
    assert [line.partition(" ")[0] for line in lines] == ["error:", "hint:"]
    assert hint in lines[1]
    assert gptfit(*words.split(), "--json").out == ""


def test_a_config_that_calls_a_function_is_refused_not_run(gptfit: Any, tmp_path: Path) -> None:
    path = tmp_path / "config.py"
    path.write_text("batch_size = int(open('ran', 'w').write('12'))\n")
    result = gptfit("estimate", str(path))
    assert (result.code, result.out) == (2, "")
    assert "would have to be executed to know batch_size" in result.err
    assert not Path("ran").exists()
    # Given on the command line, the value is known.
    assert gptfit("estimate", str(path), "batch_size=4").code == 0


def test_a_group_alone_says_what_it_has(gptfit: Any) -> None:
    result = gptfit("data")
    assert (result.code, result.err) == (0, "")
    assert "prepare" in result.out


def test_no_measurement_is_no_pass(gptfit: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n")
    result = gptfit("accuracy", str(path))
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: there is no measurement in ")


def test_a_name_with_its_size_is_one_card(gptfit: Any) -> None:
    """As nvidia-smi --query-gpu=name,memory.total --format=csv prints it."""
    card = "NVIDIA GeForce RTX 4070, 12282 MiB"
    assert gptfit("plan", "--gpu", card).out == gptfit("plan", "--gpu", "rtx4070").out


def test_a_kept_micro_batch_is_the_only_one(gptfit: Any) -> None:
    words = ("plan", "--gpu", "rtx4070", "--json", "batch_size=5")
    assert json.loads(gptfit(*words).out)["choice"]["batch_size"] != 5
    kept = json.loads(gptfit(*words, "--keep", "batch_size").out)
    assert {candidate["choice"]["batch_size"] for candidate in kept["candidates"]} == {5}
    steps = json.loads(gptfit(*words, "--keep", "gradient_accumulation_steps").out)["choice"]
    assert steps["gradient_accumulation_steps"] == 40


# CONFIG and overrides


def test_overrides_are_typed_in_either_form_and_any_order(gptfit: Any) -> None:
    first = gptfit("estimate", "gpt2", "batch_size=3", "n_layer=2", "--json")
    assert json.loads(first.out)["config"]["batch_size"] == 3
    for words in (
        ("--json", "--batch_size=3", "gpt2", "--n_layer=2"),
        ("n_layer=2", "--json", "--batch-size=3"),
        ("n_layer=2", "batch_size=3", "gpt2", "--json", "--"),
    ):
        assert gptfit("estimate", *words).out == first.out


def test_a_nanogpt_config_is_answered_for_both_programs(gptfit: Any, nanogpt_config: str) -> None:
    result = gptfit("estimate", nanogpt_config, "--batch_size=2", "--gpu", "rtx4090")
    assert "nanogpt's code" in result.out
    assert "Under gptfit's code the same run fits" in result.out
    assert "1 key without effect" in result.out
    assert "wandb_log = True" in gptfit("estimate", nanogpt_config, "-v").out
    assert json.loads(gptfit("estimate", nanogpt_config, "--json").out)["program"] == "nanogpt"
    chosen = gptfit("estimate", nanogpt_config, "--program", "gptfit")
    assert "gptfit's code" in chosen.out and "Under" not in chosen.out


def test_a_saved_plan_is_the_run_that_was_chosen(gptfit: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "run.yaml")
    planned = gptfit("plan", "gpt2", "n_layer=2", "--gpu", "rtx4070", "--save", path, "--json")
    choice = json.loads(planned.out)["choice"]
    again = json.loads(gptfit("estimate", path, "--gpu", "rtx4070", "--json").out)
    assert again["verdict"] == "fits"
    assert {key: again["config"][key] for key in choice} == choice
    assert f"gptfit train {path}" in gptfit("plan", "gpt2", "n_layer=2", "--gpu", "rtx4070", "--save", path).out


def test_a_name_with_spaces_is_quoted_in_what_to_type(gptfit: Any, tmp_path: Path) -> None:
    path = tmp_path / "my rün.yaml"
    shown = gptfit("plan", "--gpu", "rtx4070", "--save", str(path)).out
    assert shown.rstrip().endswith(f"gptfit train '{path}'")
    assert gptfit("estimate", str(path), "--gpu", "rtx4070").code == 0


def test_what_to_type_next_can_be_typed(gptfit: Any, nanogpt_config: str) -> None:
    """The commands that an answer ends with are accepted, and are about the run that was asked for."""
    shown = gptfit("plan", nanogpt_config, "--batch_size=64", "n_layer=12", "--gpu", "rtx4070").out
    typed = [
        line.split("    (")[0].split() for line in shown.splitlines() if line.startswith(("  gptfit ", "  python "))
    ]
    assert ["python", "train.py", nanogpt_config] in [words[:3] for words in typed]
    train = next(words for words in typed if words[:2] == ["gptfit", "train"])
    answer = gptfit("estimate", *train[2:], "--program", "gptfit", "--gpu", "rtx4070", "--json")
    assert json.loads(answer.out)["verdict"] == "fits"


# explain-oom: where the text comes from


class Pipe(io.TextIOWrapper):
    """A stdin that is no terminal."""


def test_a_paste_comes_from_a_file_or_a_pipe(gptfit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of "
        "11.60 GiB of which 1.02 GiB is free. Process 1 has 10.50 GiB memory in use.\n"
    )
    path = tmp_path / "train.log"
    path.write_text(text, encoding="utf-8")
    answers = [gptfit("explain-oom", str(path), "--json")]
    for words in (("--json",), ("-", "--json")):
        monkeypatch.setattr(sys, "stdin", Pipe(io.BytesIO(text.encode())))
        answers.append(gptfit("explain-oom", *words))
    path.write_text(text, encoding="utf-16")  # as PowerShell's > writes it
    answers.append(gptfit("explain-oom", str(path), "--json"))
    assert [answer.code for answer in answers] == [0] * 4
    assert len({answer.out for answer in answers}) == 1
    assert json.loads(answers[0].out)["tried_bytes"] == 3 << 29


def test_text_that_is_no_out_of_memory_error_is_the_answer_no(gptfit: Any, tmp_path: Path) -> None:
    path = tmp_path / "train.log"
    path.write_text("Traceback (most recent call last):\n  File \"a.py\", line 1, in <module>\nKeyError: 'x'\n")
    result = gptfit("explain-oom", str(path), "--json")
    assert (result.code, json.loads(result.out)["kind"]) == (1, "not_oom")


@pytest.mark.parametrize(
    ("raw", "reason"), [(b"", "is empty"), (b" \n\n", "is empty"), (b"\x89PNG\0\0\x1a", "is binary")]
)
def test_what_is_no_text_cannot_be_explained(gptfit: Any, tmp_path: Path, raw: bytes, reason: str) -> None:
    path = tmp_path / "train.log"
    path.write_bytes(raw)
    result = gptfit("explain-oom", str(path))
    assert (result.code, result.out) == (2, "")
    assert reason in result.err.splitlines()[0]


def test_of_a_long_log_the_end_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gptfit import logfile

    monkeypatch.setattr(logfile, "MAX_LOG_BYTES", 20)
    path = tmp_path / "train.log"
    path.write_bytes(b"step 1\n" * 1000 + b"the error")
    text = logfile.read_log(str(path))
    assert text.endswith("the error") and len(text) == 20
    monkeypatch.setattr(sys, "stdin", Pipe(io.BytesIO(b"x" * 100 + b"the error")))
    assert logfile.read_log(None).endswith("xthe error")
    monkeypatch.setattr(sys, "stdin", Pipe(io.BytesIO(b"x" * (3 << 20))))
    with pytest.raises(GptfitError, match="of text came in"):
        logfile.read_log("-")


# replay


TRACE = {
    "format": "cuda-caching-allocator-trace/1",
    "event_fields": ["kind", "address", "bytes", "stream", "us", "tag"],
    "events": [
        ["A", 4096, 3 << 20, 0, 0, -1],  # out of a new segment of 20 MiB
        ["A", 8192 << 10, 12 << 20, 0, 1, -1],  # out of the same one
        ["F", 4096, 3 << 20, 0, 2, -1],
        ["A", 1 << 30, 30 << 20, 0, 3, -1],  # a segment of its own
    ],
}


def test_a_recording_is_replayed(gptfit: Any, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(TRACE))
    done = gptfit("replay", str(path), "--json")
    answer = json.loads(done.out)
    assert (done.code, answer["schema"], answer["events"]) == (0, "gptfit.replay/1", 4)
    assert (answer["peak_allocated_bytes"], answer["peak_reserved_bytes"]) == (42 << 20, 50 << 20)
    assert "50.00 MiB reserved at most" in gptfit("replay", str(path)).out
    short = gptfit("replay", str(path), "--capacity", "40MiB")
    assert short.code == 1 and short.out.startswith("Out of memory: event 3 asked for 30.00 MiB")
    expandable = json.loads(gptfit("replay", str(path), "--expandable-segments", "--json").out)
    assert expandable["peak_reserved_bytes"] == (60 << 20)  # pages of 20 MiB; the first has 5 MiB left at its end


# Cards, presets, measurements


def test_a_machine_without_a_driver_says_so(gptfit: Any) -> None:
    shown, record = gptfit("gpus", "--detect"), gptfit("gpus", "--detect", "--json")
    assert (shown.code, record.code) == (1, 1)
    assert json.loads(record.out) == {"schema": "gptfit.detected/1", "gpus": []}
    assert shown.out.startswith("No NVIDIA driver answers")


def test_what_the_driver_says_is_free_is_the_budget(gptfit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from gptfit.driver import DriverGpu, DriverProcess

    desktop = DriverProcess(7, "Xorg", 900 << 20)
    cards = [
        DriverGpu(0, "GPU-aa", "NVIDIA GeForce RTX 4070", 12282 << 20, 10 << 30, 2 << 30, "580.1", (desktop,)),
        DriverGpu(1, "GPU-bb", "NVIDIA GeForce RTX 3090", 24576 << 20, 20 << 30, 4 << 30, "580.1"),
    ]
    monkeypatch.setattr("gptfit.driver.detect", lambda: cards)

    def usable(*words: str) -> tuple[str, int]:
        gpu = json.loads(gptfit("estimate", "gpt2", "n_layer=1", *words, "--json").out)["gpu"]
        return gpu["name"], gpu["usable_bytes"]

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert usable() == usable("--gpu", "auto") == ("rtx4070", 10 << 30)
    assert usable("--reserve", "1GiB") == usable("--gpu", "rtx4070", "--reserve", "1GiB")
    assert "beside Xorg" in gptfit("estimate", "gpt2", "n_layer=1").out
    for visible in ("1", "GPU-bb", "1,0"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert usable() == ("rtx3090", 20 << 30)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gptfit("plan").code == 2
    assert "Xorg" in gptfit("gpus", "--detect").out


@pytest.mark.parametrize(("mib", "code"), [(325.4, 0), (400.0, 1)])
def test_a_missed_gate_is_the_exit_code(gptfit: Any, tmp_path: Path, mib: float, code: int) -> None:
    from gptfit.accuracy import ROWS

    rows = map(json.loads, ROWS.read_text().splitlines())
    row = next(row for row in rows if row["id"] == "rtx3060-ladder-small-b8-t256-peak")
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**row, "mib": mib}))
    result = gptfit("accuracy", str(path), "--json")
    assert (result.code, json.loads(result.out)["passed"]) == (code, not code)
    assert gptfit("accuracy", str(path)).out.startswith("Missed: " if code else "Holds: ")
