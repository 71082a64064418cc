"""The memory of any training step: what a user's file makes, traced on fake tensors, and whether it fits a card.

`FILE.py:NAME` names a function that returns `(module, batch)` or a callable that runs one micro-step, and behind
it the optimizer if there is one. It is called on fake tensors, so a model of any size takes no memory.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gptfit.config import RunConfig, make_run
from gptfit.errors import GptfitError, nearest
from gptfit.estimate import Budget, Needs, TensorRow, live_rows
from gptfit.factory import Factory, load_factory, users_code
from gptfit.gpus import GpuProfile
from gptfit.interval import process_interval
from gptfit.memory.overhead import UNKNOWN_CARD_CONTEXT_BYTES, cublas_workspace_bytes
from gptfit.memory.reserve import replay_tape
from gptfit.memory.tape import Buffer, Event, Item, Mark, Tape, make_buffer
from gptfit.trace import trace_step
from gptfit.traceloop import Loop
from gptfit.units import format_bytes
from gptfit.valueread import note_of

# What a run is where neither the file nor the user says: nothing that the file does not do itself.
DEFAULTS: dict[str, Any] = {
    "dtype": "float32",
    "optimizer": "adamw",
    "optimizer_impl": "fused",
    "grad_clip": 1.0,
    "gradient_accumulation_steps": 1,
    "compile": False,
    "expandable_segments": False,
}

# The first step, which makes the optimizer's state, and two after it, as an estimate replays them.
STEPS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceReport(Needs):
    """The answer for one traced step."""

    source: str
    arguments: Mapping[str, Any]
    takes_batch_size: bool
    expandable_segments: bool
    run_tape: Tape = field(repr=False, compare=False)  # the steps that were replayed
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        """The object that `gptfit trace --json` prints; keys that an estimate has, too, mean the same."""
        return {
            "schema": "gptfit.trace/1",
            "source": self.source,
            "arguments": {key: value if is_plain(value) else str(value) for key, value in self.arguments.items()},
            **self.memory_json(),
            "notes": list(self.notes),
            "fit": None,
        }


def is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def trace_file(spec: str, profile: GpuProfile | None = None, reserve_bytes: int = 0, /, **keys: Any) -> TraceReport:
    """Traces the steady step of what `FILE.py:NAME` makes. Imports the file and calls the function: it is the
    user's own code.

    `keys` are arguments of the function, and for what it does not take itself, keys of DEFAULTS: dtype is
    autocast's, optimizer the one that is taken where the function returns none.
    Raises GptfitError for a file, name, key or return value that is none, for an exception in the user's code, and
    for what cannot be traced, naming the op.
    """
    return trace_factory(load_factory(spec), spec, profile, reserve_bytes, **keys)


def trace_factory(
    factory: Factory,
    source: str,
    profile: GpuProfile | None = None,
    reserve_bytes: int = 0,
    /,
    **keys: Any,
) -> TraceReport:
    """`trace_file` for a factory that is loaded already; `source` is how it was named."""
    arguments, run = sort_keys(factory, keys)
    loop = Loop(lambda: factory(**arguments), run)
    with users_code(factory.path), loop.watched():
        traced = trace_step(loop.job, STEPS)
    workspace_bytes = cublas_workspace_bytes(profile.compute_capability if profile else None)
    whole = Tape(with_scratch(loop.recorder.items(loop.starts[0], loop.stop), workspace_bytes))
    replayed = replay_tape(whole, run.expandable_segments)
    context_bytes = profile.context_bytes if profile else UNKNOWN_CARD_CONTEXT_BYTES
    peak = traced.peak
    return TraceReport(
        source=source,
        arguments={**factory.defaults, **arguments},
        takes_batch_size="batch_size" in factory.parameters,
        expandable_segments=run.expandable_segments,
        run_tape=whole,
        budget=Budget(profile.name, profile.total_bytes, reserve_bytes) if profile else None,
        n_params=traced.n_params,
        live_bytes=peak.live_bytes,
        reserved_bytes=replayed.reserved_bytes,
        process_bytes=replayed.reserved_bytes + context_bytes,
        interval=process_interval(run.compile, replayed.reserved_bytes, profile),
        phase=peak.phase,
        op=peak.op,
        tensors=grouped(live_rows(traced.tape, replayed.allocated_bytes, peak.live_bytes, workspace_bytes)),
        saved_for_backward_bytes=traced.saved_for_backward_bytes,
        phases=tuple(traced.phases.items()),
        assumptions=assumptions(loop, context_bytes, profile, reserve_bytes),
        notes=(*loop.notes, *map(note_of, sorted(filter(None, loop.recorder.readers)))),
    )


def sort_keys(factory: Factory, keys: Mapping[str, Any]) -> tuple[dict[str, Any], RunConfig]:
    """What goes to the factory, and the run for what it leaves open. A key that both know is the factory's.

    Raises GptfitError for a key that neither knows, and for a value that a run cannot have.
    """
    arguments = {key: value for key, value in keys.items() if key in factory.parameters}
    rest = {key: value for key, value in keys.items() if key not in arguments}
    for key in rest:
        if key not in DEFAULTS:
            known = (*factory.parameters, *DEFAULTS)
            takes = f"{factory.name}() takes {', '.join(factory.parameters) or 'no argument'}"
            raise GptfitError(
                f'unknown key "{key[:60]}"{nearest(key[:60], known)}', f"{takes}; beside it {', '.join(DEFAULTS)}"
            )
    return arguments, make_run({**DEFAULTS, **rest})


def grouped(rows: Iterable[TensorRow]) -> tuple[TensorRow, ...]:
    """Rows that differ in the number of their block alone as one, `h.*.attn.c_attn.weight`; largest first."""
    groups: dict[tuple[Any, ...], TensorRow] = {}
    for row in rows:
        name = re.sub(r"(?<![^.\s])\d+(?=\.)", "*", row.name.split(" #")[0])
        key = (name, row.category, row.shape, row.dtype, row.n_bytes // row.count)
        old = groups.get(key)
        count, n_bytes = (old.count, old.n_bytes) if old else (0, 0)
        groups[key] = TensorRow(
            name if old else row.name.split(" #")[0],
            row.category,
            row.shape,
            row.dtype,
            count + row.count,
            n_bytes + row.n_bytes,
        )
    return tuple(sorted(groups.values(), key=lambda row: -row.n_bytes))


def with_scratch(items: list[Item], workspace_bytes: int) -> list[Item]:
    """`items` with what kernels take from the allocator and a trace does not see: a cuBLAS workspace for each of
    the two threads that multiply, and the fp32 sums of flash-attention's backward."""
    written: list[Item] = []
    threads = {"forward": "main", "backward": "autograd"}
    scratch: Event | None = None
    in_flash = False
    for item in items:
        written.append(item)
        if isinstance(item, Mark):
            in_flash = "ScaledDotProductFlashAttention" in item.op and "Backward" in item.op
            thread = threads.pop(item.phase.removeprefix("loss "), None)
            if thread is not None:
                name = f"cuBLAS workspace {thread}"
                written.append(Event(1, Buffer(name, "workspace", (workspace_bytes,), "uint8", workspace_bytes)))
        elif in_flash and isinstance(item, Event) and item.sign > 0 and len(item.buffer.shape) == 4:
            b, n_head, t, size = item.buffer.shape
            # flash_api.cpp, mha_bwd: dq_accum and softmax_d, over rows in 128s and columns in 32s.
            shape = (b, n_head, -(-t // 128) * 128, -(-size // 32) * 32 + 1)
            scratch = Event(1, make_buffer(f"{item.buffer.name} in fp32", "workspace", shape, "float32"))
            written += [scratch, Event(-1, scratch.buffer)]
            in_flash = False
    return written


def assumptions(loop: Loop, context_bytes: int, profile: GpuProfile | None, reserve_bytes: int) -> tuple[str, ...]:
    """What the figures rest on, in words a reader can object to."""
    run, made = loop.run, loop.made
    lines = ["the peak is that of a steady step: optimizer state exists"]
    if made.batch is not None:
        lines.append(
            "the module's output is alive until the next micro-step's, as in a loop that keeps it in a variable"
        )
        lines.append("no autocast" if run.dtype == "float32" else f"autocast to {run.dtype}")
    if loop.steps_itself:
        lines.append("the callable takes the optimizer's step itself")
    elif not made.optimizers:
        lines.append(f"the file brings no optimizer: {run.optimizer}, {run.optimizer_impl}")
    if run.micro_steps > 1:
        lines.append(f"{run.micro_steps} micro-steps accumulate, all gradients are alive during the last ones")
    if loop.is_compiled:
        lines.append("the module as torch.compile would run it, by inductor's plan")
    lines.append(
        f"reserved is a replay of the first steps through the caching allocator, expandable segments "
        f"{'on' if run.expandable_segments else 'off'}"
    )
    card = profile.context_source if profile else "no card named"
    lines.append(f"context and libraries outside the allocator: {format_bytes(context_bytes)}, {card}")
    if profile is not None:
        lines.append(f"others on the card hold {format_bytes(reserve_bytes)}")
    return tuple(lines)
