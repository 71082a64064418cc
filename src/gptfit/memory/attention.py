"""Memory twins of attention: q, k and v as views of one projection, their changes, and the two kernels.

Shapes: [b, heads, t, head_size], whatever the order in memory. `rows` says which order that is: torch lays the
projection's views out by token, rotated ones by head; joining heads that lie by head takes a copy.
"""

from collections.abc import Callable
from dataclasses import dataclass

from gptfit.memory.autograd import Bundle, Shape, Storage, Tensor, Writer
from gptfit.memory.tape import Buffer, make_buffer

Saved = tuple[Storage, ...]


@dataclass(frozen=True, slots=True)
class Heads:
    """Queries, keys and values; `by_head` where q and k were made anew, laid out by head."""

    q: Tensor
    k: Tensor
    v: Tensor
    by_head: bool = False


def split_heads(w: Writer, qkv: Tensor, n_head: int, n_kv_head: int, head_size: int, copies: bool = False) -> Heads:
    """Views. Backward joins the three gradients; with `copies` each that lies by head is laid out by token first."""
    shape, dtype = qkv.shape, qkv.dtype
    b, t = shape[:2]
    name = qkv.storage.buffer.name

    def backward(grad: Tensor, saved: Saved) -> list[Tensor]:
        assert isinstance(grad, Bundle)
        for index in range(len(grad.parts) if copies else 0):
            part = grad.parts[index]
            if part.shape[1] > 1 and part.storage.buffer.name.endswith("by head"):
                grad.parts[index] = w.empty(f"{name} gradient part", "temporary", part.shape, dtype)
            del part
        return [w.empty(f"{name} gradient", "temporary", shape, dtype)]

    node = w.record(f"{name} split", (qkv.node,), (), backward)
    if node is not None:
        node.joins = True
    q, k, v = (Tensor(qkv.storage, (b, heads, t, head_size), dtype, node) for heads in (n_head, n_kv_head, n_kv_head))
    return Heads(q, k, v)


