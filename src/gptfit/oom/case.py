"""A run as it was or as a change would make it: what it needs in a phase, and whether it fits the room there was."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from gptfit.config import RunConfig, derive
from gptfit.errors import GptfitError
from gptfit.estimate import under_program
from gptfit.levers import CLEAR
from gptfit.memory.overhead import CUBLAS_HANDLES, CUBLAS_WORKSPACE_BYTES
from gptfit.memory.reserve import replay_run, replay_tape, with_workspaces
from gptfit.memory.step import Pieces, first_steps, pieces, start_items, steady_step
from gptfit.memory.tape import Event, Item, Loop, Tape
from gptfit.memory.whole_run import evaluation_bytes

# Stretches of a step's tape in which a phase of a traceback may be. The loss is taken within forward by most models.
WITHIN: dict[str, tuple[str, ...]] = {
    "forward": ("forward", "loss"),
    "loss": ("loss", "loss backward"),
    "backward": ("loss backward", "backward"),
    "optimizer": ("optimizer",),
    "eval": ("evaluation",),
}
LATER = 0.06  # more than what the allocator was seen to add after two steps of two micro-steps
WORKSPACES_BYTES = CUBLAS_HANDLES * CUBLAS_WORKSPACE_BYTES


@dataclass(frozen=True)
class Case:
    """`without` are buffers that changed code no longer makes, `extra_bytes` what it makes instead. `first` says that
    it failed before its first step was over: what it needed then is less than what a later step needs."""

    run: RunConfig
    program: str
    without: frozenset[str] = frozenset()
    extra_bytes: int = 0
    first: bool = False

    def changed(self, program: str = "", **changes: object) -> "Case | None":
        """The case with keys changed; None where its program has no such thing."""
        try:
            program = program or self.program
            run = under_program(derive(self.run, **changes), program)
            return replace(self, run=run, program=program)
        except GptfitError:
            return None

    def without_buffers(self, names: frozenset[str], extra_bytes: int = 0) -> "Case":
        return replace(self, without=self.without | names, extra_bytes=self.extra_bytes + extra_bytes)

    def pieces(self, whole: bool = False, kernels: bool = False) -> Pieces:
        """The stretches of its tape. Raises GptfitError for what the program cannot do."""
        parts = pieces(self.run, self.program, whole=whole, kernels=kernels)
        if not self.without:
            return parts
        names = ("first_micro", "fresh_micro", "next_micro", "kept", "evaluation")
        return replace(parts, **{name: left_out(getattr(parts, name), self.without) for name in names})

    @cached_property
    def phases(self) -> Mapping[str, int]:
        """Peaks of live bytes by stretch of the steady step."""
        return self._peaks(steady_step(self.run, self.pieces()))

    @cached_property
    def first_phases(self) -> Mapping[str, int]:
        """The same of the first evaluation and step."""
        return self._peaks(Tape(start_items(self.run, self.pieces(whole=True), 2)))

    def _peaks(self, tape: Tape) -> Mapping[str, int]:
        return {name: n_bytes + self.extra_bytes for name, n_bytes in tape.phases().items()}

    @cached_property
    def evaluation_bytes(self) -> int:
        return evaluation_bytes(self.pieces(whole=True))

    @cached_property
    def checkpoint_bytes(self) -> int:
        """Parameters and optimizer state, as a checkpoint has them."""
        parts = self.pieces()
        return Tape([*parts.parameter_items, *parts.states]).peak().live_bytes

    @cached_property
    def parameter_bytes(self) -> int:
        return Tape(self.pieces().parameter_items).peak().live_bytes

    @cached_property
    def kernels(self) -> Pieces:
        """The stretches with what kernels take from the allocator, for a replay."""
        return self.pieces(whole=True, kernels=True)

    @cached_property
    def reserved_bytes(self) -> int:
        """What the allocator would hold: a replay as an estimate makes it, some ten milliseconds."""
        return replay_run(self.run, self.kernels, CUBLAS_WORKSPACE_BYTES).reserved_bytes + self.extra_bytes

    @cached_property
    def soon_reserved_bytes(self) -> int:
        """The same of two steps of two micro-steps, in half the time: on runs drawn at random 0 to 3.9 % less."""
        tape = with_workspaces(first_steps(self.run, self.kernels, 2, 2), CUBLAS_WORKSPACE_BYTES)
        return replay_tape(tape, self.run.expandable_segments).reserved_bytes + self.extra_bytes

    def need(self, within: tuple[str, ...]) -> int:
        """Live bytes at the worst instant of those stretches; of the whole step where none is named."""
        phases = self.first_phases if self.first else self.phases
        if within == ("evaluation",):
            return phases.get("evaluation", self.evaluation_bytes)
        return max(phases[name] for name in (within or phases) if name in phases)

    def least_bytes(self, within: tuple[str, ...]) -> int:
        """What tensors and workspaces take at the worst instant of a step, and of an evaluation if that failed."""
        step = max(self.phases.values())
        return max(step, self.evaluation_bytes if within == WITHIN["eval"] else 0) + WORKSPACES_BYTES

    def may_fit(self, room: int, within: tuple[str, ...] = ()) -> bool:
        """Whether its live peak fits: tensors alone, which takes no replay."""
        return self.least_bytes(within) <= room

    def fits(self, room: int, within: tuple[str, ...] = ()) -> bool:
        """Whether it fits; replayed where the live peak does not decide."""
        least = self.least_bytes(within)
        if least > room or least * (1 + CLEAR) <= room:
            return least <= room
        # With expandable segments a shorter run may need more than a longer one; and it has no evaluation.
        if self.run.expandable_segments or within == WITHIN["eval"]:
            return self.reserved_bytes <= room
        if self.soon_reserved_bytes > room:
            return False
        return self.soon_reserved_bytes * (1 + LATER) <= room or self.reserved_bytes <= room


def left_out(items: list[Item], names: frozenset[str]) -> list[Item]:
    """`items` without what happens to the buffers of those names."""
    kept: list[Item] = []
    for item in items:
        if isinstance(item, Loop):
            kept.append(item._replace(body=left_out(item.body, names)))
        elif not (isinstance(item, Event) and item.buffer.name in names):
            kept.append(item)
    return kept
