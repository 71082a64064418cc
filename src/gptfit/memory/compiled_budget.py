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
from gptfit.memory.compiled_lean_plan import FINAL, OVER, ZEROS, LeanPlan


class Lean(Compiled):
    """Forward and backward of a compiled step that keeps no more than matmuls and attention gave."""

    keeps_joined = False

    def stretches_of(self) -> list[Stretch]:
        return [Stretch(self.run.n_layer, 0, 1)]

    # ---- forward ------------------------------------------------------------------------------------------------

    def norm(self, name: str) -> list[Tensor]:
        """The statistics, and the output of the last; that of others is there in passing."""
        self.norm_parameters(name)
        parts = ("mean", "rstd") if self.run.norm == "layernorm" else ("rstd",)
        kept = [self.activation(f"{name} {part}", 1, "float32") for part in parts]
        output = self.activation(name, self.run.n_embd, self.low)
        return [*kept, output] if name == "ln_f" else kept

    def heads(self) -> list[Tensor]:
        """What attention reads, where it is no view of the projection. In half precision norms are made again, in fp32
        their outputs are kept. Copies that attention makes are kept unless they are of more than two heads for one; of
        a single head, or sequence, it makes none of keys and values."""
        run, low = self.run, self.low
        c, kv_width = run.n_embd, run.n_kv_head * run.head_size
        rope, math = run.position == "rope", run.attention == "math"
        normed = run.qk_norm and low == "float32"
        kept: list[Tensor] = []
        if run.qk_norm:
            kept += [self.rows("h.*.attn.q rstd", run.n_head), self.rows("h.*.attn.k rstd", run.n_kv_head)]
        if normed:
            kept += [self.activation("h.*.attn.q normed", c, low), self.activation("h.*.attn.k normed", kv_width, low)]
        if rope and not math:
            kept.append(self.activation("h.*.attn.q rotated", c, low))
        if rope and not (math and self.n_groups == 1 and not self.views_apart):
            kept.append(self.activation("h.*.attn.k rotated", kv_width, low))
        copied = [] if run.qk_norm and not rope else ["q scaled"] if math else []
        if self.n_groups <= 2 and (math or (self.n_groups == 2 and low == "float32")):
            copied += ["v"] if (rope and self.n_groups == 2) or (run.qk_norm and not rope) else ["k", "v"]
        if math and self.views_apart:
            copied = [part for part in copied if part == "q scaled"]
        kind = "copy" if math else "repeated"
        return kept + [self.activation(f"h.*.attn.{part} {kind}", c, low) for part in copied]

    @property
    def n_groups(self) -> int:
        """Query heads for each of keys and values."""
        return self.run.n_head // self.run.n_kv_head

    @property
    def views_apart(self) -> bool:
        """Whether a product can read keys and values as they lie in the projection."""
        return self.n_groups == 1 and 1 in (self.run.n_head, self.run.batch_size)

    @property
    def keeps_projection(self) -> bool:
        """Whether attention, or backward of what is done to its inputs, reads views of it."""
        run = self.run
        if run.attention == "math":
            return self.n_groups > 2 or self.views_apart or (run.qk_norm and self.low != "float32")
        changed = run.position == "rope" or (run.qk_norm and self.low == "float32")
        return not (changed and self.n_groups == 2 and self.low == "float32")

    def attention(self, first: bool) -> list[Tensor]:
        name = "h.*.attn.c_attn"
        kept = [tensor for tensor in super().attention(first) if tensor.storage.buffer.name != name]
        if self.keeps_projection:
            kept.append(self.activation(name, self.run.n_embd + 2 * self.run.n_kv_head * self.run.head_size, self.low))
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

    def head_backward(self, grads: list[Tensor]) -> None:
        self.drop_head("loss maximum", "loss log-sum")
        del self.inputs[:1]
        given: dict[str, Tensor] = dict(zip((OVER, ZEROS), grads, strict=False))
        grads.clear()
        self.planned_backward(given)
        self.accumulate()

    def blocks_backward(self, dx: Tensor, tied_here: bool) -> None:
        self.planned_backward({FINAL: dx})

    def planned_backward(self, given: dict[str, Tensor]) -> None:
        self.w.mark("blocks", "backward")
        plan = LeanPlan(self, given)
        plan.write()
        self.inputs.clear()
        for tensors in (self.head_kept, self.embedding_kept, self.stretches[0].kept):
            tensors.clear()


class LeanNanoGPT(Lean, CompiledNanoGPT):
    def positions(self) -> list[Tensor]:
        kept = [self.w.empty("pos", "activation", (self.run.block_size,), "int64")]
        if self.w.grad_enabled:
            kept.append(self.w.empty("pos_emb", "activation", (self.run.block_size, self.run.n_embd), "float32"))
        return kept

    def backward(self, loss: Tensor) -> None:
        w = self.w
        w.mark("zeros for the unused logits", "loss backward")
        shape = self.shape(self.run.vocab_size)
        zeros = w.empty("zero gradient of the returned logits", "logits", shape, self.low)
        w.mark("log_softmax")
        grads = [w.empty("logits gradient", "logits", shape, self.low), zeros]
        del zeros
        self.head_backward(grads)


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
    """Bytes that the graph keeps for backward, and bytes of its inputs: parameters and token ids. Weights that backward
    reads as they are count among what is kept, too."""
    w = Writer(run.n_layer)
    made = twin(w, run)
    ids, targets = (w.empty(name, "buffer", made.tokens, "int64") for name in ("X", "Y"))
    result = made.forward(ids, targets)
    whole = run.loss == "full"  # else the loss, and an untied head, are outside of the graph
    kept_bytes = made.saved_bytes() if whole else CompiledForward.saved_bytes(made)
    inside = [param for name, param in w.parameters.items() if whole or name != "lm_head.weight"]
    inputs_bytes = sum(param.buffer.n_bytes * param.count for param in inside)
    if not made.copies:
        multiplied = [param for param in inside if "*" in param.name or param.name == "lm_head.weight"]
        kept_bytes += sum(param.buffer.n_bytes * param.count for param in multiplied if len(param.shape) == 2)
        if whole and run.tie_embeddings:
            kept_bytes += w.parameters["wte.weight"].buffer.n_bytes
    del result
    return kept_bytes, inputs_bytes + (1 + whole) * ids.storage.buffer.n_bytes
