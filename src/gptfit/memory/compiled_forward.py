"""What inductor's plan keeps of a block for backward, and how that is made: the forward half of the compiled twins.

The partitioner keeps, of each block and token, 36 bytes × n_embd in half precision: both norms' normalised input in
fp32, their outputs, q, k and v, the attention's output, the MLP's pre-activation and activation; and the low-precision
copies of the weights. The residual stream itself is not kept, unless it is in low precision too (param_dtype): then it
is cheaper than the normalised input. Read off the graphs and wrappers of torch 2.13, CPU lowering; which tensors are
kept was compared with what torch.compile's own front end (Dynamo) hands to the partitioner.
"""

from dataclasses import dataclass, field

from gptfit.config import RunConfig
from gptfit.memory.autograd import Shape, Tensor, Writer
from gptfit.memory.compiled_chains import banned
from gptfit.memory.programs import Program
from gptfit.memory.tape import Event


@dataclass(slots=True)
class Stretch:
    """`n` rounds of `stride` blocks from block `start` on, written once; `kept` for backward, by position."""

    n: int
    start: int
    stride: int
    kept: list[list[Tensor]] = field(default_factory=list)


# So many rounds are planned each for itself; of more one stands for those between. Where attention is written out none
# does: its matrices of scores take each other's places otherwise in each round.
SINGLE_ROUNDS, SINGLE_ROUNDS_OF_SCORES = 12, 48

# Of a block that keeps nothing, what is never there as a tensor: its norms and its activation are made in passing.
FUSED = ("ln_1 normalised", "ln_2 normalised", "mlp.h", "attn.c_proj", "mlp.c_proj")


