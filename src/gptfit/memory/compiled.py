"""Twins of the compiled step: nanoGPT's and ours, as torch.compile runs them."""

from gptfit.config import RunConfig
from gptfit.memory.attention import tables
from gptfit.memory.autograd import Tensor
from gptfit.memory.compiled_backward import Compiled
from gptfit.memory.compiled_forward import base_name
from gptfit.memory.compiled_plan import PADDED_FROM, ROW_ALIGNMENT_BYTES
from gptfit.memory.nanogpt import NanoGPT
from gptfit.memory.ops import placeholder, use
from gptfit.memory.ours import chunked_cross_entropy
from gptfit.memory.programs import collect
from gptfit.memory.tape import DTYPE_BYTES, Buffer, make_buffer


class CompiledNanoGPT(Compiled):
    """nanoGPT compiled: the model returns logits and loss; backward is handed zeros as the logits' gradient."""

    name = "nanogpt"
    kept_buffers = NanoGPT.kept_buffers

    def positions(self) -> list[Tensor]:
        """The indices; and the rows, where the partitioner finds them cheaper than the sum of both embeddings."""
        w, run = self.w, self.run
        kept = [w.empty("pos", "activation", (run.block_size,), "int64")]
        if not w.grad_enabled:
            return kept
        if run.batch_size > 2 or (run.batch_size == 2 and run.n_embd > 512):  # as observed
            kept.append(w.empty("pos_emb", "activation", (run.block_size, run.n_embd), run.param_dtype))
        return kept

    def forward(self, idx: Tensor, targets: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        w = self.w
        assert targets is not None, "sampling runs uncompiled"
        self.inputs = [targets, idx]
        final = self.blocks_forward()
        logits, scalars = logits_and_loss(self)
        self.head_kept = [*final, *scalars] if w.grad_enabled else []
        return w.empty("mean loss", "activation", (), "float32"), [logits]

    def backward(self, loss: Tensor) -> None:
        w = self.w
        shape = self.shape(self.run.vocab_size)
        w.mark("zeros for the unused logits", "loss backward")
        zeros = w.empty("zero gradient of the returned logits", "logits", shape, self.low)
        w.mark("log_softmax")
        grads = [w.empty("logits gradient", "logits", shape, self.low)]
        self.before_logits_go()
        del zeros
        self.head_backward(grads)

    def saved_bytes(self) -> int:
        logits = make_buffer("lm_head", "logits", self.shape(self.run.vocab_size), self.low)
        return super().saved_bytes() + logits.n_bytes


class CompiledOurs(Compiled):
    """gptfit's model compiled: with the chunked loss up to the final norm, with the full loss all of it."""

    name = "gptfit"

    @property
    def plans_kernels(self) -> bool:
        """Attention written out makes matrices of scores, whose number decides: that takes the kernels' order."""
        return super().plans_kernels or (self.run.attention == "math" and self.w.grad_enabled)

    def buffers(self) -> list[Buffer]:
        run = self.run
        return tables(run.position, run.attention, run.block_size, run.head_size, run.dtype)

    def forward(self, idx: Tensor, targets: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        w, run = self.w, self.run
        assert targets is not None, "sampling runs uncompiled"
        self.inputs = [targets, idx]
        final = self.blocks_forward()
        if run.loss == "full":
            logits, scalars = logits_and_loss(self)
            self.head_kept = [*final, *scalars, logits] if w.grad_enabled else []
            return w.empty("mean loss", "activation", (), "float32"), []
        w.mark("loss", "loss" if w.training else "evaluation")
        x = final.pop()
        self.head_kept = final if w.grad_enabled else []
        self.entry = placeholder()
        x.node = self.entry if w.grad_enabled else None
        name = "wte.weight" if run.tie_embeddings else "lm_head.weight"
        weight = use(w, w.parameter(name, (run.vocab_size, run.n_embd), run.param_dtype))
        self.weight_node = weight.node
        return chunked_cross_entropy(w, run, x, weight), []

    def backward(self, loss: Tensor) -> None:
        w, run = self.w, self.run
        w.mark("loss", "loss backward")
        if run.loss == "full":
            grads = self.logits_gradient()
            self.before_logits_go()
            self.drop_head("lm_head")
            self.head_backward(grads)
            return
        root, loss.node = loss.node, None
        assert root is not None and self.weight_node is not None
        if run.tie_embeddings:
            self.weight_node.awaited += 1  # the embedding's part comes when the compiled backward returns
        arrived = {root: w.empty("loss gradient", "temporary", (), "float32")}
        del root
        w.backward(collect(w), arrived)
        self.blocks_backward(arrived.pop(self.entry), tied_here=False)
        if run.tie_embeddings:
            w.deliver(self.weight_node, arrived[self.weight_node], arrived)
        self.accumulate(but="wte.weight" if run.tie_embeddings else "lm_head.weight")

    def logits_gradient(self) -> list[Tensor]:
        """Written over the logits, which nobody else has (torch/_functorch/config.py, donated_buffer), unless
        inductor pads their rows to whole 128 bytes (torch/_inductor/config.py, padding_alignment_bytes)."""
        vocab_size = self.run.vocab_size
        if vocab_size > PADDED_FROM and vocab_size * DTYPE_BYTES[self.low] % ROW_ALIGNMENT_BYTES:
            return [self.w.empty("logits gradient", "logits", self.shape(vocab_size), self.low)]
        return [tensor for tensor in self.head_kept if base_name(tensor) == "lm_head"]

    def saved_bytes(self) -> int:
        if self.run.loss == "full":
            return super().saved_bytes()
        nodes = (storage for node in self.w.nodes for storage in node.saved if storage.writer is not None)
        return super().saved_bytes() + sum(storage.buffer.n_bytes for storage in nodes)


def logits_and_loss(program: Compiled) -> tuple[Tensor, list[Tensor]]:
    """The logits; the head's weight copy and two numbers a token that the loss keeps."""
    w, run = program.w, program.run
    name = "wte.weight" if run.tie_embeddings else "lm_head.weight"
    copy = program.weight(name, (run.vocab_size, run.n_embd))
    w.flops += 2 * program.tokens[0] * program.tokens[1] * run.n_embd * run.vocab_size
    logits = w.empty("lm_head", "logits", program.shape(run.vocab_size), program.low)
    w.mark("cross entropy", "loss" if w.training else "evaluation")
    scalars = [program.activation(f"loss {part}", 1, "float32") for part in ("maximum", "log-sum")]
    return logits, [*([copy] if copy is not None else []), *scalars]


def assumptions(run: RunConfig, program: str) -> list[str]:
    """What the twin of a compiled run rests on, and where it is known to be off; nothing for an eager run."""
    if not run.compile:
        return []
    lines = ["compiled: as inductor of torch 2.13 plans it on a CPU, which fuses nearly as on CUDA"]
    if program == "nanogpt":
        lines.append(
            "the zero gradient of the returned logits is let go after its use: torch before 2.12 holds it to the end "
            "of backward"
        )
    if run.vocab_size % 8 and run.dtype != "float32":
        lines.append(f"padding of matmuls to even shapes is left out: vocab_size {run.vocab_size} is no multiple of 8")
    few_tokens = run.batch_size * run.block_size <= run.n_embd
    if few_tokens and run.activation_checkpointing != "block":
        lines.append(
            f"the order of backward is approximate for {run.batch_size * run.block_size} tokens, no more than n_embd "
            f"{run.n_embd}: weight gradients are larger than what they set free; up to a tenth either way"
        )
    if run.activation_checkpointing != "block" and run.attention == "math" and run.dropout and run.dtype != "float32":
        lines.append(
            "what the forward of attention written out needs beside what it keeps is left out: up to a thirtieth"
        )
    if run.activation_checkpointing == "block":
        grouped = run.dtype == "float32" and run.qk_norm and run.n_kv_head != run.n_head
        dropped = run.param_dtype == "bfloat16" and run.dropout and run.checkpoint_every > 1
        capped = run.loss == "full" and run.logit_softcap > 0
        if grouped or dropped or capped:
            lines.append("what blocks that are run again keep is approximate here: up to a thirtieth either way")
    return lines
