"""The kernels of a backward that makes again what is cheap: what the partitioner keeps under a memory budget below 1.

In the order in which autograd runs, as AOTAutograd hands it to inductor (torch/_functorch/partitioners.py,
reordering_to_mimic_autograd_engine): what is made again stands right before its first use. The residual stream is
summed again from the embedding and what was added to it; a sum that is used twice is written down where it would read
more than four tensors (torch/_inductor/ir.py, should_realize_on_reuse), and so is a norm's normalised input.
"""

from math import prod

from gptfit.memory.compiled_kernels import Block
from gptfit.memory.compiled_plan import GIVEN, OUTPUT, TEMPORARY, length_in_lines

EMBEDDING = "end/wte.weight.grad"
MOST_READS = 4  # torch/_inductor/config.py, realize_reads_threshold

# What is fused with its like, by the ends of its groups' names: sums of the stream and what norms make of them, and
# gradients of norms' parameters.
STREAM, OF_NORM = "/stream", "/of norm"

EMBEDDING = "end/wte.weight.grad"
MOST_READS = 4  # torch/_inductor/config.py, realize_reads_threshold

# What is fused with its like, by the ends of its groups' names: sums of the stream, gradients of norms' parameters; and
# sums with rows of positions, which are read again for each sequence and so have loops of their own.
STREAM, OF_NORM = "/stream", "/of norm"

Names = dict[str, str]  # of buffers that forward kept of a block, by what they are


