"""The commands as functions. A config is what the command line takes (a preset's name or a file), a RunConfig, or a
mapping of keys; keys by name change it: `gptfit.plan("gpt2", gpu="rtx4070", batch_size=8)`.

What plan, estimate, explain_oom, check and guard need is imported when they run, and torch is not among it.
"""

import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

from gptfit.errors import GptfitError

if TYPE_CHECKING:
    from gptfit.card import Card
    from gptfit.config import RunConfig
    from gptfit.door import ConfigSource
    from gptfit.estimate import Estimate
    from gptfit.oom.diagnose import Diagnosis
    from gptfit.oom.failed_run import FailedRun
    from gptfit.oom.read import OomFacts
    from gptfit.plan import Plan
    from gptfit.tracefile import TraceReport

    Config: TypeAlias = str | os.PathLike[str] | RunConfig | Mapping[str, Any] | None


def plan(
    config: "Config" = None,
    *,
    gpu: str | None = None,
    reserve: str | int | None = None,
    tokens_per_step: int | None = None,
    allow: str | Sequence[str] = (),
    keep: str | Sequence[str] = (),
    program: str | None = None,
    **changes: Any,
) -> "Plan":
    """The best run that fits `gpu`, as `gptfit plan`. `reserve` is what others hold there, as "1.5GiB" or in bytes.

    Raises GptfitError for what cannot be read, and where no card is named and no driver knows one.
    """
    from gptfit.options import program_of
    from gptfit.plan import plan as make_plan

    source = source_of(config, changes)
    source = replace(source, program=program_of(program, source))
    card = card_of(gpu, reserve)
    if card is None:
        raise GptfitError("there is no GPU driver here, so plan has to be told the card", 'plan(..., gpu="rtx4070")')
    names = words_of(allow, 'allow=["adamw8bit"]'), words_of(keep, 'keep=["batch_size"]')
    return make_plan(source, card.profile, card.reserve_bytes, tokens_per_step, *names)


def estimate(
    config: "Config" = None,
    *,
    gpu: str | None = None,
    reserve: str | int | None = None,
    program: str | None = None,
    **changes: Any,
) -> "Estimate":
    """The memory of exactly this run, as `gptfit estimate`. Without a card its verdict is None.

    Raises GptfitError for what cannot be read.
    """
    from gptfit.options import program_of

    source = source_of(config, changes)
    return estimate_on(source.run, program_of(program, source), card_of(gpu, reserve))


def explain_oom(
    text: str | BaseException, *, config: "Config" = None, program: str | None = None, **changes: Any
) -> "Diagnosis":
    """Why a run ran out of memory, from its log, its traceback, or the exception itself, as `gptfit explain-oom`.

    Raises GptfitError for an empty text, and a config that cannot be read.
    """
    from gptfit.oom.diagnose import diagnose
    from gptfit.oom.read import read_paste

    if not isinstance(text, str | BaseException):
        raise GptfitError(
            f"a log of type {type(text).__name__}: expected the text, or the exception",
            "explain_oom(open(path).read())",
        )
    if program is not None:
        from gptfit.options import program_of

        program_of(program)
    facts = read_paste("".join(traceback.format_exception(text)) if isinstance(text, BaseException) else text)
    program = program or ("nanogpt" if is_namespace(config) else None)
    return diagnose(facts, failed(facts, config, changes), program)


def trace_step(
    make: Callable[..., Any], *, gpu: str | None = None, reserve: str | int | None = None, **keys: Any
) -> "TraceReport":
    """The memory of the training step that `make` makes, as `gptfit trace FILE.py:make`: it returns `(module, batch)`,
    or a callable that runs one micro-step, and behind it the optimizer if there is one. It is called on fake tensors.

    `keys` are its arguments, and what it does not take: dtype, optimizer, gradient_accumulation_steps, compile …
    Imports torch. Raises GptfitError for what cannot be traced, and for an exception in `make`.
    """
    from gptfit.factory import Factory, arguments_of
    from gptfit.tracefile import trace_factory

    name = getattr(make, "__name__", type(make).__name__)
    try:
        path = Path(inspect.getsourcefile(make) or "").absolute()
    except TypeError:  # an object with __call__, a partial, or a function written in C
        path = Path("python").absolute()
    factory = Factory(path, name, make, *arguments_of(make))
    card = card_of(gpu, reserve)
    on_card = (card.profile, card.reserve_bytes) if card else (None, 0)
    return trace_factory(factory, f"{path.name}:{name}", *on_card, **keys)


