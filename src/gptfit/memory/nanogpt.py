"""The step of nanoGPT's model.py and train.py, eager, as the code stands: twin of GPT.forward and the loop.

Under autocast (bf16, fp16) CUDA runs linears and attention in the low precision, and layer_norm and
cross_entropy in fp32; a parameter's low-precision copy is made once in a forward and cached to its end.
Functions mirror nanoGPT's modules, so local variables live as long here as there.
"""

from collections.abc import Callable
from typing import Any

from gptfit.config import RunConfig
from gptfit.memory import ops
from gptfit.memory.autograd import Node, Storage, Tensor, Writer
from gptfit.memory.tape import Buffer, make_buffer


def call(module: Callable[..., Tensor], *args: Any) -> Tensor:
    """nn.Module's __call__ holds the arguments until forward returns, whatever forward does with its names."""
    return module(*args)


class Autocast:
    """torch.autocast's casts on CUDA: activations each time, leaf parameters once (ATen/autocast_mode.cpp)."""

    def __init__(self, w: Writer, dtype: str) -> None:
        self.w = w
        self.dtype = dtype
        self.cache: dict[str, Tensor] = {}

    def low(self, x: Tensor) -> Tensor:
        return ops.cast(self.w, x, self.dtype)

    def parameter(self, weight: Tensor) -> Tensor:
        if weight.dtype == self.dtype:
            return weight
        name = weight.storage.buffer.name
        if name not in self.cache:
            self.cache[name] = ops.cast(self.w, weight, self.dtype)
        return self.cache[name]

    def linear(self, x: Tensor, name: str, n_out: int, bias: bool, tied: str = "") -> Tensor:
        w = self.w
        weight = ops.use(w, w.parameter(tied or f"{name}.weight", (n_out, x.shape[-1]), "float32"))
        x, weight = self.low(x), self.parameter(weight)
        b = self.parameter(ops.use(w, w.parameter(f"{name}.bias", (n_out,), "float32"))) if bias else None
        return ops.linear(w, x, weight, b, name, "logits" if tied else "activation")


def layer_norm(w: Writer, x: Tensor, name: str, bias: bool) -> Tensor:
    weight = ops.use(w, w.parameter(f"{name}.weight", (x.shape[-1],), "float32"))
    b = ops.use(w, w.parameter(f"{name}.bias", (x.shape[-1],), "float32")) if bias else None
    return ops.layer_norm(w, x, weight, b, name)


class NanoGPT:
    """One micro-step of nanoGPT. `kept` is what the loop's variables hold from one micro-step to the next."""

    name = "nanogpt"

    def __init__(self, w: Writer, run: RunConfig) -> None:
        self.w = w
        self.run = run
        self.stream = make_buffer("h.*.x", "activation", (run.batch_size, run.block_size, run.n_embd), "float32")

    def attention(self, cast: Autocast, x: Tensor) -> Tensor:
        w, run = self.w, self.run
        qkv = call(cast.linear, x, "h.*.attn.c_attn", 3 * run.n_embd, run.bias)
        y = ops.flash_attention(w, qkv, run.n_head, run.n_head, run.head_size, "h.*.attn.y")
        y = call(cast.linear, y, "h.*.attn.c_proj", run.n_embd, run.bias)
        return ops.dropout(w, y, run.dropout, "h.*.attn.resid_dropout")

    def mlp(self, cast: Autocast, x: Tensor) -> Tensor:
        w, run = self.w, self.run
        x = call(cast.linear, x, "h.*.mlp.c_fc", 4 * run.n_embd, run.bias)
        x = ops.elementwise(w, x, "h.*.mlp.gelu")
        x = call(cast.linear, x, "h.*.mlp.c_proj", run.n_embd, run.bias)
        return ops.dropout(w, x, run.dropout, "h.*.mlp.dropout")

    def block(self, cast: Autocast, x: Tensor) -> Tensor:
        w, run = self.w, self.run
        x = ops.add(w, x, call(self.attention, cast, layer_norm(w, x, "h.*.ln_1", run.bias)), "h.*.x_mid")
        return ops.add(w, x, call(self.mlp, cast, layer_norm(w, x, "h.*.ln_2", run.bias)), self.stream.name, shift=1)

    def embed(self, idx: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The stream into the first block, and forward's local variables that live until it returns."""
        w, run = self.w, self.run
        pos = w.empty("pos", "activation", (run.block_size,), "int64")
        wte = w.parameter("wte.weight", (run.vocab_size, run.n_embd), "float32")
        wpe = w.parameter("wpe.weight", (run.block_size, run.n_embd), "float32")
        tok_emb = ops.embedding(w, idx, ops.use(w, wte), "tok_emb")
        pos_emb = ops.embedding(w, pos, ops.use(w, wpe), "pos_emb")
        dropped = run.dropout > 0 and w.grad_enabled
        x = ops.add_positions(w, tok_emb, pos_emb, "emb" if dropped else self.stream.name)
        return call(ops.dropout, w, x, run.dropout, self.stream.name), [pos, tok_emb, pos_emb]

    def kept_buffers(self) -> list[Buffer]:
        """What `logits, loss` still hold when the next micro-step begins."""
        run = self.run
        shape = (run.batch_size, run.block_size, run.vocab_size)
        return [
            make_buffer("lm_head", "logits", shape, run.dtype),
            make_buffer("scaled loss", "activation", (), "float32"),
        ]

    def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, list[list[Node]]]:
        """logits, loss, and the nodes of embedding, one block, and head."""
        w, run = self.w, self.run
        cast = Autocast(w, run.dtype)
        w.mark("embedding", "forward")
        x, local = self.embed(idx)
        stages = [w.nodes]
        w.nodes = []
        first_node, x = hand_over(x)
        with w.loop(run.n_layer):
            w.mark("block")
            x = take_over(w, self.stream, ops.placeholder())
            self.entry = x.node
            x = self.block(cast, x)
            x.storage.forget()
        stages.append(w.nodes)
        w.nodes = []
        self.first_node, self.last_node = first_node, x.node
        x = take_over(w, self.stream, x.node, shift=run.n_layer)
        w.mark("head")
        x = layer_norm(w, x, "ln_f", run.bias)
        logits = cast.linear(x, "lm_head", run.vocab_size, False, tied="wte.weight")
        w.mark("cross entropy", "loss")
        loss = self.cross_entropy(cast, logits, targets)
        stages.append(w.nodes)
        w.nodes = []
        del local
        return logits, loss, stages

    def cross_entropy(self, cast: Autocast, logits: Tensor, targets: Tensor) -> Tensor:
        return ops.cross_entropy(self.w, ops.cast(self.w, logits, "float32", "logits as float32"), targets)


def hand_over(x: Tensor) -> tuple[Node | None, None]:
    """Lets go of the stream, which the loop's first round takes over."""
    x.storage.forget()
    return x.node, None


def take_over(w: Writer, buffer: Buffer, node: Node | None, shift: int = 0) -> Tensor:
    """A tensor that was made elsewhere on the tape: freeing it is ours from here on."""
    return Tensor(Storage(w, buffer, shift), buffer.shape, buffer.dtype, node)
