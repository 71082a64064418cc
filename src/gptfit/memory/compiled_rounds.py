"""The backward of a compiled step with checkpoints on the tape: rounds of `checkpoint_every` blocks, alike ones a loop.

A round is a block that is run again and those after it that were kept. Some rounds at either end are planned each for
itself, one stands for all between: by then the buffers in use repeat. The operations (compiled_joint.py) are lowered,
fused and ordered as inductor does it (compiled_lowering.py, compiled_schedule.py, compiled_order.py); what that
allocates (compiled_plan.py) is written here.
"""

from collections import Counter
from typing import TYPE_CHECKING

from gptfit.memory.autograd import Tensor
from gptfit.memory.compiled_blocks import Blocks, Forward
from gptfit.memory.compiled_forward import Stretch
from gptfit.memory.compiled_graph import FLOAT, FULL, SCATTER, Op, backward_ops
from gptfit.memory.compiled_listed import Listed
from gptfit.memory.compiled_lowering import Lowering
from gptfit.memory.compiled_order import reordered
from gptfit.memory.compiled_plan import GIVEN, OUTPUT, SAVED, Kernel, Plan, Slot, Step
from gptfit.memory.tape import Buffer, Event, make_buffer

if TYPE_CHECKING:
    from gptfit.memory.compiled_backward import Compiled

FINAL = "final norm gradient"
PRODUCT = "attn.c_attn input gradient"  # the last of a block's matrix products
SILENT = "top/"  # what begins so, others write


