"""The kernels of a block in a compiled backward, module by module: what each reads, writes and may overwrite.

Read off the schedules of torch 2.13, CPU lowering; what is allocated for them when follows (compiled_plan.py).
"""

from gptfit.config import RunConfig
from gptfit.memory.compiled_plan import FRESH, OUTPUT, TEMPORARY, Kernel, Slot
from gptfit.memory.tape import DTYPE_BYTES

Shape = tuple[int, ...]


class Listing:
    """Kernels of a graph; `shapes` has the shape and dtype of each buffer that is named."""

    def __init__(self, run: RunConfig) -> None:
        self.run = run
        self.low, self.stream = run.dtype, run.param_dtype
        self.copies = run.dtype != run.param_dtype
        self.kernels: list[Kernel] = []
        self.slots: dict[str, Slot] = {}
        self.shapes: dict[str, tuple[Shape, str]] = {}
        self.at = ""  # what the names of this block begin with

    # ---- words --------------------------------------------------------------------------------------------------

    def slot(self, name: str, shape: Shape, dtype: str, kind: str = TEMPORARY, whole: str = "") -> str:
        n_bytes = DTYPE_BYTES[dtype]
        for size in shape:
            n_bytes *= size
        self.slots[name] = Slot(n_bytes, dtype, kind, whole)
        self.shapes[name] = (shape, dtype)
        return name

    def rows(self, name: str, width: int, dtype: str = "", kind: str = TEMPORARY, whole: str = "") -> str:
        """A buffer with `width` numbers for each token."""
        run = self.run
        shape = (run.batch_size, run.block_size, width)
        return self.slot(self.at + name, shape, dtype or self.low, kind, self.at + whole if whole else "")

    def statistic(self, name: str, n_head: int = 1) -> str:
        return self.rows(name, n_head, "float32")

    def add(self, writes: list[str], reads: list[str], **settings: object) -> None:
        self.kernels.append(Kernel(tuple(writes), tuple(name for name in reads if name), **settings))  # type: ignore[arg-type]

    def call(self, write: str, *reads: str) -> str:
        """A matrix product, or another call of a library."""
        self.add([write], list(reads), extern=True)
        return write

    def cast(self, module: str, n_out: int, n_in: int) -> str:
        """The low-precision copy of a weight, which is made again."""
        if not self.copies:
            return ""
        name = self.slot(f"{self.at}{module}.weight as {self.low}", (n_out, n_in), self.low)
        self.add([name], [], parts=1 + self.run.bias)
        return name

    def gradient(self, parameter: str, shape: Shape, reads: list[str], extern: bool = False, group: str = "") -> None:
        """A parameter's gradient, handed out at the end."""
        name = self.slot(f"{self.at}{parameter}.grad", shape, self.stream, OUTPUT)
        self.add([name], reads, extern=extern, group=group)

    def weight_gradient(self, module: str, n_out: int, n_in: int, *reads: str) -> list[Kernel]:
        """The product, and its cast, which comes after the next kernel: it is returned."""
        if not self.copies:
            self.gradient(f"{module}.weight", (n_out, n_in), list(reads), extern=True)
            return []
        product = self.call(self.slot(f"{self.at}{module}.product", (n_out, n_in), self.low), *reads)
        self.gradient(f"{module}.weight", (n_out, n_in), [product])
        return [self.kernels.pop()]

    def both_gradients(self, module: str, n_out: int, n_in: int, x: str, dy: str, weight: str, dx: str) -> str:
        """Of a linear layer: the weight's, then its input's; with a bias the other way round (addmm)."""
        if self.run.bias:
            self.call(dx, dy, weight)
            late = self.weight_gradient(module, n_out, n_in, dy, x)
            self.gradient(f"{module}.bias", (n_out,), [dy])
            self.kernels[-1].parts = 1 + self.copies
        else:
            late = self.weight_gradient(module, n_out, n_in, dy, x)
            self.call(dx, dy, weight)
        self.kernels += late
        return dx


