"""What a stranger types that cannot be answered: one line each, at the command line and from Python."""

from collections.abc import Callable
from pathlib import Path

import pytest

import gptfit
from gptfit.allowed import ALLOWED_TEXT, LAST_RESORT, allowed
from gptfit.answers import answer
from gptfit.cli import main
from gptfit.errors import GptfitError
from gptfit.units import GiB, parse_size


def typed(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


@pytest.mark.parametrize("text", ["1.5", "11.5", "0.5", "1."])
def test_a_part_of_a_byte_is_no_size(text: str) -> None:
    with pytest.raises(GptfitError, match="has no unit") as refused:
        parse_size(text)
    assert f"{text}GiB" in refused.value.hint
    assert parse_size(f"{text}GiB") == float(text) * GiB


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("plan", "--gpu", "rtx4070", "--reserve", "1.5"), 'the size "1.5" has no unit'),
        (("estimate", "--gpu", "rtx4070", "--reserve", "100GiB"), "others would hold more than rtx4070 has, 11.58 GiB"),
        (("plan", "--gpu", "rtx4070,l4", "--reserve", "30GiB"), "others would hold more than l4 has"),
        (("plan", "--gpu", "rtx4070,all"), 'expected names alone, or all, or auto'),
        (("plan", ""), "the config is an empty text"),
        (("verify", "gpt2", "--gpu", "rtx4070"), "gptfit verify takes no --gpu"),
        (("estimate", "gpt2", "--gpus", "2"), "gptfit estimate takes no --gpus; plan does"),
        (("data", "prepare", "a.txt", "--out", "x", "--shard-size", "1"), "--shard-size 1: expected 1MiB or more"),
        (("data", "prepare", "a.txt", "--out", "x", "--shard-size", "0"), "--shard-size 0: expected 1MiB or more"),
        (("train", "tiny", "eval_only=True"), "eval_only=True: gptfit train changes weights"),
        (("plan", "--gpu", "rtx4070", "--allow", "adam"), 'unknown lever "adam"'),
    ],
)  # fmt: skip
def test_one_line_says_what_is_wrong(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], error: str) -> None:
    code, out, err = typed(capsys, *words)
    assert (code, out) == (2, "")
    assert error in err and len(err.splitlines()) == 2, err


