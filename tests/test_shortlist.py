"""Several cards: each has the choice that a plan of it alone has, the order is that of use, and the words say so."""

import json
import re
from typing import Any

import pytest

from gptfit.cli import main
from gptfit.door import read_config
from gptfit.errors import GptfitError
from gptfit.gpus import all_gpus, gpu_names
from gptfit.shortlist import Shortlist, find_cards, several, shortlist
from gptfit.target import Goal

# A step of four sequences: few micro-batches to search, over all cards.
FEW_TOKENS = ("batch_size=2", "gradient_accumulation_steps=2")


def asked(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(list(words))
    printed = capsys.readouterr()
    return int(end.value.code or 0), printed.out, printed.err


def as_json(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    code, out, err = asked(capsys, *words, "--json")
    assert err == ""
    return code, json.loads(out)


def listed(config: str, gpu: str, **options: Any) -> Shortlist:
    names = several(gpu)
    assert names is not None
    return shortlist(read_config(config, ()), find_cards(names, None), **options)


# Which cards are meant


def test_a_single_name_is_no_list() -> None:
    assert several(None) is several("rtx4070") is several("auto") is several("NVIDIA GeForce RTX 4070") is None


def test_lists_and_all() -> None:
    assert several(" rtx4070, l4,,") == ["rtx4070", "l4"]
    assert several("ALL") == several("all") == gpu_names()
    with pytest.raises(GptfitError):
        several(" , ")


def test_a_card_named_twice_is_planned_once() -> None:
    assert [card.profile.name for card in find_cards(["4070", "rtx4070", "NVIDIA L4"], None)] == ["rtx4070", "l4"]


def test_a_reserve_is_that_of_every_card() -> None:
    assert {card.reserve_bytes for card in find_cards(["rtx4070", "l4"], "1GiB")} == {1 << 30}


# The answer


@pytest.mark.parametrize(("config", "gpu"), [("gpt2", "rtx4070"), ("gpt2-medium", "rtx2060"), ("gpt2-xl", "l4")])
def test_each_card_has_the_choice_of_its_own_plan(config: str, gpu: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, alone = as_json(capsys, "plan", config, "--gpu", gpu, "--tokens", "1B", "--price-per-kwh", "0.3")
    _, both = as_json(capsys, "plan", config, "--gpu", f"gtx1080,{gpu}", "--tokens", "1B", "--price-per-kwh", "0.3")
    card = next(card for card in both["cards"] if card["gpu"]["name"] == gpu)
    assert both["schema"] == "gptfit.cards/1" and alone["schema"] == "gptfit.plan/1"
    assert card["verdict"] == "fits" and card["missing_bytes"] == 0
    for key in ("gpu", "choice", "speed", "to_tokens"):
        assert card[key] == alone[key], key
    for key in ("live_bytes", "allocated_bytes", "reserved_bytes", "process_bytes"):
        assert card["peak"][key] == alone["estimate"]["peak"][key]


def test_a_plan_without_tokens_has_no_target(capsys: pytest.CaptureFixture[str]) -> None:
    _, alone = as_json(capsys, "plan", "--gpu", "rtx4070")
    assert alone["to_tokens"] is None


def test_what_fits_comes_first_then_what_lacks_least() -> None:
    answer = listed("gpt2-xl", "gtx1650,gtx1080,rtx4070,a100-80gb,h100-sxm,l4")
    fits = [plan.fits for plan in answer.cards]
    assert fits == sorted(fits, reverse=True)
    exact = [plan for plan in answer.fitting if not plan.changes_numerics]
    assert answer.fitting[: len(exact)] == tuple(exact)
    speeds = [plan.tokens_per_second for plan in exact]
    assert [plan.name for plan in exact] == ["h100-sxm", "a100-80gb"] and speeds == sorted(speeds, reverse=True)
    missing = [plan.missing_bytes for plan in answer.cards if not plan.fits]
    assert len(missing) >= 1 and missing == sorted(missing) and missing[0] > 0


def test_what_a_card_lacks_is_enough() -> None:
    """A card with just that much more memory has a run that fits; with a tenth less none does, however much the
    allocator gives back of what it caches."""
    source = read_config("gpt2-xl", ())
    (card,) = find_cards(["gtx1650"], "0")
    (plan,) = shortlist(source, [card]).cards
    assert not plan.fits

    def verdict(total_bytes: int) -> str:
        larger = card.profile.model_copy(update={"total_bytes": total_bytes})
        return shortlist(source, [type(card)(larger, 0)]).verdict

    enough = card.profile.total_bytes + plan.missing_bytes
    assert verdict(enough) == "fits" and verdict(round(0.9 * enough)) == "does_not_fit"


def test_time_and_cost_rank_as_speed_and_power_do() -> None:
    answer = listed("gpt2", "rtx4090,l4", goal=Goal(10**9, price_per_kwh=0.3))
    fast, slow = (plan.target for plan in answer.cards)
    assert fast is not None and slow is not None and fast.seconds < slow.seconds
    assert fast.power_watts == 450 and slow.power_watts == 72
    assert (fast.cost or 0) > (slow.cost or 0)


def test_all_profiles_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    code, answer = as_json(
        capsys, "plan", "n_layer=2", "n_embd=128", "n_head=4", "block_size=64", *FEW_TOKENS, "--gpu", "all"
    )
    assert code == 0 and {card["gpu"]["name"] for card in answer["cards"]} == {gpu.name for gpu in all_gpus()}
    speeds = [card["speed"]["tokens_per_second"] for card in answer["cards"]]
    assert speeds == sorted(speeds, reverse=True)


# The words


def test_the_first_line_is_the_answer_and_the_rows_fit_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    words = ("--gpu", "rtx4070,rtx3090,rtx3080ti-laptop,gtx1650", "--tokens", "10B", "--price", "0.40")
    code, out, err = asked(capsys, "plan", "gpt2-large", *words)
    lines = out.splitlines()
    next_command = lines.index("Next")
    assert code == 0 and err == ""
    assert re.fullmatch(r"Fits: 3 of 4 cards; fastest: rtx3090, [\d,]+ tokens/s", lines[0])
    assert max(map(len, lines[:next_command])) <= 80
    row = next(line for line in lines if line.strip().startswith("rtx4070"))
    assert re.search(r"\d+ × \d+ .* [\d,]+ +\S+ – \S+ +[\d.]+ +[\d.,]+$", row)
    assert re.search(r"gtx1650 .*GiB .*GiB +\S+ [MG]iB", out)
    assert lines[next_command + 1].strip() == "gptfit plan gpt2-large --gpu rtx3090 --tokens 10B --price 0.40"


def test_where_none_fits_the_nearest_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = asked(capsys, "plan", "gpt2-xl", "--gpu", "gtx1650,gtx1080")
    assert code == 1 and out.startswith("Does not fit: none of 2 cards; the nearest is gtx1080, short by ")


def test_a_long_list_is_cut_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("plan", "n_layer=1", "n_embd=64", "n_head=2", "block_size=64", *FEW_TOKENS, "--gpu", "all")
    _, short, _ = asked(capsys, *words)
    _, whole, _ = asked(capsys, *words, "-v")
    assert re.search(rf"^  {len(gpu_names()) - 15} more; -v lists them$", short, re.MULTILINE)
    assert "more; -v" not in whole and all(f"  {name} " in whole for name in gpu_names())


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--gpu", "l4,rtx4071"), 'error: unknown GPU "rtx4071"; did you mean'),
        (("--gpu", "l4,t4", "--save", "run.yaml"), "error: --save writes the run of one card"),
        (("--gpu", "l4,t4", "--html", "page.html"), "error: --html writes the run of one card"),
        (("--gpu", ","), 'error: --gpu "," names no card'),
        (("--gpu", "l4", "--tokens", "10Q"), 'error: cannot read "10Q" as a number of tokens'),
        (("--gpu", "l4", "--price", "1"), "error: a price was given, but no --tokens"),
        (("--gpu", "l4,t4", "--allow", "adamw9bit"), 'error: unknown lever "adamw9bit"'),
        (("--gpu", "l4,t4", "--tokens-per-step", "5"), "error: tokens per step 5 is less than one sequence"),
    ],
)
def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], line: str) -> None:
    code, out, err = asked(capsys, "plan", *words)
    assert code == 2 and out == "" and err.startswith(line)
    assert [text.partition(":")[0] for text in err.splitlines()] == ["error", "hint"]
