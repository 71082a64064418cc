"""A compiled backward that is planned kernel by kernel, on the tape: rounds of blocks, alike ones a loop.

A round is `checkpoint_every` blocks, the first of them run again, or one block that was kept. Some rounds at either end
are planned each for itself, one stands for all between: by then the buffers in use repeat.
"""

from collections import Counter
from typing import TYPE_CHECKING

from gptfit.memory.autograd import Tensor
from gptfit.memory.compiled_forward import Stretch
from gptfit.memory.compiled_plan import OUTPUT, SAVED, Step
from gptfit.memory.compiled_planned import FINAL, TOP, Span, planned
from gptfit.memory.tape import Buffer, Event

if TYPE_CHECKING:
    from gptfit.memory.compiled_backward import Compiled


class Rounds:
    """Writes the rounds of `program` as they are planned. `dx` is the gradient of the final norm's output, or `grads`
    that of the logits, where the loss is in the graph."""

    def __init__(self, program: "Compiled", dx: Tensor | None, grads: list[Tensor], tied_here: bool) -> None:
        self.program = program
        self.grads = grads
        self.tied_here = tied_here
        self.part: list[Tensor] = []  # of the gradient of an embedding that is tied outside of this graph
        spans = tuple(Span(stretch.n, stretch.start, stretch.stride) for stretch in program.stretches)
        self.plan = planned(program.run, spans, self.names_kept())
        self.rounds: list[list[Step]] = [[] for _ in range(len(program.stretches) + 1)]
        self.late: set[str] = set()  # what was kept and goes after its own round
        stretches = [*reversed(program.stretches), None]
        for step in self.plan.steps:
            index, owner = self.round_of(step), self.stretch_of(step)
            self.rounds[index].append(step)
            if owner is not None and owner is not stretches[index]:
                self.late.add(step.name)
        self.buffers = dict(self.plan.buffers)
        if dx is not None:
            self.buffers[FINAL] = dx.storage.buffer
            dx.storage.forget()

    def names_kept(self) -> frozenset[str]:
        """What forward kept, by the names of the operations that made it."""
        program = self.program
        last = program.stretches[-1]
        last_place = f"{last.start}+{last.stride - 1}/"
        found = {last_place + short_name(tensor) for tensor in program.head_kept}
        for stretch in program.stretches:
            for position, tensors in enumerate(stretch.kept):
                found |= {f"{stretch.start}+{position}/{short_name(tensor)}" for tensor in tensors}
        return frozenset(found)

    def stretch_of(self, step: Step) -> Stretch | None:
        """Whose gradient is made, or whose kept tensor goes."""
        place = self.plan.name_of(step.name).partition("+")[0]
        if self.plan.kinds[step.name] not in (OUTPUT, SAVED) or not place.isdigit():
            return None
        return next(stretch for stretch in self.program.stretches if stretch.start == int(place))

    def round_of(self, step: Step) -> int:
        """In which round a step is taken. Where one round stands for many, what stays and what was kept goes with its
        own, also if it is touched in another."""
        now = sum(step.kernel > end for end in self.plan.ends)
        owner = self.stretch_of(step)
        stretches = self.program.stretches[::-1]
        if owner is None or (owner.n == 1 and (now == len(stretches) or stretches[now].n == 1)):
            return now
        return stretches.index(owner)

    def write(self) -> None:
        program = self.program
        w = program.w
        for steps, stretch in zip(self.rounds[:-1], reversed(program.stretches), strict=True):
            before, steps, after = self.balanced(steps) if stretch.n > 1 else ([], steps, [])
            self.write_steps(before, stretch)
            with w.loop(stretch.n, reverse=True, start=stretch.start, stride=stretch.stride):
                w.mark("block")
                self.write_steps(steps, stretch)
                for position, kept in enumerate(stretch.kept):
                    kept[:] = [
                        tensor for tensor in kept if f"{stretch.start}+{position}/{short_name(tensor)}" in self.late
                    ]
            w.shift = 0
            self.write_steps(after, stretch)
        w.mark("embedding")
        self.write_steps(self.rounds[-1], program.stretches[0])

    def write_steps(self, steps: list[Step], stretch: Stretch) -> None:
        program = self.program
        w = program.w
        for step in steps:
            sign, name = step.sign, self.plan.name_of(step.name)
            place, _, label = name.rpartition("/")
            kind, owner = self.plan.kinds[step.name], self.stretch_of(step) or stretch
            position = int(place.partition("+")[2] or 0)
            w.shift = owner.start - stretch.start + position
            if name.startswith(TOP):
                self.write_top(label, sign)
            elif name == "end/embedding.grad" and sign > 0:
                self.write_embedding()
            elif kind == OUTPUT:
                parameter = label.removesuffix(".grad")
                program.gradient(parameter if place == "end" or parameter.startswith("ln_f") else f"h.*.{parameter}")
            elif kind == SAVED:
                kept = program.head_kept if label.startswith("ln_f ") else owner.kept[position]
                for index in reversed(range(len(kept))):
                    if short_name(kept[index]) == label:
                        kept[index].storage.shift = w.shift if w.rounds else position  # its own loop comes with it
                        del kept[index]
            else:
                w.items.append(Event(sign, self.buffers[step.name]))
        w.shift = 0

    def write_top(self, label: str, sign: int) -> None:
        """The logits' gradient lies where they lay."""
        program = self.program
        if sign > 0:
            if label == "lm_head.weight.grad":
                program.gradient("lm_head.weight")
        elif label.startswith("logits"):
            self.grads.clear()
        elif label == "weight":
            program.drop_head("wte.weight", "lm_head.weight")
        else:
            program.drop_head(label)

    def write_embedding(self) -> None:
        run, program = self.program.run, self.program
        if self.tied_here or not run.tie_embeddings:
            program.gradient("wte.weight")
        else:
            shape = (run.vocab_size, run.n_embd)
            self.part.append(program.w.empty("embedding gradient", "temporary", shape, run.param_dtype))

    def balanced(self, steps: list[Step]) -> tuple[list[Step], list[Step], list[Step]]:
        """`steps` of a round that is repeated, less what it makes for good or frees for good: that is done before, and
        after."""
        net = Counter[Buffer]()
        for sign, name, _ in steps:
            if self.plan.kinds[name] not in (OUTPUT, SAVED):
                net[self.buffers[name]] += sign
        before, inside, after = [], [], []
        for step in steps:
            own = self.plan.kinds[step.name] not in (OUTPUT, SAVED)
            if own and net[self.buffers[step.name]] * step.sign > 0:
                net[self.buffers[step.name]] -= step.sign
                (before if step.sign > 0 else after).append(step)
            else:
                inside.append(step)
        return before, inside, after


def short_name(tensor: Tensor) -> str:
    """The name within a block of what forward kept."""
    return tensor.storage.buffer.name.removeprefix("h.*.")
