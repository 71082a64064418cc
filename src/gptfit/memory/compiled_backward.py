"""What inductor's plan allocates and reuses in backward: the other half of the compiled twins.

Backward allocates each kind of gradient of activations once and reuses it from block to block; the gradients of all
parameters are returned together at its end. Inductor orders it by what each kernel takes and frees (torch 2.13,
torch/_inductor/memory.py, topological_sort_lpmf): a weight's gradient comes as soon as it can, unless it is larger than
the activations that it sets free; then it comes last. Read off the wrappers, CPU lowering (trace.py runs them).
"""

from gptfit.memory.autograd import Parameter, Shape, Tensor
from gptfit.memory.compiled_forward import CompiledForward, Stretch, base_name
from gptfit.memory.compiled_rounds import Rounds
from gptfit.memory.tape import Buffer, Event, Item, Loop


class Compiled(CompiledForward):
    """Backward of a compiled step."""

    late = False

    def is_late(self) -> bool:
        """Whether the MLP's weight gradients come last: in low precision they are larger than the activations they set
        free, and the fp32 one is larger than what the peak so far leaves (memory_gap): half of what all outputs exceed
        the kept tensors by, as observed; or the embedding's gradient, which is made first."""
        run = self.run
        if not self.copies or self.plans_kernels or self.tokens[0] * self.tokens[1] > run.n_embd:
            return False
        outputs = sum(param.buffer.n_bytes * param.count for param in self.w.parameters.values())
        gap = max((outputs - self.saved_bytes()) // 2, 4 * run.vocab_size * run.n_embd)
        return gap < 4 * run.n_hidden * run.n_embd

    # ---- parameters' gradients ----------------------------------------------------------------------------------

    def gradient(self, name: str) -> None:
        """A parameter's gradient, which is alive to the end of the backward. Where one is there already, this is
        added to it then."""
        self.w.items.append(Event(1, new_gradient(self.w.parameters[name]), self.w.shift))

    def gradients(self, *modules: str) -> None:
        for module in modules:
            for part in ("weight", "bias"):
                if f"{module}.{part}" in self.w.parameters:
                    self.gradient(f"{module}.{part}")

    def product(self, module: str, shape: Shape) -> list[Tensor]:
        """A weight's gradient in low precision, before it is cast; used again by the next block, unless it is late."""
        if not self.copies:
            return []
        name = (
            f"{module}.weight gradient" if self.late and "*" in module else f"weight gradient {shape[0]} × {shape[1]}"
        )
        made = [self.w.empty(name, "temporary", shape, self.low)]
        self.w.multiplies()
        return made

    def accumulate(self, but: str = "") -> None:
        """The gradients come back together: taken over where there are none, else added and dropped."""
        block: list[Item] = []
        for param in self.w.parameters.values():
            if not param.has_gradient or param.name == but:
                continue
            free = Event(-1, new_gradient(param))
            if "*" in param.name:
                if not block:
                    self.w.items.append(Loop(self.run.n_layer, block))
                block.append(free)
            else:
                self.w.items.append(free)

    # ---- one block ----------------------------------------------------------------------------------------------

    def drop(self, *names: str) -> None:
        """Lets go of what the block kept under these names, and of copies of weights of these names."""
        self.kept = [tensor for tensor in self.kept if base_name(tensor).removeprefix("h.*.") not in names]

    def drop_all_of(self, *prefixes: str) -> None:
        """Lets go of what the block kept under names that begin so, copies of weights excepted."""
        self.kept = [
            tensor
            for tensor in self.kept
            if base_name(tensor).endswith(".weight") or not base_name(tensor).removeprefix("h.*.").startswith(prefixes)
        ]

    @property
    def mlp_inputs(self) -> list[str]:
        """The MLP's projections of its input."""
        return ["h.*.mlp.c_gate", "h.*.mlp.c_fc"] if self.run.mlp == "swiglu" else ["h.*.mlp.c_fc"]

    def block_backward(self) -> list[Tensor]:
        """What one block makes and drops. What the next one reuses, `own`, is dropped at the end of this one.
        Returns what waits for late gradients."""
        own = self.mlp_backward() + self.attention_backward()
        waiting = [*self.kept, *(tensor for tensor in own if "*" in tensor.storage.buffer.name)]
        del own
        self.kept = []
        return waiting

    def mlp_backward(self) -> list[Tensor]:
        w, run = self.w, self.run
        own = [] if self.late else self.product("h.*.mlp.c_proj", (run.n_embd, run.n_hidden))
        if not self.late and not run.bias:  # a bias's gradient is summed first, and the products change places
            self.drop("mlp.h")
        own.append(w.empty("mlp gradient", "temporary", self.shape(run.n_hidden), self.low))
        if not self.late:
            self.drop("mlp.h")
        self.drop("mlp.c_proj.weight", "mlp mask")
        if self.late:  # gradients take the place of what they are made of
            self.drop("mlp.c_fc.weight", "mlp.c_gate.weight")
            self.gradients("h.*.ln_2")
        else:
            self.gradients("h.*.mlp.c_proj")
            if run.mlp == "swiglu":
                own.append(w.empty("mlp gate gradient", "temporary", self.shape(run.n_hidden), self.low))
            self.drop("mlp.c_fc", "mlp.c_gate", "ln_2", "mlp.c_fc.weight", "mlp.c_gate.weight")
            self.gradients(*reversed(self.mlp_inputs), "h.*.ln_2")
        self.drop("ln_2 normalised", "ln_2 input", "ln_2 mean", "ln_2 rstd", "attn mask", "attn.c_proj")
        return own

    def attention_backward(self) -> list[Tensor]:
        w, run = self.w, self.run
        c = run.n_embd
        qkv_width = c + 2 * run.n_kv_head * run.head_size
        own = self.product("attention", (c, c))
        own.append(w.empty("stream gradient in low precision", "temporary", self.shape(c), self.low))
        self.drop("attn.c_proj.weight")
        self.gradients("h.*.attn.c_proj")
        parts = self.attention_gradients()
        self.drop_all_of("attn.")
        own.append(w.empty("qkv gradient", "temporary", self.shape(qkv_width), self.low))
        parts.clear()
        own += self.product("h.*.attn.c_attn", (qkv_width, c))
        self.drop("ln_1", "attn.c_attn.weight", "ln_1 normalised", "ln_1 input", "ln_1 mean", "ln_1 rstd")
        self.gradients(*([] if self.late else ["h.*.attn.c_attn"]), "h.*.ln_1")
        return own

    def late_gradients(self, waiting: list[tuple[Stretch, list[Tensor]]]) -> None:
        """The MLP's products, then all of them cast at once."""
        w, run = self.w, self.run
        products: list[Tensor] = []
        stretches = [stretch for stretch, _ in waiting]
        while waiting:
            stretch, self.kept = waiting.pop(0)
            with w.loop(stretch.n, reverse=True, start=stretch.start):
                products += self.product("h.*.mlp.c_proj", (run.n_embd, run.n_hidden))
                self.drop("mlp.h")
                for module in self.mlp_inputs:
                    products += self.product(module, (run.n_hidden, run.n_embd))
                self.drop("mlp.c_fc", "mlp.c_gate", "ln_2")
            products += self.kept
            self.kept = []
        for stretch in stretches:
            with w.loop(stretch.n, reverse=True, start=stretch.start):
                self.gradients("h.*.mlp.c_proj", *self.mlp_inputs, "h.*.attn.c_attn")
        products.clear()

    def attention_gradients(self) -> list[Tensor]:
        """Of q, k and v, as the kernel makes them."""
        w, run = self.w, self.run
        c, kv_width = run.n_embd, run.n_kv_head * run.head_size
        parts = [
            w.empty(f"gradient of {part}", "temporary", self.shape(width), self.low)
            for part, width in (("q", c), ("k", kv_width), ("v", kv_width))
        ]
        if w.kernels and self.low != "float32" and run.attention == "flash":
            b, t = self.tokens
            rows, width = -(-t // 128) * 128, -(-run.head_size // 32) * 32 + 1
            scratch = w.empty("attention dq accumulator", "workspace", (b, run.n_head, rows, width), "float32")
            del scratch
        return parts

    def before_logits_go(self) -> None:
        """What is written while the logits and their gradient are there."""

    # ---- all of them --------------------------------------------------------------------------------------------

    def blocks_backward(self, dx: Tensor, tied_here: bool) -> None:
        """From the gradient of the final norm's output downwards. `tied_here`: the head's part of the embedding's
        gradient is made by this graph too, and summed in it."""
        w, run = self.w, self.run
        c = run.n_embd
        self.late = self.is_late()
        w.mark("blocks", "backward")
        if self.plans_kernels:
            self.rounds_backward(Rounds(self, dx, [], tied_here))
            return
        reused = [dx, w.empty("stream gradient", "temporary", self.shape(c), run.param_dtype)]
        self.gradients("ln_f")
        late: list[tuple[Stretch, list[Tensor]]] = []
        self.head_kept.clear()
        for stretch in reversed(self.stretches):
            with w.loop(stretch.n, reverse=True, start=stretch.start, stride=stretch.stride):
                while stretch.kept:
                    self.kept = stretch.kept.pop()
                    w.shift = len(stretch.kept)
                    w.mark("block")
                    waiting = self.block_backward()
                    if self.late:
                        late.append((stretch, waiting))
                    del waiting
        w.shift = 0
        reused += self.embedding_backward(tied_here)
        if self.late:
            self.late_gradients(late)
        self.embedding_kept.clear()
        self.inputs.clear()
        reused.clear()

    def rounds_backward(self, rounds: Rounds) -> None:
        """Blocks that are run again, with the head if the loss is in their graph."""
        rounds.write()
        self.head_kept.clear()
        self.embedding_kept.clear()
        self.inputs.clear()
        rounds.part.clear()

    def embedding_backward(self, tied_here: bool) -> list[Tensor]:
        """The gradients of the embeddings; the tied one's part of it is returned."""
        w, run = self.w, self.run
        w.mark("embedding")
        if "wpe.weight" in w.parameters:
            self.gradient("wpe.weight")
        part: list[Tensor] = []
        raised: list[Tensor] = []
        shape = (run.vocab_size, run.n_embd)
        if self.low_stream:  # summed up in fp32, then cast
            raised.append(w.empty("embedding gradient in float32", "temporary", shape, "float32"))
        if run.tie_embeddings and not (tied_here and self.low_stream):  # where the sum takes the place of one
            part.append(w.empty("embedding gradient", "temporary", shape, run.param_dtype))
        if tied_here or not run.tie_embeddings:
            self.gradient("wte.weight")
        return part

    def head_backward(self, grads: list[Tensor]) -> None:
        """The head's two products, then the blocks; `grads` holds the logits' gradient, and is emptied."""
        w, run = self.w, self.run
        self.drop_head("loss maximum", "loss log-sum")
        del self.inputs[:1]
        tied = run.tie_embeddings
        if self.plans_kernels:
            w.mark("blocks", "backward")
            self.rounds_backward(Rounds(self, None, grads, tied))
            self.accumulate()
            return
        head: list[Tensor] = []
        if tied and not self.copies:  # multiplied last, onto the embedding's part (addmm)
            head += [*grads, *(tensor for tensor in self.head_kept if base_name(tensor) == "ln_f")]
        elif self.copies:
            name = "head gradient in low precision"
            head.append(w.empty(name, "temporary", (run.vocab_size, run.n_embd), self.low))
            w.multiplies()
        else:
            self.gradient("lm_head.weight")
        self.drop_head("ln_f")
        dx = w.empty("final norm gradient", "temporary", self.shape(run.n_embd), self.low)
        w.multiplies()
        self.drop_head("wte.weight", "lm_head.weight")
        grads.clear()
        if not tied and self.copies:
            self.gradient("lm_head.weight")
            head.clear()
        self.blocks_backward(dx, tied_here=tied)
        del head, dx
        self.accumulate()

    def drop_head(self, *names: str) -> None:
        """Lets go of what the head kept: of these names, and of copies of weights of these names."""
        self.head_kept = [tensor for tensor in self.head_kept if base_name(tensor) not in names]


def new_gradient(param: Parameter) -> Buffer:
    """The gradient of this backward: the one that stays, or one beside it."""
    if not param.has_gradient:
        return param.gradient
    return param.gradient._replace(name=f"{param.gradient.name} of this micro-step", category="temporary")
