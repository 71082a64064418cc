"""Which tensor could not be allocated: from the line that failed, and from arithmetic on the config."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from gptfit.config import RunConfig
from gptfit.memory.tape import DTYPE_BYTES, rounded
from gptfit.oom.pattern import lazy

MiB = 1 << 20
GiB = 1 << 30
Confidence = Literal["exact", "likely", "possible"]


@dataclass(frozen=True, slots=True)
class Tensor:
    """The tensor that was asked for. `shape` is empty where the text does not tell it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    n_bytes: int
    confidence: Confidence
    printed: bool = False  # whether the text itself prints shape and dtype


# Lines of GPT code and of torch on the way to an allocation, innermost first match; phase "" is any.
LINES: tuple[tuple[str, str, str], ...] = (
    (r"exp_avg_sq_sqrt|_foreach_sqrt|_foreach_div|_foreach_lerp|_foreach_mul\(|denom\s*=", "", "optimizer temporary"),
    (r"state\[.{1,24}\]\s*=|zeros_like\(\s*p\b|_init_group|momentum_buffer", "optimizer", "optimizer state"),
    (
        r"cross_entropy|log_softmax|nll_loss|CrossEntropyLoss|logits\.float\(\)|logits_to_keep|upcast",
        "",
        "cross entropy",
    ),
    (r"lm_head|unembed|output_projection|self\.head\(|logits\s*=|logits,?\s+\w*\s*=\s*self\.lm", "", "logits"),
    (r"q @ k|k\.transpose\(-2|softmax\(att|att\s*=|scores|attn_weights|baddbmm|bmm\(", "", "attention scores"),
    (r"scaled_dot_product_attention|flash_attn|c_proj\(y\)|att @ v", "", "attention output"),
    (r"gelu|silu|swiglu|c_fc|gate_proj|up_proj|mlp|relu", "", "mlp activation"),
    (r"wte\(|wpe\(|tok_emb|pos_emb|embed_tokens|F\.embedding|torch\.embedding", "", "embedding"),
    (r"\.to\(device|\bt\.to\(|_apply|\.cuda\(|from_pretrained|module\.to\(", "model_load", "parameter"),
)
_LINES = tuple((lazy(pattern), phase, name) for pattern, phase, name in LINES)
_STRIDED = lazy(
    r"empty_strided(?:_cuda)?\(\s*\(([0-9, ]{1,80})\)\s*,\s*\([0-9, ]{0,80}\)\s*,\s*torch\.([a-z0-9]{3,10})"
)
_BACKWARD = {"logits": "logits gradient", "cross entropy": "cross entropy gradient", "parameter": "parameter gradient"}


