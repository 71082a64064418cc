"""What fits: plan, estimate and explain-oom."""

import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import typer

from gptfit.options import (
    NO,
    WORDS,
    YES,
    Allow,
    Cards,
    Config,
    Formulas,
    Gpu,
    Gpus,
    Json,
    Keep,
    LogWords,
    Page,
    Price,
    PricePerKwh,
    Program,
    Reserve,
    Risk,
    Save,
    Snapshot,
    Tokens,
    TokensPerStep,
    Verbose,
    Words,
    asked_for,
    for_one_card,
    options_of,
    program_of,
)

if TYPE_CHECKING:
    from gptfit.plan import Plan

app = typer.Typer()


@app.command(context_settings=WORDS)
def plan(
    context: typer.Context,
    words: Words = None,
    gpu: Cards = None,
    gpus: Gpus = None,
    tokens_per_step: TokensPerStep = None,
    allow: Allow = None,
    keep: Keep = None,
    program: Program = None,
    reserve: Reserve = None,
    risk: Risk = None,
    tokens: Tokens = None,
    price: Price = None,
    price_per_kwh: PricePerKwh = None,
    save: Save = None,
    html: Page = None,
    json: Json = False,
    verbose: Verbose = False,
) -> int:
    """The best run that fits the card: what to change, and how fast it will be.

    Of several cards (--gpu rtx4070,l4 or --gpu all) it says which fit, best first.
    """
    from gptfit.card import need_card
    from gptfit.door import read_config
    from gptfit.errors import GptfitError
    from gptfit.plan import plan as make_plan
    from gptfit.report.output import respond
    from gptfit.report.plans import after_plan, plan_view
    from gptfit.report.target import target_view
    from gptfit.report.terminal import notes_view
    from gptfit.several_gpus import plan_on_gpus
    from gptfit.shortlist import several
    from gptfit.target import reach, read_goal

    asked = asked_for(context, words)
    source = read_config(asked.config, asked.overrides)
    source = replace(source, program=program_of(program, source))
    goal = read_goal(tokens, price, price_per_kwh)
    names = several(gpu)
    if names is not None:
        if gpus is not None:
            raise GptfitError("--gpus is for one kind of card, and --gpu names several", "name one with --gpu")
        from gptfit.report.shortlist import after_shortlist, shortlist_view
        from gptfit.shortlist import find_cards, shortlist

        for_one_card(save=save, html=html)
        cards = find_cards(names, reserve)
        listed = shortlist(source, cards, tokens_per_step, allow or (), keep or (), goal, risk)
        view = shortlist_view(listed, source.run, verbose), notes_view(source, None, verbose)
        options = options_of(program=program, reserve=reserve, tokens=tokens, price=price, price_per_kwh=price_per_kwh)
        respond(json, listed.to_json, *view, after_shortlist(listed, asked, options))
        return YES if listed.verdict == "fits" else NO
    card = need_card(gpu, reserve, "plan")
    how = card.profile, card.reserve_bytes, tokens_per_step, allow or (), keep or (), risk
    answer = make_plan(source, *how) if gpus is None else plan_on_gpus(source, gpus, *how)
    if gpus is not None and answer.run is not None:
        asked = replace(asked, overrides=(*asked.overrides, f"n_gpus={gpus}", f"strategy={answer.run.strategy}"))
    if save is not None:
        save_choice(answer, save, asked.gptfit("plan", {}, "--gpu", card.profile.name))
    if html is not None:
        from gptfit.report.html import plan_page, write_page

        options = options_of(gpu=card.profile.name, program=program, reserve=reserve)
        write_page(html, plan_page(answer, source, card, asked.gptfit("plan", {}, *options)))
    target = None
    if goal is not None and answer.run is not None and answer.speed is not None:
        target = reach(goal, answer.speed, card.profile, answer.run.n_gpus)
    view = plan_view(answer, verbose), target_view(target), notes_view(source, card, verbose)
    respond(
        json,
        lambda: {**answer.to_json(), "to_tokens": target.to_json() if target else None},
        *view,
        after_plan(answer, source, asked, save),
    )
    return YES if answer.verdict == "fits" else NO


def save_choice(answer: "Plan", path: str, header: str) -> None:
    """Writes the run that was chosen, or says that there is none: an older file of that name is another run's."""
    if answer.run is None:
        print(f"{path} is not written: no run fits", file=sys.stderr)
        return
    from gptfit.door import save_run

    save_run(answer.run, path, header)


@app.command(context_settings=WORDS)
def estimate(
    context: typer.Context,
    words: Words = None,
    gpu: Gpu = None,
    program: Program = None,
    reserve: Reserve = None,
    risk: Risk = None,
    snapshot: Snapshot = None,
    html: Page = None,
    formulas: Formulas = False,
    json: Json = False,
    verbose: Verbose = False,
) -> int:
    """The memory of exactly this run, and whether it fits."""
    from gptfit.card import find_card
    from gptfit.door import read_config
    from gptfit.estimate import estimate as make_estimate
    from gptfit.report.formulas import formulas_view
    from gptfit.report.output import respond
    from gptfit.report.terminal import after_estimate, estimate_view, notes_view

    asked = asked_for(context, words)
    source = read_config(asked.config, asked.overrides)
    card = find_card(gpu, reserve)
    on_card = (card.profile, card.reserve_bytes) if card else (None, 0)
    answer = make_estimate(source.run, program_of(program, source), *on_card, risk=risk)
    if snapshot is not None:
        from gptfit.report.torch_snapshot import predicted_tape, write_snapshot

        tape = predicted_tape(source.run, answer.program, on_card[0])
        write_snapshot(snapshot, tape, source.run.expandable_segments)
    if html is not None:
        from gptfit.report.html import estimate_page, write_page

        options = options_of(gpu=card.profile.name if card else None, program=program, reserve=reserve)
        write_page(html, estimate_page(answer, source, card, asked.gptfit("estimate", {}, *options)))
    # A config written for nanoGPT is answered for both programs: its owner may train it with either.
    both = program is None and source.program == "nanogpt" and not json
    other = make_estimate(source.run, "gptfit", *on_card, risk=risk) if both else None
    live = formulas_view(answer) if formulas else None
    view = estimate_view(answer, other, verbose, live), notes_view(source, card, verbose)
    after = after_estimate(answer, asked, options_of(program=program, reserve=reserve))
    respond(json, answer.to_json, *view, after)
    return NO if answer.verdict == "does_not_fit" else YES


@app.command("explain-oom", context_settings=WORDS)
def explain_oom(
    context: typer.Context,
    words: LogWords = None,
    config: Config = None,
    program: Program = None,
    json: Json = False,
) -> int:
    """Why a run ran out of memory, from its traceback or log.

    The first word is the file; - or a pipe reads from there, and a terminal asks for the text.
    """
    from gptfit.logfile import read_log
    from gptfit.oom.diagnose import diagnose
    from gptfit.oom.failed_run import failed_run
    from gptfit.oom.read import read_paste
    from gptfit.report.lists import diagnosis_view
    from gptfit.report.output import respond

    if program is not None:
        program_of(program)
    asked = asked_for(context, words)  # its CONFIG is the log
    facts = read_paste(read_log(asked.config))
    answer = diagnose(facts, failed_run(facts, config, asked.overrides), program)
    options = options_of(config=config, program=program)
    respond(json, answer.to_json, diagnosis_view(answer, asked, *options))
    return NO if facts.kind == "not_oom" else YES
