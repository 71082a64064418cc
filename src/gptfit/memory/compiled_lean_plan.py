"""The lean backward on the tape: its kernels (compiled_lean.py) in inductor's order, and what is allocated for them."""

from functools import lru_cache
from typing import TYPE_CHECKING

from gptfit.memory.autograd import Tensor
from gptfit.memory.compiled_forward import base_name
from gptfit.memory.compiled_lean import EMBEDDING, OF_NORM, STREAM, Lean, Names
from gptfit.memory.compiled_lean_fusion import fuse_alike, fuse_with_next, loops_of
from gptfit.memory.compiled_order import reordered
from gptfit.memory.compiled_plan import FRESH, GIVEN, OUTPUT, SAVED, Kernel, Plan, Slot, Step, fused
from gptfit.memory.tape import Buffer, Event, make_buffer

if TYPE_CHECKING:
    from gptfit.memory.compiled_backward import Compiled

FINAL = "end/final norm gradient"
OVER, LOGITS = "end/logits", "end/logits gradient"  # the one is written over the other
ZEROS = "end/zeros"


class LeanPlan:
    """Plans the backward of `program` and writes it. `given`: what it is handed, by name; it lets go of that."""

    def __init__(self, program: "Compiled", given: dict[str, Tensor]) -> None:
        self.program = program
        self.listing = Lean(program.run)
        self.buffers: dict[str, Buffer] = {}
        # Of a tied embedding whose head is outside of the graph: what is handed out then, to be added there.
        self.only_part = program.run.tie_embeddings and OVER not in given
        self.part: list[Tensor] = []
        for name, tensor in given.items():
            self.listing.slot(name, tensor.shape, tensor.dtype, SAVED if name == OVER else GIVEN)
            self.take_over(name, tensor)
        self.list_kernels(given)
        listing = self.listing
        final = f"{program.run.n_layer - 1}+0/ln_f/again"
        fuse_alike(listing.kernels, listing.slots, STREAM, listing.positions, final)
        self.fuse_normalised()
        fuse_alike(listing.kernels, listing.slots, OF_NORM)
        if program.run.dtype == "float32" and not program.run.dropout:
            fuse_with_next(listing.kernels, "/masked", "/softmax")
        self.order, self.steps = planned(tuple(map(content, listing.kernels)), tuple(listing.slots.items()))
        self.show()

    def list_kernels(self, given: dict[str, Tensor]) -> None:
        program, listing = self.program, self.listing
        run = program.run
        of_block = program.stretches[0].kept[0]
        blocks = [self.saved(f"{i}+0/", of_block) | self.weights(f"{i}+0/", "h.*.") for i in range(run.n_layer)]
        end = self.saved("end/", [*program.head_kept, *program.embedding_kept])
        logits = ""
        if OVER in given:
            end |= self.weights("end/", "")
            logits = listing.slot(LOGITS, given[OVER].shape, given[OVER].dtype)
            listing.add([logits], list(given), places={logits: (OVER,)})
            listing.slot(FINAL, (*program.tokens, run.n_embd), run.dtype)
        start = [end["embedding"]]
        if run.position == "learned" and run.batch_size > 1:  # of one sequence their sum is kept, which is no more
            listing.positions = end.get("pos_emb", "wpe.weight")
            start.append(listing.positions)
        start += [end["emb mask"]] if run.dropout and (run.batch_size > 1 or run.position == "rope") else []
        listing.slots["wpe.weight"] = Slot(0, "", GIVEN)
        listing.sums(start, blocks)
        dx = listing.lean_head(f"{run.n_layer - 1}+0/", end, FINAL, logits)
        for index in reversed(range(run.n_layer)):
            dx = listing.lean_block(f"{index}+0/", index, blocks[index], dx)
        listing.embedding(end, dx, logits)

    def take_over(self, name: str, tensor: Tensor) -> None:
        """Its free is written here."""
        self.buffers[name] = tensor.storage.buffer
        tensor.storage.forget()

    def fuse_normalised(self) -> None:
        """What is normalised alone is made with what reads it first."""
        groups: dict[str, list[Kernel]] = {}
        for kernel in self.listing.kernels:
            if kernel.group.endswith(STREAM):
                groups.setdefault(kernel.group, []).append(kernel)
        for kernels in groups.values():
            if all(loops_of(kernel, self.listing.positions) == "rows" for kernel in kernels):
                for kernel in kernels:
                    kernel.group = f"{kernels[0].writes[0].removesuffix(' normalised')}/again"

    def saved(self, place: str, tensors: list[Tensor]) -> Names:
        """The buffers that forward kept, by what they are."""
        found: Names = {}
        for tensor in tensors:
            name = tensor.storage.buffer.name.removeprefix("h.*.")
            full = self.listing.slot(place + name, tensor.shape, tensor.dtype, SAVED)
            found[base_name(tensor).removeprefix("h.*.")] = full
            self.take_over(full, tensor)
        if "attn.c_attn" in found:
            found |= self.views(found["attn.c_attn"], found)
        for part, n_head in (("q", self.program.run.n_head), ("k", self.program.run.n_kv_head)):
            full = found.get(f"attn.{part} rstd", "")
            if full and n_head > 1:  # read where heads lie beside each other: counted once for each number of them
                slot = self.listing.slots[full]
                self.listing.slots[full] = slot._replace(n_bytes=slot.n_bytes * self.program.run.head_size)
        return found

    def weights(self, place: str, prefix: str) -> Names:
        """Weights that are no copies: transposed, so that inductor takes them for something that goes after its use."""
        if self.listing.copies:
            return {}
        found: Names = {}
        for name, parameter in self.program.w.parameters.items():
            if len(parameter.shape) == 2 and name.startswith(prefix) and ("*" in name) == bool(prefix):
                short = name.removeprefix(prefix)
                found[short] = self.listing.slot(place + short, parameter.shape, parameter.dtype, SAVED)
        return found

    def views(self, full: str, kept: Names) -> Names:
        """The parts of the projection to q, k and v that backward reads: inductor counts those alone, each for
        itself."""
        run, listing = self.program.run, self.listing
        kv_width = run.n_kv_head * run.head_size
        kinds = ("rotated", "normed", "scaled copy", "copy", "repeated")
        found: Names = {}
        for part, width in (("q", run.n_embd), ("k", kv_width), ("v", kv_width)):
            taken = any(f"attn.{part} {kind}" in kept for kind in kinds)
            again = run.qk_norm and part != "v" and "attn.q normed" not in kept  # it is what is normalised
            if again or not taken:
                shape, dtype = (*self.program.tokens, width), listing.shapes[full][1]
                found[f"attn.c_attn {part}"] = listing.slot(f"{full} {part}", shape, dtype, SAVED, full)
        listing.slots[full] = listing.slots[full]._replace(n_bytes=0)
        return found

    def show(self) -> None:
        """The buffer of each storage: of one size all are named alike, as they take each other's place."""
        names: dict[Slot, str] = {}
        for name, slot in self.listing.slots.items():
            if name not in self.buffers and slot.kind not in (SAVED, GIVEN):
                shape, dtype = self.listing.shapes[name]
                label = names.setdefault(slot._replace(kind="", whole=""), name.split("/")[-1])
                self.buffers[name] = make_buffer(f"any block.{label}", "temporary", shape, dtype)

    def write(self) -> None:
        w = self.program.w
        at = ""
        for step in self.steps:
            place, _, label = self.order[step.kernel].writes[0].rpartition("/")
            if place != at and (place != "end" or label.startswith("w")):
                at = place
                w.mark("embedding" if place == "end" else "block")
            self.write_step(step)
        w.shift = 0

    def write_step(self, step: Step) -> None:
        program = self.program
        w, name = program.w, step.name
        place, _, label = name.rpartition("/")
        kind = self.listing.slots[name].kind
        w.shift = int(place.partition("+")[0]) if place not in ("", "end") else 0
        parameter = label.removesuffix(".grad")
        if name == EMBEDDING and self.only_part:
            self.part.append(w.empty("embedding gradient", "temporary", *self.listing.shapes[name]))
        elif kind == OUTPUT and step.sign > 0:
            program.gradient(parameter if parameter in w.parameters else f"h.*.{parameter}")
        elif name in self.buffers:
            w.items.append(Event(step.sign, self.buffers[name], w.shift if kind == SAVED else 0))
            if kind == FRESH and label == "attn.v gradient" and step.sign > 0:
                self.attention_scratch()

    def attention_scratch(self) -> None:
        """What the attention kernel takes for itself on a GPU."""
        w, run = self.program.w, self.program.run
        if w.kernels and run.dtype != "float32":
            b, t = self.program.tokens
            rows, width = -(-t // 128) * 128, -(-run.head_size // 32) * 32 + 1
            scratch = w.empty("attention dq accumulator", "workspace", (b, run.n_head, rows, width), "float32")
            del scratch


Content = tuple[tuple[str, ...], tuple[str, ...], bool, tuple[tuple[str, tuple[str, ...]], ...], int, str, int]


def content(k: Kernel) -> Content:
    return k.writes, k.reads, k.extern, tuple(k.places.items()), k.inside, k.group, k.parts


@lru_cache(maxsize=128)
def planned(kernels: tuple[Content, ...], slots: tuple[tuple[str, Slot], ...]) -> tuple[list[Kernel], list[Step]]:
    """The order of the kernels, and what is allocated and freed in it. Chunks of the loss do not change it: kept, as a
    search asks for each size of a chunk."""
    made = [Kernel(k[0], k[1], k[2], dict(k[3]), k[4], k[5], k[6]) for k in kernels]
    numbers: dict[str, int] = {}
    for kernel in made:
        numbers |= {name: len(numbers) + i for i, name in enumerate(kernel.writes)}
    by_name = dict(slots)
    order = reordered(fused(made), by_name, {}, 0, 0)
    return order, [step for step in NumberedPlan(order, by_name, numbers).steps if step is not None]


class NumberedPlan(Plan):
    """Lets go of buffers in the order of their numbers (torch/_inductor/scheduler.py, free_buffers), by which the next
    takes the place of the last."""

    def __init__(self, kernels: list[Kernel], slots: dict[str, Slot], numbers: dict[str, int]) -> None:
        self.numbers = numbers
        super().__init__(kernels, slots)

    def flush(self, now: int) -> None:
        names = {
            (self.slots[name].whole or name, index)
            for index in self.pending
            for name in (*self.kernels[index].writes, *self.kernels[index].reads)
        }
        for name, index in sorted(names, key=lambda item: (self.numbers.get(item[0], -1), item[1], item[0])):
            slot = self.slots[name]
            if self.last[name] != index or slot.kind == OUTPUT or name in self.overwritten:
                continue
            if slot.kind in (SAVED, GIVEN):
                self.steps.append(Step(-1, name, index))
            elif name in self.storage:
                storage = self.storage.pop(name)
                if slot.kind != FRESH:  # whose alignment is not known
                    self.pool.setdefault((slot.n_bytes, slot.dtype), []).append((storage, len(self.steps), now))
                self.steps.append(Step(-1, storage, index))
        self.pending.clear()