class Rounds:
    """Plans the rounds of `program` and writes them. `dx`: the gradient of the final norm's output."""

    def __init__(self, program: "Compiled", dx: Tensor, tied_here: bool) -> None:
        self.program = program
        self.dx = dx
        self.tied_here = tied_here
        self.part: list[Tensor] = []  # of the gradient of an embedding that is tied outside of this graph
        self.joint = Blocks(program.run)
        self.kept = self.names_kept()
        ops = self.operations()
        lowering = Lowering(ops, self.kept | self.joint.kept_for_nothing)
        counted = [f"{SILENT}{name}" for name in ("logits", "maximum", "log-sum", "ln_f")]
        counted += [f"{SILENT}weight"] * (program.run.dtype != program.run.param_dtype)
        self.listed = Listed(lowering, self.kept.union(counted, self.joint.kept_for_nothing))
        self.names = {buffer: name for name, buffer in lowering.named.items()}
        for node in lowering.nodes:
            for made in node.makes:
                if node.op.label.startswith(SILENT):
                    self.names[made.name] = node.op.label
                    self.listed.set_apart(made.name)
        self.ends: list[int] = []  # the last kernel of each round
        self.rounds: list[list[Step]] = [[] for _ in range(len(program.stretches) + 1)]
        self.late: set[str] = set()  # what was kept and goes after its own round
        stretches = [*reversed(program.stretches), None]
        for step in self.planned():
            index, owner = self.round_of(step), self.stretch_of(step)
            self.rounds[index].append(step)
            if owner is not None and owner is not stretches[index]:
                self.late.add(step.name)
        self.buffers = self.shown()

    # ---- the graph ---------------------------------------------------------------------------------------------------

    @property
    def last_place(self) -> str:
        last = self.program.stretches[-1]
        return f"{last.start}+{last.stride - 1}/"

    def names_kept(self) -> set[str]:
        """What forward kept, by the names of the operations that made it."""
        program = self.program
        found = {self.last_place + short_name(tensor) for tensor in program.head_kept}
        for stretch in program.stretches:
            for position, tensors in enumerate(stretch.kept):
                found |= {f"{stretch.start}+{position}/{short_name(tensor)}" for tensor in tensors}
        return found

    def operations(self) -> list[Op]:
        """The backward of all stretches, from the last to the first, a loop's once."""
        joint, run = self.joint, self.program.run
        shape = (run.batch_size, run.block_size, run.n_embd)
        x = joint.input("0+0/x", shape, run.param_dtype)
        mask = joint.given("end/mask", shape, "bool") if run.dropout else None
        # Of one sequence the sum with the positions is kept, which is less than both.
        summed = run.position == "learned" and run.batch_size == 1
        if run.position == "learned" and not summed:
            x = joint.point(x, joint.given("end/positions", shape[1:], run.param_dtype))
        if mask is not None and not summed:
            x = joint.point(joint.point(mask, x, dtype=x.dtype), dtype=x.dtype, numbers=("scale",))
        blocks: list[Forward] = []
        for stretch in self.program.stretches:
            for position in range(stretch.stride):
                joint.at = f"{stretch.start}+{position}/"
                if blocks:
                    joint.named(x, "ln_1 input" if position else "x")
                made, x = joint.block(x)
                blocks.append(made)
                if position:
                    joint.kept_for_nothing |= {f"{joint.at}ln_1 mean", f"{joint.at}ln_1 rstd"}
        joint.at = self.last_place
        ln_f = joint.norm(joint.named(x, "ln_f input"), "ln_f")
        joint.kept_for_nothing |= {f"{joint.at}ln_f mean", f"{joint.at}ln_f rstd"}  # a number for each token
        self.first = len(joint.ops)
        dy = self.head()
        joint.at = self.last_place
        dx = joint.norm_backward(dy, ln_f, "ln_f", None)
        for block in reversed(blocks):
            dx = joint.block_backward(block, dx)
        self.embedding(joint.dropped_backward(dx, mask))
        return backward_ops(joint.ops, self.first, self.kept | joint.kept_for_nothing)

    def head(self) -> Op:
        """The gradient of the final norm's output; with the full loss by way of the logits', which is written over
        them."""
        joint, run = self.joint, self.program.run
        shape = (run.batch_size, run.block_size, run.n_embd)
        if run.loss != "full":
            return joint.input(FINAL, shape, run.dtype)
        n, width = joint.n_rows, run.vocab_size
        logits = joint.given("top/logits", (n, width), run.dtype)
        targets = joint.expand(joint.given("top/targets", (n, 1), "int64"), n, width)
        scale = [joint.given(f"top/{name}", (1, 1), FLOAT) for name in ("loss gradient", "count")]
        right = joint.point(targets, *scale, dtype=FLOAT)
        numbers = [joint.given(f"top/{name}", (n, 1), FLOAT) for name in ("maximum", "log-sum")]
        grad = joint.cast(joint.point(logits, *numbers, right, joint.sum(right, 1), dtype=FLOAT), run.dtype)
        output = joint.given("top/ln_f", (n, run.n_embd), run.dtype)
        weight = joint.given("top/weight", (width, run.n_embd), run.dtype)
        grad.label = "top/logits gradient"
        self.head_reads = joint.permute(grad, 1, 0), output
        self.product: Op | None = None
        if not run.tie_embeddings or joint.low != joint.stream:
            self.product = joint.mm(*self.head_reads)
            self.product.label = "top/product"
        dx = joint.mm(grad, weight)
        dx.label = FINAL
        if self.product is not None and not run.tie_embeddings:
            joint.at = "top/"
            joint.handed_out(joint.cast(self.product, joint.stream), "lm_head.weight")
        return joint.tokens(dx)

    def embedding(self, dx: Op) -> None:
        """The gradients of the embeddings."""
        joint, run = self.joint, self.program.run
        joint.at = "end/"
        if run.position == "learned":
            joint.handed_out(joint.sum(dx, 0), "wpe.weight")
        shape = (run.vocab_size, run.n_embd)
        table = joint.op(FULL, (), shape, FLOAT)
        ids = joint.given("end/ids", (run.batch_size, run.block_size), "int64")
        made = joint.cast(joint.op(SCATTER, (table, ids, joint.cast(dx, FLOAT)), shape, FLOAT), joint.stream)
        if run.loss == "full" and run.tie_embeddings:  # one sum; in one precision the product is added to the other
            if self.product is None:
                made = joint.mm(*self.head_reads, made)
            else:
                made = joint.point(joint.cast(self.product, joint.stream), made)
        joint.handed_out(made, "embedding")

    # ---- the plan ----------------------------------------------------------------------------------------------------

    def planned(self) -> list[Step]:
        listed = self.listed
        order = listed.kernels
        hidden = dict(zip(self.ends_in(order), (made - kept for kept, made in self.unseen()), strict=True))
        saved_bytes, output_bytes = (sum(sizes) for sizes in zip(*self.unseen(), strict=True))
        order = reordered(order, listed.slots, hidden, saved_bytes, output_bytes)
        self.ends = self.ends_in(order)
        spans: list[tuple[int, int, int]] = []
        for end, (kept, made) in zip(self.ends, self.unseen(), strict=True):
            spans += [(0, end + 1, kept), (end + 1, len(order), made)] if kept or made else []
        plan = Plan(order, listed.slots, spans)
        return [step for step in plan.steps if step is not None and self.is_written(step)]

    def is_written(self, step: Step) -> bool:
        """Others write what belongs to the loss; parameters stay; the gradient that comes in is there already."""
        name = self.name_of(step.name)
        if name == FINAL:
            return True
        return self.listed.slots[step.name].kind != GIVEN and not name.startswith(SILENT)

    def ends_in(self, order: list[Kernel]) -> list[int]:
        """The last kernel of each round's way down."""
        products = {
            node.op.label: node.makes[0].name for node in self.listed.lowering.nodes if node.op.label.endswith(PRODUCT)
        }
        found = {name: index for index, kernel in enumerate(order) for name in kernel.writes}
        return [found[products[f"{stretch.start}+0/{PRODUCT}"]] for stretch in reversed(self.program.stretches)]

    def name_of(self, step_name: str) -> str:
        """A buffer's name by what it is: what was kept, an output, or only a buffer."""
        return self.names.get(step_name, step_name)

    def stretch_of(self, step: Step) -> Stretch | None:
        """Whose gradient is made, or whose kept tensor goes."""
        place = self.name_of(step.name).partition("+")[0]
        if self.listed.slots[step.name].kind not in (OUTPUT, SAVED) or not place.isdigit():
            return None
        return next(stretch for stretch in self.program.stretches if stretch.start == int(place))

    def unseen(self) -> list[tuple[int, int]]:
        """What the rounds that each one stands for hold more: what they kept until then, their gradients from then
        on."""
        found: list[tuple[int, int]] = []
        for stretch in reversed(self.program.stretches):
            sizes = {SAVED: 0, OUTPUT: 0}
            for name, slot in self.listed.slots.items() if stretch.n > 1 else ():
                if self.name_of(name).partition("+")[0] == str(stretch.start) and slot.kind in sizes:
                    sizes[slot.kind] += slot.n_bytes
            found.append(((stretch.n - 1) * sizes[SAVED], (stretch.n - 1) * sizes[OUTPUT]))
        return found

    def shown(self) -> dict[str, Buffer]:
        """The buffer of each storage: of one size all are named alike, as they take each other's place."""
        names: dict[Slot, str] = {}
        found: dict[str, Buffer] = {}
        lowering = self.listed.lowering
        for node in lowering.nodes:
            for made in node.makes:
                slot = self.listed.slots[made.name]
                label = names.setdefault(slot._replace(kind="", whole=""), node.op.label.split("/")[-1] or node.op.kind)
                found[made.name] = make_buffer(f"any block.{label}", "temporary", made.shape, made.dtype)
        found[FINAL] = self.dx.storage.buffer
        self.dx.storage.forget()
        return found

    def round_of(self, step: Step) -> int:
        """In which round a step is taken. Where one round stands for many, what stays and what was kept goes with its
        own, also if it is touched in another."""
        now = sum(step.kernel > end for end in self.ends)
        owner = self.stretch_of(step)
        stretches = self.program.stretches[::-1]
        if owner is None or (owner.n == 1 and (now == len(stretches) or stretches[now].n == 1)):
            return now
        return stretches.index(owner)

    # ---- the tape ----------------------------------------------------------------------------------------------------

    def write(self) -> None:
        program = self.program
        w = program.w
        if program.run.loss == "full":  # it is written where this graph makes it
            w.items.append(Event(-1, self.buffers[FINAL]))
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
            sign, name = step.sign, self.name_of(step.name)
            place, _, label = name.rpartition("/")
            kind, owner = self.listed.slots[step.name].kind, self.stretch_of(step) or stretch
            position = int(place.partition("+")[2] or 0)
            w.shift = owner.start - stretch.start + position
            if name == "end/embedding.grad" and sign > 0:
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
            if self.listed.slots[name].kind not in (OUTPUT, SAVED):
                net[self.buffers[name]] += sign
        before, inside, after = [], [], []
        for step in steps:
            own = self.listed.slots[step.name].kind not in (OUTPUT, SAVED)
            if own and net[self.buffers[step.name]] * step.sign > 0:
                net[self.buffers[step.name]] -= step.sign
                (before if step.sign > 0 else after).append(step)
            else:
                inside.append(step)
        return before, inside, after


def short_name(tensor: Tensor) -> str:
    """The name within a block of what forward kept."""
    return tensor.storage.buffer.name.removeprefix("h.*.")
