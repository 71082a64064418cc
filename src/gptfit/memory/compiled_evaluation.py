"""Twins of a compiled evaluation: inductor's graph of a forward without gradients, kernel by kernel.

Nothing is kept, so what is alive is decided by the order of the kernels and by who takes whose place
(kernel_order.py). A weight is cast to low precision just before its matmul. The residual stream is no tensor: each norm
reads what was added up so far, until it would read more than four tensors (inductor's realize_reads_threshold): then
the sum is written down. Read off the wrappers of torch 2.13, CPU lowering.
"""

from typing import Any

from gptfit.config import RunConfig
from gptfit.memory.autograd import Shape, Tensor
from gptfit.memory.compiled import CompiledNanoGPT, CompiledOurs
from gptfit.memory.compiled_forward import CompiledForward
from gptfit.memory.kernel_order import Kernel, Made, in_order, planned
from gptfit.memory.ops import use
from gptfit.memory.ours import chunked_cross_entropy

MOST_READS = 4  # realize_reads_threshold
LONG = 8  # blocks from which on two more change nothing


class Kernels:
    """The kernels of one forward, in the order in which the code runs."""

    def __init__(self, run: RunConfig) -> None:
        self.run = run
        self.low = run.dtype
        self.tokens = (run.batch_size, run.block_size)
        self.found: list[Kernel] = []
        self.stream: list[str] = []  # what the residual stream is the sum of, parameters and token ids left out
        self.n_read = 3 if run.position == "learned" else 2  # token ids and the rows of the embeddings
        self.block = 0

    def name(self, label: str) -> str:
        return f"h.{self.block}.{label}"

    def add(self, *makes: Made, reads: tuple[str, ...] = (), call: bool = False) -> str:
        self.found.append(Kernel(makes, reads, call))
        return makes[-1].name

    def tensor(self, name: str, *last: int, dtype: str = "", **more: Any) -> Made:
        return Made(name, (*self.tokens, *last), dtype or self.low, **more)

    def copy(self, name: str, *shape: int) -> tuple[str, ...]:
        """A parameter in low precision, if that is another one."""
        if self.low == self.run.param_dtype:
            return ()
        return (self.add(Made(f"{name} as {self.low}", shape, self.low)),)

    def linear(self, name: str, n_in: int, n_out: int, *reads: str, bias: bool = False, category: str = "") -> str:
        copies = self.copy(f"{name}.weight", n_out, n_in) + (self.copy(f"{name}.bias", n_out) if bias else ())
        made = self.tensor(name, n_out, category=category or "activation")
        return self.add(made, reads=(*reads, *copies), call=True)

    def norm(self, name: str) -> str:
        run = self.run
        if self.n_read > MOST_READS:
            reads = tuple(self.stream)
            total = self.tensor(f"stream {name}", run.n_embd, dtype=run.param_dtype, over=reads)
            self.stream, self.n_read = [self.add(total, reads=reads)], 1
        parts = ("mean", "rstd") if run.norm == "layernorm" else ("rstd",)
        statistics = (self.tensor(f"{name} {part}", 1, dtype="float32") for part in parts)
        reads = tuple(self.stream)
        return self.add(*statistics, self.tensor(name, run.n_embd, over=reads), reads=reads)

    def join(self, name: str) -> None:
        self.stream.append(name)
        self.n_read += 1

    # ---- attention ----------------------------------------------------------------------------------------------

    def heads(self, qkv: str) -> tuple[tuple[str, ...], ...]:
        """What queries, keys and values are read from: the projection, or what is made of it. A norm alone is made as
        part of a copy, where there is one."""
        run = self.run
        widths = {"q": run.n_embd, "k": run.n_kv_head * run.head_size}
        found: dict[str, tuple[str, ...]] = dict.fromkeys("qkv", (qkv,))
        for part, n_head in (("q", run.n_head), ("k", run.n_kv_head)) if run.qk_norm else ():
            name = self.name(f"attn.{part}")
            rows = self.tensor(f"{name} rstd", n_head, dtype="float32")
            if run.position == "rope" or run.attention == "math" or (part == "k" and self.repeats):
                found[part] = (qkv, self.add(rows, reads=(qkv,)))
            else:
                found[part] = (self.add(rows, self.tensor(f"{name} normed", widths[part]), reads=(qkv,)),)
        if run.position == "rope":
            for part, width in widths.items():
                name = self.name(f"attn.{part}")
                halves = [self.tensor(f"{name} half {i}", width // 2, part=True) for i in range(2)]
                self.add(*halves, reads=found[part])
                rotated = self.tensor(f"{name} rotated", width)
                found[part] = (self.add(rotated, reads=tuple(half.name for half in halves)),)
        return found["q"], found["k"], found["v"]

    @property
    def repeats(self) -> bool:
        """Whether keys and values are copied for each query head: the fp32 kernel knows no groups (model.py)."""
        run = self.run
        return run.n_kv_head != run.n_head and (run.attention == "math" or self.low == "float32")

    def copied(self, part: str, *sources: str) -> tuple[str, ...]:
        return (self.add(self.tensor(self.name(f"attn.{part} copy"), self.run.n_embd), reads=sources),)

    def attention(self, x: str) -> str:
        run, c = self.run, self.run.n_embd
        width = c + 2 * run.n_kv_head * run.head_size
        q, k, v = self.heads(self.linear(self.name("attn.c_attn"), c, width, x, bias=run.bias))
        if run.attention == "math":
            y = self.scores(q, k, v)
        else:
            if self.repeats:
                k, v = self.copied("k", *k), self.copied("v", *v)
            y = self.name("attn.y")
            extra = [Made(f"{y} random {part}", (), "int64", unseen=True) for part in ("seed", "offset")]
            if self.low != "float32":
                rows = (run.batch_size, run.n_head, run.block_size)
                extra.append(Made(f"{y} log-sum-exp", rows, "float32", unseen=True))
            self.add(*extra, self.tensor(y, c, fresh=True), reads=(*q, *k, *v), call=True)
            if run.position == "rope" and self.low != "float32" and run.n_head > 1:  # it lies by head, as q does
                (y,) = self.copied("y", y)
        return self.linear(self.name("attn.c_proj"), c, c, y, bias=run.bias)

    def scores(self, q: tuple[str, ...], k: tuple[str, ...], v: tuple[str, ...]) -> str:
        """Attention written out: the scores, softmax of them in fp32 and in low precision."""
        run = self.run
        y, shape = self.name("attn.y"), (run.batch_size, run.n_head, run.block_size, run.block_size)

        def matrix(label: str, dtype: str, over: str) -> tuple[Made, Made]:
            row = Made(f"{y} {label} row", (*shape[:3], 1), "float32")
            return row, Made(f"{y} {label}", shape, dtype, over=(over,))

        apart = run.batch_size > 1 and run.n_head > 1  # heads of a view are no batch of matrices then
        q = self.copied("q", *q)
        if self.repeats or (run.position != "rope" and (apart or run.qk_norm)):
            k = self.copied("k", *k)
        scores = self.add(Made(f"{y} scores", shape, self.low), reads=(*q, *k), call=True)
        high = self.add(*matrix("exponentials", "float32", scores), reads=(scores,))
        low = self.add(*matrix("probabilities", self.low, high), reads=(high,))
        if self.repeats or apart:
            v = self.copied("v", *v)
        product = self.add(self.tensor(y, run.n_embd), reads=(low, *v), call=True)
        return self.copied("y", product)[0] if run.n_head > 1 else product

    # ---- all of it ----------------------------------------------------------------------------------------------

    def mlp(self, x: str) -> str:
        run, c, hidden = self.run, self.run.n_embd, self.run.n_hidden
        inner = [self.linear(self.name("mlp.c_gate"), c, hidden, x, bias=run.bias)] if run.mlp == "swiglu" else []
        inner.append(self.linear(self.name("mlp.c_fc"), c, hidden, x, bias=run.bias))
        h = self.add(self.tensor(self.name("mlp.h"), hidden, over=tuple(inner)), reads=tuple(inner))
        return self.linear(self.name("mlp.c_proj"), hidden, c, h, bias=run.bias)

    def blocks(self) -> str:
        """Embedding, blocks and final norm, whose output is named."""
        n_layer = self.run.n_layer
        for self.block in range(n_layer if n_layer <= LONG else LONG + n_layer % 2):
            self.join(self.attention(self.norm(self.name("ln_1"))))
            self.join(self.mlp(self.norm(self.name("ln_2"))))
        return self.norm("ln_f")

    def logits_and_loss(self, x: str) -> tuple[str, str]:
        run = self.run
        logits = head = self.linear("lm_head", run.n_embd, run.vocab_size, x, category="logits")
        if run.logit_softcap:
            capped = self.tensor("logits capped", run.vocab_size, dtype="float32", category="logits", over=(logits,))
            logits = self.add(capped, reads=(logits,))
        maximum, total = (self.tensor(f"loss {part}", 1, dtype="float32") for part in ("maximum", "sum"))
        self.add(maximum, total, reads=(logits,))
        log = self.tensor("loss log-sum", 1, dtype="float32", over=(total.name,))
        scalars = (Made("losses", (), "float32"), Made("targets counted", (), "int64"))
        self.add(log, *scalars, reads=(total.name, logits, maximum.name))
        mean = Made("mean loss", (), "float32", over=("losses",))
        return head, self.add(mean, reads=("losses", "targets counted"))


def written(program: CompiledForward, kernels: Kernels, *outputs: str) -> list[Tensor]:
    """Writes what the kernels allocate and free; the outputs are alive."""
    w, names = program.w, frozenset(outputs)
    w.mark("compiled forward", "evaluation")
    items, buffers = planned(in_order(kernels.found, names), names)
    w.items += items
    shapes: dict[str, tuple[Shape, str]] = {
        made.name: (made.shape, made.dtype) for kernel in kernels.found for made in kernel.makes
    }
    return [Tensor(w.take_over(buffers[name], None).storage, *shapes[name]) for name in outputs]


class EvaluatedNanoGPT(CompiledNanoGPT):
    """nanoGPT compiled: the model returns logits and loss."""

    def forward(self, idx: Tensor, targets: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        if self.w.grad_enabled:
            return super().forward(idx, targets)
        kernels = Kernels(self.run)
        logits, loss = written(self, kernels, *kernels.logits_and_loss(kernels.blocks()))
        return loss, [logits]


class EvaluatedOurs(CompiledOurs):
    """gptfit's model compiled: with the chunked loss up to the final norm, with the full loss all of it."""

    def forward(self, idx: Tensor, targets: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        w, run = self.w, self.run
        if w.grad_enabled:
            return super().forward(idx, targets)
        kernels = Kernels(run)
        x = kernels.blocks()
        if run.loss == "full":
            return written(self, kernels, kernels.logits_and_loss(x)[1])[0], []
        made = written(self, kernels, x)
        w.mark("loss", "evaluation")
        name = "wte.weight" if run.tie_embeddings else "lm_head.weight"
        weight = use(w, w.parameter(name, (run.vocab_size, run.n_embd), run.param_dtype))
        return chunked_cross_entropy(w, run, made.pop(), weight), []
