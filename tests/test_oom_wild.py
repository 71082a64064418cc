"""Pastes as people post them, of many memories and of programs that are not torch: read, explained and answered with
something to type. Facts and figures are those of public reports (`source` says whose), paths and prose are ours."""

import json
import random
import re
from pathlib import Path

import pytest

from gptfit.oom.diagnose import explain_text
from gptfit.oom.engines import ENGINES
from gptfit.oom.read import read_paste
from gptfit.oom.tensors import name_tensor
from gptfit.oom.wordings import RULES

ROWS = [
    json.loads(line) for line in (Path(__file__).parent / "data" / "oom_wild.jsonl").read_text("utf-8").splitlines()
]
NAMED = {row["id"]: row for row in ROWS}
FIGURES = (
    *("tried_bytes", "total_bytes", "free_bytes", "process_bytes", "allocated_bytes", "reserved_bytes"),
    *("reserved_unallocated_bytes", "other_processes_bytes", "device_index"),
)


@pytest.mark.parametrize("row", ROWS, ids=list(NAMED))
def test_a_paste_from_the_wild_is_read_and_explained(row: dict) -> None:
    answer = explain_text(row["text"])
    facts = answer.facts
    assert facts.kind == row["kind"]
    assert row["phase"] in (None, facts.phase)
    assert {name: getattr(facts, name) for name in row["figures"]} == row["figures"]
    assert answer.cause.startswith(row["cause"])
    assert row["change"] is None or row["change"] in [remedy.change for remedy in answer.remedies]


@pytest.mark.parametrize("row", ROWS, ids=list(NAMED))
def test_no_figure_is_read_that_the_text_does_not_print(row: dict) -> None:
    """Each figure read is a number that stands in the text, with its unit."""
    facts = read_paste(row["text"])
    units = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
    printed = {
        round(float(number) * units[unit[:1].lower()])
        for number, unit in re.findall(
            r"(\d+\.?\d*)\s?(bytes|[KMG]i?B|[KMG]|B)?", re.sub(r"(?<=\d),(?=\d{3})", "", row["text"])
        )
    }
    read = {getattr(facts, name) for name in FIGURES} - {None}
    others = {facts.other_processes_bytes}  # a sum, and 0 where the list names none
    assert read - others - {facts.device_index} <= printed


@pytest.mark.parametrize("row", [row for row in ROWS if row["kind"] != "not_oom"], ids=lambda row: row["id"])
def test_something_to_type_comes_first(row: dict) -> None:
    """What is named first answers the cause; nanoGPT's flags are for nanoGPT's runs alone."""
    answer = explain_text(row["text"])
    assert answer.remedies
    changes = " ".join(remedy.change for remedy in answer.remedies)
    assert "--batch_size=" not in changes
    if answer.facts.wording in ENGINES:
        assert not answer.not_remedies
        assert not answer.missing, "no size of a GPT changes the answer"


def test_every_wording_with_an_answer_of_its_own_is_in_a_paste() -> None:
    assert ENGINES.keys() <= {rule.wording for rule in RULES}
    assert ENGINES.keys() - {read_paste(row["text"]).wording for row in ROWS} == set()


def test_what_is_not_known_to_be_a_gpt_gets_no_figure_of_one() -> None:
    answer = explain_text(NAMED["no-gpt"]["text"])
    assert [remedy.saves_bytes for remedy in answer.remedies] == [None] * len(answer.remedies)
    assert "GPT" not in answer.summary + " ".join(answer.warnings)


def test_a_tensor_is_not_named_from_any_figure() -> None:
    """In backward, without a config: figures drawn at random are rarely so many rows of a vocabulary."""
    rng = random.Random(3)
    drawn = [rng.randrange(128, 512) * (2 << 20) for _ in range(400)]
    assert sum(name_tensor("backward", (), n_bytes, None) is not None for n_bytes in drawn) < 80
    four_sequences = 4 * 1024 * 50304 * 4
    named = name_tensor("backward", (), four_sequences, None)
    assert named is not None
    assert (named.name, named.confidence) == ("cross entropy gradient", "possible")


CARDS = """|   0  NVIDIA A100  On  | 00000000:07:00.0 Off |   0 |
| N/A   31C    P0    60W /  400W |  {first}MiB /  40960MiB |  0%   Default |
|   1  NVIDIA A100  On  | 00000000:0A:00.0 Off |   0 |
| N/A   29C    P0    52W /  400W |  {second}MiB /  40960MiB |  0%   Default |
RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"""


@pytest.mark.parametrize(("first", "second", "other"), [(39871, 4, True), (39871, 38000, False), (900, 4, False)])
def test_another_card_is_named_where_the_text_shows_one_empty(first: int, second: int, other: bool) -> None:
    changes = [remedy.change for remedy in explain_text(CARDS.format(first=first, second=second)).remedies]
    assert ("CUDA_VISIBLE_DEVICES=1" in changes) is other


OOM = (
    "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 400.00 MiB (GPU 0; 22.20 GiB total capacity; "
    "21.00 GiB already allocated; 210.12 MiB free; 21.10 GiB reserved in total by PyTorch)"
)


