"""Twins of the compiled step: what inductor's plan allocates, keeps and reuses, block by block.

The partitioner keeps, of each block and token, 36 bytes × n_embd in half precision: both norms' normalised input in
fp32, their outputs, q, k and v, the attention's output, the MLP's pre-activation and activation; and the low-precision
copies of the weights. The residual stream itself is not kept, nor are three buffers of it freed before the end of the
forward. Backward allocates each kind of gradient of activations once and reuses it from block to block; the gradients
of all parameters are returned together at its end. Read off the wrappers that inductor writes (trace.py runs them),
torch 2.13, CPU lowering.
"""

from gptfit.config import RunConfig
from gptfit.memory.attention import tables
from gptfit.memory.autograd import Parameter, Shape, Tensor, Writer
from gptfit.memory.nanogpt import NanoGPT
from gptfit.memory.ops import placeholder, use
from gptfit.memory.ours import chunked_cross_entropy
from gptfit.memory.programs import Program, collect
from gptfit.memory.tape import Buffer, Event, Item, Loop, make_buffer


class Compiled(Program):
    """A step whose blocks run compiled. Everything is written by hand: inductor's plan has no autograd."""

    def __init__(self, w: Writer, run: RunConfig) -> None:
        super().__init__(w, run)
        self.tokens = (run.batch_size, run.block_size)
        self.low = run.dtype
        self.copies = run.dtype != run.param_dtype
        self.kept: list[Tensor] = []  # of a block, for backward, in the order backward drops them
        self.head_kept: list[Tensor] = []
        self.embedding_kept: list[Tensor] = []
        self.inputs: list[Tensor] = []  # targets, then token ids

    # ---- what both programs share -------------------------------------------------------------------------------

    def shape(self, *last: int) -> Shape:
        return (*self.tokens, *last)

    def activation(self, name: str, width: int, dtype: str) -> Tensor:
        return self.w.empty(name, "activation", self.shape(width), dtype)

    def weight(self, name: str, shape: Shape) -> Tensor | None:
        """The parameter, and its low-precision copy if there is one."""
        self.w.parameter(name, shape, self.run.param_dtype)
        if not self.copies:
            return None
        return self.w.empty(f"{name} as {self.low}", "activation", shape, self.low)

    def vector(self, name: str, width: int) -> None:
        self.w.parameter(name, (width,), self.run.param_dtype)

    def norm(self, name: str) -> list[Tensor]:
        """Normalised input in fp32, reciprocal deviation, output."""
        run = self.run
        self.vector(f"{name}.weight", run.n_embd)
        if run.bias and run.norm == "layernorm":
            self.vector(f"{name}.bias", run.n_embd)
        normed = self.activation(f"{name} normalised", run.n_embd, "float32")
        return [normed, self.activation(f"{name} rstd", 1, "float32"), self.activation(name, run.n_embd, self.low)]

    def linear(self, name: str, n_in: int, n_out: int, output: str = "") -> list[Tensor]:
        """The weight's copy, and the output if it is kept."""
        copy = self.weight(f"{name}.weight", (n_out, n_in))
        if self.run.bias:
            self.vector(f"{name}.bias", n_out)
        self.w.flops += 2 * self.tokens[0] * self.tokens[1] * n_in * n_out * self.w.repeat
        kept = [copy] if copy is not None else []
        return [*kept, self.activation(output, n_out, self.low)] if output else kept

    def mask(self, name: str) -> list[Tensor]:
        """Dropout keeps a boolean mask."""
        dropped = self.run.dropout > 0 and self.w.training
        return [self.activation(f"{name} mask", self.run.n_embd, "bool")] if dropped else []

    def block_forward(self) -> list[Tensor]:
        w, run = self.w, self.run
        b, t = self.tokens
        c, kv_width = run.n_embd, run.n_kv_head * run.head_size
        kept = self.norm("h.*.ln_1")
        kept += self.linear("h.*.attn.c_attn", c, c + 2 * kv_width, "h.*.attn.c_attn")
        if run.position == "rope":
            kept += [
                self.activation("h.*.attn.q rotated", c, self.low),
                self.activation("h.*.attn.k rotated", kv_width, self.low),
            ]
        kept.append(self.activation("h.*.attn.y", c, self.low))
        rows = t if self.low != "float32" else -(-t // 32) * 32
        kept.append(w.empty("h.*.attn.y log-sum-exp", "activation", (b, run.n_head, rows), "float32"))
        kept += [w.empty(f"h.*.attn.y random {part}", "activation", (), "int64") for part in ("seed", "offset")]
        w.flops += 4 * b * t * t * c * w.repeat
        kept += self.linear("h.*.attn.c_proj", c, c) + self.mask("h.*.attn")
        kept += self.norm("h.*.ln_2")
        if run.mlp == "swiglu":
            kept += self.linear("h.*.mlp.c_gate", c, run.n_hidden, "h.*.mlp.c_gate")
        kept += self.linear("h.*.mlp.c_fc", c, run.n_hidden, "h.*.mlp.c_fc")
        kept.append(self.activation("h.*.mlp.h", run.n_hidden, self.low))
        return kept + self.linear("h.*.mlp.c_proj", run.n_hidden, c) + self.mask("h.*.mlp")

    def embedding_forward(self) -> list[Tensor]:
        w, run = self.w, self.run
        w.parameter("wte.weight", (run.vocab_size, run.n_embd), run.param_dtype)
        kept: list[Tensor] = []
        if run.position == "learned":
            w.parameter("wpe.weight", (run.block_size, run.n_embd), run.param_dtype)
            if run.batch_size > 2 and not run.dropout:  # then cheaper for the partitioner than the sum of both
                kept.append(w.empty("pos_emb", "activation", (run.block_size, run.n_embd), run.param_dtype))
            kept.append(w.empty("pos", "activation", (run.block_size,), "int64"))
        return kept + self.mask("emb")

    def blocks_forward(self) -> list[Tensor]:
        """Embedding, blocks and final norm; what the final norm keeps."""
        w, run = self.w, self.run
        w.mark("embedding", "forward" if w.training else "evaluation")
        self.embedding_kept = self.embedding_forward()
        stream = [self.activation(f"stream {i}", run.n_embd, self.low) for i in range(3)]
        with w.loop(run.n_layer):
            w.mark("block")
            self.kept = self.block_forward()
            if not w.grad_enabled:
                self.kept.clear()
        w.mark("head")
        final = self.norm("ln_f")
        stream.clear()
        return final

    def saved_bytes(self) -> int:
        kept = [(self.kept, self.run.n_layer), (self.head_kept, 1), (self.embedding_kept, 1)]
        return sum(tensor.storage.buffer.n_bytes * times for tensors, times in kept for tensor in tensors)

    # ---- backward -----------------------------------------------------------------------------------------------

    def gradient(self, name: str) -> None:
        """A parameter's gradient, which is alive to the end of the backward. Where one is there already, this is
        added to it then."""
        param = self.w.parameters[name]
        self.w.items.append(Event(1, new_gradient(param)))

    def blocks_backward(self, dx: Tensor, tied_here: bool) -> None:
        """From the gradient of the final norm's output downwards. `tied_here`: the head's part of the embedding's
        gradient is made by this graph too, and summed in it."""
        w, run = self.w, self.run
        c = run.n_embd
        w.mark("blocks", "backward")
        reused = [dx, w.empty("stream gradient", "temporary", self.shape(c), "float32")]
        self.gradients("ln_f")
        reused.append(w.empty("stream gradient in low precision", "temporary", self.shape(c), self.low))
        self.head_kept.clear()
        with w.loop(run.n_layer, reverse=True):
            w.mark("block")
            self.block_backward()
        w.mark("embedding")
        if "wpe.weight" in w.parameters:
            self.gradient("wpe.weight")
        if tied_here:
            reused.append(w.empty("embedding gradient", "temporary", (run.vocab_size, c), "float32"))
        if tied_here or not run.tie_embeddings:
            self.gradient("wte.weight")
        else:
            reused.append(w.empty("embedding gradient", "temporary", (run.vocab_size, c), "float32"))
        self.embedding_kept.clear()
        self.inputs.clear()
        reused.clear()

    def head_backward(self, grads: list[Tensor]) -> None:
        """The head's two products, then the blocks; `grads` holds the logits' gradient, and is emptied."""
        w, run = self.w, self.run
        self.drop_head("loss maximum", "loss log-sum")
        del self.inputs[:1]
        tied = run.tie_embeddings
        if tied or self.copies:
            name = "head gradient in low precision" if self.copies else "head gradient"
            head = w.empty(name, "temporary", (run.vocab_size, run.n_embd), self.low)
        else:
            head = None
        self.drop_head("ln_f")
        dx = w.empty("final norm gradient", "temporary", self.shape(run.n_embd), self.low)
        self.drop_head("wte.weight", "lm_head.weight")
        grads.clear()
        if not tied:
            self.gradient("lm_head.weight")
            head = None
        self.blocks_backward(dx, tied_here=tied)
        del head, dx
        self.accumulate()

    def drop_head(self, *names: str) -> None:
        """Lets go of what the head kept: of these names, and of copies of weights of these names."""
        self.head_kept = [tensor for tensor in self.head_kept if base_name(tensor) not in names]

    def product(self, shape: Shape) -> Tensor | None:
        """A weight's gradient in low precision, before it is cast; reused by the next block."""
        if not self.copies:
            return None
        return self.w.empty(f"weight gradient {shape[0]} × {shape[1]}", "temporary", shape, self.low)

    def gradients(self, module: str) -> None:
        for part in ("weight", "bias"):
            if f"{module}.{part}" in self.w.parameters:
                self.gradient(f"{module}.{part}")

    def block_backward(self) -> None:
        """What one block makes and drops. What the next one reuses, `own`, is dropped at the end of this one."""
        w, run = self.w, self.run
        c = run.n_embd
        own = [self.product((run.n_hidden, c))]
        self.drop("h.*.mlp.h", "h.*.mlp mask")
        own.append(w.empty("mlp gradient", "temporary", self.shape(run.n_hidden), self.low))
        self.drop("h.*.mlp.c_proj.weight")
        self.gradients("h.*.mlp.c_proj")
        if run.mlp == "swiglu":
            own.append(w.empty("mlp gate gradient", "temporary", self.shape(run.n_hidden), self.low))
        self.drop("h.*.mlp.c_fc", "h.*.mlp.c_gate", "h.*.ln_2", "h.*.mlp.c_fc.weight", "h.*.mlp.c_gate.weight")
        for name in ("h.*.mlp.c_fc", "h.*.mlp.c_gate", "h.*.ln_2"):
            self.gradients(name)
        self.drop("h.*.ln_2 normalised", "h.*.ln_2 rstd", "h.*.attn mask")
        own.append(self.product((c, c)))
        self.drop("h.*.attn.c_proj.weight")
        self.gradients("h.*.attn.c_proj")
        parts = [
            w.empty(f"h.*.attn.y gradient of {part}", "temporary", self.shape(heads * run.head_size), self.low)
            for part, heads in (("q", run.n_head), ("k", run.n_kv_head), ("v", run.n_kv_head))
        ]
        if w.kernels and self.low != "float32":
            b, t = self.tokens
            rows, width = -(-t // 128) * 128, -(-run.head_size // 32) * 32 + 1
            scratch = w.empty("h.*.attn.y dq accumulator", "workspace", (b, run.n_head, rows, width), "float32")
            del scratch
        self.drop("h.*.attn.y", "h.*.attn.y log-sum-exp", "h.*.attn.y random seed", "h.*.attn.y random offset")
        self.drop("h.*.attn.c_attn", "h.*.attn.q rotated", "h.*.attn.k rotated")
        qkv_width = c + 2 * run.n_kv_head * run.head_size
        own.append(w.empty("qkv gradient", "temporary", self.shape(qkv_width), self.low))
        parts.clear()
        own.append(self.product((qkv_width, c)))
        self.drop("h.*.ln_1", "h.*.attn.c_attn.weight")
        self.gradients("h.*.attn.c_attn")
        self.gradients("h.*.ln_1")
        self.kept.clear()

    def drop(self, *names: str) -> None:
        """Lets go of what a block kept under these names, and of copies of weights of these names."""
        self.kept = [tensor for tensor in self.kept if base_name(tensor) not in names]

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


def base_name(tensor: Tensor) -> str:
    return tensor.storage.buffer.name.split(" as ")[0]


def new_gradient(param: Parameter) -> Buffer:
    """The gradient of this backward: the one that stays, or one beside it."""
    if not param.has_gradient:
        return param.gradient
    return param.gradient._replace(name=f"{param.gradient.name} of this micro-step", category="temporary")


class CompiledNanoGPT(Compiled):
    """nanoGPT compiled: the model returns logits and loss; backward is handed zeros as the logits' gradient."""

    name = "nanogpt"
    kept_buffers = NanoGPT.kept_buffers

    def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, list[Tensor]]:
        w = self.w
        self.inputs = [targets, idx]
        final = self.blocks_forward()
        logits, scalars = logits_and_loss(self)
        self.head_kept = [*final, *scalars] if w.grad_enabled else []
        return w.empty("mean loss", "activation", (), "float32"), [logits]

    def backward(self, loss: Tensor) -> None:
        w = self.w
        shape = self.shape(self.run.vocab_size)
        w.mark("zeros for the unused logits", "loss backward")
        zeros = w.empty("zero gradient of the returned logits", "logits", shape, self.low)
        w.mark("log_softmax")
        grads = [w.empty("logits gradient", "logits", shape, self.low)]
        del zeros
        self.head_backward(grads)

    def saved_bytes(self) -> int:
        logits = make_buffer("lm_head", "logits", self.shape(self.run.vocab_size), self.low)
        return super().saved_bytes() + logits.n_bytes


class CompiledOurs(Compiled):
    """gptfit's model compiled: with the chunked loss up to the final norm, with the full loss all of it."""

    name = "gptfit"

    def buffers(self) -> list[Buffer]:
        run = self.run
        return tables(run.position, run.attention, run.block_size, run.head_size, run.dtype)

    def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, list[Tensor]]:
        w, run = self.w, self.run
        self.inputs = [targets, idx]
        final = self.blocks_forward()
        if run.loss == "full":
            logits, scalars = logits_and_loss(self)
            self.head_kept = [*final, *scalars, logits] if w.grad_enabled else []
            return w.empty("mean loss", "activation", (), "float32"), []
        w.mark("loss", "loss" if w.training else "evaluation")
        x = final.pop()
        self.head_kept = final if w.grad_enabled else []
        self.entry = placeholder()
        x.node = self.entry if w.grad_enabled else None
        name = "wte.weight" if run.tie_embeddings else "lm_head.weight"
        weight = use(w, w.parameter(name, (run.vocab_size, run.n_embd), run.param_dtype))
        self.weight_node = weight.node
        return chunked_cross_entropy(w, run, x, weight), []

    def backward(self, loss: Tensor) -> None:
        w, run = self.w, self.run
        w.mark("loss", "loss backward")
        if run.loss == "full":
            grads = [w.empty("logits gradient", "logits", self.shape(run.vocab_size), self.low)]
            self.drop_head("lm_head")
            self.head_backward(grads)
            return
        root, loss.node = loss.node, None
        assert root is not None and self.weight_node is not None
        if run.tie_embeddings:
            self.weight_node.awaited += 1  # the embedding's part comes when the compiled backward returns
        arrived = {root: w.empty("loss gradient", "temporary", (), "float32")}
        del root
        w.backward(collect(w), arrived)
        self.blocks_backward(arrived.pop(self.entry), tied_here=False)
        if run.tie_embeddings:
            w.deliver(self.weight_node, arrived[self.weight_node], arrived)
        self.accumulate(but="wte.weight" if run.tie_embeddings else "lm_head.weight")

    def saved_bytes(self) -> int:
        if self.run.loss == "full":
            return super().saved_bytes()
        nodes = (storage for node in self.w.nodes for storage in node.saved if storage.writer is not None)
        return super().saved_bytes() + sum(storage.buffer.n_bytes for storage in nodes)


def logits_and_loss(program: Compiled) -> tuple[Tensor, list[Tensor]]:
    """The logits; the head's weight copy and two numbers a token that the loss keeps."""
    w, run = program.w, program.run
    name = "wte.weight" if run.tie_embeddings else "lm_head.weight"
    copy = program.weight(name, (run.vocab_size, run.n_embd))
    w.flops += 2 * program.tokens[0] * program.tokens[1] * run.n_embd * run.vocab_size
    logits = w.empty("lm_head", "logits", program.shape(run.vocab_size), program.low)
    w.mark("cross entropy", "loss" if w.training else "evaluation")
    scalars = [program.activation(f"loss {part}", 1, "float32") for part in ("maximum", "log-sum")]
    return logits, [*([copy] if copy is not None else []), *scalars]
