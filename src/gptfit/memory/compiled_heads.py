"""Attention forward and backward as operations: queries, keys, values, what changes them, and both kinds of it."""

from dataclasses import dataclass

from gptfit.memory.compiled_graph import ATTENTION, ATTENTION_BACKWARD, FLOAT, ITEM, Op
from gptfit.memory.compiled_joint import Joint

COSINES, SINES, MASK = "cosines", "sines", "future"


@dataclass(slots=True)
class Heads:
    """Queries or keys: as the projection made them, normalised, and as attention takes them."""

    made: Op
    normal: Op | None = None
    rstd: Op | None = None


@dataclass(slots=True)
class Attended:
    """What backward of attention needs: its inputs, what it made of them, and the mask of its dropout."""

    q: Heads
    k: Heads
    reads: list[Op]
    mask: Op | None = None


def laid_out(shape: tuple[int, ...], by_head: bool) -> tuple[int, ...]:
    """Strides of [B, H, T, D], head after head or token after token."""
    _, h, t, d = shape
    return (h * t * d, t * d, d, 1) if by_head else (h * t * d, d, h * d, 1)


class Attention(Joint):
    """`attended` is what its backward needs."""

    def heads_of(self, x: Op, n_head: int) -> Op:
        run = self.run
        return self.permute(self.view(x, run.batch_size, run.block_size, n_head, run.head_size), 0, 2, 1, 3)

    def changed(self, made: Op, part: str) -> Heads:
        """Queries or keys, normalised; `made` becomes what attention takes."""
        found = Heads(made)
        if self.run.qk_norm:
            found.normal, found.rstd = self.rsqrt(made, self.run.head_size)
            self.named(found.rstd, f"attn.{part} rstd")
            found.made = self.cast(found.normal, self.low)
            self.named(found.made, f"attn.{part} normed")
            found.made.strides = laid_out(made.shape, by_head=False)  # as it is kept
        return found

    def tables(self) -> tuple[Op, Op]:
        shape = (self.run.block_size, self.run.head_size // 2)
        return self.given(COSINES, shape, self.low), self.given(SINES, shape, self.low)

    def turned(self, x: Op, part: str) -> Op:
        cos, sin = self.tables()
        half = x.shape[-1] // 2
        self.unseen()  # the split
        a, b = self.slice(x, 0, half), self.slice(x, half, 2 * half)
        low = self.point(self.point(a, cos), self.point(b, sin))
        high = self.point(self.point(b, cos), self.point(a, sin))
        return self.named(self.cat(low, high), f"attn.{part} rotated")

    def turned_backward(self, dy: Op) -> Op:
        cos, sin = self.tables()
        half = dy.shape[-1] // 2
        a, b = self.slice(dy, 0, half), self.slice(dy, half, 2 * half)
        from_b, own_b = self.point(b, sin), self.point(b, cos)
        d_b = self.point(own_b, self.point(self.point(a), sin))
        d_a = self.point(from_b, self.point(a, cos))
        return self.cat(d_a, d_b)

    def repeated(self, x: Op) -> Op:
        run = self.run
        b, kv, t, d = x.shape
        groups = run.n_head // kv
        wide = self.expand(self.view(x, b, kv, 1, t, d), b, kv, groups, t, d)
        return self.view(self.point(wide), b, run.n_head, t, d)

    def repeated_backward(self, dy: Op) -> Op:
        run = self.run
        b, _, t, d = dy.shape
        groups = run.n_head // run.n_kv_head
        split = self.view(dy, b, run.n_kv_head, groups, t, d)
        return self.view(self.sum(split, 2), b, run.n_kv_head, t, d)

    @property
    def repeats(self) -> bool:
        run = self.run
        return run.n_kv_head != run.n_head and (run.attention == "math" or self.low == FLOAT)

    def attention(self, qkv: Op) -> tuple[Attended, Op]:
        """Of `qkv` [B, T, width]: what backward needs, and the output [B, T, C]."""
        run = self.run
        c, kv = run.n_embd, run.n_kv_head * run.head_size
        self.unseen()  # the split
        parts = [self.slice(qkv, 0, c), self.slice(qkv, c, c + kv), self.slice(qkv, c + kv, c + 2 * kv)]
        made = [self.heads_of(x, n) for x, n in zip(parts, (run.n_head, run.n_kv_head, run.n_kv_head), strict=True)]
        q, k = self.changed(made[0], "q"), self.changed(made[1], "k")
        q_made, k_made, v_made = q.made, k.made, made[2]
        if run.position == "rope":
            q_made, k_made = self.turned(q_made, "q"), self.turned(k_made, "k")
        if self.repeats:
            k_made, v_made = self.repeated(k_made), self.repeated(v_made)
            if run.attention != "math":
                self.named(k_made, "attn.k repeated")
                self.named(v_made, "attn.v repeated")
        if run.attention == "math":
            reads, y = self.written_out(q_made, k_made, v_made)
        else:
            reads, y = self.flash(q_made, k_made, v_made)
        masked = run.attention == "math" and run.dropout > 0
        return Attended(q, k, reads, self.mask if masked else None), y

    def flash(self, q: Op, k: Op, v: Op) -> tuple[list[Op], Op]:
        run = self.run
        b, h, t, d = q.shape
        state = self.given(f"{self.at}attn.y random state", (5056,), "uint8")  # of a CPU, which the plan is for
        self.kept_for_nothing.add(state.label)
        both = self.op(ATTENTION, (q, k, v, state), q.shape, self.low)
        y = self.named(self.op(ITEM, (both,), q.shape, self.low, 0), "attn.y")
        by_head = run.position == "rope" and h > 1 and self.low != FLOAT
        y.strides = laid_out(q.shape, self.low != FLOAT and (by_head or run.qk_norm))  # as q lies
        length = t if self.low != FLOAT else -(-t // 32) * 32
        sums = self.named(self.op(ITEM, (both,), (b, h, length), FLOAT, 1), "attn.y log-sum-exp")
        numbers = [self.op(ITEM, (both,), (1,), "int64", 2 + i) for i in range(2)]
        # The kernel of half precision has one more output, which nobody reads.
        both.data = [y, sums, *numbers, *([self.op(ITEM, (both,), (0,), self.low, 4)] if self.low != FLOAT else [])]
        for number, name in zip(numbers, ("seed", "offset"), strict=True):
            self.named(number, f"attn.y random {name}")
        joined = self.permute(y, 0, 2, 1, 3)
        if by_head:
            joined = self.point(joined)
        joined = self.view(joined, b, t, h * d)
        return [q, k, v, y, sums, *numbers], joined

    def written_out(self, q: Op, k: Op, v: Op) -> tuple[list[Op], Op]:
        run = self.run
        b, h, t, d = q.shape
        apart = b > 1 and h > 1  # heads of several sequences, token after token, are no one dimension
        self.unseen(2)  # queries and keys are expanded to their own shape
        scaled = self.point(q, numbers=("scale of attention",))
        if apart and run.position != "rope":
            scaled = self.point(scaled)
        q = self.view(scaled, b * h, t, d)
        self.named(q, "attn.q scaled copy")
        k = self.permute(k, 0, 1, 3, 2)
        if apart and not (self.repeats or run.position == "rope"):
            k = self.point(k)
        keys = self.named(self.view(k, b * h, d, t), "attn.k copy")
        scores = self.named(self.bmm(q, keys), "attn.y scores")
        full = self.cast(self.view(scores, b, h, t, t), FLOAT)
        mask = self.given(MASK, (t, t), "bool")
        if not self.masked:
            self.unseen()  # minus infinity
            self.masked = True
        if run.n_layer > run.checkpoint_every:  # made once for all blocks, and kept
            masked = self.point(mask, full, self.given("minus infinity", (), FLOAT), dtype=FLOAT)
        else:
            masked = self.point(mask, full, dtype=FLOAT, numbers=("minus infinity",))
        maximum = self.named(self.sum(masked, 3), "attn.y maximum")
        raised = self.point(self.point(masked, maximum))
        total = self.named(self.sum(raised, 3), "attn.y sum")
        p = div = self.point(raised, total)
        low = dropped = self.cast(div, self.low)
        if run.dropout:
            dropped = self.dropped(low, "attn.y")
        self.named(div, "attn.y probabilities in float32")
        flat = self.view(dropped, b * h, t, t)
        if self.low == FLOAT and not run.dropout:
            self.named(div, "attn.y probabilities")
        else:
            self.named(flat, "attn.y probabilities")
        if apart and not self.repeats:
            v = self.point(v)
        self.unseen(2)  # so are probabilities and values
        values = self.named(self.view(v, b * h, t, d), "attn.v copy")
        y = self.view(self.bmm(flat, values), b, h, t, d)
        joined = self.permute(y, 0, 2, 1, 3)
        if h > 1:
            joined = self.point(joined)
        joined = self.named(self.view(joined, b, t, h * d), "attn.y")
        return [q, keys, values, flat, p], joined

    def attention_backward(self, dy: Op, f: Attended) -> Op:
        """Gradient of the projection, [B, T, width]."""
        run = self.run
        b, t, h, d = run.batch_size, run.block_size, run.n_head, run.head_size
        dy = self.permute(self.view(dy, b, t, h, d), 0, 2, 1, 3)
        if run.attention == "math":
            d_q, d_k, d_v = self.written_out_backward(dy, f)
        else:
            both = self.op(ATTENTION_BACKWARD, (dy, *f.reads), dy.shape, self.low)
            d_q, d_k, d_v = (self.op(ITEM, (both,), x.shape, self.low, i) for i, x in enumerate(f.reads[:3]))
            both.data = [d_q, d_k, d_v]
            by_head = self.low != FLOAT and run.position == "rope"
            for one in (d_q, d_k, d_v):
                one.strides = laid_out(one.shape, by_head and one is not d_v)
        if self.repeats:
            d_v, d_k = self.repeated_backward(d_v), self.repeated_backward(d_k)
        if run.position == "rope":
            d_k, d_q = self.turned_backward(d_k), self.turned_backward(d_q)
        if run.qk_norm:
            found = []
            for dx, heads in ((d_k, f.k), (d_q, f.q)):
                assert heads.normal is not None and heads.rstd is not None
                found.append(self.cast(self.rsqrt_backward(dx, heads.normal, heads.rstd), self.low))
            d_k, d_q = found
        parts = [self.permute(x, 0, 2, 1, 3) for x in (d_q, d_k, d_v)]
        return self.cat(*(self.view(x, b, t, x.shape[2] * d) for x in parts))

    def written_out_backward(self, dy: Op, f: Attended) -> tuple[Op, Op, Op]:
        b, h, t, d = dy.shape
        q, keys, values, flat, p = f.reads
        if b > 1 and h > 1:
            dy = self.point(dy)
        dy = self.view(dy, b * h, t, d)
        d_v = self.bmm(self.permute(flat, 0, 2, 1), dy)
        d_p = self.view(self.bmm(dy, self.permute(values, 0, 2, 1)), b, h, t, t)
        d_v = self.view(d_v, b, h, t, d)
        d_p = self.cast(self.dropped_backward(d_p, f.mask), FLOAT)
        weighed = self.point(d_p, p)
        row = self.sum(weighed, 3)
        d_s = self.point(self.point(p), row, weighed)
        d_s = self.point(self.given(MASK, (t, t), "bool"), d_s, dtype=FLOAT, numbers=(0,))
        d_s = self.view(self.cast(d_s, self.low), b * h, t, t)
        d_k = self.bmm(self.permute(q, 0, 2, 1), d_s)
        d_q = self.bmm(d_s, self.permute(keys, 0, 2, 1))
        d_k = self.permute(self.view(d_k, b, h, d, t), 0, 1, 3, 2)
        return self.point(self.view(d_q, b, h, t, d), numbers=("scale of attention",)), d_k, d_v