def test_of_several_cards_those_with_room_are_answered_for(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = typed(capsys, "plan", "--gpu", "rtx4070,l4", "--reserve", "15GiB")
    assert code == 0 and out.startswith("Fits: 1 of 2 cards; fastest: l4")
    assert "-" not in next(line for line in out.splitlines() if line.startswith("  rtx4070"))


@pytest.mark.parametrize(
    "call",
    [
        lambda: gptfit.explain_oom(5),  # pyright: ignore[reportArgumentType]
        lambda: gptfit.explain_oom(None),  # pyright: ignore[reportArgumentType]
        lambda: gptfit.explain_oom("CUDA out of memory.", program="x"),
        lambda: gptfit.estimate("gpt2", gpu=7),  # pyright: ignore[reportArgumentType]
        lambda: gptfit.estimate(""),
        lambda: gptfit.plan("gpt2", gpu="rtx4070", tokens_per_step="x"),  # pyright: ignore[reportArgumentType]
        lambda: gptfit.plan("gpt2", gpu="rtx4070", tokens_per_step=0),
        lambda: gptfit.plan("gpt2", gpu="rtx4070", reserve=1.5),  # pyright: ignore[reportArgumentType]
        lambda: gptfit.plan("gpt2", gpu="rtx4070", keep=[5]),  # pyright: ignore[reportArgumentType]
        lambda: gptfit.plan("gpt2", gpu="rtx4070", allow=None),  # pyright: ignore[reportArgumentType]
        lambda: gptfit.plan("gpt2", gpu="rtx4070", program=5),  # pyright: ignore[reportArgumentType]
    ],
)
def test_from_python_it_is_the_promised_error(call: Callable[[], object]) -> None:
    with pytest.raises(GptfitError) as refused:
        call()
    assert refused.value.message and "\n" not in refused.value.message


@pytest.mark.parametrize("namespace", [None, 5, {}, {"batch_size": "x"}, {"batch_size": 4, "n_layer": 10**30}])
def test_a_check_never_stops_a_run(namespace: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert gptfit.check(namespace, gpu="rtx4070") is None  # pyright: ignore[reportArgumentType]
    assert capsys.readouterr().err.startswith("gptfit: no answer: ")


def test_a_name_alone_is_taken_for_several() -> None:
    kept = gptfit.plan("gpt2", gpu="rtx4070", batch_size=7, keep="batch_size")
    assert kept.choice is not None and kept.choice["batch_size"] == 7
    few = gptfit.plan("gpt2-medium", gpu="rtx3050-6gb", allow="adamw8bit")
    assert few == gptfit.plan("gpt2-medium", gpu="rtx3050-6gb", allow=["adamw8bit"])


def test_what_may_change_the_numbers_is_allowed_by_key_or_by_value(capsys: pytest.CaptureFixture[str]) -> None:
    for key, values in LAST_RESORT.items():
        assert allowed([key]) == {key: values}
        for value in values:
            assert allowed([str(value)]) == {key: (value,)}, "and no other value of that key"
    both = sorted(str(value) for value in LAST_RESORT["optimizer"])
    assert allowed(both) == {"optimizer": LAST_RESORT["optimizer"]}
    code, out, _ = typed(capsys, "plan", "--help")
    assert code == 0 and ALLOWED_TEXT in " ".join(out.split())
    assert ALLOWED_TEXT in typed(capsys, "plan", "--gpu", "rtx4070", "--allow", "x")[2]


def test_what_is_changed_for_want_of_anything_else_is_marked(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = typed(capsys, "plan", "gpt2-xl", "--gpu", "rtx4070")
    changed = " ".join(out[out.index("Changed:") :].split("\n\n")[0].split())
    assert code == 0 and "optimizer adamw → adamw8bit *" in changed and "param_dtype float32 → bfloat16 *" in changed
    assert "batch_size 12 → 2 *" not in changed and "* changes the numbers of training" in changed
    _, out, _ = typed(capsys, "plan", "gpt2", "--gpu", "rtx4070")
    assert "*" not in out[out.index("Changed:") :].split("\n\n")[0]


def test_a_key_that_is_given_twice_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    twice = typed(capsys, "estimate", "batch_size=8", "batch_size=9")
    once = typed(capsys, "estimate", "batch_size=9")
    note = "note: batch_size is given twice: 9 holds, not 8\n"
    assert note in twice[1] and twice[1].replace(note, "").splitlines()[0] == once[1].splitlines()[0]
    assert "twice" not in typed(capsys, "estimate", "batch_size=9", "--batch_size=9")[1]


@pytest.mark.parametrize("width", [40, 48, 56, 64, 80])
def test_no_number_is_cut_on_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    every = ("plan", "--gpu", "h100-sxm,rtx4070,l4,gtx1650", "--tokens", "10B", "--price", "2")
    wide = typed(capsys, *every)[1] + typed(capsys, "plan", "--gpu", "rtx4070")[1]
    monkeypatch.setenv("COLUMNS", str(width))
    narrow = typed(capsys, *every)[1] + typed(capsys, "plan", "--gpu", "rtx4070")[1]
    whole = {word for word in wide.replace("\n", " ").split() if word[:1] in "+-0123456789"}
    cut = {word for word in narrow.split() if word[:1] in "+-0123456789" and word not in whole}
    assert not cut
    assert max(map(len, (line for line in narrow.splitlines() if not line.startswith("  gptfit ")))) <= width


def test_the_page_of_the_server_says_it_too() -> None:
    for fields in ({"reserve": "1.5"}, {"reserve": "100GiB"}):
        status, page = answer("/fit", {"gpu": "rtx4070", **fields})
        assert status == 400
        assert "has no unit" in page or "others would hold more than rtx4070 has" in page


@pytest.mark.parametrize(
    "words",
    [("replay", "trace.json", "--capacity", "11.5"), ("data", "prepare", "-", "--out", "x", "--shard-size", "1.5")],
)
def test_every_size_is_read_alike(capsys: pytest.CaptureFixture[str], words: tuple[str, ...]) -> None:
    code, _, err = typed(capsys, *words)
    assert code == 2 and err.startswith(f'error: the size "{words[-1]}" has no unit\n')


def test_what_comes_once_is_called_by_its_name(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    _, _, err = typed(capsys, "data", "prepare", "/dev/null", "--out", str(tmp_path / "out"))
    assert err.startswith("/dev/null comes once") and "stdin" not in err.splitlines()[0]


def test_what_nanogpt_is_told_by_a_key_and_this_by_an_option(tmp_path: Path) -> None:
    from gptfit.door import read_config
    from gptfit.launch import said_otherwise

    path = tmp_path / "train_small.py"
    path.write_text("out_dir = 'out-small'\nwandb_log = False\nbatch_size = 8\n")
    assert said_otherwise(read_config(str(path))) == [
        "out_dir=out-small has no effect here: the run's folder is --out DIR"
    ]
    assert [
        line.partition("=")[0] for line in said_otherwise(read_config("tiny", ["wandb_log=True", "device=cpu"]))
    ] == [
        "device",
        "wandb_log",
    ]
    assert said_otherwise(read_config("tiny", ["batch_size=8"])) == []


def test_no_older_run_is_taken_for_one_that_was_not_found(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    code, _, err = typed(capsys, "plan", "gpt2-xl", "--gpu", "gtx1650", "--save", str(path))
    assert (code, err, path.exists()) == (1, f"{path} is not written: no run fits\n", False)
