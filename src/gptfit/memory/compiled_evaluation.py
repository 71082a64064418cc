"""Twins of a compiled evaluation: inductor's graph of a forward without gradients, kernel by kernel.

Nothing is kept, so what is alive is decided by the order of the kernels (compiled_order.py) and by who takes whose
place (compiled_plan.py). A weight is cast to low precision just before its matmul. The residual stream is no tensor:
each norm reads what was added up so far, until it would read more than four tensors (inductor's
realize_reads_threshold): then the sum is written down. Read off the wrappers of torch 2.13, CPU lowering.
"""

from gptfit.config import RunConfig
from gptfit.memory.autograd import Shape, Tensor
from gptfit.memory.compiled import CompiledNanoGPT, CompiledOurs
from gptfit.memory.compiled_forward import CompiledForward
from gptfit.memory.compiled_kernels import Listing
from gptfit.memory.compiled_order import reordered
from gptfit.memory.compiled_plan import FRESH, LIBRARY, OUTPUT, Plan
from gptfit.memory.ops import use
from gptfit.memory.ours import chunked_cross_entropy
from gptfit.memory.tape import Event, make_buffer

MOST_READS = 4  # realize_reads_threshold
LONG = 8  # blocks from which on two more change nothing


class Evaluation(Listing):
    """The kernels of one forward, in the order in which the code runs."""

    def __init__(self, run: RunConfig) -> None:
        super().__init__(run)
        self.sum: list[str] = []  # what the residual stream is the sum of, parameters and token ids left out
        self.n_read = 3 if run.position == "learned" else 2  # token ids and the rows of the embeddings

    def linear(self, module: str, n_in: int, n_out: int, x: str, bias: bool = False) -> str:
        copies = [self.low_copy(f"{module}.weight", (n_out, n_in))]
        copies += [self.low_copy(f"{module}.bias", (n_out,))] if bias else []
        return self.call(self.rows(module, n_out), x, *copies)

    def low_copy(self, parameter: str, shape: Shape) -> str:
        if not self.copies:
            return ""
        name = self.slot(f"{self.at}{parameter} as {self.low}", shape, self.low)
        self.add([name], [])
        return name

    def norm(self, name: str) -> str:
        run = self.run
        if self.n_read > MOST_READS:
            total = self.rows(f"stream {name}", run.n_embd, run.param_dtype)
            self.add([total], self.sum, places={total: tuple(self.sum)})
            self.sum, self.n_read = [total], 1
        parts = ("mean", "rstd") if run.norm == "layernorm" else ("rstd",)
        statistics = [self.statistic(f"{name} {part}") for part in parts]
        output = self.rows(name, run.n_embd)
        self.add([*statistics, output], self.sum, places={output: tuple(self.sum)})
        return output

    def join(self, name: str) -> None:
        self.sum.append(name)
        self.n_read += 1

    # ---- attention ----------------------------------------------------------------------------------------------

    def heads(self, qkv: str) -> dict[str, list[str]]:
        """What queries, keys and values are read from: the projection, or what is made of it. A norm alone is made as
        part of a copy, where there is one."""
        run = self.run
        widths = {"q": run.n_embd, "k": run.n_kv_head * run.head_size}
        found = {part: [qkv] for part in "qkv"}
        for part, n_head in (("q", run.n_head), ("k", run.n_kv_head)) if run.qk_norm else ():
            rows = self.statistic(f"attn.{part} rstd", n_head)
            if run.position == "rope" or run.attention == "math" or (part == "k" and self.repeats):
                self.add([rows], [qkv])
                found[part] = [qkv, rows]
            else:
                normed = self.rows(f"attn.{part} normed", widths[part])
                self.add([rows, normed], [qkv])
                found[part] = [normed]
        if run.position == "rope":
            for part, width in widths.items():
                rotated = self.rows(f"attn.{part} rotated", width)
                halves = [
                    self.rows(f"attn.{part} {half}", width // 2, whole=f"attn.{part} rotated")
                    for half in ("low", "high")
                ]
                self.add(halves, found[part])
                self.add([rotated], halves)
                found[part] = [rotated]
        return found

    @property
    def repeats(self) -> bool:
        """Whether keys and values are copied for each query head: the fp32 kernel knows no groups (model.py)."""
        run = self.run
        return run.n_kv_head != run.n_head and (run.attention == "math" or self.low == "float32")

    def copied(self, part: str, sources: list[str]) -> list[str]:
        copy = self.rows(f"attn.{part} copy", self.run.n_embd)
        self.add([copy], sources)
        return [copy]

    def attention(self, x: str) -> str:
        run, c = self.run, self.run.n_embd
        width = c + 2 * run.n_kv_head * run.head_size
        parts = self.heads(self.linear("attn.c_attn", c, width, x, bias=run.bias))
        if run.attention == "math":
            y = self.scores(parts)
        else:
            for part in "kv" if self.repeats else "":
                parts[part] = self.copied(part, parts[part])
            y = self.rows("attn.y", c, kind=LIBRARY)
            beside = [self.unseen(f"attn.y random {part}", (), "int64") for part in ("seed", "offset")]
            if self.low != "float32":
                rows = (run.batch_size, run.n_head, run.block_size)
                beside.append(self.unseen("attn.y log-sum-exp", rows, "float32"))
            self.add([*beside, y], [*parts["q"], *parts["k"], *parts["v"]], extern=True)
            if run.position == "rope" and self.low != "float32" and run.n_head > 1:  # it lies by head, as q does
                (y,) = self.copied("y", [y])
        return self.linear("attn.c_proj", c, c, y, bias=run.bias)

    def unseen(self, name: str, shape: Shape, dtype: str) -> str:
        """What a library makes and nobody reads: inductor does not know of it."""
        name = self.slot(self.at + name, shape, dtype, FRESH)
        self.slots[name] = self.slots[name]._replace(n_bytes=0)
        return name

    def scores(self, parts: dict[str, list[str]]) -> str:
        """Attention written out: the scores, softmax of them in fp32 and in low precision."""
        run = self.run
        shape = (run.batch_size, run.n_head, run.block_size, run.block_size)

        def matrix(label: str, dtype: str, over: str = "", *more: str) -> str:
            made = self.slot(f"{self.at}attn.y {label}", shape, dtype)
            if over:
                row = self.statistic(f"attn.y {label} row", run.n_head)
                self.add([row, made], [over], places={made: (over,)})
            return made

        apart = run.batch_size > 1 and run.n_head > 1  # heads of a view are no batch of matrices then
        q, k, v = self.copied("q", parts["q"]), parts["k"], parts["v"]
        if self.repeats or (run.position != "rope" and (apart or run.qk_norm)):
            k = self.copied("k", k)
        scores = self.call(matrix("scores", self.low), *q, *k)
        probabilities = matrix("probabilities", self.low, matrix("exponentials", "float32", scores))
        if self.repeats or apart:
            v = self.copied("v", v)
        y = self.call(self.rows("attn.y", run.n_embd), probabilities, *v)
        return self.copied("y", [y])[0] if run.n_head > 1 else y

    # ---- all of it ----------------------------------------------------------------------------------------------

    def mlp(self, x: str) -> str:
        run, c, hidden = self.run, self.run.n_embd, self.run.n_hidden
        modules = ("mlp.c_gate", "mlp.c_fc") if run.mlp == "swiglu" else ("mlp.c_fc",)
        inner = [self.linear(module, c, hidden, x, bias=run.bias) for module in modules]
        h = self.rows("mlp.h", hidden)
        self.add([h], inner, places={h: tuple(inner)})
        return self.linear("mlp.c_proj", hidden, c, h, bias=run.bias)

    def blocks(self) -> str:
        """Embedding, blocks and final norm, whose output is named."""
        n_layer = self.run.n_layer
        for block in range(n_layer if n_layer <= LONG else LONG + n_layer % 2):
            self.at = f"h.{block}."
            self.join(self.attention(self.norm("ln_1")))
            self.join(self.mlp(self.norm("ln_2")))
        self.at = ""
        return self.norm("ln_f")

    def logits_and_loss(self, x: str) -> tuple[str, str]:
        run = self.run
        logits = head = self.linear("lm_head", run.n_embd, run.vocab_size, x)
        if run.logit_softcap:
            logits = self.rows("logits capped", run.vocab_size, "float32")
            self.add([logits], [head], places={logits: (head,)})
        maximum, total, log = (self.statistic(f"loss {part}") for part in ("maximum", "sum", "log-sum"))
        self.add([maximum, total], [logits])
        losses, counted = self.slot("losses", (), "float32"), self.slot("targets counted", (), "int64")
        self.add([log, losses, counted], [total, logits, maximum], places={log: (total,)})
        mean = self.slot("mean loss", (), "float32")
        self.add([mean], [losses, counted], places={mean: (losses,)})
        return head, mean

    def write(self, program: CompiledForward, *outputs: str) -> list[Tensor]:
        """Writes what the kernels allocate and free; the outputs are alive."""
        w = program.w
        w.mark("compiled forward", "evaluation")
        for name in outputs:
            self.slots[name] = self.slots[name]._replace(kind=OUTPUT)
        plan = Plan(reordered(self.kernels, self.slots, {}, 0, 0), self.slots)
        buffers = {
            name: make_buffer(name, "logits" if name.startswith(("lm_head", "logits")) else "activation", *shape)
            for name, shape in self.shapes.items()
        }
        w.items += [Event(step.sign, buffers[step.name]) for step in plan.steps if step is not None]
        return [Tensor(w.take_over(buffers[plan.storage[name]], None).storage, *self.shapes[name]) for name in outputs]


class EvaluatedNanoGPT(CompiledNanoGPT):
    """nanoGPT compiled: the model returns logits and loss."""

    def forward(self, idx: Tensor, targets: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        if self.w.grad_enabled:
            return super().forward(idx, targets)
        listing = Evaluation(self.run)
        logits, loss = listing.write(self, *listing.logits_and_loss(listing.blocks()))
        return loss, [logits]


class EvaluatedOurs(CompiledOurs):
    """gptfit's model compiled: with the chunked loss up to the final norm, with the full loss all of it."""

    def forward(self, idx: Tensor, targets: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        w, run = self.w, self.run
        if w.grad_enabled:
            return super().forward(idx, targets)
        listing = Evaluation(run)
        x = listing.blocks()
        if run.loss == "full":
            return listing.write(self, listing.logits_and_loss(x)[1])[0], []
        made = listing.write(self, x)
        w.mark("loss", "evaluation")
        name = "wte.weight" if run.tie_embeddings else "lm_head.weight"
        weight = use(w, w.parameter(name, (run.vocab_size, run.n_embd), run.param_dtype))
        return chunked_cross_entropy(w, run, made.pop(), weight), []
