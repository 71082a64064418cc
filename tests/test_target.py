"""Tokens as typed, and the time, energy and money that they take: against arithmetic written out here."""

from dataclasses import replace

import pytest

from gptfit.errors import GptfitError
from gptfit.gpus import load_gpu
from gptfit.report.target import cost_text, energy_text, time_text
from gptfit.speed import Speed
from gptfit.target import Goal, reach, read_goal
from gptfit.units import MAX_COUNT, format_count, format_time, parse_count, parse_price

# 100,000 tokens/s, a quarter faster or a fifth slower: 10B tokens take 100,000 s.
SPEED = Speed(tokens_per_second=1e5, seconds_per_step=1.0, mfu=0.5, low=8e4, high=1.25e5, source="a test")


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("10B", 10_000_000_000),
        ("300e9", 300_000_000_000),
        ("524288", 524_288),
        ("10M", 10_000_000),
        ("1.5t", 1_500_000_000_000),
        ("0.1B", 100_000_000),  # 0.1 is no binary fraction
        ("2.5e3", 2_500),
        ("100k", 100_000),
        ("1_000_000", 1_000_000),
        (" 1 ".strip(), 1),
        ("1e18", MAX_COUNT),
    ],
)
def test_tokens_as_people_write_them(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize(
    "text",
    ["", "0", "-5", "10Q", "ten", "1.5", "0.0001k", "1e19", "9" * 20, "nan", "inf", "1e", "B", "10 B B", "1e99", "٣B"],
)
def test_what_is_no_number_of_tokens_is_one_line(text: str) -> None:
    with pytest.raises(GptfitError) as error:
        parse_count(text)
    assert "\n" not in error.value.message and "10B" in error.value.hint


@pytest.mark.parametrize("text", ["", "-1", "nan", "inf", "1e3", "$0.40", "0,40", "free"])
def test_what_is_no_price_is_one_line(text: str) -> None:
    with pytest.raises(GptfitError):
        parse_price(text)


@pytest.mark.parametrize("count", [1, 491_520, 1_000_000, 1_500_000, 10**10, 3 * 10**11, 12_345_678])
def test_a_count_is_read_back_as_it_is_written(count: int) -> None:
    assert parse_count(format_count(count).replace(",", "")) == count


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(45, "45 seconds"), (2400, "40 minutes"), (111_600, "31 hours"), (552_960, "6.4 days"), (8.64e7, "1,000 days")],
)
def test_time_is_in_the_unit_that_one_plans_in(seconds: float, text: str) -> None:
    assert format_time(seconds) == text


def test_an_interval_has_the_unit_of_its_middle() -> None:
    assert format_time(31 * 3600, 22 * 3600, 72 * 3600) == "31 hours (22 to 72)"


def test_time_is_tokens_over_speed_and_its_ends_are_those_of_the_speed() -> None:
    target = reach(Goal(10**10), SPEED, load_gpu("rtx4070"))
    assert target.seconds == pytest.approx(100_000)
    assert (target.low_seconds, target.high_seconds) == (pytest.approx(80_000), pytest.approx(125_000))
    assert time_text(target) == "28 hours (22 to 35)"
    assert target.cost is None and target.cost_range is None


def test_energy_is_that_of_all_cards_at_their_power_limit() -> None:
    # 4 cards x 200 W x 100,000 s = 80 MJ; a kWh is 3.6 MJ.
    target = reach(Goal(10**10, price_per_kwh=0.30), SPEED, load_gpu("rtx4070"), n_gpus=4)
    assert target.energy_kwh == pytest.approx(80 / 3.6)
    assert target.cost == pytest.approx(0.30 * 80 / 3.6)
    assert target.cost_range == (pytest.approx(0.24 * 80 / 3.6), pytest.approx(0.375 * 80 / 3.6))
    assert "4 cards" in energy_text(target) and "200 W" in energy_text(target)


def test_the_price_of_an_hour_is_for_each_card() -> None:
    target = reach(Goal(36 * 10**8, price=0.40), SPEED, load_gpu("rtx4070"), n_gpus=4)  # 10 hours
    assert target.cost == pytest.approx(16.0)
    assert cost_text(target) == "16.00 (12.80 to 20.00) at 0.4 an hour and card"


def test_where_the_power_is_not_known_nothing_is_made_up() -> None:
    profile = load_gpu("rtx4070").model_copy(update={"power_limit_watts": None})
    target = reach(Goal(10**10, price_per_kwh=0.30), SPEED, profile)
    assert target.to_json()["energy_kwh"] is None and target.to_json()["cost"] is None
    assert "not known" in energy_text(target) and "not known" in cost_text(target)
    by_the_hour = replace(target, goal=Goal(10**10, price=0.36))
    assert by_the_hour.cost == pytest.approx(10.0)


def test_a_price_needs_tokens_and_there_is_one() -> None:
    assert read_goal(None, None, None) is None
    assert read_goal("1B", "0", None) == Goal(10**9, price=0.0)
    for tokens, price, per_kwh in ((None, "0.4", None), (None, None, "0.3"), ("1B", "0.4", "0.3")):
        with pytest.raises(GptfitError, match=r"--tokens|both"):
            read_goal(tokens, price, per_kwh)
