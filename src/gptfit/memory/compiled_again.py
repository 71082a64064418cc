"""The order of a compiled backward with checkpoints: each block is run again, then differentiated.

That is the order in which autograd would run it, as AOTAutograd hands it to inductor (torch/_functorch/partitioners.py,
reordering_to_mimic_autograd_engine): what is run again stands right before its first use.
"""

from dataclasses import dataclass

from gptfit.memory.compiled_kernels import Block
from gptfit.memory.compiled_plan import SAVED


@dataclass(slots=True)
class Forward:
    """What backward reads of a block: run again, or kept."""

    at: str
    ln_1_reads: list[str]  # by the first norm's backward
    ln_1: str
    attention: list[str]  # by the attention kernel's backward
    made_of: dict[str, tuple[str, str]]  # by that of what is done to its inputs
    joined: str
    ln_2_reads: list[str]
    ln_2: str
    made: list[str]  # the activation is made of
    h: str
    weights: dict[str, str]
    noise: list[str]
    group: str
    stream: list[str]  # the block's output is the sum of these, and of the MLP's


class Again(Block):
    """One block after the other."""

    def low_gradient(self, dx: str, name: str, noise: list[str]) -> str:
        """The stream's gradient as the matrix products read it."""
        if not self.copies and not self.run.dropout:
            return dx
        low = self.rows(name, self.run.n_embd)
        self.add([low], [dx, *noise])
        return low

    def forward(self, x: str, top: bool, first: bool) -> Forward:
        """Runs a block of input `x` again. `top`: its activation is needed before its gradient is there."""
        run, c = self.run, self.run.n_embd
        width = c + 2 * run.n_kv_head * run.head_size
        stored, dropped = self.stored(first), run.dropout > 0
        weights: dict[str, str] = {}
        ln_1_reads, ln_1 = self.norm_again("ln_1", [x], stored, [])
        weights["attn.c_attn"] = self.cast("attn.c_attn", width, c)
        attention, made_of, joined = self.attention_again(ln_1, weights["attn.c_attn"])
        weights["attn.c_proj"] = self.cast("attn.c_proj", c, c)
        p = self.call(self.rows("attn.c_proj", c), joined, weights["attn.c_proj"])
        between, extra = [x, p], []
        noise: list[str] = []
        if dropped:
            noise = [self.rows("attn.noise", c, "float32")]
            self.add(noise, [])
            between = [x, p, *noise]
            extra = [self.rows("x between", c, self.stream)]
        stored = (stored or (first and self.stores_between)) and not dropped
        ln_2_reads, ln_2 = self.norm_again("ln_2", between, stored, extra)
        if dropped:
            ln_2_reads = [*extra, *self.names_of("ln_2")]
        made, h, copies = self.mlp_again(ln_2, top)
        group = "" if stored or dropped else f"{self.at}norms"
        stream = extra or [x, p]
        return Forward(
            self.at, ln_1_reads, ln_1, attention, made_of, joined, ln_2_reads, ln_2, made, h,
            weights | copies, noise, group, stream,
        )  # fmt: skip

    def kept(self, names: dict[str, str], below: list[str]) -> Forward:
        """A block that kept what backward reads: buffers `names` by what they are. `below`: what its input is made
        of, where that is not kept."""

        def some(*prefixes: str) -> list[str]:
            return [full for name, full in names.items() if name.startswith(prefixes) and "weight" not in name]

        weights = {name.removesuffix(".weight"): full for name, full in names.items() if name.endswith(".weight")}
        ln = {n: [f for f in some(n) if f != names.get(n)] for n in ("ln_1", "ln_2")}
        qkv = [f for name, f in names.items() if name.startswith("attn.c_attn") and not name.endswith("weight")]
        parts = ("q rotated", "k rotated", "q normed", "k normed", "k repeated", "v repeated")
        changed = some(*(f"attn.{part}" for part in parts))
        y = some("attn.y")
        joined = names.get("attn.y joined", names.get("attn.y", ""))
        attention = [*changed, *qkv, *(f for f in y if f != names.get("attn.y joined"))]
        if self.run.attention == "math":
            p = names["attn.y probabilities"]
            copies = [names[f"attn.{part} copy"] for part in ("q scaled", "k", "v")]
            attention = [*copies, p, names.get("attn.y probabilities in float32", p), *some("attn.y mask")]
        own = (
            {"q": names.get("attn.q normed", ""), "k": names.get("attn.k normed", "")} if self.low == "float32" else {}
        )
        made_of = {
            part: (own.get(part) or "".join(qkv), names[f"attn.{part} rstd"]) for part in "qk" if self.run.qk_norm
        }
        made = some("mlp.c_fc", "mlp.c_gate")
        return Forward(
            self.at, [*below, *ln["ln_1"]], names["ln_1"], attention, made_of, joined, ln["ln_2"], names["ln_2"],
            made, names["mlp.h"], weights, some("attn mask"), "", [],
        )  # fmt: skip

    def backward(self, f: Forward, dx: str, dx_low: str, top: bool) -> str:
        """Differentiates a block down to its first norm; `dx` is what comes from above. Returns the gradient between
        attention and MLP."""
        c = self.run.n_embd
        self.at = f.at
        d_ln_2 = self.mlp_backward(f.made, f.h, f.ln_2, f.weights, dx_low, top)
        dx_2 = self.rows("x between gradient", c, self.stream)
        self.norm_backward("ln_2", dx_2, dx, [*f.ln_2_reads, *d_ln_2])
        self.norm_parameter_gradients("ln_2", [*f.ln_2_reads, *d_ln_2], f.group)
        width = c + 2 * self.run.n_kv_head * self.run.head_size
        dx_2_low = self.low_gradient(dx_2, "attn gradient in low precision", f.noise)
        dy = self.rows("attn.y gradient", c)
        self.both_gradients("attn.c_proj", c, c, f.joined, dx_2_low, f.weights.get("attn.c_proj", ""), dy)
        d_qkv = self.attention_backward(dy, f.attention, f.made_of)
        d_ln_1 = self.rows("ln_1 gradient", c)
        self.both_gradients("attn.c_attn", width, c, f.ln_1, d_qkv, f.weights.get("attn.c_attn", ""), d_ln_1)
        return dx_2

    def backward_of_norm(self, f: Forward, dx_2: str) -> str:
        """The rest of a block's backward; returns what goes down."""
        self.at = f.at
        d_ln_1 = f"{f.at}ln_1 gradient"
        dx = self.rows("x gradient", self.run.n_embd, self.stream)
        self.norm_backward("ln_1", dx, dx_2, [*f.ln_1_reads, d_ln_1])
        self.norm_parameter_gradients("ln_1", [*f.ln_1_reads, d_ln_1], f.group)
        return dx

    def backward_of_norm_of_sum(self, f: Forward, stream: list[str], dx_2: str, group: str, first: bool) -> str:
        """The same of a block whose input was not kept: it is summed again, and written down where it is read twice."""
        run = self.run
        if run.norm == "layernorm" or (first and run.position == "learned"):
            self.at = f.at
            normalised = self.rows("ln_1 normalised again", run.n_embd, self.stream)
            self.add([normalised], [*f.ln_1_reads, *stream])
            f.ln_1_reads += [normalised]
        else:
            f.ln_1_reads += stream
            f.group = group
        return self.backward_of_norm(f, dx_2)

    def round(
        self, places: list[str], kept: list[dict[str, str]], final: list[str], above: str, top: bool, first: bool
    ) -> str:
        """A block that is run again and those after it that kept what they need, differentiated from the last on."""
        run, c = self.run, self.run.n_embd
        again: Forward | None = None
        self.at = places[0]
        x = self.rows("x", c, run.param_dtype, SAVED)
        outputs: list[str] = []
        dx = above
        for position in reversed(range(1, len(places))):
            self.at = places[position]
            if top and position == len(places) - 1:
                dx = self.head(final, above)
            dx_low = self.low_gradient(
                dx, "mlp gradient in low precision", [kept[position]["mlp mask"]] if run.dropout else []
            )
            f = self.kept(kept[position], [])
            dx_2 = self.backward(f, dx, dx_low, top=False)
            if position == 1 and not any(name.startswith(("ln_1 normalised", "ln_1 input")) for name in kept[1]):
                again, outputs = self.forward_to_the_end(places[0], x, first)
                dx = self.backward_of_norm_of_sum(f, outputs, dx_2, again.group, first)
            else:
                dx = self.backward_of_norm(f, dx_2)
        self.at = places[0]
        if again is not None:
            dx_low = self.low_gradient(dx, "mlp gradient in low precision", [])
            return self.backward_of_norm(again, self.backward(again, dx, dx_low, top=True))
        top = top and len(places) == 1
        dx_low = "" if top else self.low_gradient(dx, "mlp gradient in low precision", [])
        w_proj = self.cast("mlp.c_proj", c, run.n_hidden) if run.bias and not top else ""
        again = self.forward(x, top, first)
        again.weights["mlp.c_proj"] = w_proj or self.cast("mlp.c_proj", c, run.n_hidden)
        if top:
            m = self.call(self.rows("mlp.c_proj", c), again.h, again.weights["mlp.c_proj"])
            dx = self.head([*again.stream, m], above, again.group)
            dx_low = self.low_gradient(dx, "mlp gradient in low precision", [])
        return self.backward_of_norm(again, self.backward(again, dx, dx_low, top))

    def forward_to_the_end(self, at: str, x: str, first: bool) -> tuple[Forward, list[str]]:
        """A block run again whose output is needed as well: what that is the sum of."""
        self.at, back = at, self.at
        again = self.forward(x, True, first)
        again.weights["mlp.c_proj"] = self.cast("mlp.c_proj", self.run.n_embd, self.run.n_hidden)
        m = self.call(self.rows("mlp.c_proj", self.run.n_embd), again.h, again.weights["mlp.c_proj"])
        self.at = back
        return again, [*again.stream, m]

    def names_of(self, norm: str) -> list[str]:
        parts = ("mean", "rstd") if self.run.norm == "layernorm" else ("rstd",)
        return [f"{self.at}{norm} {part}" for part in parts]

    def norm_backward(self, name: str, dx: str, above: str, reads: list[str]) -> None:
        sums = [self.statistic(f"{name} sum {i}") for i in range(2 if self.run.norm == "layernorm" else 1)]
        inside = (
            4 * self.run.batch_size * self.run.block_size * self.run.n_embd if len(sums) == 2 and self.low_stream else 0
        )
        places = {dx: (above, *reads)}
        self.add([*sums, dx], [*reads, above], places=places, inside=inside, parts=1 + len(sums) + (inside > 0))

    def head(self, stream: list[str], above: str, group: str = "") -> str:
        """The final norm's backward; `stream` is what its input is the sum of."""
        run, c = self.run, self.run.n_embd
        sums = [self.statistic(f"ln_f sum {i}") for i in range(2 if run.norm == "layernorm" else 1)]
        dx = self.rows("x after gradient", c, self.stream)
        if run.norm == "layernorm" and len(stream) > 1:
            normalised = self.rows("ln_f normalised", c, "float32")
            self.add([normalised, *sums, dx], [*stream, above], parts=4)
            self.norm_parameter_gradients("ln_f", [normalised, above])
        else:
            self.add([*sums, dx], [*stream, above], parts=1 + len(sums))
            self.norm_parameter_gradients("ln_f", [*stream, above], group)
        return dx
