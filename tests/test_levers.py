"""Single changes to a run, beside the estimate of the changed run."""

import json
import shlex

import pytest

from gptfit.api import card_of, source_of
from gptfit.config import derive
from gptfit.estimate import estimate, under_program
from gptfit.levers import effects, step_text, with_micro_batch
from gptfit.units import MiB

CARD = card_of("rtx4070", None)


@pytest.mark.parametrize(
    ("program", "keys"),
    [
        ("nanogpt", {"batch_size": 12}),
        ("nanogpt", {"batch_size": 16}),
        ("nanogpt", {"batch_size": 4}),
        ("gptfit", {"batch_size": 12}),
        ("gptfit", {"batch_size": 24, "compile": False}),
    ],
)
def test_what_a_change_does_to_the_process_is_the_difference_of_two_estimates(program: str, keys: dict) -> None:
    assert CARD is not None
    on_card = CARD.profile, CARD.reserve_bytes
    run = under_program(source_of("gpt2", keys).run, program)
    given = estimate(run, program, *on_card)
    seen = 0
    for effect in effects(given, run, program, *on_card):
        change = dict(effect.change)
        if "empty_cache" in change:
            continue
        other = str(change.pop("program", program))
        after = estimate(derive(run, **change, **({"loss": "chunked"} if other != program else {})), other, *on_card)
        assert effect.process_delta_bytes == after.process_bytes - given.process_bytes, effect
        assert effect.fits == (after.verdict == "fits"), effect
        seen += 1
    assert seen >= 5


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    from gptfit.cli import main

    with pytest.raises(SystemExit):
        main(["plan", *words])
    return capsys.readouterr().out


def test_expandable_segments_are_offered_where_they_alone_make_a_run_fit(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("batch_size=12", "--program", "nanogpt", "--gpu", "rtx4070")
    answer = json.loads(planned(capsys, *words, "--json"))
    assert answer["smallest_change"]["change"] == {"expandable_segments": True}
    assert answer["smallest_change"]["delta_bytes"] == 0 > answer["smallest_change"]["process_delta_bytes"]
    shown = planned(capsys, *words)
    row = next(line.split() for line in shown.splitlines() if line.startswith("  expandable_segments=True"))
    saved = f"{answer['smallest_change']['process_delta_bytes'] / MiB:,.1f}"
    assert (row[1], row[-1]) == (saved, "fits")
    idle = shown[shown.index("no memory is saved") :].split("note:")[0]
    assert "expandable_segments" not in idle and "dtype=float16" in idle
    command = next(line for line in shown.splitlines() if "train.py" in line)
    assert shlex.split(command)[0] == "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
    assert "--expandable_segments" not in command, "nanoGPT's train.py has no such key"


def test_a_micro_batch_that_does_not_divide_the_step_says_by_how_much(capsys: pytest.CaptureFixture[str]) -> None:
    run = source_of("gpt2", {"batch_size": 16, "gradient_accumulation_steps": 40}).run
    assert step_text(run, with_micro_batch(run, 10)) == "the tokens of a step stay the same"
    assert step_text(run, with_micro_batch(run, 14)) == f"{14 * 46 * 1024:,} tokens a step for {16 * 40 * 1024:,}"
    shown = planned(capsys, "batch_size=16", "--program", "nanogpt", "--gpu", "rtx4070", "-v")
    assert "stay the same" not in shown.replace("\n  ", " ").replace("tensors stay the same", "")
    assert "# the smallest change that fits; 653,312 tokens a step for 655,360" in shown