def rotate(w: Writer, x: Tensor, name: str) -> Tensor:
    """Rotary embedding: four products of half the size, their sum and difference, joined (model.rotate).
    Saves nothing of that size: cosines and sines need no gradient."""
    shape, dtype = x.shape, x.dtype
    half: Shape = (*shape[:-1], shape[-1] // 2)

    def part(label: str) -> Tensor:
        return w.empty(f"{name} {label}", "temporary", half, dtype)

    first, second = part("a cos"), part("b sin")
    low = part("low")
    del first, second
    first, second = part("b cos"), part("a sin")
    high = part("high")
    del first, second
    out = w.empty(name, "activation", shape, dtype)
    del low, high

    def backward(grad: Tensor, saved: Saved) -> list[Tensor]:
        grads = [part("gradient of a"), part("gradient of b")]
        negative = part("gradient negated")
        again = part("gradient of b again")
        del negative, again
        again = part("gradient of a again")
        del again
        result = w.empty(f"{name} gradient by head", "temporary", shape, dtype)
        grads.clear()
        return [result]

    out.node = w.record(name, (x.node,), (), backward)
    return out


def repeat_heads(w: Writer, x: Tensor, n_head: int, name: str) -> Tensor:
    """k or v of grouped heads, each repeated for its group: a copy, whose gradient is summed over the group."""
    b, _, t, head_size = x.shape
    dtype, shape = x.dtype, x.shape
    y = w.empty(f"{name} repeated", "activation", (b, n_head, t, head_size), dtype)

    def backward(grad: Tensor, saved: Saved) -> list[Tensor]:
        return [w.empty(f"{name} gradient by head", "temporary", shape, dtype)]

    y.node = w.record(f"{name} repeat", (x.node,), (), backward)
    return y


def flash_attention(w: Writer, heads: Heads, name: str) -> Tensor:
    """Causal attention, [b, t, n_embd]. Saves q, k, v, the output and the fp32 log-sum-exp of each row;
    backward makes the gradients of q, k and v.

    4·T·C FLOPs a token in forward, the causal half not taken off (PaLM, appendix B).
    """
    q, k, v = heads.q, heads.k, heads.v
    b, n_head, t, head_size = q.shape
    dtype = q.dtype
    if k.shape[1] != n_head and dtype == "float32":  # the fp32 kernel knows no groups (model.py)
        k, v = repeat_heads(w, k, n_head, f"{name} k"), repeat_heads(w, v, n_head, f"{name} v")
    shapes = (q.shape, k.shape, v.shape)
    labels = tuple("by head" if heads.by_head and part in "qk" else "by token" for part in "qkv")
    out = w.empty(name, "activation", (b, t, n_head * head_size), dtype)
    # The memory-efficient kernel, which takes fp32, pads the rows to 32 (aten/native/transformers/cuda/attention.cu).
    rows = t if dtype != "float32" else -(-t // 32) * 32
    lse = w.empty(f"{name} log-sum-exp", "activation", (b, n_head, rows), "float32")
    seed, offset = (w.empty(f"{name} random {part}", "activation", (), "int64") for part in ("seed", "offset"))
    w.flops += 4 * b * t * t * n_head * head_size * w.repeat

    def backward(grad: Tensor, saved: Saved) -> list[Tensor]:
        parts = [
            w.empty(f"{name} {part} gradient {label}", "temporary", shape, dtype)
            for part, shape, label in zip("qkv", shapes, labels, strict=True)
        ]
        if w.kernels and dtype == "float32":
            # delta, the row sums of grad · out, is made by tensor operations (attention_backward.cu).
            product = w.empty(f"{name} product", "workspace", shapes[0], dtype)
            sums = w.empty(f"{name} row sums", "workspace", (b, t, n_head), dtype)
            delta = w.empty(f"{name} delta", "workspace", (b, n_head, t), dtype)
            del product, sums, delta
        elif w.kernels:
            # flash-attention's backward sums dq in fp32 (flash_api.cpp, mha_bwd: dq_accum, softmax_d).
            scratch_shape = (b, n_head, -(-t // 128) * 128, -(-head_size // 32) * 32 + 1)
            scratch = w.empty(f"{name} dq accumulator", "workspace", scratch_shape, "float32")
            del scratch
        return parts

    kept = (*map(w.saving, (q, k, v)), out.storage, lse.storage, seed.storage, offset.storage)
    storages = {id(storage): storage for storage in kept}
    out.node = w.record(name, (q.node, k.node, v.node), tuple(storages.values()), backward)
    # The fp32 kernel's output lies by token, whatever its inputs do; flash-attention's lies as q does.
    return join_heads(w, out, n_head, name) if heads.by_head and dtype != "float32" else out


def join_heads(w: Writer, x: Tensor, n_head: int, name: str) -> Tensor:
    """Heads that lie by head, laid out by token: a copy, whose gradient is a view. One head lies both ways."""
    if n_head == 1:
        return x
    y = w.empty(f"{name} joined", "activation", x.shape, x.dtype)
    y.node = w.record(f"{name} join", (x.node,), (), lambda grad, saved: [grad])
    return y


def math_attention(w: Writer, heads: Heads, name: str, dropout: float = 0.0) -> Tensor:
    """Attention written out (model.math_attention): scores [b, n_head, t, t] in the compute dtype, in fp32, and
    softmax's fp32 output, which is saved beside its copy in the compute dtype."""
    q, k, v = heads.q, heads.k, heads.v
    b, n_head, t, head_size = q.shape
    n_kv_head, dtype = k.shape[1], q.dtype
    grouped = n_kv_head != n_head
    lies_by_head = heads.by_head or n_head == 1 or b == 1  # of one sequence a view by head is enough
    scores: Shape = (b, n_head, t, t)
    low = dtype != "float32"
    w.flops += 4 * b * t * t * n_head * head_size * w.repeat

    def like_q(label: str) -> Tensor:
        return w.empty(f"{name} {label}", "activation", q_shape, dtype)

    q_shape, kv_shape = q.shape, k.shape
    # Grouped heads are repeated; views by token are laid out by head for the batched matmul.
    k_copy = like_q("k copy") if grouped else None
    v_copy = like_q("v copy") if grouped else None
    scaled = like_q("q scaled")
    q_copy = scaled if lies_by_head else like_q("q copy")
    if k_copy is None:
        k_copy = Tensor(k.storage, k.shape, dtype) if lies_by_head else like_q("k copy")
    products = w.empty(f"{name} scores", "activation", scores, dtype)
    saved_products = (q_copy.storage, k_copy.storage) if w.grad_enabled else ()
    del scaled, q_copy, k_copy
    scores_32 = w.empty(f"{name} scores in float32", "activation", scores, "float32") if low else products
    del products
    probs = w.empty(f"{name} probabilities in float32", "activation", scores, "float32")
    weights = w.empty(f"{name} probabilities", "activation", scores, dtype) if low else probs
    saved_probs = (probs.storage,) if w.grad_enabled else ()
    del probs
    masks: list[Tensor] = []
    if dropout > 0 and w.training:
        dropped = w.empty(f"{name} dropped probabilities", "activation", scores, dtype)
        masks.append(w.empty(f"{name} dropout mask", "activation", scores, "bool"))
        weights = dropped
        del dropped
    if v_copy is None:
        v_copy = Tensor(v.storage, v.shape, dtype) if n_head == 1 or b == 1 else like_q("v copy")
    out = w.empty(f"{name} by head", "activation", q_shape, dtype)
    del scores_32

    def temporary(label: str, shape: Shape, kind: str) -> Tensor:
        return w.empty(f"{name} {label}", "temporary", shape, kind)

    def scores_backward(grad: Tensor, saved: Saved) -> list[Tensor]:
        grad_k, grad_q = temporary("k gradient by head", q_shape, dtype), temporary("q gradient raw", q_shape, dtype)
        grad_q = temporary("q gradient by head", q_shape, dtype)
        return [grad_q, grad_k]

    def mask_backward(grad: Tensor, saved: Saved) -> list[Tensor]:
        return [temporary("masked gradient", scores, "float32")]

    def raise_backward(grad: Tensor, saved: Saved) -> list[Tensor]:
        return [temporary("scores gradient", scores, dtype) if low else grad]

    def softmax_backward(grad: Tensor, saved: Saved) -> list[Tensor]:
        return [temporary("softmax gradient", scores, "float32")]

    def cast_backward(grad: Tensor, saved: Saved) -> list[Tensor]:
        return [temporary("probabilities gradient in float32", scores, "float32") if low else grad]

    def dropout_backward(grad: Tensor, saved: Saved) -> list[Tensor]:
        return [temporary("dropped gradient", scores, dtype)]

    def out_backward(grad: Tensor, saved: Saved) -> list[Tensor]:
        by_head = temporary("output gradient by head", q_shape, dtype) if n_head > 1 and b > 1 else grad
        grad_v, grad_weights = temporary("v gradient by head", q_shape, dtype), temporary("p gradient", scores, dtype)
        del by_head
        return [grad_weights, grad_v]

    def repeat_backward(label: str) -> Callable[[Tensor, Saved], list[Tensor]]:
        return lambda grad, saved: [temporary(f"{label} gradient by head", kv_shape, dtype) if grouped else grad]

    k_node = w.record(f"{name} k repeat", (k.node,), (), repeat_backward("k"))
    v_node = w.record(f"{name} v repeat", (v.node,), (), repeat_backward("v"))
    node = w.record(f"{name} scores", (q.node, k_node), saved_products, scores_backward)
    node = w.record(f"{name} in float32", (node,), (), raise_backward)
    node = w.record(f"{name} mask", (node,), (), mask_backward)
    node = w.record(f"{name} softmax", (node,), saved_probs, softmax_backward)
    node = w.record(f"{name} cast", (node,), (), cast_backward)
    if masks:
        node = w.record(f"{name} dropout", (node,), (masks.pop().storage,), dropout_backward)
    out.node = w.record(f"{name} values", (node, v_node), (weights.storage, v_copy.storage), out_backward)
    del saved_products, saved_probs, v_copy, weights
    joined: Shape = (b, t, n_head * head_size)
    return join_heads(w, Tensor(out.storage, joined, dtype, out.node), n_head, name)


def tables(position: str, attention: str, block_size: int, head_size: int, dtype: str) -> list[Buffer]:
    """What the blocks share: rope's cosines and sines, and the mask of attention written out."""
    found: list[Buffer] = []
    if position == "rope":
        found += [make_buffer(name, "buffer", (block_size, head_size // 2), dtype) for name in ("cos", "sin")]
    if attention == "math":
        found.append(make_buffer("mask", "buffer", (block_size, block_size), "bool"))
    return found
