"""The backward of a compiled step with checkpoints on the tape: rounds of `checkpoint_every` blocks, alike ones a loop.

A round is a block that is run again and those after it that were kept. Some rounds at either end are planned each for
itself, one stands for all between: by then the buffers in use repeat.
"""

from collections import Counter
from typing import TYPE_CHECKING

from gptfit.memory.autograd import Tensor
from gptfit.memory.compiled_again import Again
from gptfit.memory.compiled_forward import Stretch, base_name
from gptfit.memory.compiled_fusion import fuse_near, fuse_softmaxes, fuse_with_next
from gptfit.memory.compiled_order import reordered
from gptfit.memory.compiled_plan import (
    FRESH,
    GIVEN,
    OUTPUT,
    SAVED,
    Kernel,
    Plan,
    Slot,
    Step,
    fused,
)  # fmt: skip
from gptfit.memory.tape import Buffer, Event, make_buffer

if TYPE_CHECKING:
    from gptfit.memory.compiled_backward import Compiled

FINAL = "final norm gradient"


class Rounds:
    """Plans the rounds of `program` and writes them. `dx`: the gradient of the final norm's output."""

    def __init__(self, program: "Compiled", dx: Tensor) -> None:
        self.program = program
        self.dx = dx
        self.listing = Again(program.run)
        self.ends: list[int] = []  # the last kernel of each round
        self.list_kernels()
        self.rounds: list[list[Step]] = [[] for _ in range(len(program.stretches) + 1)]
        self.late: set[str] = set()  # what was kept and goes after its own round
        stretches = [*reversed(program.stretches), None]
        for step in self.planned():
            index, owner = self.round_of(step), self.stretch_of(step)
            self.rounds[index].append(step)
            if owner is not None and owner is not stretches[index]:
                self.late.add(step.name)
        self.buffers = self.shown()

    def list_kernels(self) -> None:
        """Kernels of all stretches, from the last to the first, a loop's once."""
        program, listing = self.program, self.listing
        run = program.run
        above = listing.slot(FINAL, self.dx.shape, self.dx.dtype, FRESH if run.loss == "full" else GIVEN)
        if run.loss == "full":
            n_logits = run.batch_size * run.block_size * run.vocab_size
            listing.add([above], [])
            listing.kernels[-1].inside = n_logits * 2 * (2 if run.dtype != "float32" else 4)
            if not run.tie_embeddings:
                listing.call(listing.slot("end/head.grad", (run.vocab_size, run.n_embd), run.param_dtype, OUTPUT))
        for stretch in reversed(program.stretches):
            places = [f"{stretch.start}+{position}/" for position in range(stretch.stride)]
            kept = [self.saved(place, tensors) for place, tensors in zip(places, stretch.kept, strict=True)]
            last = stretch is program.stretches[-1]
            final: list[str] = []
            if last and stretch.stride > 1:
                final += [self.saved("end/", program.head_kept)[name] for name in self.final_names()]
            above = listing.round(places, kept, final, above, last, stretch.start == 0)
        listing.at = ""
        ends = [listing.slot("end/embedding.grad", (run.vocab_size, run.n_embd), run.param_dtype, OUTPUT)]
        listing.add(ends, [above], inside=listing.low_stream * 2 * listing.slots[ends[0]].n_bytes)

    def saved(self, place: str, tensors: list[Tensor]) -> dict[str, str]:
        """The buffers that forward kept of a block, by their names in it."""
        found: dict[str, str] = {}
        for tensor in tensors:
            name = tensor.storage.buffer.name.removeprefix("h.*.")
            found[base_name(tensor).removeprefix("h.*.")] = self.listing.slot(
                place + name, tensor.shape, tensor.dtype, SAVED
            )
        return found

    def final_names(self) -> list[str]:
        """What the final norm kept, its output left out."""
        names = [base_name(tensor) for tensor in self.program.head_kept]
        return [name for name in names if name.startswith("ln_f ")]

    def planned(self) -> list[Step]:
        listing = self.listing
        run = self.program.run
        if (
            run.attention == "flash" and run.dtype == "float32"
        ):  # turning gradients back is laid out as turning q and k is
            fuse_with_next(listing.kernels, "/turning", "/rotation")
        fuse_near(listing.kernels, "/rotation", 4)
        fuse_softmaxes(listing.kernels)
        order = fused(listing.kernels)
        hidden = dict(zip(self.ends_in(order), (made - kept for kept, made in self.unseen()), strict=True))
        saved_bytes, output_bytes = (sum(sizes) for sizes in zip(*self.unseen(), strict=True))
        order = reordered(order, listing.slots, hidden, saved_bytes, output_bytes)
        self.ends = self.ends_in(order)
        spans: list[tuple[int, int, int]] = []
        for end, (kept, made) in zip(self.ends, self.unseen(), strict=True):
            spans += [(0, end + 1, kept), (end + 1, len(order), made)] if kept or made else []
        plan = Plan(order, listing.slots, spans)
        return [step for step in plan.steps if step is not None]

    def ends_in(self, order: list[Kernel]) -> list[int]:
        """The last kernel of each round's way down."""
        found = {name: index for index, kernel in enumerate(order) for name in kernel.writes if "x gradient" in name}
        return [found[f"{stretch.start}+0/x gradient"] for stretch in reversed(self.program.stretches)]

    def stretch_of(self, step: Step) -> Stretch | None:
        """Whose gradient is made, or whose kept tensor goes."""
        place = step.name.partition("+")[0]
        if self.listing.slots[step.name].kind not in (OUTPUT, SAVED) or not place.isdigit():
            return None
        return next(stretch for stretch in self.program.stretches if stretch.start == int(place))

    def round_of(self, step: Step) -> int:
        """In which round a step is taken. Where one round stands for many, what stays and what was kept goes with its
        own, also if it is touched in another."""
        now = sum(step.kernel > end for end in self.ends)
        owner = self.stretch_of(step)
        stretches = self.program.stretches[::-1]
        if owner is None or (owner.n == 1 and (now == len(stretches) or stretches[now].n == 1)):
            return now
        return stretches.index(owner)

    def unseen(self) -> list[tuple[int, int]]:
        """What the rounds that each one stands for hold more: what they kept until then, their gradients from then
        on."""
        found: list[tuple[int, int]] = []
        for stretch in reversed(self.program.stretches):
            sizes = {SAVED: 0, OUTPUT: 0}
            for name, slot in self.listing.slots.items() if stretch.n > 1 else ():
                if name.partition("+")[0] == str(stretch.start) and slot.kind in sizes:
                    sizes[slot.kind] += slot.n_bytes
            found.append(((stretch.n - 1) * sizes[SAVED], (stretch.n - 1) * sizes[OUTPUT]))
        return found

    def shown(self) -> dict[str, Buffer]:
        """The buffer of each storage: of one size all are named alike, as they take each other's place."""
        names: dict[Slot, str] = {}
        found: dict[str, Buffer] = {}
        for name, slot in self.listing.slots.items():
            shape, dtype = self.listing.shapes[name]
            label = names.setdefault(slot._replace(kind="", whole=""), name.split("/")[-1])
            found[name] = make_buffer(f"any block.{label}", "temporary", shape, dtype)
        found[FINAL] = self.dx.storage.buffer
        self.dx.storage.forget()
        return found

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
                    kept[:] = [tensor for tensor in kept if saved_name(stretch, position, tensor) in self.late]
            w.shift = 0
            self.write_steps(after, stretch)

    def write_end(self) -> None:
        """What goes when the embeddings' gradients are made."""
        self.write_steps(self.rounds[-1], self.program.stretches[0])

    def write_steps(self, steps: list[Step], stretch: Stretch) -> None:
        program = self.program
        w = program.w
        for step in steps:
            sign, name, _ = step
            place, _, label = name.rpartition("/")
            kind, owner = self.listing.slots[name].kind, self.stretch_of(step) or stretch
            position = int(place.partition("+")[2] or 0)
            w.shift = owner.start - stretch.start + position
            if kind == OUTPUT:
                if place != "end":
                    parameter = label.removesuffix(".grad")
                    program.gradient(parameter if parameter.startswith("ln_f") else f"h.*.{parameter}")
            elif kind == SAVED:
                kept = program.head_kept if place == "end" else owner.kept[position]
                for index in reversed(range(len(kept))):
                    if kept[index].storage.buffer.name.removeprefix("h.*.") == label:
                        kept[index].storage.shift = w.shift if w.rounds else position  # its own loop comes with it
                        del kept[index]
            elif not (sign > 0 and name == FINAL):
                w.items.append(Event(sign, self.buffers[name]))
        w.shift = 0

    def balanced(self, steps: list[Step]) -> tuple[list[Step], list[Step], list[Step]]:
        """`steps` of a round that is repeated, less what it makes for good or frees for good: that is done before, and
        after."""
        net = Counter[Buffer]()
        for sign, name, _ in steps:
            if self.listing.slots[name].kind not in (OUTPUT, SAVED):
                net[self.buffers[name]] += sign
        before, inside, after = [], [], []
        for step in steps:
            buffer = self.buffers[step.name]
            if net[buffer] * step.sign > 0 and self.listing.slots[step.name].kind not in (OUTPUT, SAVED):
                net[buffer] -= step.sign
                (before if step.sign > 0 else after).append(step)
            else:
                inside.append(step)
        return before, inside, after


def saved_name(stretch: Stretch, position: int, tensor: Tensor) -> str:
    """The name in the plan of what forward kept."""
    return f"{stretch.start}+{position}/{tensor.storage.buffer.name.removeprefix('h.*.')}"