def check(namespace: Mapping[str, Any], gpu: str | None = None) -> "Estimate | None":
    """For one line in nanoGPT's train.py, below its configurator: `import gptfit; gptfit.check(globals())`.

    Reads the keys of the run and says on stderr whether it fits the card, and if not, the smallest change that does.
    It never stops a run: where it has no answer it says why, and returns None. Of several ranks the first speaks.
    """
    try:
        source = nanogpt_source(namespace)
        card = card_of(gpu, None)
        answer = estimate_on(source.run, "nanogpt", card)
        line = verdict_line(answer, source.run, card)
    except Exception as error:  # a training is worth more than what is said of it
        answer, line = None, f"no answer: {error.message if isinstance(error, GptfitError) else error}"
    if os.environ.get("RANK", "0") == "0":
        print(f"gptfit: {line}", file=sys.stderr)
    return answer


@contextmanager
def guard(config: "Config" = None, *, program: str | None = None, **changes: Any) -> Iterator[None]:
    """`with gptfit.guard("config/train_gpt2.py"):` around training. An out of memory inside is explained on stderr,
    and raised again. `config` may be `globals()` of nanoGPT's train.py; without it the traceback has to tell the run.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        try:
            explain_to_stderr(error, config, program, changes)
        except Exception as problem:
            print(f"gptfit: this cannot be explained: {problem}", file=sys.stderr)
        raise


def explain_to_stderr(error: BaseException, config: "Config", program: str | None, changes: Mapping[str, Any]) -> None:
    """Prints nothing for an error that is no out of memory."""
    from gptfit.report.lists import diagnosis_view
    from gptfit.report.output import show

    answer = explain_oom(error, config=config, program=program, **changes)
    if answer.facts.kind != "not_oom":
        with redirect_stdout(sys.stderr):
            show(diagnosis_view(answer))


def source_of(config: "Config", changes: Mapping[str, Any]) -> "ConfigSource":
    """The run, and which of its keys the caller set. Raises GptfitError for what cannot be read."""
    from gptfit.config import RunConfig, derive, shown
    from gptfit.door import ConfigSource, read_config

    if isinstance(config, RunConfig):
        user_keys = frozenset(config.model_fields_set | changes.keys())
        return ConfigSource(derive(config, **changes) if changes else config, "run", user_keys)
    if isinstance(config, Mapping):
        config, changes = None, {**config, **changes}
    elif config is not None and not isinstance(config, str | os.PathLike):
        raise GptfitError(
            f"a config of type {type(config).__name__}: expected a name, a path, a RunConfig or a mapping",
            'for example plan("gpt2", gpu="rtx4070")',
        )
    name = None if config is None else os.fspath(config)
    return read_config(name, [f"{key}={text_of(value, shown)}" for key, value in changes.items()])


def text_of(value: Any, shown: Callable[[Any], str]) -> str:
    """A value as it would be typed behind KEY=. Raises GptfitError for what is neither text nor a number."""
    if not isinstance(value, bool | int | float | str):
        raise GptfitError(f"{shown(value)} is no value of a key", "give text, a number, True or False")
    return f'"{value}"' if value == "" else f"{value}"


def words_of(names: str | Sequence[str], example: str) -> Sequence[str]:
    """Several names, or one. Raises GptfitError for what is none."""
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, Sequence | set | frozenset) or not all(isinstance(name, str) for name in names):
        raise GptfitError(f"{names!r:.60} is no list of names", f"write it as {example}")
    return list(names)


def card_of(gpu: str | None, reserve: str | int | None) -> "Card | None":
    from gptfit.card import find_card

    if not isinstance(gpu, str | None):
        raise GptfitError(f"a card of type {type(gpu).__name__}: expected its name", 'for example gpu="rtx4070"')
    return find_card(gpu, None if reserve is None else str(reserve))


def estimate_on(run: "RunConfig", program: str, card: "Card | None") -> "Estimate":
    from gptfit.estimate import estimate as make_estimate

    return make_estimate(run, program, card.profile, card.reserve_bytes) if card else make_estimate(run, program)


def failed(facts: "OomFacts", config: "Config", changes: Mapping[str, Any]) -> "FailedRun | None":
    """The run that failed: the config, or without one what the text and `changes` tell."""
    from gptfit.config import shown
    from gptfit.oom.failed_run import FailedRun, failed_run

    if config is None:
        return failed_run(facts, None, [f"{key}={text_of(value, shown)}" for key, value in changes.items()])
    source = nanogpt_source({**config, **changes}) if is_namespace(config) else source_of(config, changes)
    return FailedRun(source.run, frozenset(), True)


def is_namespace(config: "Config") -> "TypeGuard[Mapping[str, Any]]":
    """Whether it is a module's globals(), and not keys alone."""
    return isinstance(config, Mapping) and "__name__" in config


