"""A folder that is trained into again: by two at once, and with settings that are not those it began with."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from gptfit import checkpoint, metrics
from gptfit.errors import GptfitError
from gptfit.events import Event, Note, Stepped
from gptfit.optim import learning_rate_at
from gptfit.sample import sample
from gptfit.train import train
from test_train import same, tiny, weights, words_in


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return words_in(tmp_path_factory.mktemp("words"))


def notes_of(events: list[Event]) -> str:
    return "\n".join(event.text for event in events if isinstance(event, Note))


def test_two_do_not_train_into_one_folder(dataset: Path, tmp_path: Path) -> None:
    run, out = tiny(dataset), tmp_path / "out"
    tried: list[str] = []

    def begin_another(event: Event) -> None:
        if isinstance(event, Stepped) and event.step == 7:
            for resume in (False, True):
                with pytest.raises(GptfitError) as caught:
                    train(run, out, resume)
                tried.append(caught.value.message)

    train(run, out, on_event=begin_another)
    assert tried == [f'another process trains into "{out}" now'] * 2
    assert [entry["step"] for entry in metrics.read(out)] == list(range(1, 11))
    assert train(run, out, resume=True).step == 10  # it is free again


def test_one_that_is_killed_leaves_its_folder_to_the_next(dataset: Path, tmp_path: Path) -> None:
    line = f"""
import os, signal
from test_train import tiny
from gptfit.train import train
train(tiny({str(dataset)!r}), {str(tmp_path / "out")!r},
      on_event=lambda event: getattr(event, "step", 0) == 7 and os.kill(os.getpid(), signal.SIGKILL))
"""
    killed = subprocess.run([sys.executable, "-c", line], cwd=Path(__file__).parent, capture_output=True, timeout=60)
    assert killed.returncode == -9, killed.stderr
    assert train(tiny(dataset), tmp_path / "out", resume=True).step == 10


def test_tokens_are_those_that_were_trained_on_however_large_a_step_was(dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for steps, batch_size, resume in ((2, 3, False), (4, 5, True), (5, 1, True)):
        train(tiny(dataset, max_iters=steps, batch_size=batch_size), out, resume)
    sizes = [3, 3, 5, 5, 1]  # sequences of a micro-batch; two of them a step, of 16 tokens
    assert [entry["tokens"] for entry in metrics.read(out)] == [32 * sum(sizes[: i + 1]) for i in range(5)]


def test_a_checkpoint_that_does_not_count_tokens_is_resumed(dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(tiny(dataset, max_iters=2), out)
    found = checkpoint.latest_valid(out)
    assert found is not None
    from dataclasses import replace

    checkpoint.save(out, replace(found.checkpoint, tokens=None))
    train(tiny(dataset, max_iters=3, batch_size=5), out, resume=True)
    assert [entry["tokens"] for entry in metrics.read(out)] == [96, 192, 352]


def test_a_longer_run_is_told_where_its_learning_rate_stays(dataset: Path, tmp_path: Path) -> None:
    for name, said, changes in (
        ("kept", True, {"lr_decay_iters": 4}),
        ("moved", False, {"lr_decay_iters": 8}),
        ("constant", False, {"lr_decay_iters": 4, "lr_schedule": "constant"}),
        ("warms up", False, {"lr_decay_iters": 4, "warmup_iters": 50}),
    ):
        train(tiny(dataset, max_iters=4, **{**changes, "lr_decay_iters": 4}), tmp_path / name)
        events: list[Event] = []
        longer = tiny(dataset, max_iters=8, **changes)
        train(longer, tmp_path / name, resume=True, on_event=events.append)
        assert ("lr_decay_iters stays 4" in notes_of(events)) == said, name
        level = {learning_rate_at(step, longer) for step in range(4, 8)} == {longer.min_lr}
        assert level == said


def test_attention_computed_otherwise_has_the_same_weights(dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(tiny(dataset, max_iters=5), out)
    before = weights(out)
    events: list[Event] = []
    train(tiny(dataset, max_iters=5, attention="math"), out, resume=True, on_event=events.append)
    assert same(weights(out), before) and "attention=math (was flash)" in notes_of(events)


@pytest.mark.parametrize("wrong", [{"temperature": float("inf")}, {"temperature": float("nan")}, {"seed": 2**64}])
def test_a_sample_asked_for_with_no_number_is_one_line(dataset: Path, tmp_path: Path, wrong: dict[str, float]) -> None:
    train(tiny(dataset, max_iters=1), tmp_path / "out")
    with pytest.raises(GptfitError, match=re.escape(next(iter(wrong)))):
        sample(tmp_path / "out", n_tokens=2, **wrong)  # pyright: ignore[reportArgumentType]
