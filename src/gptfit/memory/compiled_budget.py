"""Compiled twins under activation_memory_budget below 1: what is kept then, and what backward makes again.

Below 1 torch's partitioner (torch/_functorch/partitioners.py, choose_saved_values_set) no longer keeps what is cheap to
compute: norms, activations and casts are made again, fused into the kernels of backward. It keeps the outputs of
matmuls and attention, the embedding's rows, masks, and the norms' statistics: 22 bytes × n_embd a token and block
instead of 36, in half precision. The residual stream is summed again from the embedding and the projections that were
added to it: inductor writes a sum down where it has read more than four tensors (realize_reads_threshold), which is
every second block, and all these sums at the start of backward. Read off the wrappers of torch 2.13, CPU lowering.
"""

from gptfit.config import RunConfig
from gptfit.errors import GptfitError
from gptfit.memory.autograd import Tensor, Writer
from gptfit.memory.compiled import CompiledNanoGPT, CompiledOurs
from gptfit.memory.compiled_backward import Compiled
from gptfit.memory.compiled_evaluation import EvaluatedNanoGPT, EvaluatedOurs
from gptfit.memory.compiled_forward import CompiledForward, Stretch, base_name

PROJECTIONS = ("attn.c_proj", "mlp.c_proj")


class Lean(Compiled):
    """Forward and backward of a compiled step that keeps no more than matmuls and attention gave."""

    keeps_joined = False

    def stretches_of(self) -> list[Stretch]:
        """Rounds of blocks between two sums that are written down, and the last round apart: backward begins there."""
        n, every = self.run.n_layer, self.blocks_a_sum
        last = n % every or every
        top = Stretch(1, n - last, last)
        return [Stretch((n - last) // every, 0, every), top] if n > last else [top]

    @property
    def blocks_a_sum(self) -> int:
        """Each block adds two projections to the stream; a mask that is multiplied with each is read as well."""
        return 1 if self.run.dropout else 2

    # ---- forward ------------------------------------------------------------------------------------------------

    def norm(self, name: str) -> list[Tensor]:
        """The statistics, and the output of the last; that of others is there in passing."""
        self.norm_parameters(name)
        parts = ("mean", "rstd") if self.run.norm == "layernorm" else ("rstd",)
        kept = [self.activation(f"{name} {part}", 1, "float32") for part in parts]
        output = self.activation(name, self.run.n_embd, self.low)
        return [*kept, output] if name == "ln_f" else kept

    def heads(self) -> list[Tensor]:
        run, low = self.run, self.low
        c, kv_width = run.n_embd, run.n_kv_head * run.head_size
        kept: list[Tensor] = []
        if run.qk_norm:
            kept += [self.rows("h.*.attn.q rstd", run.n_head), self.rows("h.*.attn.k rstd", run.n_kv_head)]
        if run.attention == "math":
            return kept + [self.activation(f"h.*.attn.{part} copy", c, low) for part in ("q scaled", "k", "v")]
        if run.position == "rope":
            widths = {"q": c, "k": kv_width}
            kept += [self.activation(f"h.*.attn.{part} rotated", width, low) for part, width in widths.items()]
        return kept

    def scores(self, first: bool) -> list[Tensor]:
        """Attention written out: the scores, with maximum and sum of each row."""
        run, shape = self.run, (self.tokens[0], self.run.n_head, self.tokens[1], self.tokens[1])
        kept = [self.w.empty("h.*.attn.y scores", "activation", shape, self.low)]
        kept += [self.rows(f"h.*.attn.y {part}", run.n_head) for part in ("maximum", "sum")]
        if run.dropout > 0 and self.w.training:
            kept.append(self.w.empty("h.*.attn.y mask", "activation", shape, "bool"))
        return kept

    def mlp(self) -> list[Tensor]:
        kept = [tensor for tensor in super().mlp() if base_name(tensor) != "h.*.mlp.h"]
        mask = kept[-1:] if base_name(kept[-1]).endswith("mask") else []
        kept = kept[: len(kept) - len(mask)]
        return [*kept, self.activation("h.*.mlp.c_proj", self.run.n_embd, self.low), *mask]

    def block_forward(self, first: bool = False) -> list[Tensor]:
        c = self.run.n_embd
        kept = self.norm("h.*.ln_1") + self.attention(first)
        kept += self.linear("h.*.attn.c_proj", c, c, "h.*.attn.c_proj") + self.mask("h.*.attn")
        return kept + self.norm("h.*.ln_2") + self.mlp()

    def embedding_forward(self) -> list[Tensor]:
        kept = super().embedding_forward()
        if self.w.grad_enabled:
            kept = [tensor for tensor in kept if not base_name(tensor).startswith("h.0.ln_1")]
            kept.append(self.activation("embedding", self.run.n_embd, self.run.param_dtype))
        return kept

    def forward(self, idx: Tensor, targets: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        made = super().forward(idx, targets)
        self.drop_head("ln_f")  # with the full loss it is in the graph, and made again
        return made

    # ---- backward -----------------------------------------------------------------------------------------------

    def room(self, name: str, width: int, dtype: str = "") -> None:
        """A temporary that the first block makes and every later one uses again."""
        if name not in self.rooms:
            self.rooms[name] = self.w.empty(name, "temporary", self.shape(width), dtype or self.low)

    def product_room(self, name: str, n_out: int, n_in: int) -> None:
        """The same for a weight's gradient in low precision."""
        if self.copies and name not in self.rooms:
            self.rooms[name] = self.w.empty(name, "temporary", (n_out, n_in), self.low)

    def blocks_backward(self, dx: Tensor, tied_here: bool) -> None:
        w, run = self.w, self.run
        self.rooms: dict[str, Tensor] = {}
        w.mark("blocks", "backward")
        below = self.stretches[0] if len(self.stretches) > 1 else None
        if run.loss == "chunked" or run.position == "rope":
            self.write_sums()
        top = self.stretches[-1]
        w.shift = 0
        self.top_sums = [self.sum_of_stream(f"sum of the stream {i}") for i in range(self.n_top_sums(top))]
        self.room("stream gradient", run.n_embd, run.param_dtype)
        if self.low != run.param_dtype:
            self.room("stream gradient in low precision", run.n_embd)
        self.kept = []
        if below is not None:
            with w.loop(below.n, start=below.start, stride=below.stride):
                self.drop_last_addend(below)
        w.shift = 0
        for kept in top.kept[:-1]:
            drop_from(kept, PROJECTIONS)
        drop_from(top.kept[-1], PROJECTIONS[: 1 if top.stride == self.blocks_a_sum else 2])
        self.gradients("ln_f")
        self.head_kept.clear()
        del dx
        for stretch in reversed(self.stretches):
            with w.loop(stretch.n, reverse=True, start=stretch.start, stride=stretch.stride):
                for position in reversed(range(stretch.stride)):
                    w.shift = position
                    w.mark("block")
                    self.kept = stretch.kept.pop()
                    self.lean_block_backward(stretch, position)
                    self.kept = []
            w.shift = 0
        part = self.embedding_backward(tied_here)
        self.inputs.clear()
        part.clear()

    def embedding_backward(self, tied_here: bool) -> list[Tensor]:
        """After the last block no room is used again; what the embedding's gradient is made of goes with it."""
        tied = self.run.tie_embeddings
        last = ("qkv gradient", "stream gradient", "mlp input gradient")
        self.rooms = {name: room for name, room in self.rooms.items() if name in last}
        self.top_sums.clear()
        part = super().embedding_backward(tied_here=False)
        self.rooms.clear()
        self.embedding_kept.clear()
        if tied and tied_here:
            self.gradient("wte.weight")
        return part

    def sum_of_stream(self, name: str) -> Tensor:
        return self.w.empty(name, "temporary", self.shape(self.run.n_embd), self.run.param_dtype)

    def n_top_sums(self, top: Stretch) -> int:
        """Sums beside those of the rounds below, as observed: what is read twice is written down as well."""
        run = self.run
        twice = int(run.norm == "layernorm" and not run.dropout)
        if run.position == "rope" and not run.dropout:
            return 1 + twice
        return 2 + twice if top.stride == self.blocks_a_sum else 1

    def before_logits_go(self) -> None:
        if self.run.position != "rope":  # written as the last norm's output is made again
            self.write_sums()

    def write_sums(self) -> None:
        """The sums of the rounds below the last one."""
        for stretch in self.stretches[:-1]:
            with self.w.loop(stretch.n, start=stretch.start, stride=stretch.stride):
                stretch.kept[0].append(self.sum_of_stream("h.*.sum of the stream"))

    def drop_last_addend(self, stretch: Stretch) -> None:
        """The last projection in a sum that is written down is not read again."""
        last = 1 if self.run.position == "rope" and not self.run.dropout else 0
        drop_from(stretch.kept[-1], PROJECTIONS[last : last + 1])

    def lean_block_backward(self, stretch: Stretch, position: int) -> None:
        self.lean_mlp_backward()
        if stretch is self.stretches[-1] and position == stretch.stride - 1:
            del self.top_sums[1:]
        self.lean_attention_backward()
        if position == 1 and stretch.kept:
            drop_from(stretch.kept[0], PROJECTIONS)

    def lean_mlp_backward(self) -> None:
        run = self.run
        hidden = run.n_hidden
        self.drop("sum of the stream")
        self.room("mlp gradient", hidden)
        self.drop("mlp.c_proj.weight")
        self.room("mlp.h again", hidden)
        if run.mlp == "swiglu":
            self.room("mlp gate gradient", hidden)
            self.room("mlp silu", hidden)
        self.kept = [t for t in self.kept if t.storage.buffer.name not in ("h.*.mlp.c_fc", "h.*.mlp.c_gate")]
        self.product_room("mlp weight gradient", run.n_embd, hidden)
        self.gradients("h.*.mlp.c_proj")
        self.drop("mlp.c_fc.weight", "mlp.c_gate.weight")
        self.room("mlp input gradient", run.n_embd)
        self.gradients(*reversed(self.mlp_inputs), "h.*.ln_2")
        self.drop("mlp.c_proj", "mlp mask", "ln_2 mean", "ln_2 rstd", "attn mask")

    def lean_attention_backward(self) -> None:
        run, c = self.run, self.run.n_embd
        qkv_width = c + 2 * run.n_kv_head * run.head_size
        self.product_room("attention weight gradient", c, c)
        self.drop("attn.c_proj.weight")
        self.gradients("h.*.attn.c_proj")
        if run.position == "rope":
            self.room("attention output by token", c)
        if run.attention == "math":  # between the scores nothing of the MLP's size is used again
            for name in [name for name in self.rooms if name.startswith("mlp")]:
                del self.rooms[name]
        made_again = self.scores_again() if run.attention == "math" else self.repeated_again()
        parts = self.attention_gradients()
        made_again.clear()
        if run.qk_norm:  # whose backward reads the projection
            self.room("qkv gradient", qkv_width)
            if run.position == "rope":
                self.room("q and k gradients turned back", qkv_width - run.n_kv_head * run.head_size)
        self.drop_all_of("attn.")
        self.room("qkv gradient", qkv_width)
        self.drop("attn.c_attn.weight")
        parts.clear()
        self.product_room("qkv weight gradient", qkv_width, c)
        self.gradients("h.*.attn.c_attn", "h.*.ln_1")
        self.drop("ln_1 mean", "ln_1 rstd")

    def scores_again(self) -> list[Tensor]:
        """Attention written out: the gradient of its scores and softmax's output, in fp32 on the way."""
        shape = (self.tokens[0], self.run.n_head, self.tokens[1], self.tokens[1])
        for name in ("scores gradient", "probabilities"):
            if name not in self.rooms:
                self.rooms[name] = self.w.empty(name, "temporary", shape, self.low)
        dtypes = [self.low] if self.low == "float32" else [self.low, "float32"]
        return [self.w.empty(f"scores in {dtype}", "temporary", shape, dtype) for dtype in dtypes]

    def repeated_again(self) -> list[Tensor]:
        """k and v for each query head: the fp32 kernel knows no groups (model.py)."""
        if self.run.n_kv_head == self.run.n_head or self.low != "float32":
            return []
        return [self.w.empty(f"{part} repeated", "temporary", self.shape(self.run.n_embd), self.low) for part in "kv"]


def drop_from(kept: list[Tensor], names: tuple[str, ...]) -> None:
    """Lets go of outputs of these names, copies of their weights left."""
    kept[:] = [tensor for tensor in kept if tensor.storage.buffer.name.removeprefix("h.*.") not in names]


class LeanNanoGPT(Lean, CompiledNanoGPT):
    def positions(self) -> list[Tensor]:
        kept = [self.w.empty("pos", "activation", (self.run.block_size,), "int64")]
        if self.w.grad_enabled:
            kept.append(self.w.empty("pos_emb", "activation", (self.run.block_size, self.run.n_embd), "float32"))
        return kept


class LeanOurs(Lean, CompiledOurs):
    pass


USUAL: dict[str, type[Compiled]] = {"nanogpt": EvaluatedNanoGPT, "gptfit": EvaluatedOurs}
LEAN: dict[str, type[Compiled]] = {"nanogpt": LeanNanoGPT, "gptfit": LeanOurs}


def compiled_twin(program: str, w: Writer, run: RunConfig) -> Compiled:
    """The twin of what the partitioner does under the run's budget: the first cut that is small enough, where sizes
    count from the graph's inputs on. If the usual cut is no larger than those, it is taken under any budget.

    Raises GptfitError for a budget below the lean cut's share: what is kept then is a knapsack's choice.
    """
    budget = run.activation_memory_budget
    if budget == 1:
        return USUAL[program](w, run)
    usual_bytes, inputs_bytes = cut_bytes(USUAL[program], run)
    if usual_bytes <= inputs_bytes:
        return USUAL[program](w, run)
    share = (cut_bytes(LEAN[program], run)[0] - inputs_bytes) / (usual_bytes - inputs_bytes)
    if share >= budget:
        raise GptfitError(
            f"activation_memory_budget={budget:g} cannot be estimated: below {max(share, 0):.2f} of this run torch's "
            "partitioner alone knows what it keeps",
            "0.9 can; `gptfit verify` traces any budget",
        )
    return LEAN[program](w, run)


def cut_bytes(twin: type[Compiled], run: RunConfig) -> tuple[int, int]:
    """Bytes that the graph keeps for backward, and bytes of its inputs: parameters and token ids."""
    w = Writer(run.n_layer)
    made = twin(w, run)
    ids, targets = (w.empty(name, "buffer", made.tokens, "int64") for name in ("X", "Y"))
    result = made.forward(ids, targets)
    whole = run.loss == "full"  # else the loss, and an untied head, are outside of the graph
    kept_bytes = made.saved_bytes() if whole else CompiledForward.saved_bytes(made)
    inside = [param for name, param in w.parameters.items() if whole or name != "lm_head.weight"]
    inputs_bytes = sum(param.buffer.n_bytes * param.count for param in inside)
    del result
    return kept_bytes, inputs_bytes + (1 + whole) * ids.storage.buffer.n_bytes
