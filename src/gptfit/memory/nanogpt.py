"""nanoGPT's model.py and train.py, eager, as the code stands.

Under autocast (bf16, fp16) CUDA runs linears and attention in the low precision, and layer_norm and
cross_entropy in fp32; a parameter's low-precision copy is made once in a forward and cached to its end
(ATen/autocast_mode.cpp). Functions mirror nanoGPT's modules, so that local variables live as long here.
"""

from gptfit.config import RunConfig
from gptfit.memory import ops
from gptfit.memory.attention import flash_attention, split_heads
from gptfit.memory.autograd import Tensor, Writer
from gptfit.memory.programs import Eager, call
from gptfit.memory.tape import Buffer, make_buffer


class NanoGPT(Eager):
    """The twin of nanoGPT's GPT. It returns logits and loss, and the training loop holds on to both."""

    name = "nanogpt"

    def __init__(self, w: Writer, run: RunConfig) -> None:
        super().__init__(w, run)
        self.cache: dict[str, Tensor] = {}

    def kept_buffers(self) -> list[Buffer]:
        run = self.run
        return [make_buffer("lm_head", "logits", (run.batch_size, run.block_size, run.vocab_size), run.dtype)]

    def weight(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The parameter's copy in the autocast dtype."""
        param = self.w.parameter(name, shape, self.run.param_dtype)
        if name not in self.cache:
            self.cache[name] = ops.cast(self.w, ops.use(self.w, param), self.run.dtype)
        return self.cache[name]

    def linear(self, x: Tensor, name: str, n_out: int, bias: bool) -> Tensor:
        x, weight = ops.cast(self.w, x, self.run.dtype), self.weight(f"{name}.weight", (n_out, x.shape[-1]))
        return ops.linear(self.w, x, weight, self.weight(f"{name}.bias", (n_out,)) if bias else None, name)

    def layer_norm(self, x: Tensor, name: str) -> Tensor:
        w, shape, dtype = self.w, (self.run.n_embd,), self.run.param_dtype
        weight = ops.use(w, w.parameter(f"{name}.weight", shape, dtype))
        bias = ops.use(w, w.parameter(f"{name}.bias", shape, dtype)) if self.run.bias else None
        return ops.layer_norm(w, x, weight, bias, name)

    def attention(self, x: Tensor) -> Tensor:
        w, run = self.w, self.run
        qkv = call(self.linear, x, "h.*.attn.c_attn", 3 * run.n_embd, run.bias)
        heads = split_heads(w, qkv, run.n_head, run.n_head, run.head_size)
        y = flash_attention(w, heads, "h.*.attn.y")
        y = call(self.linear, y, "h.*.attn.c_proj", run.n_embd, run.bias)
        return call(ops.dropout, w, y, run.dropout, "h.*.attn.resid_dropout")

    def mlp(self, x: Tensor) -> Tensor:
        w, run = self.w, self.run
        x = call(self.linear, x, "h.*.mlp.c_fc", 4 * run.n_embd, run.bias)
        x = call(ops.elementwise, w, x, "h.*.mlp.gelu")
        x = call(self.linear, x, "h.*.mlp.c_proj", run.n_embd, run.bias)
        return call(ops.dropout, w, x, run.dropout, "h.*.mlp.dropout")

    def block(self, x: Tensor) -> Tensor:
        w = self.w
        x = ops.add(w, x, call(self.attention, self.layer_norm(x, "h.*.ln_1")), "h.*.x_mid")
        return ops.add(w, x, call(self.mlp, self.layer_norm(x, "h.*.ln_2")), self.stream.name, shift=1)

    def embed(self, idx: Tensor) -> tuple[Tensor, list[Tensor]]:
        w, run = self.w, self.run
        self.cache.clear()
        pos = w.empty("pos", "activation", (run.block_size,), "int64")
        wte = w.parameter("wte.weight", (run.vocab_size, run.n_embd), run.param_dtype)
        wpe = w.parameter("wpe.weight", (run.block_size, run.n_embd), run.param_dtype)
        tok_emb = ops.embedding(w, idx, ops.use(w, wte), "tok_emb")
        pos_emb = ops.embedding(w, pos, ops.use(w, wpe), "pos_emb")
        dropped = run.dropout > 0 and w.training
        x = ops.add_positions(w, tok_emb, pos_emb, "emb" if dropped else self.stream.name)
        return call(ops.dropout, w, x, run.dropout, self.stream.name), [pos, tok_emb, pos_emb]

    def head(self, x: Tensor, targets: Tensor) -> tuple[Tensor, list[Tensor]]:
        w, run = self.w, self.run
        x = self.layer_norm(x, "ln_f")
        weight = self.weight("wte.weight", (run.vocab_size, run.n_embd))
        logits = ops.linear(w, ops.cast(w, x, run.dtype), weight, None, "lm_head", "logits")
        del weight
        w.mark("cross entropy", "loss" if w.training else "evaluation")
        loss = ops.cross_entropy(w, ops.cast(w, logits, "float32", "logits as float32"), targets)
        self.cache.clear()
        return loss, [logits]

    def last_logits(self, x: Tensor) -> Tensor:
        """What forward does without targets: the head on a copy of the last position."""
        w, run = self.w, self.run
        x = self.layer_norm(x, "ln_f")
        last = w.empty("last position", "activation", (run.batch_size, 1, run.n_embd), x.dtype)
        weight = self.weight("wte.weight", (run.vocab_size, run.n_embd))
        logits = ops.linear(w, ops.cast(w, last, run.dtype), weight, None, "lm_head", "logits")
        self.cache.clear()
        return logits
