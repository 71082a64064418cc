"""gptfit's own model.py and loss.py, eager: explicit casts, no logits returned, the loss in chunks."""

from gptfit.memory import ops
from gptfit.memory.autograd import Storage, Tensor
from gptfit.memory.programs import Program, call

Saved = tuple[Storage, ...]


class Ours(Program):
    """The twin of gptfit's GPT."""

    name = "gptfit"

    def parameter(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return ops.use(self.w, self.w.parameter(name, shape, self.run.param_dtype))

    def linear(self, x: Tensor, name: str, n_out: int) -> Tensor:
        w, run = self.w, self.run
        bias = ops.cast(w, self.parameter(f"{name}.bias", (n_out,)), run.dtype) if run.bias else None
        weight = ops.cast(w, self.parameter(f"{name}.weight", (n_out, x.shape[-1])), run.dtype)
        return ops.linear(w, x, weight, bias, name)

    def norm(self, x: Tensor, name: str) -> Tensor:
        w, run = self.w, self.run
        weight = self.parameter(f"{name}.weight", (run.n_embd,))
        if run.norm == "rmsnorm":
            return rms_norm(self, x, weight, name)
        bias = self.parameter(f"{name}.bias", (run.n_embd,)) if run.bias else None
        return ops.cast(w, ops.layer_norm(w, x, weight, bias, name), run.dtype)

    def attention(self, x: Tensor) -> Tensor:
        w, run = self.w, self.run
        kv_width = run.n_kv_head * run.head_size
        qkv = call(self.linear, x, "h.*.attn.c_attn", run.n_embd + 2 * kv_width)
        qkv = ops.split_heads(w, qkv, "h.*.attn.qkv")
        y = ops.flash_attention(w, qkv, run.n_head, run.n_kv_head, run.head_size, "h.*.attn.y")
        y = call(self.linear, y, "h.*.attn.c_proj", run.n_embd)
        return ops.dropout(w, y, run.dropout, "h.*.attn.dropout")

    def mlp(self, x: Tensor) -> Tensor:
        w, run = self.w, self.run
        if run.mlp == "swiglu":
            gate = ops.elementwise(w, call(self.linear, x, "h.*.mlp.c_gate", run.n_hidden), "h.*.mlp.silu")
            h = ops.multiply(w, gate, call(self.linear, x, "h.*.mlp.c_fc", run.n_hidden), "h.*.mlp.h")
            del gate
        elif run.mlp == "relu2":
            h = ops.elementwise(w, call(self.linear, x, "h.*.mlp.c_fc", run.n_hidden), "h.*.mlp.relu", "output")
            h = ops.square(w, h, "h.*.mlp.h")
        else:
            h = ops.elementwise(w, call(self.linear, x, "h.*.mlp.c_fc", run.n_hidden), "h.*.mlp.gelu")
        return ops.dropout(w, call(self.linear, h, "h.*.mlp.c_proj", run.n_embd), run.dropout, "h.*.mlp.dropout")

    def block(self, x: Tensor) -> Tensor:
        w = self.w
        x = ops.add(w, x, call(self.attention, call(self.norm, x, "h.*.ln_1")), "h.*.x_mid")
        return ops.add(w, x, call(self.mlp, call(self.norm, x, "h.*.ln_2")), self.stream.name, shift=1)

    def embed(self, idx: Tensor) -> tuple[Tensor, list[Tensor]]:
        w, run = self.w, self.run
        wte = self.parameter("wte.weight", (run.vocab_size, run.n_embd))
        dropped = run.dropout > 0 and w.training
        learned = run.position == "learned"
        x = ops.embedding(w, idx, wte, "tok_emb" if dropped or learned else self.stream.name)
        if learned:
            wpe = self.parameter("wpe.weight", (run.block_size, run.n_embd))
            x = ops.add_positions(w, x, wpe, "emb" if dropped else self.stream.name)
        return ops.dropout(w, x, run.dropout, self.stream.name), []

    def head(self, x: Tensor, targets: Tensor) -> tuple[Tensor, list[Tensor]]:
        w, run = self.w, self.run
        x = call(self.norm, x, "ln_f")
        name = "wte.weight" if run.tie_embeddings else "lm_head.weight"
        weight = self.parameter(name, (run.vocab_size, run.n_embd))
        w.mark("loss", "loss" if w.training else "evaluation")
        if run.loss == "chunked":
            return chunked_cross_entropy(self, x, weight), []
        logits = ops.linear(w, x, ops.cast(w, weight, run.dtype), None, "lm_head", "logits")
        return ops.cross_entropy(w, ops.cast(w, logits, "float32", "logits as float32"), targets), []


def rms_norm(program: Ours, x: Tensor, weight: Tensor, name: str) -> Tensor:
    """model.rms_norm: keeps its input and one fp32 rstd a row; statistics and product in fp32."""
    w, dtype, shape, x_dtype = program.w, program.run.dtype, x.shape, x.dtype
    rows = (*shape[:-1], 1)
    norm = w.empty(f"{name} norm", "temporary", rows, "float32")
    mean = w.empty(f"{name} mean square", "temporary", rows, "float32")
    rstd = w.empty(f"{name} rstd", "activation", rows, "float32")
    del mean
    y = w.empty(f"{name} in float32", "temporary", shape, "float32")
    out = y if dtype == "float32" else w.empty(name, "activation", shape, dtype)
    weight_shape, weight_dtype = weight.shape, weight.dtype
    del norm, y

    def backward(grad: Tensor, saved: Saved) -> list[Tensor]:
        normed = w.empty(f"{name} normed", "temporary", shape, "float32")
        product = w.empty(f"{name} product", "temporary", shape, "float32")
        grad_weight = w.empty(f"{name} weight gradient", "temporary", weight_shape, weight_dtype)
        del product
        scaled = w.empty(f"{name} scaled gradient", "temporary", shape, "float32")
        product = w.empty(f"{name} product", "temporary", shape, "float32")
        along = w.empty(f"{name} mean product", "temporary", rows, "float32")
        del product, scaled, along
        if x_dtype != "float32":
            normed = w.empty(f"{name} input gradient", "temporary", shape, x_dtype)
        return [normed, grad_weight]

    out.node = w.record(name, (x.node, weight.node), (x.storage, weight.storage, rstd.storage), backward)
    return out


def chunked_cross_entropy(program: Ours, x: Tensor, weight: Tensor) -> Tensor:
    """loss.chunked_cross_entropy: gradients made in the forward, one chunk's logits alive at a time."""
    w, run = program.w, program.run
    n_tokens = run.batch_size * run.block_size
    n_embd, vocab = run.n_embd, run.vocab_size
    low = run.dtype
    w.flops += 2 * n_tokens * n_embd * vocab
    w_low = ops.cast(w, Tensor(weight.storage, weight.shape, weight.dtype), low, "lm_head weight copy")
    valid = w.empty("valid", "temporary", (n_tokens,), "bool")
    count = w.empty("loss scale", "activation", (), "float32")
    total = w.empty("loss sum", "temporary", (), "float32")
    with_grad = w.grad_enabled
    grad_x = w.empty("loss gradient of x", "activation", x.shape, x.dtype) if with_grad else None
    grad_w = w.empty("loss gradient of the head", "gradient", (vocab, n_embd), "float32") if with_grad else None
    for rows in chunk_kinds(n_tokens, run.loss_chunk_size):
        one_chunk(program, rows, with_grad)
    del w_low, valid
    loss = w.empty("mean loss", "activation", (), "float32")
    del total
    if grad_x is None or grad_w is None:
        return loss

    def backward(grad: Tensor, saved: Saved) -> list[Tensor]:
        factor = w.empty("loss factor", "temporary", (), "float32")
        del factor
        return [Tensor(saved[0], x_shape, low), Tensor(saved[1], (vocab, n_embd), "float32")]

    x_shape = x.shape
    loss.node = w.record(
        "chunked loss", (x.node, weight.node), (grad_x.storage, grad_w.storage, count.storage), backward
    )
    return loss


def chunk_kinds(n_tokens: int, chunk_size: int) -> list[int]:
    """A full chunk stands for all full ones, as each is gone before the next; then the rest."""
    full, rest = divmod(n_tokens, chunk_size)
    return ([chunk_size] if full else []) + ([rest] if rest else [])


def one_chunk(program: Ours, rows: int, with_grad: bool) -> None:
    w, run = program.w, program.run
    shape, low = (rows, run.vocab_size), run.dtype
    logits = w.empty("logits of a chunk", "logits", shape, low)
    capped = [
        w.empty("logits of a chunk, tanh", "logits", shape, "float32") for _ in range(2 if run.logit_softcap else 0)
    ]
    if low != "float32" and not run.logit_softcap:
        capped.append(w.empty("logits of a chunk in float32", "logits", shape, "float32"))
    if with_grad:
        capped.clear()
        product = w.empty("head gradient of a chunk", "temporary", (run.vocab_size, run.n_embd), low)
        del product
        part = w.empty("x gradient of a chunk", "temporary", (rows, run.n_embd), low)
        del part
    capped.clear()
    del logits
