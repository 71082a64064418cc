"""What would have helped the run that failed, by reading its tape again with each change, and with pairs of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from types import MappingProxyType

from gptfit.config import derive
from gptfit.levers import step_text, with_micro_batch
from gptfit.memory.tape import Event, Loop
from gptfit.oom.case import WITHIN, Case
from gptfit.oom.enough import Prospect
from gptfit.oom.instant import Instant
from gptfit.oom.read import OomFacts
from gptfit.oom.remedies import Remedy
from gptfit.oom.trainers import Trainer, Word, spelled

MiB = 1 << 20
MOST_PAIRS = 3
NEAR = 3  # micro-batches below the bound of live bytes that are replayed one by one
ZEROS = "zero gradient of the returned logits"

Lever = Callable[[Case], Case | None]


def _detached(case: Case) -> Case | None:
    """Without the zeros that a compiled backward makes for an output that nobody differentiates."""
    returned = case.program == "nanogpt" and case.run.compile
    return case.without_buffers(frozenset((ZEROS,))) if returned and ZEROS not in case.without else None


def _returned(case: Case) -> Case | None:
    """Without the logits that the training loop holds; eager, nothing else needs them in backward."""
    held = case.program == "nanogpt" and not case.run.compile and "lm_head" not in case.without
    return case.without_buffers(frozenset(("lm_head",))) if held else None


def _checkpointing(case: Case) -> Case | None:
    """nanoGPT has no key for it: what its blocks keep is left out but their inputs, and one block is computed again."""
    if case.program != "nanogpt":
        none = case.run.activation_checkpointing == "none"
        return case.changed(activation_checkpointing="block") if none else None
    if any("*" in name for name in case.without):
        return None
    kept = {
        event.buffer
        for item in case.pieces().fresh_micro
        if isinstance(item, Loop)
        for event in item.body
        if isinstance(event, Event) and event.buffer.category == "activation" and "*" in event.buffer.name
    }
    inputs = ("h.*.x", "h.*.ln_1 normalised")  # compiled, the normalised input is kept in place of the input
    again = [buffer for buffer in kept if buffer.name not in inputs and ".weight as" not in buffer.name]
    return case.without_buffers(frozenset(buffer.name for buffer in again), sum(buffer.n_bytes for buffer in again))


LEVERS: Mapping[str, Lever] = MappingProxyType(
    {
        "detached": _detached,
        "returned": _returned,
        "compile": lambda case: None if case.run.compile else case.changed(compile=True),
        "chunked": lambda case: case.changed(loss="chunked") if case.run.loss == "full" else None,
        "gptfit": lambda case: case.changed("gptfit", loss="chunked") if case.program == "nanogpt" else None,
        "checkpointing": _checkpointing,
        "bfloat16": lambda case: case.changed(dtype="bfloat16") if case.run.dtype == "float32" else None,
        "fused": lambda case: case.changed(optimizer_impl="fused") if case.run.optimizer_impl != "fused" else None,
        "adamw8bit": lambda case: case.changed(optimizer="adamw8bit") if case.run.optimizer == "adamw" else None,
        "adamw16bit": lambda case: case.changed(optimizer="adamw16bit") if case.run.optimizer == "adamw" else None,
    }
)
# Levers by what failed, where no figure can be computed; those that help most come first.
BY_PHASE: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "forward": ("batch", "checkpointing", "chunked", "bfloat16", "block"),
        "loss": ("chunked", "batch", "block"),
        "backward": ("batch", "checkpointing", "chunked", "bfloat16", "block"),
        "optimizer": ("fused", "adamw8bit", "adamw16bit"),
        "eval": ("eval",),
        "unknown": ("batch", "checkpointing", "chunked"),
        "compile": ("batch", "checkpointing", "chunked"),
    }
)


# Levers that a run has pulled already, by the key and values that tell so.
DONE: tuple[tuple[str, str, tuple[object, ...]], ...] = (
    ("checkpointing", "activation_checkpointing", ("block",)),
    ("bfloat16", "dtype", ("bfloat16", "float16")),
    ("adamw8bit", "optimizer", ("adamw8bit",)),
    ("adamw16bit", "optimizer", ("adamw16bit", "adamw8bit")),
    ("fused", "optimizer_impl", ("fused",)),
    ("chunked", "loss", ("chunked",)),
    ("batch", "batch_size", (1,)),
)


def worded_remedies(facts: OomFacts, trainer: Trainer, logits: bool) -> list[Remedy]:
    """Changes in the trainer's words, without figures: for a run whose sizes nobody told."""
    names = BY_PHASE["loss"] if logits and facts.phase in ("forward", "backward", "unknown") else ()
    names = dict.fromkeys((*names, *BY_PHASE.get(facts.phase, ())))
    batch = facts.config.get("batch_size")
    sizes = _sizes(batch // 2, facts) if isinstance(batch, int) and batch > 1 else {}
    done = {lever for lever, key, values in DONE if facts.config.get(key) in values}
    if not logits and not trainer.title:  # it may be no language model
        done |= {"chunked", "block"}
    words = {**trainer.words, "batch": (trainer.batch, "a step's peak is that of one micro-batch; its tokens stay")}
    return [Remedy(*spelled(words[name], **sizes)) for name in names if name in words and name not in done]


def _sizes(batch: int, facts: OomFacts) -> dict[str, object]:
    before = facts.config.get("batch_size")
    steps = facts.config.get("gradient_accumulation_steps")
    if isinstance(before, int) and isinstance(steps, int):
        return {"batch": batch, "steps": max(1, round(before * steps / batch))}
    return {"batch": batch}


@dataclass(frozen=True, slots=True)
class Failure:
    """The run that failed, where on its tape, and the room there was for it, None where the text does not tell."""

    case: Case
    trainer: Trainer
    within: tuple[str, ...]
    instant: Instant | None
    prospect: Prospect

    @property
    def room(self) -> int | None:
        return self.prospect.room

    def remedy(self, words: Sequence[Word], after: Case, **sizes: object) -> Remedy | None:
        """A change that makes `after` of the case; None where it saves nothing there."""
        saves = self.saves(after)
        if saves < MiB:
            return None
        enough = None if self.room is None else self.prospect.enough(saves, after)
        texts = [spelled(word, **sizes) for word in words]
        change, why = " and ".join(change for change, _ in texts), "; ".join(why for _, why in texts)
        return Remedy(change, why, saves, enough)

    def saves(self, after: Case) -> int:
        """Bytes at that instant."""
        case = self.case
        if self.instant and (after.run, after.program, after.extra_bytes) == (case.run, case.program, case.extra_bytes):
            return self.instant.bytes_of(after.without - case.without)
        return case.need(self.within) - after.need(self.within)


def run_remedies(failure: Failure) -> list[Remedy]:
    """Changes to the run, what saves most at that instant first, those that are enough before those that are not;
    pairs of them where none is. Whether one is enough is None where the room is not known."""
    case, words = failure.case, failure.trainer.words
    useless = ("returned",) if failure.within == WITHIN["eval"] else ()  # its loss needs the logits
    names = [name for name in words if name in LEVERS and name not in useless]
    cases = {name: after for name in names if (after := LEVERS[name](case)) is not None}
    found = [remedy for name, after in cases.items() if (remedy := failure.remedy([words[name]], after)) is not None]
    if failure.within != WITHIN["optimizer"]:
        found += _micro_batch(failure, case, [])
    if failure.room is not None and not any(remedy.enough for remedy in found):
        found += _pairs(failure, cases)
    return sorted(found, key=lambda remedy: (remedy.enough is False, -(remedy.saves_bytes or 0)))


def _pairs(failure: Failure, cases: Mapping[str, Case]) -> list[Remedy]:
    """Pairs of changes that are enough together, and one change with the largest micro-batch that then fits."""
    words = failure.trainer.words
    found: list[Remedy] = []
    for first, second in combinations(cases, 2):
        both = LEVERS[second](cases[first])
        remedy = failure.remedy([words[first], words[second]], both) if both is not None else None
        found += [remedy] if remedy is not None and remedy.enough else []
    for name, after in cases.items():
        found += _micro_batch(failure, after, [words[name]])
    return sorted(found, key=lambda remedy: -(remedy.saves_bytes or 0))[:MOST_PAIRS]


def _micro_batch(failure: Failure, case: Case, words: Sequence[Word]) -> list[Remedy]:
    """The largest micro-batch of `case` that fits, tokens a step kept; half of it where the room is not known. Where
    an evaluation failed it is that of the evaluation. `words` are those of the change that made `case`."""
    run, trainer, room, within = case.run, failure.trainer, failure.room, failure.within
    evaluates = within == WITHIN["eval"] and trainer.twin == "gptfit"
    batch_size = run.eval_batch_size if evaluates else run.batch_size
    tokens = run.batch_size * run.gradient_accumulation_steps
    sizes = [size for size in range(1, batch_size) if not trainer.divides or tokens % size == 0]
    if not sizes:
        return []

    def smaller(size: int) -> Case:
        other = derive(run, eval_batch_size=size) if evaluates else with_micro_batch(run, size)
        return replace(case, run=other, extra_bytes=case.extra_bytes * other.batch_size // run.batch_size)

    why = "the largest micro-batch that fits here"
    if room is None:
        size = max(size for size in sizes if size <= max(1, batch_size // 2))
        why = "half the micro-batch"
    else:
        lacking = failure.prospect.missing or 0

        def may(size: int) -> bool:
            return smaller(size).may_fit(room, within) and failure.saves(smaller(size)) >= lacking

        def fits(size: int) -> bool:
            return smaller(size).fits(room, within)

        most = _last(sizes, may)
        near = max(0, most - NEAR)
        size = (
            next((size for size in reversed(sizes[near:most]) if fits(size)), 0)
            or [0, *sizes][_last(sizes[:near], fits)]
        )
        if size == 0:
            return []
    after = smaller(size)
    steps = after.run.gradient_accumulation_steps // (run.n_gpus if trainer.per_gpu else 1)
    word = trainer.words["eval"] if evaluates else (trainer.batch, f"{why}; {step_text(run, after.run)}")
    remedy = failure.remedy([*words, word], after, batch=size, steps=steps)
    return [] if remedy is None else [replace(remedy, micro_batch=0 if words or evaluates else size)]


def _last(sizes: Sequence[int], test: Callable[[int], bool]) -> int:
    """How many of the sizes pass, the smaller ones first."""
    low, high = 0, len(sizes)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if test(sizes[middle - 1]) else (low, middle - 1)
    return low