class Lean(Block):
    """The blocks from the last to the first; `stream` holds what the input of each norm is the sum of."""

    def __init__(self, *given: object) -> None:
        super().__init__(*given)  # type: ignore[arg-type]
        self.unpadded: dict[str, tuple[tuple[int, ...], str]] = {}
        self.stream_reads: list[list[str]] = []
        self.kept_here: Names = {}  # of the block that is being written
        self.positions = ""  # the rows that are added to the embedding

    def low_gradient(self, dx: str, name: str, noise: list[str]) -> str:
        """The stream's gradient as the matrix products read it."""
        if not self.copies and not self.run.dropout:
            return dx
        low = self.rows(name, self.run.n_embd)
        self.add([low], [dx, *noise])
        return low

    def slot(self, name: str, shape: tuple[int, ...], dtype: str, kind: str = TEMPORARY, whole: str = "") -> str:
        """Of what kernels write, long strides are whole lines."""
        if kind != TEMPORARY or len(shape) < 3 or name.startswith("end/"):
            return super().slot(name, shape, dtype, kind, whole)
        length = length_in_lines(shape, dtype)
        super().slot(name, shape, dtype, kind, whole)
        if length != prod(shape):  # which no one counts, but whose place can be taken by the like alone
            self.unpadded[name] = shape, dtype
            self.slots[name] = self.slots[name]._replace(dtype=f"{dtype} in lines")
            self.shapes[name] = (length,), dtype
        return name

    def call(self, write: str, *reads: str) -> str:
        """What a library writes is padded nowhere."""
        if write in self.unpadded:
            super().slot(write, *self.unpadded[write])
        return super().call(write, *reads)

    # ---- the residual stream ------------------------------------------------------------------------------------

    def sums(self, start: list[str], blocks: list[Names]) -> None:
        """The input of every norm, from the first to the last."""
        dropped = ("attn mask", "mlp mask") if self.run.dropout else ("", "")
        reads = start
        self.stream_reads = []
        places = [f"{i}+0/" for i in range(len(blocks))]
        for place, kept in zip(places, blocks, strict=True):
            for module, mask, norm in (("", "", "ln_1"), ("attn.c_proj", dropped[0], "ln_2")):
                reads = self.joined(place, norm, reads, [kept[n] for n in (module, mask) if n])
                self.stream_reads.append(reads)
            reads = list(dict.fromkeys([*reads, *(kept[n] for n in ("mlp.c_proj", dropped[1]) if n)]))
        self.stream_reads.append(reads)

    def joined(self, place: str, norm: str, reads: list[str], added: list[str]) -> list[str]:
        """What the stream is read from: written down if it would be too much."""
        reads = list(dict.fromkeys([*reads, *added]))
        if len(reads) <= MOST_READS:
            return reads
        self.at = place
        return [self.written(f"x at {norm}", reads, self.stream)]

    def written(self, name: str, reads: list[str], dtype: str) -> str:
        made = self.rows(name, self.run.n_embd, dtype)
        self.add([made], reads, places={made: tuple(reads)}, group=f"{made}{STREAM}")
        return made

    # ---- norms --------------------------------------------------------------------------------------------------

    def normalised(self, name: str, reads: list[str], statistics: list[str]) -> list[str]:
        """What the normalised input is read from."""
        reads = [*reads, *statistics]
        return reads if len(reads) <= MOST_READS else [self.written(f"{name} normalised", reads, "float32")]

    def norm_output(self, name: str, reads: list[str]) -> str:
        """Fused with the norm's backward; a layer norm's in a low-precision stream with the normalised input."""
        output = self.rows(name, self.run.n_embd)
        group = f"{self.at}{name}/again"
        if self.low_stream and len(reads) == 1 and self.run.norm == "layernorm":
            group = self.kernels[-1].group
        self.add([output], reads, places={output: tuple(reads)}, group=group)
        return output

    def lean_norm_backward(self, name: str, dx: str, above: str, dy: list[str], x: list[str], rstd: list[str]) -> str:
        """`x`: what the normalised input is read from. Returns `dx`."""
        run, c = self.run, self.run.n_embd
        sums = [self.statistic(f"{name} sum {i}") for i in range(2 if run.norm == "layernorm" else 1)]
        dx = self.rows(dx, c, self.stream)
        group = f"{self.at}{name}/again"
        reads = [*dy, *dict.fromkeys([*x, *rstd])]
        for one in sums:
            self.add([one], reads, group=group)
        parts = {"weight": [*dy, *x]} | ({"bias": dy} if run.bias and run.norm == "layernorm" else {})
        for part, made_of in parts.items():
            suffix = "" if part == "weight" else " bias"
            self.gradient(f"{name}.{part}", (c,), made_of, group=f"{self.at}{name}{suffix}{OF_NORM}")
            self.kernels[-1].parts = 1 + self.low_stream  # summed up in fp32, then cast
        self.add([dx], [above, *reads, *sums], places={dx: (above, *reads) if above else ()}, group=group)
        return dx

    # ---- a block ------------------------------------------------------------------------------------------------

    def lean_block(self, place: str, index: int, kept: Names, above: str) -> str:
        """Differentiates block `index`; returns the gradient of its input."""
        run, c = self.run, self.run.n_embd
        self.at, self.kept_here = place, kept
        x_1, x_2 = self.stream_reads[2 * index : 2 * index + 2]
        masks = {part: [kept[f"{part} mask"]] if run.dropout else [] for part in ("attn", "mlp")}
        low = self.lean_low_gradient(above, "mlp gradient in low precision", masks["mlp"])
        weights = {name.removesuffix(".weight"): full for name, full in kept.items() if name.endswith(".weight")}
        made = [kept[name] for name in ("mlp.c_gate", "mlp.c_fc") if name in kept]
        h = self.rows("mlp.h", run.n_hidden)
        self.add([h], made, group=f"{place}activation")
        dh = self.rows("mlp.h gradient", run.n_hidden)
        self.both_gradients("mlp.c_proj", c, run.n_hidden, h, low, weights.get("mlp.c_proj", ""), dh)
        grads = self.activation_gradients(made, dh)
        x_2, ln_2 = self.norm_again_of("ln_2", x_2, kept)
        dy = [
            self.both_gradients(
                module, run.n_hidden, c, ln_2, grad, weights.get(module, ""), self.rows(f"{module} input gradient", c)
            )
            for module, grad in grads.items()
        ]
        between = self.lean_norm_backward("ln_2", "x between gradient", above, dy, x_2, [kept["ln_2 rstd"]])
        low = self.lean_low_gradient(between, "attn gradient in low precision", masks["attn"])
        d_qkv = self.lean_attention(kept, weights, low)
        x_1, ln_1 = self.norm_again_of("ln_1", x_1, kept)
        width = c + 2 * run.n_kv_head * run.head_size
        dy = [self.rows("ln_1 gradient", c)]
        self.both_gradients("attn.c_attn", width, c, ln_1, d_qkv, weights.get("attn.c_attn", ""), dy[0])
        return self.lean_norm_backward("ln_1", "x gradient", between, dy, x_1, [kept["ln_1 rstd"]])

    def lean_low_gradient(self, dx: str, name: str, noise: list[str]) -> str:
        """A masked one is made together with `dx`."""
        low = self.low_gradient(dx, name, noise)
        if noise:
            self.kernels[-1].group = next(kernel.group for kernel in self.kernels if dx in kernel.writes)
        return low

    def norm_again_of(self, name: str, reads: list[str], kept: Names) -> tuple[list[str], str]:
        statistics = [kept[f"{name} {part}"] for part in ("mean", "rstd") if f"{name} {part}" in kept]
        reads = self.normalised(name, reads, statistics)
        return reads, self.norm_output(name, reads)

    def activation_gradients(self, made: list[str], dh: str) -> dict[str, str]:
        """Of what the activation is made of, made together with it; gelu's and relu's lie where `dh` lay."""
        modules = ["mlp.c_fc", "mlp.c_gate"] if self.run.mlp == "swiglu" else ["mlp.c_fc"]
        grads = {module: self.rows(f"{module} gradient", self.run.n_hidden) for module in modules}
        places = {} if len(grads) > 1 else {next(iter(grads.values())): (dh, *made)}
        self.add([*grads.values()], [*made, dh], places=places, group=f"{self.at}activation", parts=len(grads))
        return grads

    def lean_attention(self, kept: Names, weights: Names, dx: str) -> str:
        """Returns the gradient of the projection to q, k and v."""
        run, c = self.run, self.run.n_embd
        y = kept["attn.y"]
        by_head = run.attention != "math" and run.position == "rope"
        if by_head and self.low != "float32" and run.n_head > 1:
            y = self.rows("attn.y joined", c)
            self.add([y], [kept["attn.y"]])
        dy = self.rows("attn.y gradient", c)
        self.both_gradients("attn.c_proj", c, c, y, dx, weights.get("attn.c_proj", ""), dy)
        reads, made_of = self.attention_reads(kept)
        first = len(self.kernels)
        gradient = self.attention_backward(dy, reads, made_of)
        if run.attention == "flash" and self.low != "float32":
            self.leave_out_copies(first)
        for kernel in self.kernels[first:] if run.attention == "math" else ():
            name = kernel.writes[0].removeprefix(self.at)
            kernel.extern &= not name.endswith(" piece")  # laid out by head
            if name in ("attn.q row", "attn.q scaled copy"):
                kernel.group = f"{self.at}q"
        return gradient

    def leave_out_copies(self, first: int) -> None:
        """Of the kernels from `first` on: what is made again here is laid out as the attention kernel wants it."""
        copied = {k.writes[0]: k.reads[0] for k in self.kernels[first:] if k.writes[0].endswith(" copy")}
        self.kernels[first:] = [k for k in self.kernels[first:] if k.writes[0] not in copied]
        for kernel in self.kernels[first:]:
            kernel.reads = tuple(copied.get(name, name) for name in kernel.reads)

    def attention_reads(self, kept: Names) -> tuple[list[str], dict[str, tuple[str, str]]]:
        """What the attention kernel's backward reads, what is cheap of it made again; and what that of its inputs
        does."""
        run, c = self.run, self.run.n_embd
        kv = run.n_kv_head * run.head_size
        views = {part: kept.get(f"attn.c_attn {part}", "") for part in "qkv"}
        made_of = {
            part: (kept.get(f"attn.{part} normed", views[part]), kept[f"attn.{part} rstd"])
            for part in "qk"
            if run.qk_norm
        }
        if run.attention == "math":
            return [], made_of
        changed = "rotated" if run.position == "rope" else "normed"
        parts = [kept[n] for n in (f"attn.q {changed}", f"attn.k {changed}") if n in kept]
        if run.qk_norm and not parts:
            parts = [self.rows("attn.q normed", c), self.rows("attn.k normed", kv)]
            for part, made in zip("qk", parts, strict=True):
                self.add([made], list(made_of[part]))
        parts = [*(parts or [views["q"], views["k"]]), views["v"]]
        if run.n_kv_head != run.n_head and self.low == "float32":
            repeated = [
                kept.get(f"attn.{part} repeated") or self.again(f"attn.{part} repeated", [source])
                for part, source in zip("kv", parts[1:], strict=True)
            ]
            parts = [parts[0], *repeated]
        sums = [full for name, full in kept.items() if name.startswith("attn.y ")]
        return [*filter(None, parts), kept["attn.y"], *sums], made_of

    def scores_backward(self, dy: str, reads: list[str]) -> list[str]:
        """Attention written out: softmax is made again from its scores, with the gradient that is taken through it."""
        run, c = self.run, self.run.n_embd
        kept, group = self.kept_here, f"{self.at}softmax"
        softmax = [kept[f"attn.y {part}"] for part in ("scores", "maximum", "sum", "mask") if f"attn.y {part}" in kept]
        p = self.scores("probabilities")
        self.add([p], softmax, places={p: (softmax[0],)}, group=group)
        if run.n_head > 1:
            by_head = self.rows("attn.y gradient by head", c)
            self.add([by_head], [dy])
            dy = by_head
        d_v = self.call(self.rows("attn.v gradient", c), p, dy)
        d_p = self.call(self.scores("probabilities gradient"), dy, self.operand("v"))
        row, d_s = self.statistic("attn.y row", run.n_head), self.scores("scores gradient")
        through, again = [p, d_p], []
        if self.low != "float32" or run.dropout:  # p is not what softmax gave: its product is written down
            weighed = self.scores("probabilities weighed", "float32")
            self.add([weighed], [*softmax, d_p], places={weighed: (softmax[0], d_p)}, group=group)
            through, again = [weighed], softmax[:3]
        # The causal mask is one for all heads, so that loops with it are over heads and rows. A sum over rows is one
        # loop over all, unless their strides are padded: it is fused with what has the same.
        apart = row in self.unpadded
        alike = not apart and (run.batch_size * run.n_head == 1 or p in self.unpadded)
        group = group if alike else f"{self.at}rows" if apart else ""
        self.add([row], through, group=group)
        reads_s = [*again, *through, row]
        self.add([d_s], reads_s, places={d_s: tuple(reads_s)}, group=group or f"{self.at}masked")
        d_k = self.call(self.rows("attn.k gradient", c), d_s, self.operand("q scaled"))
        d_q = self.call(self.rows("attn.q gradient", c), d_s, self.operand("k"))
        return [d_q, d_k, d_v]

    def operand(self, part: str) -> str:
        """A copy of queries, keys or values: kept, or made again."""
        kept = self.kept_here
        if f"attn.{part} copy" in kept:
            return kept[f"attn.{part} copy"]
        places = (f"attn.{part[0]} rotated", f"attn.{part[0]} normed", f"attn.c_attn {part[0]}")
        source = next(kept[name] for name in places if name in kept)
        projected = source.endswith(f"c_attn {part[0]}")
        scale = kept.get(f"attn.{part[0]} rstd", "") if projected else ""
        alone = self.run.n_kv_head == self.run.n_head and 1 in (self.run.n_head, self.run.batch_size)
        if alone and part in "kv" and not scale:  # there is nothing to put beside each other
            return source
        return self.again(f"attn.{part} copy", [source, scale])

    def again(self, name: str, reads: list[str]) -> str:
        made = self.rows(name, self.run.n_embd)
        self.add([made], reads)
        return made

    # ---- head and embedding -------------------------------------------------------------------------------------

    def lean_head(self, place: str, kept: Names, above: str, logits: str) -> str:
        """The final norm, and with the full loss the head: `logits` is their gradient. Returns the gradient of the last
        block's output."""
        run, c = self.run, self.run.n_embd
        self.at = place
        statistics = [kept[f"ln_f {part}"] for part in ("mean", "rstd") if f"ln_f {part}" in kept]
        x = self.normalised("ln_f", self.stream_reads[-1], statistics)
        if logits:
            output, product = self.norm_output("ln_f", x), ""
            if self.copies:
                product = self.slot("end/head product", (run.vocab_size, c), self.low)
                self.call(product, logits, output)
            elif not run.tie_embeddings:
                self.gradient("lm_head.weight", (run.vocab_size, c), [logits, output], extern=True)
            weight = kept.get("wte.weight") or kept.get("lm_head.weight") or ""
            self.call(above, logits, weight)
            if self.copies and not run.tie_embeddings:
                self.gradient("lm_head.weight", (run.vocab_size, c), [product])
        return self.lean_norm_backward("ln_f", "x after gradient", "", [above], x, statistics[-1:])

    def embedding(self, kept: Names, dx: str, logits: str) -> None:
        """The gradients of the embeddings, that of the tied head's product with it."""
        run, c = self.run, self.run.n_embd
        masks = [kept["emb mask"]] if run.dropout else []
        if run.position == "learned":  # read twice: by the sum over sequences, too
            if masks:
                self.at = "end/"
                masked = self.rows("embedding gradient by token", c, self.stream)
                self.add([masked], [dx, *masks], places={masked: (dx,)})
                dx = masked
            self.add([self.slot("end/wpe.weight.grad", (run.block_size, c), self.stream, OUTPUT)], [dx])
            made, group = [dx], ""
        else:  # made where it is added
            last = self.kernels.pop()
            made, group = [*last.reads, *masks], last.group
        shape = (run.vocab_size, c)
        total = "end/wte.weight rows"
        if self.low_stream or (run.tie_embeddings and logits):
            self.slot(total, shape, "float32")
        else:
            total = self.slot(EMBEDDING, shape, "float32", OUTPUT)
        self.add([total], [])  # zeros, to which the rows are added in place
        put = self.slot("end/wte.weight rows added", (0,), "float32", GIVEN)
        self.add([put], [*made, total], group=group)
        read = [put, total]
        if self.low_stream:
            tied = run.tie_embeddings and bool(logits)
            low = self.slot("end/wte.weight rows cast", shape, self.stream) if tied else ""
            read = [low or self.slot(EMBEDDING, shape, self.stream, OUTPUT)]
            self.add(read, [put, total])
        if run.tie_embeddings and logits:
            self.slot(EMBEDDING, shape, self.stream, OUTPUT)
            if self.copies:
                self.add([EMBEDDING], [*read, "end/head product"])
            else:
                self.call(EMBEDDING, *read, logits, next(name for name in self.slots if name.endswith("/ln_f")))