PRETRAINED_SHAPE = frozenset(("n_layer", "n_head", "n_embd", "bias", "vocab_size"))


def nanogpt_source(namespace: Mapping[str, Any]) -> "ConfigSource":
    """The run that the variables of nanoGPT's train.py describe; other variables are left alone.

    Raises GptfitError where none of them is a key, and for values that no run can have.
    """
    from gptfit.config import KEYS, make_run
    from gptfit.door import ConfigSource
    from gptfit.memory.allocator_options import parse_options
    from gptfit.nanogpt_file import NANOGPT, OTHER_TRAIN_PY, TRAIN_PY, implied

    if not isinstance(namespace, Mapping):
        raise GptfitError(f"{type(namespace).__name__} is no namespace", "gptfit.check(globals())")
    plain = {key: value for key, value in namespace.items() if isinstance(value, bool | int | float | str)}
    own = {key: value for key, value in plain.items() if key in TRAIN_PY | OTHER_TRAIN_PY and key not in NANOGPT}
    values = {key: value for key, value in own.items() if key in KEYS}
    if str(own.get("init_from")).startswith("gpt2"):  # the weights say the shape, whatever the variables hold
        values = {key: value for key, value in values.items() if key not in PRETRAINED_SHAPE}
    if not values:
        raise GptfitError("no key of a run is set here", "call it below the lines that set batch_size and n_layer")
    extra, notes = implied(own, values, "nanogpt")
    around: dict[str, Any] = {"n_gpus": int(os.environ.get("WORLD_SIZE") or 1)}
    allocator = os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or os.environ.get("PYTORCH_ALLOC_CONF") or ""
    around["expandable_segments"] = parse_options(allocator).expandable_segments
    run = make_run({**TRAIN_PY, **extra, **around, **values})
    return ConfigSource(run, "train.py", frozenset(values), "nanogpt", notes=tuple(notes))


def verdict_line(answer: "Estimate", run: "RunConfig", card: "Card | None") -> str:
    """`fits: 10.14 GiB of 10.38 GiB on rtx4070, …`, and for a run that does not fit, what the least change is."""
    from gptfit.levers import effects
    from gptfit.plan import smallest_change
    from gptfit.report.plans import change_text
    from gptfit.report.terminal import headline, margin_text

    text = headline(answer.verdict, margin_text(answer), answer.certain).plain
    line = text[:1].lower() + text[1:]
    if answer.verdict != "does_not_fit" or card is None:
        return line
    levers = effects(answer, run, "nanogpt", card.profile, card.reserve_bytes)
    change = smallest_change(answer, levers)
    return f"{line}; {change_text(change.change)} would fit" if change else line
