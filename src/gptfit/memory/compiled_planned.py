"""The plan of a compiled backward, kernel by kernel: which buffers it takes and lets go of, in which order.

The operations (compiled_blocks.py) are lowered, fused and ordered as inductor does it (compiled_lowering.py,
compiled_schedule.py, compiled_order.py), and memory is planned for them (compiled_plan.py).
"""

from functools import lru_cache
from typing import NamedTuple

from gptfit.config import RunConfig
from gptfit.memory.compiled_blocks import Blocks, Forward
from gptfit.memory.compiled_graph import FLOAT, FULL, SCATTER, Op, backward_ops
from gptfit.memory.compiled_listed import Listed
from gptfit.memory.compiled_lowering import Lowering
from gptfit.memory.compiled_order import reordered
from gptfit.memory.compiled_plan import GIVEN, OUTPUT, SAVED, Kernel, Plan, Slot, Step
from gptfit.memory.tape import Buffer, make_buffer

FINAL = "final norm gradient"
PRODUCT = "attn.c_attn input gradient"  # the last of a block's matrix products
TOP = "top/"  # what the names of the loss's tensors begin with


class Span(NamedTuple):
    """`n` rounds of `stride` blocks, from block `start` on, of which one stands for all."""

    n: int
    start: int
    stride: int


class Planned:
    """`kept` are the names of what forward kept, of blocks as `start+position/name`."""

    def __init__(self, run: RunConfig, stretches: tuple[Span, ...], kept: frozenset[str]) -> None:
        self.run, self.stretches, self.kept = run, stretches, kept
        self.joint = Blocks(run)
        ops = self.operations()
        lowering = Lowering(ops, kept | self.joint.kept_for_nothing)
        counted = [f"{TOP}{name}" for name in ("logits", "maximum", "log-sum", "ln_f", "weight")]
        if run.dtype == run.param_dtype:  # weights that are no copies come in transposed, and count as what is kept
            products = [op.label for op in self.joint.inputs.values() if len(op.shape) == 2 and "weight" in op.label]
            counted += [label for label in products if not label.partition("/")[0].endswith("+0")]
        self.listed = Listed(lowering, set(kept.union(counted, self.joint.kept_for_nothing)))
        self.names = {buffer: name for name, buffer in lowering.named.items()}
        for node in lowering.nodes:
            for made in node.makes:
                if node.op.label.startswith(TOP):
                    self.names[made.name] = node.op.label
        self.ends: list[int] = []  # the last kernel of each round
        self.steps = self.steps_in_order()
        self.kinds = {name: slot.kind for name, slot in self.listed.slots.items()}
        self.buffers = self.shown()

    # ---- the graph ---------------------------------------------------------------------------------------------------

    @property
    def last_place(self) -> str:
        last = self.stretches[-1]
        return f"{last.start}+{last.stride - 1}/"

    def operations(self) -> list[Op]:
        """The backward of all stretches, from the last to the first, a loop's once."""
        joint, run = self.joint, self.run
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
        for stretch in self.stretches:
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
        joint, run = self.joint, self.run
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
        dx = joint.mm(grad, weight)
        dx.label = FINAL
        if self.product is not None and not run.tie_embeddings:
            joint.at = "top/"
            joint.handed_out(joint.cast(self.product, joint.stream), "lm_head.weight")
        return joint.tokens(dx)

    def embedding(self, dx: Op) -> None:
        """The gradients of the embeddings."""
        joint, run = self.joint, self.run
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

    def steps_in_order(self) -> list[Step]:
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
        """Parameters stay, and what comes in is there already."""
        name = self.name_of(step.name)
        return self.listed.slots[step.name].kind != GIVEN or name == FINAL

    def ends_in(self, order: list[Kernel]) -> list[int]:
        """The last kernel of each round's way down."""
        products = {
            node.op.label: node.makes[0].name for node in self.listed.lowering.nodes if node.op.label.endswith(PRODUCT)
        }
        found = {name: index for index, kernel in enumerate(order) for name in kernel.writes}
        return [found[products[f"{stretch.start}+0/{PRODUCT}"]] for stretch in reversed(self.stretches)]

    def name_of(self, step_name: str) -> str:
        """A buffer's name by what it is: what was kept, an output, or only a buffer."""
        return self.names.get(step_name, step_name)

    def unseen(self) -> list[tuple[int, int]]:
        """What the rounds that each one stands for hold more: what they kept until then, their gradients from then
        on."""
        found: list[tuple[int, int]] = []
        for stretch in reversed(self.stretches):
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
        return found


def planned(run: RunConfig, stretches: tuple[Span, ...], kept: frozenset[str]) -> Planned:
    """One plan serves all micro-steps of a run, and all sizes of the loss's chunks that a search asks for."""
    alike = run.model_copy(update={"loss_chunk_size": 1, "gradient_accumulation_steps": 1})
    return _planned(alike, stretches, kept)  # pyright: ignore[reportArgumentType]  frozen models have a hash


_planned = lru_cache(maxsize=64)(Planned)