class CompiledForward(Program):
    """Forward of a compiled step. Everything is written by hand: inductor's plan has no autograd."""

    keeps_joined = True  # copies that attention makes of what is kept anyway

    def __init__(self, w: Writer, run: RunConfig) -> None:
        super().__init__(w, run)
        self.tokens = (run.batch_size, run.block_size)
        self.low = run.dtype
        self.copies = run.dtype != run.param_dtype
        self.low_stream = run.param_dtype == run.dtype != "float32"
        self.stretches: list[Stretch] = []
        self.kept: list[Tensor] = []  # of the block that is being written
        self.head_kept: list[Tensor] = []
        self.embedding_kept: list[Tensor] = []
        self.inputs: list[Tensor] = []  # targets, then token ids

    @property
    def checkpoints(self) -> bool:
        return self.run.activation_checkpointing == "block" and self.w.grad_enabled

    @property
    def plans_kernels(self) -> bool:
        """Whether the backward of the blocks is worked out kernel by kernel (compiled_planned.py)."""
        return self.checkpoints

    @property
    def last_is_recomputed(self) -> bool:
        return self.checkpoints and (self.run.n_layer - 1) % self.run.checkpoint_every == 0

    def stretches_of(self) -> list[Stretch]:
        """Alike blocks together. The first is another one where the partitioner can make its input again (rope: rows of
        the embedding)."""
        run = self.run
        if self.plans_kernels:
            # Some rounds at both ends apart: it takes a few until the buffers in use repeat (compiled_rounds.py).
            every = min(run.checkpoint_every, run.n_layer) if self.checkpoints else 1
            rounds = -(-run.n_layer // every)
            many = rounds > (SINGLE_ROUNDS_OF_SCORES if run.attention == "math" else SINGLE_ROUNDS)
            single = (0, 1, *range(rounds - 4, rounds)) if many else range(rounds)
            found = [Stretch(1, i * every, min(every, run.n_layer - i * every)) for i in single]
            return [*found[:2], Stretch(rounds - 6, 2 * every, every), *found[2:]] if many else found
        if self.first_is_gathered:
            return [Stretch(1, 0, 1), Stretch(run.n_layer - 1, 1, 1)] if run.n_layer > 1 else [Stretch(1, 0, 1)]
        return [Stretch(run.n_layer, 0, 1)]

    @property
    def first_is_gathered(self) -> bool:
        """Whether the first block's input is rows of the embedding and nothing else."""
        run = self.run
        return run.position == "rope" and not run.dropout and not self.low_stream

    # ---- buffers ------------------------------------------------------------------------------------------------

    def shape(self, *last: int) -> Shape:
        return (*self.tokens, *last)

    def activation(self, name: str, width: int, dtype: str) -> Tensor:
        return self.w.empty(name, "activation", self.shape(width), dtype)

    def rows(self, name: str, n_head: int) -> Tensor:
        """An fp32 number for each head and token."""
        return self.w.empty(name, "activation", (self.tokens[0], n_head, self.tokens[1], 1), "float32")

    def weight(self, name: str, shape: Shape) -> Tensor | None:
        """The parameter, and its low-precision copy if there is one."""
        self.w.parameter(name, shape, self.run.param_dtype)
        if not self.copies:
            return None
        return self.w.empty(f"{name} as {self.low}", "activation", shape, self.low)

    def vector(self, name: str, width: int) -> None:
        self.w.parameter(name, (width,), self.run.param_dtype)

    # ---- one block ----------------------------------------------------------------------------------------------

    def norm_parameters(self, name: str) -> None:
        self.vector(f"{name}.weight", self.run.n_embd)
        if self.run.bias and self.run.norm == "layernorm":
            self.vector(f"{name}.bias", self.run.n_embd)

    def norm(self, name: str) -> list[Tensor]:
        """Normalised input in fp32, reciprocal deviation, output; or the low-precision input and its statistics."""
        run, low = self.run, self.low
        self.norm_parameters(name)
        if not self.low_stream:
            kept = [self.activation(f"{name} normalised", run.n_embd, "float32")]
            kept.append(self.activation(f"{name} rstd", 1, "float32"))
        elif run.norm == "layernorm":
            kept = [self.activation(f"{name} input", run.n_embd, low)]
            kept += [self.activation(f"{name} {part}", 1, low) for part in ("mean", "rstd")]
        else:
            kept = [self.activation(f"{name} input", run.n_embd, low), self.activation(f"{name} rstd", 1, "float32")]
        return [*kept, self.activation(name, run.n_embd, low)]

    def linear(self, name: str, n_in: int, n_out: int, output: str = "") -> list[Tensor]:
        """The weight's copy, and the output if it is kept."""
        copy = self.weight(f"{name}.weight", (n_out, n_in))
        if self.run.bias:
            self.vector(f"{name}.bias", n_out)
        self.w.flops += 2 * self.tokens[0] * self.tokens[1] * n_in * n_out * self.w.repeat
        kept = [copy] if copy is not None else []
        if output:
            kept.append(self.activation(output, n_out, self.low))
            self.w.multiplies()
        return kept

    def mask(self, name: str) -> list[Tensor]:
        """Dropout keeps a boolean mask."""
        dropped = self.run.dropout > 0 and self.w.training
        return [self.activation(f"{name} mask", self.run.n_embd, "bool")] if dropped else []

    def heads(self) -> list[Tensor]:
        """What attention's changes to q and k leave: the kernel keeps those instead of views of the projection."""
        run, low = self.run, self.low
        c, kv_width = run.n_embd, run.n_kv_head * run.head_size
        kept: list[Tensor] = []
        if run.qk_norm:
            kept += [self.rows("h.*.attn.q rstd", run.n_head), self.rows("h.*.attn.k rstd", run.n_kv_head)]
        if run.attention == "math":
            if self.keeps_normed:
                kept += [
                    self.activation("h.*.attn.q normed", c, low),
                    self.activation("h.*.attn.k normed", kv_width, low),
                ]
            parts = [part for part in ("q scaled", "k", "v") if part[0] not in self.only_viewed]
            return kept + [self.activation(f"h.*.attn.{part} copy", c, low) for part in parts]
        changed = "rotated" if run.position == "rope" else "normed" if run.qk_norm else ""
        grouped = run.n_kv_head != run.n_head and low == "float32"
        if self.keeps_normed and changed == "rotated":
            kept.append(self.activation("h.*.attn.q normed", c, low))
        if self.keeps_normed and (changed == "rotated" or grouped):
            kept.append(self.activation("h.*.attn.k normed", kv_width, low))
        if changed:
            kept.append(self.activation(f"h.*.attn.q {changed}", c, low))
        if grouped:  # that kernel knows no groups (model.py)
            return kept + [self.activation(f"h.*.attn.{part} repeated", c, low) for part in ("k", "v")]
        return [*kept, self.activation(f"h.*.attn.k {changed}", kv_width, low)] if changed else kept

    @property
    def keeps_normed(self) -> bool:
        """Whether normalised queries and keys are kept: in fp32 less than the projection, which nothing else needs."""
        return self.run.qk_norm and self.low == "float32" and not (self.run.attention == "math" and self.only_viewed)

    @property
    def only_viewed(self) -> str:
        """Which of keys and values attention written out reads as views of the projection: of one head, or of one
        sequence, where nothing else is done to them."""
        run = self.run
        if run.n_kv_head != run.n_head or (run.batch_size > 1 and run.n_head > 1):
            return ""
        return "v" if run.position == "rope" or run.qk_norm else "kv"

    def scores(self, first: bool) -> list[Tensor]:
        """Attention written out: softmax's fp32 output, and its copy in low precision. Of the first block the scores
        in low precision with maximum and sum of each row, which are less."""
        w, run, low = self.w, self.run, self.low
        shape = (self.tokens[0], run.n_head, self.tokens[1], self.tokens[1])

        def matrix(name: str, dtype: str) -> Tensor:
            return w.empty(f"h.*.attn.y {name}", "activation", shape, dtype)

        if low == "float32" and run.dropout > 0 and w.training:  # what dropout makes of them, too
            kept = [matrix("probabilities in float32", low), matrix("probabilities", low)]
        elif low == "float32":
            kept = [matrix("probabilities", low)]
        elif first:
            rows = [self.rows(f"h.*.attn.y {part}", run.n_head) for part in ("maximum", "sum")]
            kept = [matrix("scores", low), *rows, matrix("probabilities", low)]
        else:
            kept = [matrix("probabilities in float32", "float32"), matrix("probabilities", low)]
        return [*kept, matrix("mask", "bool")] if run.dropout > 0 and w.training else kept

    def attention(self, first: bool) -> list[Tensor]:
        w, run = self.w, self.run
        b, t = self.tokens
        c, kv_width = run.n_embd, run.n_kv_head * run.head_size
        grouped = run.n_kv_head != run.n_head and self.low == "float32"
        all_copied = run.attention == "math" or (
            self.keeps_joined and grouped and (run.qk_norm or run.position == "rope")
        )
        projected = self.linear("h.*.attn.c_attn", c, c + 2 * kv_width, "h.*.attn.c_attn")
        kept = self.heads()
        viewed = (run.qk_norm and not self.keeps_normed) or (run.attention == "math" and self.only_viewed)
        if all_copied and not viewed:  # nothing is left that is a view of the projection
            projected.pop()
        kept += projected
        w.flops += 4 * b * t * t * c * w.repeat
        if run.attention == "math":
            return [*kept, *self.scores(first), self.activation("h.*.attn.y", c, self.low)]
        kept.append(self.activation("h.*.attn.y", c, self.low))
        if (
            self.keeps_joined and run.position == "rope" and self.low != "float32" and run.n_head > 1
        ):  # it lies by head, as q does
            kept.append(self.activation("h.*.attn.y joined", c, self.low))
        rows = t if self.low != "float32" else -(-t // 32) * 32
        kept.append(w.empty("h.*.attn.y log-sum-exp", "activation", (b, run.n_head, rows), "float32"))
        return kept + [w.empty(f"h.*.attn.y random {part}", "activation", (), "int64") for part in ("seed", "offset")]

    def mlp(self) -> list[Tensor]:
        run, c = self.run, self.run.n_embd
        kept: list[Tensor] = []
        if run.mlp == "swiglu":
            kept += self.linear("h.*.mlp.c_gate", c, run.n_hidden, "h.*.mlp.c_gate")
        kept += self.linear("h.*.mlp.c_fc", c, run.n_hidden, "h.*.mlp.c_fc")
        kept.append(self.activation("h.*.mlp.h", run.n_hidden, self.low))
        return kept + self.linear("h.*.mlp.c_proj", run.n_hidden, c) + self.mask("h.*.mlp")

    def block_forward(self, first: bool = False) -> list[Tensor]:
        """What backward needs of a block, in the order it is made."""
        c = self.run.n_embd
        kept = self.norm("h.*.ln_1")
        gathered = first and self.first_is_gathered
        if gathered:
            del kept[0]
        kept += self.attention(first)
        kept += self.linear("h.*.attn.c_proj", c, c, "h.*.attn.c_proj" if gathered else "") + self.mask("h.*.attn")
        kept += self.norm("h.*.ln_2")
        return kept + self.mlp()

    def block_again(self, but: tuple[str, ...]) -> list[Tensor]:
        """The buffers in which one block after the other is run without keeping anything: what it would keep, and
        the outputs of its two projections; `but` those of these names."""
        w, first = self.w, len(self.w.items)
        made = self.block_forward()
        made += [self.activation(f"h.*.{part}.c_proj", self.run.n_embd, self.low) for part in ("attn", "mlp")]
        made = [tensor for tensor in made if base_name(tensor).removeprefix("h.*.") not in but or forget(tensor)]
        for tensor in made:
            buffer = tensor.storage.buffer
            tensor.storage.buffer = buffer._replace(name=buffer.name.replace("h.*", "any block"), category="temporary")
        w.items[first:] = [Event(1, tensor.storage.buffer) for tensor in made]
        return made

    # ---- all of them --------------------------------------------------------------------------------------------

    def positions(self) -> list[Tensor]:
        """What is kept of the position embedding: nothing where it is a slice of the parameter."""
        return []

    def embedding_forward(self) -> list[Tensor]:
        w, run = self.w, self.run
        w.parameter("wte.weight", (run.vocab_size, run.n_embd), run.param_dtype)
        kept: list[Tensor] = []
        if run.position == "learned":
            w.parameter("wpe.weight", (run.block_size, run.n_embd), run.param_dtype)
            kept += self.positions()
        if run.norm == "layernorm" and not self.low_stream:
            kept.append(self.activation("h.0.ln_1 mean", 1, "float32"))
        if self.checkpoints:
            kept.append(self.activation("h.0.ln_1 rstd", 1, "float32"))
        return kept + self.mask("emb")

    def blocks_forward(self) -> list[Tensor]:
        """Embedding, blocks and final norm; what the final norm keeps, its output last."""
        w, run = self.w, self.run
        w.mark("embedding", "forward" if w.training else "evaluation")
        self.embedding_kept = self.embedding_forward()
        stream = [self.activation(f"stream {i}", run.n_embd, self.low) for i in range(min(3, 2 * run.n_layer))]
        self.stretches = self.stretches_of() if w.grad_enabled else []
        room: list[Tensor] = []
        if self.checkpoints or not w.grad_enabled:
            w.mark("block")
            flops = w.flops
            room += self.block_again(but=FUSED)
            n_blocks = sum(stretch.n for stretch in self.stretches) if w.grad_enabled else run.n_layer
            w.flops = flops + (w.flops - flops) * n_blocks
        for stretch in self.stretches:
            with w.loop(stretch.n, start=stretch.start, stride=stretch.stride):
                self.stretch_forward(stretch, room)
            w.shift = 0
        w.mark("head")
        room.clear()
        final = self.norm("ln_f")
        stream.clear()
        if not w.grad_enabled:
            self.embedding_kept.clear()
        made_again = self.last_is_recomputed and not self.is_kept("end/ln_f")
        if self.last_is_recomputed and not made_again and self.low_stream:
            final[0] = self.activation("ln_f normalised", run.n_embd, "float32")
        return final[-1:] if made_again or not w.grad_enabled else final

    def is_kept(self, norm: str) -> bool:
        """Whether what a norm made of its input is kept though the block before it is run again. Of a layer norm in
        low precision backward does not read it."""
        names = {f"{norm} normalised"} if self.low_stream else {f"{norm} normalised", f"{norm} centred"}
        return not names.isdisjoint(banned(self.run))  # pyright: ignore[reportArgumentType]  frozen models have a hash

    def stretch_forward(self, stretch: Stretch, room: list[Tensor]) -> None:
        w, run = self.w, self.run
        for position in range(stretch.stride):
            w.shift = position
            w.mark("block")
            if self.checkpoints and position == 0:
                kept = [self.activation("h.*.x", run.n_embd, run.param_dtype)]
                if stretch is self.stretches[-1]:
                    room.clear()
            else:
                kept = self.block_forward(first=not self.checkpoints and stretch.start == 0 and stretch.n == 1)
            if self.checkpoints and position == 1 and not self.is_kept(f"{stretch.start + 1}/ln_1"):
                del kept[0]  # the block before is run again, and with it this one's input is there
            stretch.kept.append(kept)
            del kept

    def saved_bytes(self) -> int:
        kept = [(tensors, stretch.n) for stretch in self.stretches for tensors in stretch.kept]
        kept += [(self.head_kept, 1), (self.embedding_kept, 1)]
        return sum(tensor.storage.buffer.n_bytes * times for tensors, times in kept for tensor in tensors)


def base_name(tensor: Tensor) -> str:
    """The name, of a weight's low-precision copy that of the weight."""
    return tensor.storage.buffer.name.split(" as ")[0]


def forget(tensor: Tensor) -> None:
    """Takes back that a tensor was made: its end writes no free."""
    tensor.storage.forget()
