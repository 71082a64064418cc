"""The instant of the failing allocation on the tape of the run: what was alive, and whether it adds up."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from gptfit.memory.tape import Buffer, Event, Item, Loop, Mark
from gptfit.oom.case import WITHIN, WORKSPACES_BYTES, Case
from gptfit.oom.tensors import Tensor, prints_as
from gptfit.units import format_bytes

# Of what is printed as allocated, this much may be slack of large blocks and kernels' scratch (recorded: 0 to 4.6 %).
SLACK = 0.05

GROUPS = {
    "parameter": "parameters",
    "gradient": "gradients",
    "optimizer state": "optimizer state",
    "activation": "activations kept for backward",
    "temporary": "temporaries",
    "buffer": "token ids and tables",
}
WORDS = {
    "lm_head": "logits",
    "zero gradient of the returned logits": "zeros for the returned, unused logits",
    "logits as float32": "logits as float32",
    "cross entropy": "log_softmax of the logits, float32",
    "nll gradient": "gradient of the log_softmax, float32",
    "cross entropy gradient": "gradient of the logits, float32",
    "logits gradient": "gradient of the logits",
}


@dataclass(frozen=True, slots=True)
class Alive:
    """One row of what was alive: a tensor of the logits' size, or all tensors of a kind."""

    name: str
    n_bytes: int
    wide: bool = False  # of batch × block × vocabulary


@dataclass(frozen=True, slots=True)
class Instant:
    """Just before the failing allocation, of `wanted`. `within` is the stretch of the tape, `live` counts the buffers
    that `rows` sum up; `allocated_bytes` and `total_bytes` are the printed figures."""

    wanted: Buffer
    within: tuple[str, ...]
    rows: tuple[Alive, ...]
    live: Mapping[Buffer, int]
    allocated_bytes: int | None
    total_bytes: int | None

    @property
    def alive_bytes(self) -> int:
        return sum(row.n_bytes for row in self.rows)

    @property
    def unexplained_bytes(self) -> int:
        """What is allocated beyond what the tape of this run has there; 0 where nothing is printed."""
        if self.allocated_bytes is None:
            return 0
        return max(0, self.allocated_bytes - self.alive_bytes)

    @property
    def adds_up(self) -> bool | None:
        """None where nothing is printed to compare with."""
        if self.allocated_bytes is None:
            return None
        return abs(self.allocated_bytes - self.alive_bytes) <= SLACK * self.allocated_bytes

    @property
    def impossible(self) -> bool:
        """Whether the tape has more alive than can have been: the keys are not those of this run."""
        most = self.allocated_bytes if self.allocated_bytes is not None else self.total_bytes
        return most is not None and self.alive_bytes > (1 + SLACK) * most

    def bytes_of(self, names: frozenset[str]) -> int:
        """Bytes of the live buffers of those names."""
        return sum(buffer.n_bytes * count for buffer, count in self.live.items() if buffer.name in names)

    def sentence(self) -> str:
        """Whether the rows add up to the printed figure, in words."""
        total = format_bytes(self.alive_bytes)
        if self.impossible:
            most = format_bytes(self.allocated_bytes or self.total_bytes or 0)
            return f"with these keys {total} would be alive then, but there are {most}: they are not those of this run"
        if self.allocated_bytes is None:
            return f"together {total}"
        printed = format_bytes(self.allocated_bytes)
        if self.adds_up:
            return f"together {total} of the {printed} printed as allocated"
        more = format_bytes(self.unexplained_bytes)
        return f"together {total} of the {printed} printed: another {more} is held by what these keys do not tell"


