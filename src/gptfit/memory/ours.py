"""gptfit's own model.py and loss.py, eager: explicit casts, no logits returned, the loss in chunks."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from gptfit.config import RunConfig
from gptfit.memory import ops
from gptfit.memory.attention import flash_attention, math_attention, rotate, split_heads, tables
from gptfit.memory.autograd import Storage, Tensor, Writer
from gptfit.memory.programs import Eager, call
from gptfit.memory.tape import Buffer

Saved = tuple[Storage, ...]


class Origin(NamedTuple):
    """layers.Origin: a tensor is `make(*sources)`."""

    make: Callable[..., Tensor]
    sources: tuple[Tensor, ...]


class Ours(Eager):
    """The twin of gptfit's GPT."""

    name = "gptfit"

    def buffers(self) -> list[Buffer]:
        run = self.run
        return tables(run.position, run.attention, run.block_size, run.head_size, run.dtype)

    def parameter(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return ops.use(self.w, self.w.parameter(name, shape, self.run.param_dtype))

    def linear(self, x: Tensor, name: str, n_out: int, origin: Origin | None = None) -> Tensor:
        w, run = self.w, self.run
        if origin is not None:
            return remaking_linear(self, x, name, n_out, origin)
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

    def origin(self, make: Callable[..., Tensor], *sources: Tensor) -> Origin | None:
        return Origin(make, sources) if self.run.recompute_cheap and self.w.grad_enabled else None

    def attention(self, x: Tensor, origin: Origin | None) -> Tensor:
        w, run = self.w, self.run
        qkv = call(self.linear, x, "h.*.attn.c_attn", run.n_embd + 2 * run.n_kv_head * run.head_size, origin)
        made_anew = run.position == "rope" or run.attention == "math" or run.n_kv_head != run.n_head
        heads = split_heads(w, qkv, run.n_head, run.n_kv_head, run.head_size, copies=made_anew)
        if run.qk_norm:
            q = rms_norm(self, heads.q, None, "h.*.attn.q normed")
            heads = replace(heads, q=q, k=rms_norm(self, heads.k, None, "h.*.attn.k normed"))
            del q
        if run.position == "rope":
            q = rotate(w, heads.q, "h.*.attn.q rotated")
            heads = replace(heads, q=q, k=rotate(w, heads.k, "h.*.attn.k rotated"), by_head=True)
            del q
        if run.attention == "math":
            y = math_attention(w, heads, "h.*.attn.y", run.dropout if w.training else 0.0)
        else:
            y = flash_attention(w, heads, "h.*.attn.y")
        y = call(self.linear, y, "h.*.attn.c_proj", run.n_embd, self.origin(lambda y: y, y))
        return ops.dropout(w, y, run.dropout, "h.*.attn.dropout")

    def mlp(self, x: Tensor, origin: Origin | None) -> Tensor:
        w, run = self.w, self.run
        if origin is not None:
            return self.remaking_mlp(x, origin)
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

    def remaking_mlp(self, x: Tensor, origin: Origin) -> Tensor:
        w, run = self.w, self.run
        c_fc = "h.*.mlp.c_fc"
        if run.mlp == "swiglu":
            gate = call(self.linear, x, "h.*.mlp.c_gate", run.n_hidden, origin)
            made_of = Origin(partial(swiglu, w), (gate, call(self.linear, x, c_fc, run.n_hidden, origin)))
            del gate
        elif run.mlp == "relu2":
            relu = ops.elementwise(w, call(self.linear, x, c_fc, run.n_hidden, origin), "h.*.mlp.relu", "output")
            made_of = Origin(partial(ops.square, w, name="h.*.mlp.h"), (relu,))
            del relu
        else:
            gelu = partial(ops.elementwise, w, name="h.*.mlp.gelu")
            made_of = Origin(gelu, (call(self.linear, x, c_fc, run.n_hidden, origin),))
        h = call(self.linear, made_of.make(*made_of.sources), "h.*.mlp.c_proj", run.n_embd, made_of)
        return ops.dropout(w, h, run.dropout, "h.*.mlp.dropout")

    def attend(self, x: Tensor) -> Tensor:
        origin = self.origin(partial(self.norm, name="h.*.ln_1"), x)
        return call(self.attention, call(self.norm, x, "h.*.ln_1"), origin)

    def block(self, x: Tensor) -> Tensor:
        w = self.w
        recompute = self.run.activation_checkpointing == "attention" and w.grad_enabled and self.is_checkpoint
        x = ops.add(w, x, self.checkpointed(x, self.attend) if recompute else self.attend(x), "h.*.x_mid")
        origin = self.origin(partial(self.norm, name="h.*.ln_2"), x)
        return ops.add(w, x, call(self.mlp, call(self.norm, x, "h.*.ln_2"), origin), self.stream.name, shift=1)

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
            return chunked_cross_entropy(w, run, x, weight), []
        logits = ops.linear(w, x, ops.cast(w, weight, run.dtype), None, "lm_head", "logits")
        logits = ops.cast(w, logits, "float32", "logits as float32")
        if run.logit_softcap:
            logits = soft_cap(w, logits)
        return ops.cross_entropy(w, logits, targets), []

    def last_logits(self, x: Tensor) -> Tensor:
        """GPT.logits: of a view of the last position."""
        w, run = self.w, self.run
        x = call(self.norm, x, "ln_f")
        name = "wte.weight" if run.tie_embeddings else "lm_head.weight"
        weight = self.parameter(name, (run.vocab_size, run.n_embd))
        last = Tensor(x.storage, (run.batch_size, run.n_embd), x.dtype)
        del x
        logits = ops.linear(w, last, ops.cast(w, weight, run.dtype), None, "lm_head", "logits")
        del last
        return ops.cast(w, soft_cap(w, ops.cast(w, logits, "float32")) if run.logit_softcap else logits, "float32")


def remaking_linear(program: Ours, x: Tensor, name: str, n_out: int, origin: Origin) -> Tensor:
    """layers.Linear with the origin of its input: keeps its sources; makes it, and the weight's copy, again."""
    w, run = program.w, program.run
    low, high, shape = run.dtype, run.param_dtype, x.shape
    weight = program.parameter(f"{name}.weight", (n_out, shape[-1]))
    bias = program.parameter(f"{name}.bias", (n_out,)) if run.bias else None
    w.flops += 2 * math.prod(shape) * n_out * w.repeat
    copies = [ops.cast(w, Tensor(part.storage, part.shape, high), low) for part in (weight, bias) if part is not None]
    y = w.empty(name, "activation", (*shape[:-1], n_out), low)
    w.multiplies()
    copies.clear()
    make, parts = origin.make, [(source.shape, source.dtype) for source in origin.sources]

    def gradient(label: str, of: tuple[int, ...]) -> Tensor:
        return ops.cast(w, w.empty(f"{name} {label} gradient", "temporary", of, low), high, f"{name} {label} gradient")

    def backward(grad: Tensor, saved: Saved) -> list[Tensor | None]:
        copy = ops.cast(w, Tensor(saved[0], (n_out, shape[-1]), high), low)
        grad_x = w.empty(f"{name} input gradient", "temporary", shape, low)
        w.multiplies()
        del copy
        enabled, w.grad_enabled = w.grad_enabled, False
        made = make(*(Tensor(one, *part) for one, part in zip(saved[1:], parts, strict=True)))
        w.grad_enabled = enabled
        grad_weight = gradient("weight", (n_out, shape[-1]))
        grad_bias = gradient("bias", (n_out,)) if run.bias else None
        del made
        return [grad_x, grad_weight, grad_bias]

    inputs = (x.node, weight.node, bias.node if bias is not None else None)
    y.node = w.record(name, inputs, (weight.storage, *(source.storage for source in origin.sources)), backward)
    return y


def swiglu(w: Writer, gate: Tensor, up: Tensor) -> Tensor:
    """layers.swiglu: keeps gate and up alone."""
    shape, dtype = gate.shape, gate.dtype
    h = w.empty("h.*.mlp.h", "activation", shape, dtype)

    def backward(grad: Tensor, saved: Saved) -> list[Tensor]:
        grad_up = w.empty("h.*.mlp.h gradient 2", "temporary", shape, dtype)
        product = w.empty("h.*.mlp.h product", "temporary", shape, dtype)
        grad_gate = w.empty("h.*.mlp.h gradient 1", "temporary", shape, dtype)
        del product
        return [grad_gate, grad_up]

    h.node = w.record("h.*.mlp.h", (gate.node, up.node), (gate.storage, up.storage), backward)
    return h


def soft_cap(w: Writer, logits: Tensor) -> Tensor:
    """loss.soft_cap: cap · tanh(logits / cap) in fp32; tanh's output is saved."""
    divided = ops.scale(w, logits, "logits divided", "logits")
    del logits
    tanh = ops.elementwise(w, divided, "logits tanh", "output", "logits")
    del divided
    return ops.scale(w, tanh, "logits capped", "logits")


def rms_norm(program: Ours, x: Tensor, weight: Tensor | None, name: str) -> Tensor:
    """model.rms_norm: keeps its input and one fp32 rstd a row; statistics and product in fp32."""
    w, dtype, shape, x_dtype = program.w, program.run.dtype, x.shape, x.dtype
    rows = (*shape[:-1], 1)
    norm = w.empty(f"{name} norm", "temporary", rows, "float32")
    mean = w.empty(f"{name} mean square", "temporary", rows, "float32")
    rstd = w.empty(f"{name} rstd", "activation", rows, "float32")
    del mean
    y = w.empty(f"{name} in float32", "temporary", shape, "float32")
    out = y if dtype == "float32" else w.empty(name, "activation", shape, dtype)
    weight_shape, weight_dtype = (weight.shape, weight.dtype) if weight is not None else ((), "")
    del norm, y

    def backward(grad: Tensor, saved: Saved) -> list[Tensor | None]:
        normed = w.empty(f"{name} normed", "temporary", shape, "float32")
        grad_weight = scaled = None
        if weight_dtype:
            product = w.empty(f"{name} product", "temporary", shape, "float32")
            grad_weight = w.empty(f"{name} weight gradient", "temporary", weight_shape, weight_dtype)
            del product
            scaled = w.empty(
                f"{name} scaled gradient", "temporary", shape, dtype if weight_dtype == dtype else "float32"
            )
        product = w.empty(f"{name} product", "temporary", shape, "float32")
        along = w.empty(f"{name} mean product", "temporary", rows, "float32")
        del product
        if x_dtype != "float32":
            normed = [w.empty(f"{name} input gradient", "temporary", shape, x_dtype), normed][0]
        del scaled, along
        return [normed, grad_weight]

    inputs = (x.node, weight.node if weight is not None else None)
    kept = (w.saving(x), rstd.storage)
    saved = kept if weight is None else (*kept, weight.storage)
    out.node = w.record(name, inputs, saved, backward)
    return out


def chunked_cross_entropy(w: Writer, run: RunConfig, x: Tensor, weight: Tensor) -> Tensor:
    """loss.chunked_cross_entropy: gradients made in the forward, one chunk's logits alive at a time."""
    n_tokens = run.batch_size * run.block_size
    n_embd, vocab, low = run.n_embd, run.vocab_size, run.dtype
    w.flops += 2 * n_tokens * n_embd * vocab
    w_low = ops.cast(w, Tensor(weight.storage, weight.shape, weight.dtype), low, "lm_head weight copy")
    valid = w.empty("valid", "temporary", (n_tokens,), "bool")
    factor = w.empty("loss scale", "activation", (), "float32")
    total = w.empty("loss sum", "temporary", (), "float32")
    with_grad = w.grad_enabled
    grad_x = w.empty("loss gradient of x", "activation", x.shape, x.dtype) if with_grad else None
    grad_w = w.empty("loss gradient of the head", "gradient", (vocab, n_embd), "float32") if with_grad else None
    full, rest = divmod(n_tokens, run.loss_chunk_size)
    for n_chunks, rows in ((full, run.loss_chunk_size), (1 if rest else 0, rest)):
        if n_chunks:
            with w.repeated(min(n_chunks, 2)):  # from the second full chunk on nothing new happens
                one_chunk(w, run, rows, with_grad)
    loss = w.empty("mean loss", "activation", (), "float32")
    del w_low, valid, total
    if grad_x is None or grad_w is None:
        return loss
    x_shape = x.shape

    def backward(grad: Tensor, saved: Saved) -> list[Tensor]:
        factor = w.empty("loss factor", "temporary", (), "float32")
        del factor
        grad_w = Tensor(saved[1], (vocab, n_embd), "float32")
        if run.param_dtype != "float32":
            grad_w = w.empty("loss gradient of the head cast", "temporary", (vocab, n_embd), run.param_dtype)
        return [Tensor(saved[0], x_shape, low), grad_w]

    saved = (grad_x.storage, grad_w.storage, factor.storage)
    loss.node = w.record("chunked loss", (x.node, weight.node), saved, backward)
    return loss


def one_chunk(w: Writer, run: RunConfig, rows: int, with_grad: bool) -> None:
    """A chunk's logits, their losses and gradient, and the two products."""
    low = run.dtype
    logits = w.empty("logits of a chunk", "logits", (rows, run.vocab_size), low)
    losses = (fused_chunk if run.compile else eager_chunk)(w, run, rows, with_grad)
    total = w.empty("sum of a chunk", "temporary", (), "float32")
    del total
    if with_grad:
        if low != "float32":
            product = w.empty("head gradient of a chunk", "temporary", (run.vocab_size, run.n_embd), low)
            del product
        part = w.empty("x gradient of a chunk", "temporary", (rows, run.n_embd), low)
        del part
    del losses, logits


def fused_chunk(w: Writer, run: RunConfig, rows: int, with_grad: bool) -> Tensor:
    """loss.fused_chunk as inductor plans it: three numbers a row, and of its logits nothing."""
    kept = [w.empty(f"chunk {label}", "temporary", (rows, 1), "float32") for label in ("largest", "sums")]
    if not with_grad:
        return kept[1]  # its place is taken by the losses
    return w.empty("chunk loss", "temporary", (rows, 1), "float32")


def eager_chunk(w: Writer, run: RunConfig, rows: int, with_grad: bool) -> Tensor:
    """loss.eager_chunk, line by line: the losses; an fp32 chunk is worked on in place."""
    low, cap = run.dtype, run.logit_softcap

    def column(label: str, dtype: str = "float32") -> Tensor:
        return w.empty(f"chunk {label}", "temporary", (rows, 1), dtype)

    def matrix(label: str) -> Tensor:
        return w.empty(f"logits of a chunk{label}", "logits", (rows, run.vocab_size), "float32")

    targets = column("targets", "int64")
    tanh = capped = None
    if cap:
        raised = matrix(" in float32") if low != "float32" else None
        divided = matrix(" divided")
        del raised
        tanh = matrix(" tanh")
        del divided
        capped = matrix(" capped")
    high = low != "float32" and not cap
    largest = two_step(column, "largest", low, high)
    target = two_step(column, "target", low, high)
    z = matrix(" shifted") if high else None
    sums = column("sums")
    log = column("log")
    plus = column("log plus largest")
    del log
    minus = column("loss")
    del plus
    losses = column("valid loss")
    del minus
    if with_grad:
        negative = column("negative sums")
        del negative
        share = column("valid share")
        del share
    del targets, largest, target, z, sums, tanh, capped
    return losses


def two_step(column: Callable[..., Tensor], label: str, low: str, high: bool) -> Tensor:
    """A column in the compute dtype, and its fp32 form, which stays."""
    if not high:
        return column(label)
    first = column(f"{label} low", low)
    return [column(label), first][0]