class Block(Listing):
    """Blocks, from the last to the first."""

    def norm_parameter_gradients(self, module: str, reads: list[str], group: str = "") -> None:
        self.gradient(f"{module}.weight", (self.run.n_embd,), reads, group=group)
        if self.run.bias and self.run.norm == "layernorm":
            self.gradient(f"{module}.bias", (self.run.n_embd,), reads, group=group)

    def statistics(self, name: str) -> list[str]:
        parts = ("mean", "rstd") if self.run.norm == "layernorm" else ("rstd",)
        return [self.statistic(f"{name} {part}") for part in parts]

    def stored(self, first: bool) -> bool:
        """Whether norms store their normalised input: where it is the sum of two embeddings, which is not stored."""
        return first and self.run.norm == "layernorm" and self.run.position == "learned" and not self.low_stream

    @property
    def stores_between(self) -> bool:
        """The same of the second norm alone, whose input is a sum with those."""
        return self.run.norm == "layernorm" and self.run.position == "learned" and self.low_stream

    @property
    def low_stream(self) -> bool:
        return self.run.param_dtype == self.run.dtype != "float32"

    def norm_again(self, name: str, reads: list[str], stored: bool, extra: list[str]) -> tuple[list[str], str]:
        """What backward of the norm reads, and the norm's output."""
        c = self.run.n_embd
        output = self.rows(name, c)
        statistics = self.statistics(name)
        if not stored:
            self.add([*statistics, *extra, output], reads, parts=2 * len(statistics) + len(extra))
            return [*reads, *statistics], output
        normalised = self.rows(f"{name} normalised", c, "float32")
        self.add([statistics[0]], reads)
        self.add([*statistics[1:], *extra, normalised], [*reads, statistics[0]], parts=3)
        self.add([output], [normalised])
        return [*statistics[1:], normalised], output

    def heads_again(self, qkv: str) -> tuple[list[str], dict[str, tuple[str, str]]]:
        """What attention reads, and what the backward of its changes to q and k reads."""
        run, c = self.run, self.run.n_embd
        kv = run.n_kv_head * run.head_size
        scales: list[str] = []
        if run.qk_norm:
            scales = [self.statistic("attn.q rstd", run.n_head), self.statistic("attn.k rstd", run.n_kv_head)]
            for scale in scales:
                self.add([scale], [qkv])
        parts: list[str] = [qkv]
        if run.position == "rope":
            found = []
            for part, width in (("q", c), ("k", kv)):
                found.append(self.rows(f"attn.{part} rotated", width))
                for half in ("low", "high"):
                    found.append(self.rows(f"attn.{part} {half}", width // 2, whole=f"attn.{part} rotated"))
            q, *q_halves = found[:3]
            k, *k_halves = found[3:]
            self.add([*q_halves, *k_halves], [qkv, *scales], parts=4, group=f"{self.at}rotation")
            self.add([q], q_halves)
            self.add([k], k_halves)
            parts = [q, k, qkv]
        elif run.qk_norm:
            q, k = self.rows("attn.q normed", c), self.rows("attn.k normed", kv)
            self.add([q], [qkv, scales[0]])
            self.add([k], [qkv, scales[1]])
            parts = [q, k, qkv]
        # In fp32 the normalised q and k are what is kept anyway.
        normed = self.low == "float32" and run.qk_norm and run.position != "rope"
        own = parts[:2] if normed else [qkv, qkv]
        made_of = dict(zip("qk", zip(own, scales, strict=True), strict=True)) if scales else {}
        if run.n_kv_head != run.n_head and self.low == "float32" and run.attention == "flash":
            repeated = [self.rows(f"attn.{part} repeated", c) for part in ("k", "v")]
            self.add(repeated, parts[1:] or parts)
            parts = [parts[0], *repeated]
        return parts, made_of

    def attention_again(self, ln_1: str, weight: str) -> tuple[list[str], dict[str, tuple[str, str]], str]:
        """What attention's backward reads; what that of its inputs does; and its output, as the projection reads it."""
        run, c = self.run, self.run.n_embd
        width = c + 2 * run.n_kv_head * run.head_size
        qkv = self.call(self.rows("attn.c_attn", width), ln_1, weight)
        if run.attention == "math":
            return self.written_out(qkv)
        parts, made_of = self.heads_again(qkv)
        y = self.rows("attn.y", c, kind=FRESH)
        length = run.block_size if self.low != "float32" else -(-run.block_size // 32) * 32
        sums = self.slot(f"{self.at}attn.y log-sum-exp", (run.batch_size, run.n_head, length), "float32", FRESH)
        self.add([y, sums], parts, extern=True, parts=5)
        joined = y
        by_head = run.qk_norm or run.position == "rope"  # it lies as q does
        if by_head and self.low != "float32" and run.n_head > 1:
            joined = self.rows("attn.y joined", c)
            self.add([joined], [y])
        return [*parts, y, sums], made_of, joined

    def scores(self, name: str, dtype: str = "") -> str:
        run = self.run
        shape = (run.batch_size, run.n_head, run.block_size, run.block_size)
        return self.slot(f"{self.at}attn.y {name}", shape, dtype or self.low)

    def written_out(self, qkv: str) -> tuple[list[str], dict[str, tuple[str, str]], str]:
        """Attention written out: what `scores_backward` reads, in its order."""
        run, c = self.run, self.run.n_embd
        parts, made_of = self.heads_again(qkv)
        sources = [*parts[:2], qkv] if len(parts) == 3 else [qkv] * 3
        q = self.copied("q scaled", sources[0])
        k = self.copied("k", sources[1]) if run.n_head > 1 else sources[1]
        scores = self.call(self.scores("scores"), q, k)
        maxima, sums = self.statistic("attn.y maximum", run.n_head), self.statistic("attn.y sum", run.n_head)
        self.add([maxima], [scores], group=f"{self.at}maximum")
        self.add([sums], [scores, maxima], group=f"{self.at}sum")
        raised = p = self.scores("probabilities in float32", "float32")
        places = {raised: (scores,)} if self.low == "float32" else {}
        self.add([raised], [scores, maxima, sums], places=places, group=f"{self.at}softmax")
        noise: list[str] = []
        if run.dropout:
            noise, p = [self.scores("noise", "float32")], self.scores("probabilities")
            self.add([*noise, p], [raised], parts=2)
        elif self.low != "float32":
            p = self.scores("probabilities")
            self.add([p], [raised], group=f"{self.at}softmax")
        v = self.copied("v", sources[2]) if run.n_head > 1 else sources[2]
        y = self.call(self.rows("attn.y", c), p, v)
        joined = y
        if run.n_head > 1:
            joined = self.rows("attn.y joined", c)
            self.add([joined], [y])
        return [q, k, v, p, raised, *noise], made_of, joined

    def copied(self, part: str, source: str) -> str:
        copy = self.rows(f"attn.{part} copy", self.run.n_embd)
        self.add([copy], [source])
        return copy

    def scores_backward(self, dy: str, reads: list[str]) -> list[str]:
        """Gradients of q, k and v where attention is written out."""
        run, c = self.run, self.run.n_embd
        q, k, v, p, *raised = reads
        if run.n_head > 1:
            by_head = self.rows("attn.y gradient by head", c)
            self.add([by_head], [dy])
            dy = by_head
        d_v = self.call(self.rows("attn.v gradient", c), p, dy)
        d_p = self.call(self.scores("probabilities gradient"), dy, v)
        row = self.statistic("attn.y row", run.n_head)
        self.add([row], [*raised, d_p])
        d_s = self.scores("scores gradient")
        self.add([d_s], [*raised, d_p, row], places={d_s: (*raised[:1], d_p)}, group=f"{self.at}masked")
        d_k = self.call(self.rows("attn.k gradient", c), d_s, q)
        d_q = self.call(self.rows("attn.q gradient", c), d_s, k)
        return [d_q, d_k, d_v]

    def attention_backward(self, dy: str, reads: list[str], made_of: dict[str, tuple[str, str]]) -> str:
        run, c = self.run, self.run.n_embd
        kv = run.n_kv_head * run.head_size
        repeated = run.n_kv_head != run.n_head and self.low == "float32"
        widths = {"q": c, "k": c if repeated else kv, "v": c if repeated else kv}
        if run.attention == "math":
            grads = self.scores_backward(dy, reads)
        else:
            grads = [self.rows(f"attn.{part} gradient", width, kind=FRESH) for part, width in widths.items()]
        if (
            run.attention == "flash" and run.qk_norm and run.position != "rope" and run.n_head > 1
        ):  # laid out by token, as the kernel wants them
            for i in (0, 1, *([reads.index(f"{self.at}attn.y")] if self.low != "float32" else [])):
                _, dtype = self.shapes[reads[i]]
                copy = self.rows(reads[i].removeprefix(self.at) + " copy", c if i != 1 else kv, dtype)
                self.add([copy], [reads[i]])
                reads = [*reads[:i], copy, *reads[i + 1 :]]
        if run.attention == "flash":
            self.add(grads, [dy, *reads], extern=True, parts=4)
        d_qkv = self.rows("attn.c_attn gradient", c + 2 * kv)
        pieces = [
            self.rows(f"attn.{part} piece", width, whole="attn.c_attn gradient")
            for part, width in (("q", c), ("k", kv), ("v", kv))
        ]
        before = dict(zip("qkv", grads, strict=True))
        if run.position == "rope":
            halves = [
                self.rows(f"attn.{part} gradient {half}", width // 2, whole=f"attn.{part} turned")
                for part, width in (("q", c), ("k", kv))
                for half in ("low", "high")
            ]
            turned = [self.rows(f"attn.{part} turned", width) for part, width in (("q", c), ("k", kv))]
            self.add(halves, [before["q"], before["k"]], parts=4, group=f"{self.at}turning")
            for name, parts in zip(turned[::-1], (halves[2:], halves[:2]), strict=True):
                self.add([name], parts)
            before |= dict(zip("qk", turned, strict=True))
        for part, piece in zip("qkv", pieces, strict=True):
            reads = [before[part]]
            if run.qk_norm and part != "v":
                n_head = run.n_head if part == "q" else run.n_kv_head
                row = self.statistic(f"attn.{part} row", n_head)
                self.add([row], [before[part], *made_of[part]])
                reads += [row, *made_of[part]]
            self.add([piece], reads, extern=not run.qk_norm and part != "v")
        self.add([d_qkv], pieces)
        return d_qkv

    # ---- the MLP ------------------------------------------------------------------------------------------------

    def mlp_again(self, ln_2: str, top: bool) -> tuple[list[str], str, dict[str, str]]:
        """The activation's inputs, the activation, and the copies of the weights."""
        run, c, f = self.run, self.run.n_embd, self.run.n_hidden
        weights, made = {}, []
        for module in ("mlp.c_gate", "mlp.c_fc") if run.mlp == "swiglu" else ("mlp.c_fc",):
            weights[module] = self.cast(module, f, c)
            made.append(self.call(self.rows(module, f), ln_2, weights[module]))
        h = self.rows("mlp.h", f)
        self.add([h], made, group="" if top else f"{self.at}activation")
        return made, h, weights

    def mlp_backward(
        self, made: list[str], h: str, ln_2: str, weights: dict[str, str], dx: str, top: bool
    ) -> list[str]:
        """Returns the gradients of its input, which are summed where they are read."""
        run, c, f = self.run, self.run.n_embd, self.run.n_hidden
        again = any(kernel.group == f"{self.at}activation" for kernel in self.kernels)
        group = f"{self.at}activation" if again else ""
        dh = self.rows("mlp.h gradient", f)
        weight = weights.get("mlp.c_proj") or ""
        self.both_gradients("mlp.c_proj", c, f, h, dx, weight, dh)
        modules = ["mlp.c_fc", "mlp.c_gate"] if run.mlp == "swiglu" else ["mlp.c_fc"]
        grads = [self.rows(f"{module} gradient", f) for module in modules]
        places = {grads[0]: (*made, dh)}
        if run.mlp == "swiglu":  # the gate's gradient lies where the gated part lay, which nothing else reads then
            places = {grads[1]: (made[1],)} if not group else {}
        self.add(grads, [*made, dh], places=places, group=group, parts=len(grads))
        return [
            self.both_gradients(
                module, f, c, ln_2, grad, weights.get(module, ""), self.rows(f"{module} input gradient", c)
            )
            for module, grad in zip(modules, grads, strict=True)
        ]
