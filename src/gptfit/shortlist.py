"""Several cards beside one another for one run: which of them fit, with what choice, and how fast they are."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from gptfit.card import Card, check_room, look_for_card, names_in
from gptfit.combination import Combination, Combinations
from gptfit.door import ConfigSource
from gptfit.errors import GptfitError
from gptfit.estimate import Budget, Estimate, estimate, speed_json, under_program
from gptfit.gpus import gpu_names
from gptfit.plan import LAST_RESORT, Search, changes_numerics, checked_tokens, choices, options, uncollected
from gptfit.target import Goal, Target, reach


@dataclass(frozen=True, slots=True)
class CardPlan:
    """The best run on one card; where none fits, the smallest one, whose margin is then negative."""

    card: Card
    choice: Mapping[str, object]
    estimate: Estimate
    changes_numerics: bool
    target: Target | None
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.card.profile.name

    @property
    def fits(self) -> bool:
        return self.estimate.verdict == "fits"

    @property
    def usable_bytes(self) -> int:
        return self.card.profile.total_bytes - self.card.reserve_bytes

    @property
    def missing_bytes(self) -> int:
        """What the smallest run lacks on this card; 0 where one fits."""
        return max(0, -(self.estimate.margin_bytes or 0))

    @property
    def tokens_per_second(self) -> float:
        return self.estimate.speed.tokens_per_second if self.estimate.speed else 0.0

    def to_json(self) -> dict[str, object]:
        need = self.estimate
        return {
            "gpu": need.budget.to_json() if need.budget else None,
            "verdict": need.verdict,
            "margin_bytes": need.margin_bytes,
            "certain": need.certain,
            "interval": need.interval.to_json(),
            "missing_bytes": self.missing_bytes,
            "choice": dict(self.choice) if self.fits else None,
            "smallest": None if self.fits else dict(self.choice),
            "changes_numerics": self.changes_numerics,
            "peak": {
                "live_bytes": need.live_bytes,
                "allocated_bytes": need.allocated_bytes,
                "reserved_bytes": need.reserved_bytes,
                "process_bytes": need.process_bytes,
            },
            "speed": speed_json(need.speed) if need.speed and self.fits else None,
            "to_tokens": self.target.to_json() if self.target else None,
            "notes": list(self.notes),
        }


@dataclass(frozen=True, slots=True)
class Shortlist:
    """Cards, best first: by speed those that fit for sure, before those that do only with other numerics, before those
    that do within the error of the estimate; then what lacks least."""

    tokens_per_step: int
    cards: tuple[CardPlan, ...]

    @property
    def fitting(self) -> tuple[CardPlan, ...]:
        return tuple(card for card in self.cards if card.fits)

    @property
    def verdict(self) -> str:
        return "fits" if self.fitting else "does_not_fit"

    def to_json(self) -> dict[str, object]:
        return {
            "schema": "gptfit.cards/1",
            "verdict": self.verdict,
            "tokens_per_step": self.tokens_per_step,
            "cards": [card.to_json() for card in self.cards],
        }


def several(gpu: str | None) -> list[str] | None:
    """The names in `rtx4070,l4`, or every profile's for `all`; None for a single card or none.

    Raises GptfitError for a list without a name.
    """
    if gpu is None or ("," not in gpu and gpu.strip().lower() != "all"):
        return None
    if gpu.strip().lower() == "all":
        return gpu_names()
    names = names_in(gpu)
    if any(name.lower() in ("all", "auto") for name in names) and len(names) > 1:
        raise GptfitError(
            f'--gpu "{gpu[:60]}": expected names alone, or all, or auto', "--gpu all has every card in it"
        )
    if not names:
        raise GptfitError(f'--gpu "{gpu[:60]}" names no card', "write it as --gpu rtx4070,l4, or --gpu all")
    return names if len(names) > 1 else None


def find_cards(names: Iterable[str], reserve: str | None) -> list[Card]:
    """Each card once, with `reserve` on all of them. Raises GptfitError for a name that is none, and where `reserve`
    leaves nothing of any of them."""
    cards: dict[str, Card] = {}
    for name in names:
        if (card := look_for_card(name, reserve)) is not None:
            cards.setdefault(card.profile.name, card)
    if reserve is not None:
        check_room(list(cards.values()), reserve)
    return list(cards.values())


@uncollected()
def shortlist(
    source: ConfigSource,
    cards: Sequence[Card],
    tokens_per_step: int | None = None,
    allow: Sequence[str] = (),
    keep: Sequence[str] = (),
    goal: Goal | None = None,
    risk: float | None = None,
) -> Shortlist:
    """The choice on each card is `plan`'s. Raises GptfitError as `plan` does."""
    tokens = checked_tokens(source.run, tokens_per_step, allow)
    run = under_program(source.run, "gptfit")
    combinations = Combinations(run, tokens)
    found: list[CardPlan] = []
    for card in cards:
        profile = card.profile
        budget = Budget(profile.name, profile.total_bytes, card.reserve_bytes)
        search = Search(run, profile, budget, tokens, risk, finalists=1, combinations=combinations)
        found.append(plan_card(search, source, card, allow, keep, goal))
    found.sort(key=rank)
    return Shortlist(tokens, tuple(found))


def rank(plan: CardPlan) -> tuple[float, ...]:
    if not plan.fits:
        return (1, plan.missing_bytes)
    return (0, plan.estimate.certain is False, plan.changes_numerics, -plan.tokens_per_second)


def plan_card(
    search: Search, source: ConfigSource, card: Card, allow: Sequence[str], keep: Sequence[str], goal: Goal | None
) -> CardPlan:
    found, notes = choices(search, source, allow, keep)
    if found:
        choice, chosen = found[0].choice, found[0].estimate
    else:
        choice, chosen = smallest(search, source, card, keep)
    target = None
    if goal is not None and found and chosen.speed is not None:
        target = reach(goal, chosen.speed, card.profile, found[0].run.n_gpus)
    return CardPlan(card, choice, chosen, changes_numerics(source.run, choice), target, (*notes, *card.notes))


def smallest(
    search: Search, source: ConfigSource, card: Card, keep: Iterable[str]
) -> tuple[Mapping[str, object], Estimate]:
    """Of everything that may be chosen, one sequence at a time, what needs least.

    Tried from the lowest live peak on, until that alone is more than the least so far.
    """
    every = options(source.run, search.profile, frozenset(keep), tuple(LAST_RESORT))
    peaks: list[tuple[int, int, Combination]] = []
    for index, keys in enumerate(every):
        with suppress(GptfitError):  # a budget below what can be estimated, for these shapes
            combination = search.combinations.of(keys)
            peaks.append((combination.live_bytes(1), index, combination))
    least: tuple[Mapping[str, object], Estimate] | None = None
    for live_bytes, _, combination in sorted(peaks):
        if least is not None and live_bytes >= least[1].reserved_bytes:
            break
        need = estimate(combination.run(1), "gptfit", card.profile, card.reserve_bytes, search.risk)
        if least is None or need.reserved_bytes < least[1].reserved_bytes:
            least = {**combination.keys, **combination.split(1)}, need
    assert least is not None  # there is always the run as given
    return least
