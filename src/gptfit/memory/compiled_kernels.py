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

    @property
    def low_stream(self) -> bool:
        return self.run.param_dtype == self.run.dtype != "float32"

    def scores(self, name: str, dtype: str = "") -> str:
        run = self.run
        shape = (run.batch_size, run.n_head, run.block_size, run.block_size)
        return self.slot(f"{self.at}attn.y {name}", shape, dtype or self.low)

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