def segment_bytes(n_bytes: int) -> int:
    """What "Tried to allocate" prints for a tensor: the segment that cudaMalloc is asked for."""
    size = rounded(n_bytes)
    if size <= MiB:
        return 2 * MiB
    return 20 * MiB if size < 10 * MiB else -(-size // (2 * MiB)) * 2 * MiB


def prints_as(n_bytes: int, printed_bytes: int) -> bool:
    """Whether a segment of that tensor prints as the figure, which has two decimals of its unit."""
    unit = GiB if printed_bytes >= GiB else MiB
    return abs(segment_bytes(n_bytes) - printed_bytes) <= 0.00501 * unit


def name_tensor(phase: str, lines: Sequence[str], tried_bytes: int | None, run: RunConfig | None) -> Tensor | None:
    """The tensor that failed. `lines` are code and function names of the frames, outermost first.

    exact: the line names it and its size prints as asked; likely: one of the two; possible: several would do.
    """
    strided = _strided(lines, phase, run)
    if strided is not None and (tried_bytes is None or prints_as(strided.n_bytes, tried_bytes)):
        return strided
    named = _named(lines, phase)
    fitting = (
        []
        if run is None or tried_bytes is None
        else [t for t in candidates(run, phase) if prints_as(t.n_bytes, tried_bytes)]
    )
    if named:
        for tensor in fitting:
            if tensor.name == named:
                return Tensor(tensor.name, tensor.shape, tensor.dtype, tensor.n_bytes, "exact")
        dtype = "float32" if named.startswith(("cross entropy", "optimizer", "parameter")) else ""
        return Tensor(named, (), dtype, tried_bytes or 0, "likely")
    if not fitting:
        return _by_vocabulary(phase, tried_bytes) if run is None else None
    first = fitting[0]
    confidence: Confidence = "likely" if len({tensor.name for tensor in fitting}) == 1 else "possible"
    return Tensor(first.name, first.shape, first.dtype, first.n_bytes, confidence)


# Vocabularies that GPT trainers use: GPT-2's, padded; Llama's 1 to 3; nanochat's; Qwen's.
VOCABULARIES = (50304, 50257, 32000, 32768, 65536, 128256, 151936)


def _by_vocabulary(phase: str, tried_bytes: int | None) -> Tensor | None:
    """Without a config: a figure in backward that is so many whole rows of a usual vocabulary. Of figures drawn at
    random one in nine is (of those in multiples of 256 rows nine in ten would be)."""
    if phase != "backward" or tried_bytes is None or tried_bytes < 256 * MiB:
        return None
    rows = 1024 if tried_bytes < GiB else 4096  # a GiB is printed to 10 MiB
    for dtype, name in (("float32", "cross entropy gradient"), ("bfloat16", "logits gradient")):
        for vocab in VOCABULARIES:
            tokens = round(tried_bytes / (DTYPE_BYTES[dtype] * vocab) / rows) * rows
            n_bytes = tokens * vocab * DTYPE_BYTES[dtype]
            if tokens and prints_as(n_bytes, tried_bytes):
                return Tensor(name, (tokens, vocab), dtype, n_bytes, "possible")
    return None


def _strided(lines: Sequence[str], phase: str, run: RunConfig | None) -> Tensor | None:
    """A buffer of a compiled graph, whose source line gives shape and dtype."""
    for line in reversed(lines):
        match = _STRIDED.search(line)
        if match is None:
            continue
        shape = tuple(int(size) for size in match.group(1).split(",") if size.strip())
        dtype = match.group(2)
        if not shape or dtype not in DTYPE_BYTES:
            return None
        n_bytes = DTYPE_BYTES[dtype]
        for size in shape:
            n_bytes *= size
        vocab = run.vocab_size if run else None
        wide = shape[-1] == vocab or (vocab is None and shape[-1] >= 16384)
        if wide:
            name = "logits" if dtype != "float32" else "cross entropy"
            return Tensor(_in_phase(name, phase), shape, dtype, n_bytes, "exact", True)
        hidden = run is not None and shape[-1] == run.n_hidden
        return Tensor("mlp activation" if hidden else "attention output", shape, dtype, n_bytes, "likely")
    return None


def _named(lines: Sequence[str], phase: str) -> str:
    for line in reversed(lines):
        for pattern, only, name in _LINES:
            if (not only or only == phase) and pattern.search(line[:400]):
                return _in_phase(name, phase)
    return {"optimizer": "optimizer state", "model_load": "parameter"}.get(phase, "")


def _in_phase(name: str, phase: str) -> str:
    return _BACKWARD.get(name, name) if phase == "backward" else name


def candidates(run: RunConfig, phase: str) -> Iterator[Tensor]:
    """What a step of that run allocates in that phase, largest kinds first."""
    b, t, c, v, h = run.batch_size, run.block_size, run.n_embd, run.vocab_size, run.n_head
    low = run.dtype
    activations: list[tuple[str, tuple[int, ...], str]] = [
        ("cross entropy", (b * t, v), "float32"),
        ("logits", (b, t, v), low),
        ("attention scores", (b, h, t, t), low),
        ("mlp activation", (b, t, run.n_hidden), low),
        ("attention output", (b, t, c), low),
        ("embedding", (b, t, c), "float32"),
    ]
    weights = [(v, c), (run.n_hidden, c), (c + 2 * run.n_kv_head * run.head_size, c), (c, c), (t, c)]
    named: list[tuple[str, tuple[int, ...], str]] = []
    if phase in ("forward", "loss", "eval", "compile", "unknown"):
        named += activations
    if phase in ("backward", "unknown"):
        named += [(_BACKWARD.get(name, name), shape, dtype) for name, shape, dtype in activations]
        named += [("parameter gradient", shape, "float32") for shape in weights]
    if phase in ("optimizer", "unknown"):
        named += [(name, shape, "float32") for name in ("optimizer state", "optimizer temporary") for shape in weights]
    if phase in ("model_load", "checkpoint", "unknown"):
        named += [("parameter", shape, "float32") for shape in weights]
    for name, shape, dtype in named:
        n_bytes = DTYPE_BYTES[dtype]
        for size in shape:
            n_bytes *= size
        yield Tensor(name, shape, dtype, n_bytes, "possible")
