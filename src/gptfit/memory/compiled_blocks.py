"""A block forward and backward as operations, in the order in which autograd runs them."""

from dataclasses import dataclass, field

from gptfit.memory.compiled_graph import FLOAT, Op
from gptfit.memory.compiled_heads import Attended, Attention
from gptfit.memory.compiled_joint import Norm


@dataclass(slots=True)
class Forward:
    """What backward of a block needs of it."""

    at: str
    ln_1: Norm
    ln_2: Norm
    attended: Attended
    joined: Op
    mlp: dict[str, Op]
    between: Op  # attention and MLP, the stream
    weights: dict[str, Op] = field(default_factory=dict)  # transposed, as they were multiplied
    masks: dict[str, Op] = field(default_factory=dict)


class Blocks(Attention):
    """One block after the other."""

    def block(self, x: Op) -> tuple[Forward, Op]:
        """Runs a block; returns what its backward needs, and its output."""
        run, c = self.run, self.run.n_embd
        width = c + 2 * run.n_kv_head * run.head_size
        weights: dict[str, Op] = {}
        masks: dict[str, Op] = {}
        ln_1 = self.norm(x, "ln_1")
        qkv, weights["attn.c_attn"] = self.linear(ln_1.output, "attn.c_attn", width)
        ln_1.output = self.named(self.rows, "ln_1")
        attended, y = self.attention(self.tokens(self.named(qkv, "attn.c_attn")))
        p, weights["attn.c_proj"] = self.linear(y, "attn.c_proj", c)
        joined = self.rows
        if y.label:
            self.named(joined, "attn.y")
        elif y.kind == "view":
            self.named(joined, "attn.y joined")
        p = self.tokens(self.named(p, "attn.c_proj"))
        p = self.dropped(p, "attn")
        if run.dropout:
            masks["attn"] = self.mask
        between = self.point(x, p)
        ln_2 = self.norm(between, "ln_2")
        if self.stream != FLOAT:
            self.named(between, "ln_2 input")
        mlp = self.mlp(ln_2, weights)
        m, weights["mlp.c_proj"] = self.linear(mlp["h"], "mlp.c_proj", c)
        mlp["h"] = self.named(self.rows, "mlp.h")
        m = self.dropped(self.tokens(self.named(m, "mlp.c_proj")), "mlp")
        if run.dropout:
            masks["mlp"] = self.mask
        found = Forward(self.at, ln_1, ln_2, attended, joined, mlp, between, weights, masks)
        return found, self.point(between, m)

    def mlp(self, ln_2: Norm, weights: dict[str, Op]) -> dict[str, Op]:
        """The activation `h`, and what its backward reads."""
        run, f = self.run, self.run.n_hidden
        if run.mlp == "swiglu":
            gate, weights["mlp.c_gate"] = self.linear(ln_2.output, "mlp.c_gate", f)
            full = self.cast(self.tokens(self.named(gate, "mlp.c_gate")), FLOAT)
            silu = self.cast(self.point(full, self.point(self.point(self.point(full)), numbers=(1,))), self.low)
            ln_2.output = self.rows
            made, weights["mlp.c_fc"] = self.linear(ln_2.output, "mlp.c_fc", f)
            made = self.tokens(self.named(made, "mlp.c_fc"))
            found = {"full": full, "silu": silu, "made": made, "h": self.point(silu, made)}
        else:
            made, weights["mlp.c_fc"] = self.linear(ln_2.output, "mlp.c_fc", f)
            ln_2.output = self.rows
            made = self.tokens(self.named(made, "mlp.c_fc"))
            if run.mlp == "relu2":
                relu = self.point(made)
                found = {"relu": relu, "h": self.point(relu)}
            else:
                full = self.cast(made, FLOAT)
                half = self.point(full, numbers=(0.5,))
                error = self.point(self.point(self.point(full, numbers=("root",))), numbers=(1,))
                found = {"full": full, "error": error, "h": self.cast(self.point(half, error), self.low)}
        self.named(ln_2.output, "ln_2")
        return found

    def mlp_backward(self, dh: Op, f: Forward) -> Op:
        """From the activation's gradient [B, T, F] to that of the MLP's input [B, T, C]."""
        made = f.mlp
        if self.run.mlp == "swiglu":
            d_made = self.point(dh, made["silu"])
            d_silu = self.point(dh, made["made"])
            from_made = self.linear_backward(self.flat(d_made), f.ln_2.output, f.weights["mlp.c_fc"], "mlp.c_fc")
            self.hand_out_late()
            full, wide = made["full"], self.cast(d_silu, FLOAT)
            sigmoid = self.point(full)
            inner = self.point(self.point(full, self.point(sigmoid, numbers=(1,))), numbers=(1,))
            d_gate = self.cast(self.point(self.point(wide, sigmoid), inner), self.low)
            dx = self.linear_backward(self.flat(d_gate), f.ln_2.output, f.weights["mlp.c_gate"], "mlp.c_gate")
            dx = self.point(from_made, dx)
        else:
            if self.run.mlp == "relu2":
                relu = made["relu"]
                grad = self.point(dh, self.point(relu, numbers=(2,)))
                d_made = self.point(self.compared(relu, 0), grad, dtype=dh.dtype, numbers=(0,))
            else:
                full, wide = made["full"], self.cast(dh, FLOAT)
                erf = self.point(made["error"], numbers=(0.5,))
                bell = self.point(self.point(self.point(self.point(full, full), numbers=(-0.5,))), numbers=("bell",))
                d_made = self.cast(self.point(wide, self.point(erf, self.point(full, bell))), self.low)
            dx = self.linear_backward(self.flat(d_made), f.ln_2.output, f.weights["mlp.c_fc"], "mlp.c_fc")
        self.hand_out_late()
        return dx

    def block_backward(self, f: Forward, dx: Op) -> Op:
        """Differentiates a block; `dx` is the gradient of its output, what comes back that of its input."""
        self.at = f.at
        low = self.flat(self.dropped_backward(self.cast(dx, self.low), f.masks.get("mlp")))
        dh = self.linear_backward(low, f.mlp["h"], f.weights["mlp.c_proj"], "mlp.c_proj")
        self.hand_out_late()
        d_ln_2 = self.mlp_backward(dh, f)
        dx = self.norm_backward(d_ln_2, f.ln_2, "ln_2", dx)
        low = self.flat(self.dropped_backward(self.cast(dx, self.low), f.masks.get("attn")))
        dy = self.linear_backward(low, f.joined, f.weights["attn.c_proj"], "attn.c_proj")
        self.hand_out_late()
        d_qkv = self.attention_backward(dy, f.attended)
        d_ln_1 = self.linear_backward(self.flat(d_qkv), f.ln_1.output, f.weights["attn.c_attn"], "attn.c_attn")
        self.hand_out_late()
        return self.norm_backward(d_ln_1, f.ln_1, "ln_1", dx)
