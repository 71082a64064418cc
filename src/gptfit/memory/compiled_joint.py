"""Forward and backward of our blocks as operations, in the order in which autograd runs them.

Each function is the mirror of one in model.py, and of its gradient as torch 2.13 decomposes it for inductor
(torch/_inductor/decomposition.py, torch/_decomp/decompositions.py).
"""

from dataclasses import dataclass

from gptfit.config import RunConfig
from gptfit.memory.compiled_graph import FLOAT, MEAN, POINT, RANDOM, Graph, Op

SEEDS = "seeds"


@dataclass(slots=True)
class Norm:
    """What backward of a norm needs."""

    normal: Op
    rstd: Op
    output: Op
    made_of: tuple[Op, Op] | None = None  # which backward normalises once more


class Joint(Graph):
    """The graph of blocks. `at` is what the names of the block being written begin with."""

    def __init__(self, run: RunConfig) -> None:
        super().__init__()
        self.run = run
        self.low, self.stream = run.dtype, run.param_dtype
        self.n_rows = run.batch_size * run.block_size
        self.at = ""
        self.inputs: dict[str, Op] = {}
        self.kept_for_nothing: set[str] = set()  # numbers for each token, and of random numbers
        self.masked = False
        self.late: list[tuple[Op, str]] = []

    def given(self, name: str, shape: tuple[int, ...], dtype: str) -> Op:
        if name not in self.inputs:
            self.inputs[name] = self.input(name, shape, dtype)
        return self.inputs[name]

    def parameter(self, name: str, *shape: int) -> Op:
        return self.given(f"{self.at}{name}", shape, self.stream)

    def named(self, op: Op, name: str) -> Op:
        op.label = f"{self.at}{name}"
        return op

    def handed_out(self, op: Op, name: str) -> None:
        op.output = f"{self.at}{name}.grad"

    def tokens(self, x: Op) -> Op:
        return self.view(x, self.run.batch_size, self.run.block_size, x.shape[-1])

    def flat(self, x: Op) -> Op:
        return self.view(x, self.n_rows, x.shape[-1])

    def dropped(self, x: Op, name: str) -> Op:
        """Dropout. The mask is kept, or made again of the same random numbers."""
        if not self.run.dropout:
            return x
        self.unseen()  # a seed is looked up
        noise = self.op(RANDOM, (self.given(SEEDS, (1,), "int64"),), x.shape, FLOAT)
        mask = self.named(self.compared(self.cast(noise, x.dtype), "p"), f"{name} mask")
        self.mask = mask
        return self.point(self.point(mask, x, dtype=x.dtype), numbers=("scale",))

    def dropped_backward(self, dy: Op, mask: Op | None) -> Op:
        if mask is None:
            return dy
        scaled = self.point(self.cast(mask, dy.dtype), numbers=("scale",))
        return self.point(dy, scaled, dtype=dy.dtype)

    def compared(self, x: Op, number: float | str) -> Op:
        return self.op(POINT, (x,), x.shape, "bool", (1, (number,)))

    # ---- norms -------------------------------------------------------------------------------------------------------

    def rsqrt(self, x: Op, width: int) -> tuple[Op, Op]:
        """Root mean square over the last dimension: normalised, and the reciprocal."""
        squares = self.sum(self.point(self.cast(x, FLOAT)), len(x.shape) - 1)
        mean = self.point(self.point(self.point(squares)), numbers=(width,))
        rstd = self.point(self.point(mean, numbers=("epsilon",)))
        return self.point(x, rstd, dtype=FLOAT), rstd

    def norm(self, x: Op, name: str) -> Norm:
        run = self.run
        weight = self.parameter(f"{name}.weight", run.n_embd)
        made_of: tuple[Op, Op] | None = None
        if run.norm == "rmsnorm":
            normal, rstd = self.rsqrt(x, run.n_embd)
            self.named(rstd, f"{name} rstd")
            output = self.cast(self.point(normal, weight), self.low)
        else:
            full = self.cast(x, FLOAT)
            variance, mean = self.moments(full)
            rstd = self.point(self.point(variance, numbers=("epsilon",)))
            normal = self.point(self.named(self.point(full, mean), f"{name} centred"), rstd)
            output = self.point(normal, weight, dtype=FLOAT)
            if run.bias:
                output = self.point(output, self.parameter(f"{name}.bias", run.n_embd), dtype=FLOAT)
            output = self.cast(output, self.low)
            if self.stream != FLOAT:  # backward normalises once more, with what is rounded
                mean, rstd = self.cast(mean, self.low), self.cast(rstd, self.low)
                made_of = (full, mean)
            self.named(mean, f"{name} mean")
            self.named(rstd, f"{name} rstd")
        if self.stream == FLOAT or run.norm == "rmsnorm":
            self.named(normal, f"{name} normalised")
        return Norm(normal, rstd, output, made_of)

    def norm_backward(self, dy: Op, norm: Norm, name: str, above: Op | None) -> Op:
        run = self.run
        weight = self.parameter(f"{name}.weight", run.n_embd)
        if run.norm == "rmsnorm":
            weight_gradient = self.sum(self.point(dy, norm.normal), 0, 1, keep=False)
            self.handed_out(self.cast(weight_gradient, self.stream), f"{name}.weight")
            dx = self.rsqrt_backward(self.point(dy, weight), norm.normal, norm.rstd)
        else:
            full = self.cast(dy, FLOAT)
            weight = self.cast(weight, FLOAT)
            if norm.made_of is not None:
                norm.normal = self.point(self.point(*norm.made_of, dtype=FLOAT), norm.rstd, dtype=FLOAT)
            scaled = self.point(full, weight)
            wide = self.point(scaled, numbers=(run.n_embd,))
            first = self.sum(scaled, 2)
            second = self.sum(self.point(scaled, norm.normal), 2)
            inner = self.point(self.point(wide, first), self.point(norm.normal, second))
            dx = self.point(self.point(norm.rstd, numbers=(run.n_embd,)), inner)
            weight_gradient = self.sum(self.point(full, norm.normal), 0, 1, keep=False)
            bias_gradient = self.sum(full, 0, 1, keep=False) if run.bias else None
            dx = self.cast(dx, self.stream)
            self.handed_out(self.cast(weight_gradient, self.stream), f"{name}.weight")
            if bias_gradient is not None:
                self.handed_out(self.cast(bias_gradient, self.stream), f"{name}.bias")
        dx = self.cast(dx, self.stream)
        return dx if above is None else self.point(above, dx)

    def rsqrt_backward(self, dy: Op, normal: Op, rstd: Op) -> Op:
        mean = self.sum(self.point(dy, normal), len(dy.shape) - 1, kind=MEAN)
        return self.point(self.point(self.point(self.point(normal, mean)), dy), rstd)

    # ---- linear layers -----------------------------------------------------------------------------------------------

    def linear(self, x: Op, name: str, n_out: int) -> tuple[Op, Op]:
        """The product [rows, n_out], and the transposed weight."""
        n_in = x.shape[-1]
        bias = self.cast(self.parameter(f"{name}.bias", n_out), self.low) if self.run.bias else None
        weight = self.cast(self.parameter(f"{name}.weight", n_out, n_in), self.low)
        if self.low != self.stream:
            self.named(weight, f"{name}.weight as {self.low}")
        if self.run.bias:
            rows = self.flat(x)
            turned = self.permute(weight, 1, 0)
        else:
            turned = self.permute(weight, 1, 0)
            rows = self.flat(x)
        self.rows = rows
        return self.mm(rows, turned, bias), turned

    def linear_backward(self, dy: Op, x: Op, turned: Op, name: str) -> Op:
        """`dy` and `x` in rows. The weight's gradient is returned with its cast, which comes after the input's."""

        def of_input() -> Op:
            return self.mm(dy, self.permute(turned, 1, 0))

        def of_weight() -> Op:
            return self.mm(self.permute(dy, 1, 0), x)

        if self.run.bias:
            dx, dw = of_input(), of_weight()
            db = self.view(self.sum(dy, 0), dy.shape[-1])
        else:
            dw, dx, db = of_weight(), of_input(), None
        self.named(dx, f"{name} input gradient")
        dx = self.tokens(dx)
        self.late = [(dw, f"{name}.weight"), *([(db, f"{name}.bias")] if db is not None else [])]
        return dx

    def hand_out_late(self) -> None:
        for gradient, name in self.late:
            self.handed_out(self.cast(gradient, self.stream), name)
        self.late = []