@pytest.mark.parametrize(
    ("log", "steps"),
    [
        ("step 19: loss 3.2\nstep 300: loss 3.1", 300),
        ("{'loss': 2.1, 'step': 640}", 640),
        ("Epoch 7:  83%|####3 | 833/1000 [03:12<00:38,  4.33it/s, loss=2.9]", 833),
        ("Map: 40%|###  | 52000/130000 [00:11<00:20, 4700.1it/s]", 0),  # a data set is mapped, nothing is trained
        ("Loading checkpoint shards:  50%|##  | 22/44 [00:11<00:12, 1.02s/it]", 0),
        ("100%|#####| 870/870 [03:12<00:00,  4.33it/s]", 0),
        ("", 0),
    ],
)
def test_the_steps_that_ran_before_are_counted(log: str, steps: int) -> None:
    assert read_paste(f"{log}\n{OOM}").steps == steps
    assert read_paste(f"{OOM}\nstep 900: loss 3.1").steps == 0, "what comes after the message is another run"


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ("running_loss += loss", True),
        ("self.total_loss[0] += criterion_loss", True),
        ("running_loss += loss.item()", False),
        ("total_loss += float(loss)", False),
        ("losses.append(loss)", True),
        ("losses.append(loss.detach().cpu())", False),
        ("outputs.append(output)", True),
        ("loss.backward(retain_graph=True)", True),
        ("loss = loss + penalty", False),
        ("x = x + self.mlp(x)", False),
    ],
)
def test_a_line_that_keeps_a_graph_is_named(line: str, kept: bool) -> None:
    answer = explain_text(f'Traceback (most recent call last):\n  File "t.py", line 9, in main\n    {line}\n{OOM}')
    assert answer.cause.startswith("something is kept from step to step: `") is kept


def test_what_others_hold_comes_before_pieces_where_it_is_much() -> None:
    text = "CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0; {} GiB total capacity; 2.12 GiB already allocated; "
    text += "13.69 MiB free; 2.24 GiB reserved in total by PyTorch)"
    assert explain_text(text.format("23.69")).cause.startswith("something else is on the card")
    assert explain_text(text.format("2.95")).cause.startswith("fragmentation")


def test_a_run_whose_loss_made_a_float32_tensor_was_not_compiled() -> None:
    keys = "--n_layer=12 --n_embd=768 --n_head=12 --batch_size=12 --block_size=1024 --vocab_size=50304"
    frames = '  File "train.py", line 304, in <module>\n    scaler.scale(loss).backward()'
    text = f"$ python train.py {keys} {{}}\n{frames}\n{OOM.replace('400.00 MiB', '2.30 GiB')}"
    told = explain_text(text.format("--compile=True"))
    untold = explain_text(text.format(""))
    assert any("taken as compile=False" in warning for warning in untold.warnings)
    assert not any("taken as compile=False" in warning for warning in told.warnings)
    assert "--compile=True" in [remedy.change for remedy in untold.remedies]


OTHER = 'Traceback (most recent call last):\n  File "t.py", line 8, in <module>\n    optimizer.step()\n{}'


@pytest.mark.parametrize(
    ("text", "phase"),
    [
        (f"{OOM}\n\nDuring handling of the above exception:\n{OTHER.format('KeyError: 1')}", "unknown"),
        (f"{OTHER.format('ValueError: x')}\n\n{OOM}", "unknown"),
        (f"ERROR: {OOM}\n{OTHER.format('')}", "optimizer"),  # logged first, its traceback without an end
        (OTHER.format(OOM), "optimizer"),
    ],
)
def test_frames_of_another_error_are_not_those_of_the_message(text: str, phase: str) -> None:
    assert read_paste(text).phase == phase


@pytest.mark.parametrize(
    ("sizes", "ranks"),
    [
        (("398.00 MiB", "398.00 MiB", "402.00 MiB"), True),
        (("398.00 MiB", "900.00 MiB", "402.00 MiB"), False),
        (("398.00 MiB",), False),
        (("8.00 GiB", "8.00 GiB"), False),
    ],
)
def test_contexts_alike_are_ranks_of_one_job(sizes: tuple[str, ...], ranks: bool) -> None:
    others = "".join(f"Process {100 + n} has {size} memory in use. " for n, size in enumerate(sizes))
    text = (
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 23.65 "
    )
    text += (
        f"GiB of which 3.81 MiB is free. {others}Including non-PyTorch memory, this process has 3.00 GiB memory in use."
    )
    text += " Of the allocated memory 2.50 GiB is allocated by PyTorch, and 2.30 MiB is reserved by PyTorch but unused."
    answer = explain_text(text)
    assert answer.cause.startswith("other processes hold")
    assert ("alike" in answer.cause) is ranks
    assert answer.remedies[0].change.startswith("torch.cuda.set_device(" if ranks else "nvidia-smi")


def test_steps_are_counted_through_colours_and_escapes() -> None:
    assert read_paste(f"\x1b[31miter 640: loss 3.1\x1b[0m\n{OOM}").steps == 640
    assert read_paste(f'"error": "iter 640: loss 3.1\\n{OOM}"').steps == 640