def find_instant(
    case: Case,
    phase: str,
    tensor: Tensor | None,
    tried_bytes: int | None,
    allocated_bytes: int | None,
    total_bytes: int | None,
    progress: str = "",
) -> Instant | None:
    """The allocation on the tape of the first or of a steady step that has the size asked for, as far as `progress`
    (see `OomFacts`) leaves a choice; of several the one where as much is alive as is printed, else where most is of
    what the card can hold. None where the tape has none of that size."""
    if tried_bytes is None or (phase not in WITHIN and phase != "unknown"):
        return None
    size = -(-tensor.n_bytes // 512) * 512 if tensor is not None and tensor.shape else None
    stretches = WITHIN.get(phase, ())
    best: tuple[int, list[tuple[Mark, Event]], int] | None = None
    tapes = {"first": [_first], "later": [_steady]}.get(progress, [_first, _steady])
    for items in (tape(case, phase) for tape in tapes):
        flat = list(_flat(items, [Mark("setup", "")]))
        for at, running in _candidates(flat, stretches, size, tried_bytes, tensor):
            alive_bytes = running + WORKSPACES_BYTES
            possible = total_bytes is None or alive_bytes <= total_bytes
            most = -alive_bytes if possible else alive_bytes
            far = abs(alive_bytes - allocated_bytes) if allocated_bytes is not None else most
            if best is None or far < best[0]:
                best = (far, flat, at)
    if best is None:
        return None
    _, flat, at = best
    live: Counter[Buffer] = Counter()
    for _, event in flat[:at]:
        live[event.buffer] += event.sign
    mark, event = flat[at]
    merged = ("loss", "loss backward") if mark.phase.startswith("loss") else (mark.phase,)
    return Instant(event.buffer, merged, tuple(_rows(live, mark.phase)), live, allocated_bytes, total_bytes)


def _first(case: Case, phase: str) -> list[Item]:
    """From an empty card to the end of the first step: no optimizer state, where the trainer does not make it first,
    and none of the gradients at first."""
    p = case.pieces(whole=True)
    before, within = (p.states, []) if case.run.creates_states_first else ([], p.states)
    step = [Mark("optimizer", "step"), *within, *p.step]
    return [
        Mark("setup", "parameters"),
        *p.parameter_items,
        *before,
        *p.batch,
        Mark("evaluation", "evaluation"),
        *p.evaluation,
        *p.first_micro,
        *(p.next_micro if case.run.micro_steps > 1 else []),
        *step,
    ]


def _steady(case: Case, phase: str) -> list[Item]:
    """A later step; what all its micro-steps but the first do is on the tape once."""
    p = case.pieces(whole=phase == "eval")
    evaluation = [Mark("evaluation", "evaluation"), *p.evaluation] if phase == "eval" else []
    before = [Mark("setup", "parameters"), *p.parameter_items, *p.states, *p.batch, *p.kept, *evaluation]
    after = [Mark("optimizer", "step"), *p.clip, *p.step]
    return [*before, *p.fresh_micro, *(p.next_micro if case.run.micro_steps > 1 else []), *after]


def _flat(items: Sequence[Item], mark: list[Mark]) -> Iterator[tuple[Mark, Event]]:
    """Events with the mark they stand behind."""
    for item in items:
        if isinstance(item, Mark):
            mark[0] = item
        elif isinstance(item, Loop):
            for _ in range(item.n):
                yield from _flat(item.body, mark)
        else:
            yield mark[0], item


def _candidates(
    flat: list[tuple[Mark, Event]],
    stretches: tuple[str, ...],
    size: int | None,
    tried_bytes: int,
    tensor: Tensor | None,
) -> list[tuple[int, int]]:
    """(index, bytes alive before) of each allocation that it may have been; those that bear the name, if any does."""
    found: list[tuple[int, int, bool]] = []
    running = 0
    for at, (mark, event) in enumerate(flat):
        n_bytes = event.buffer.n_bytes
        if event.sign > 0 and (not stretches or mark.phase in stretches) and mark.phase != "setup":
            right = n_bytes == size if size is not None else prints_as(n_bytes, tried_bytes)
            if right:
                found.append((at, running, tensor is not None and _named(tensor.name, event.buffer)))
        running += event.sign * n_bytes
    named = any(hit for _, _, hit in found)
    return [(at, alive) for at, alive, hit in found if hit or not named]


# What the tape calls the tensors of a diagnosis.
ON_THE_TAPE = {
    "logits": ("lm_head",),
    "logits gradient": ("logits gradient", "lm_head gradient"),
    "cross entropy": ("cross entropy", "logits as float32"),
    "cross entropy gradient": ("cross entropy gradient", "nll gradient"),
    "optimizer temporary": ("temporary",),
    "optimizer state": ("exp_avg",),
    "parameter gradient": (".grad",),
    "mlp activation": ("mlp",),
    "attention output": ("attn",),
    "attention scores": ("scores", "softmax"),
    "embedding": ("emb",),
}


def _named(name: str, buffer: Buffer) -> bool:
    words = ON_THE_TAPE.get(name, (name,))
    return buffer.name in words if buffer.category == "logits" else any(word in buffer.name for word in words)


def _rows(live: Counter[Buffer], phase: str) -> list[Alive]:
    """Tensors as wide as the vocabulary one by one, the others by kind, largest first; the workspaces with them."""
    sizes: Counter[str] = Counter()
    groups = {**GROUPS, "activation": "activations"} if phase == "evaluation" else GROUPS  # nothing is kept there
    for buffer, count in live.items():
        if count:
            alone = WORDS.get(buffer.name, buffer.name) if buffer.category == "logits" else ""
            sizes[alone or groups.get(buffer.category, buffer.category)] += buffer.n_bytes * count
    sizes["cuBLAS workspaces"] = WORKSPACES_BYTES
    wide = {WORDS.get(buffer.name, buffer.name) for buffer in live if buffer.category == "logits"}
    return [Alive(name, n_bytes, name in wide) for name, n_bytes in sizes.most_common() if n_bytes > 0]
