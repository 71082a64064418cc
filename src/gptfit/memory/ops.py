"""Memory twins of torch's ops: what each allocates in forward, keeps for backward, and makes in backward.

An op is a function on tensors that have no values. Its saved tensors and the gradients that its
backward makes are those of torch's derivatives.yaml and CUDA kernels; scratch inside a kernel is not
a tensor and is counted in overhead.py. Every op is compared with a trace of the real one.
"""

from gptfit.memory.autograd import Node, Parameter, Shape, Storage, Tensor, Writer

Saved = tuple[Storage, ...]


def use(w: Writer, param: Parameter) -> Tensor:
    """The parameter as an operand. It is alive all along, so its storage writes nothing."""
    if param.storage is None:
        param.storage = Storage(w, param.buffer)
        param.storage.forget()
    node = None
    if w.grad_enabled:
        block = w.shift + (w.rounds.start if w.rounds else 0)
        node = param.accumulate.setdefault(block, Node("AccumulateGrad", (), (), None, param))
    return Tensor(param.storage, param.shape, param.dtype, node)


def cast(w: Writer, x: Tensor, dtype: str, name: str = "") -> Tensor:
    """`x.to(dtype)`: a copy where the dtype differs; backward casts the gradient back."""
    if x.dtype == dtype:
        return x
    source, shape, buffer = x.dtype, x.shape, x.storage.buffer
    label = name or f"{buffer.name} as {dtype}"
    category = "activation" if buffer.category == "parameter" else buffer.category
    y = w.empty(label, category, shape, dtype)

    def backward(grad: Tensor, saved: Saved) -> list[Tensor]:
        return [w.empty(f"{buffer.name} gradient", "temporary", shape, source)]

    y.node = w.record(f"cast {buffer.name}", (x.node,), (), backward)
    return y


def linear(
    w: Writer, x: Tensor, weight: Tensor, bias: Tensor | None, name: str, category: str = "activation"
) -> Tensor:
    """x[..., in] @ weight[out, in].T + bias. Saves x and the weight; backward makes both gradients, then the
    bias's by summing. 2·in·out FLOPs a token."""
    shape: Shape = (*x.shape[:-1], weight.shape[0])
    x_shape, w_shape, dtype = x.shape, weight.shape, x.dtype
    x_node, weight_node, bias_node = x.node, weight.node, bias.node if bias is not None else None
    y = w.empty(name, category, shape, dtype)
    w.multiplies()
    w.flops += 2 * _numel(x_shape) * weight.shape[0] * w.repeat

    def backward(grad: Tensor, saved: Saved) -> list[Tensor | None]:
        grad_x = w.empty(f"{name} input gradient", "temporary", x_shape, dtype) if x_node else None
        w.multiplies()
        grad_w = w.empty(f"{name} weight gradient", "temporary", w_shape, dtype) if weight_node else None
        grad_b = w.empty(f"{name} bias gradient", "temporary", (w_shape[0],), dtype) if bias_node else None
        for made in (grad_x, grad_w):
            if made is not None:
                made.is_view = True  # reshaped or transposed
        return [grad_x, grad_w, grad_b]

    saved = (x.storage, weight.storage) if x_node else (x.storage,)
    y.node = w.record(name, (x_node, weight_node, bias_node), saved, backward)
    return y


def layer_norm(w: Writer, x: Tensor, weight: Tensor, bias: Tensor | None, name: str) -> Tensor:
    """Saves x and the fp32 mean and reciprocal deviation of each row."""
    rows: Shape = (*x.shape[:-1], 1)
    shape, dtype, w_shape = x.shape, x.dtype, weight.shape
    has_bias = bias is not None
    y = w.empty(name, "activation", shape, dtype)
    mean = w.empty(f"{name} mean", "activation", rows, "float32")
    rstd = w.empty(f"{name} rstd", "activation", rows, "float32")

    def backward(grad: Tensor, saved: Saved) -> list[Tensor | None]:
        grad_x = w.empty(f"{name} input gradient", "temporary", shape, dtype)
        grad_w = w.empty(f"{name} weight gradient", "temporary", w_shape, weight_dtype)
        grad_b = w.empty(f"{name} bias gradient", "temporary", w_shape, weight_dtype) if has_bias else None
        return [grad_x, grad_w, grad_b]

    weight_dtype = weight.dtype
    inputs = (x.node, weight.node, bias.node if bias is not None else None)
    y.node = w.record(name, inputs, (x.storage, weight.storage, mean.storage, rstd.storage), backward)
    return y


def elementwise(w: Writer, x: Tensor, name: str, saves: str = "input", category: str = "activation") -> Tensor:
    """A function of each element, such as gelu, silu or tanh: saves its input (or its output), one gradient."""
    shape, dtype = x.shape, x.dtype
    y = w.empty(name, category, shape, dtype)

    def backward(grad: Tensor, saved: Saved) -> list[Tensor]:
        return [w.empty(f"{name} input gradient", "temporary", shape, dtype)]

    y.node = w.record(name, (x.node,), (x.storage,) if saves == "input" else (y.storage,), backward)
    return y


def multiply(w: Writer, x: Tensor, y: Tensor, name: str) -> Tensor:
    """x · y of the same shape: saves both, backward makes both gradients."""
    shape, dtype = x.shape, x.dtype
    out = w.empty(name, "activation", shape, dtype)

    def backward(grad: Tensor, saved: Saved) -> list[Tensor]:
        return [w.empty(f"{name} gradient {side}", "temporary", shape, dtype) for side in (1, 2)]

    out.node = w.record(name, (x.node, y.node), (y.storage, x.storage), backward)
    return out


def square(w: Writer, x: Tensor, name: str) -> Tensor:
    """x²: saves x; pow's backward makes x^1 and 2·x^1 on its way (derivatives.yaml, pow.Tensor_Scalar)."""
    shape, dtype = x.shape, x.dtype
    y = w.empty(name, "activation", shape, dtype)

    def backward(grad: Tensor, saved: Saved) -> list[Tensor]:
        power = w.empty(f"{name} power", "temporary", shape, dtype)
        doubled = w.empty(f"{name} doubled", "temporary", shape, dtype)
        result = w.empty(f"{name} input gradient", "temporary", shape, dtype)
        del power, doubled
        return [result]

    y.node = w.record(name, (x.node,), (x.storage,), backward)
    return y


def dropout(w: Writer, x: Tensor, p: float, name: str) -> Tensor:
    """CUDA's native_dropout: the output and a boolean mask, which is saved. Nothing where p is 0 or in evaluation."""
    if p == 0.0 or not w.training:
        return x
    shape, dtype = x.shape, x.dtype
    y = w.empty(name, "activation", shape, dtype)
    mask = w.empty(f"{name} mask", "activation", shape, "bool")

    def backward(grad: Tensor, saved: Saved) -> list[Tensor]:
        return [w.empty(f"{name} input gradient", "temporary", shape, dtype)]

    y.node = w.record(name, (x.node,), (mask.storage,), backward)
    return y


def add(w: Writer, x: Tensor, y: Tensor, name: str, shift: int = 0) -> Tensor:
    """x + y in x's (wider) dtype. Saves nothing; the gradient is passed on, cast for a narrower y."""
    shape, y_dtype = x.shape, y.dtype
    out = w.empty(name, "activation", shape, x.dtype, shift)

    def backward(grad: Tensor, saved: Saved) -> list[Tensor]:
        if grad.dtype == y_dtype:
            return [grad, grad]
        return [grad, w.empty(f"{name} gradient as {y_dtype}", "temporary", shape, y_dtype)]

    out.node = w.record(name, (x.node, y.node), (), backward)
    return out


def add_positions(w: Writer, tokens: Tensor, positions: Tensor, name: str) -> Tensor:
    """[B,T,C] + [T,C]: backward sums the gradient over B for the positions."""
    shape, p_shape, dtype = tokens.shape, positions.shape, positions.dtype
    out = w.empty(name, "activation", shape, tokens.dtype)

    def backward(grad: Tensor, saved: Saved) -> list[Tensor]:
        return [grad, w.empty("position gradient", "temporary", p_shape, dtype)]

    out.node = w.record(name, (tokens.node, positions.node), (), backward)
    return out


def embedding(w: Writer, indices: Tensor, weight: Tensor, name: str) -> Tensor:
    """Rows of weight[V,C]. Saves the indices; backward makes a dense gradient of the whole table."""
    shape, dtype = weight.shape, weight.dtype
    y = w.empty(name, "activation", (*indices.shape, shape[1]), dtype)

    def backward(grad: Tensor, saved: Saved) -> list[Tensor]:
        return [w.empty(f"{name} weight gradient", "temporary", shape, dtype)]

    y.node = w.record(name, (weight.node,), (indices.storage,), backward)
    return y


def cross_entropy(w: Writer, logits: Tensor, targets: Tensor, name: str = "cross entropy") -> Tensor:
    """F.cross_entropy in fp32: log_softmax's output is saved; backward makes the nll's gradient, then
    log_softmax's, each as large as the logits in fp32."""
    shape = logits.shape
    log_probs = w.empty(name, "logits", shape, "float32")

    def log_softmax_backward(grad: Tensor, saved: Saved) -> list[Tensor]:
        return [w.empty(f"{name} gradient", "logits", shape, "float32")]

    log_probs.node = w.record("log_softmax", (logits.node,), (log_probs.storage,), log_softmax_backward)
    loss = w.empty("mean loss", "activation", (), "float32")
    total_weight = w.empty("loss weight", "activation", (), "float32")

    def nll_backward(grad: Tensor, saved: Saved) -> list[Tensor]:
        return [w.empty("nll gradient", "logits", shape, "float32")]

    saved = (log_probs.storage, targets.storage, total_weight.storage)
    loss.node = w.record("nll_loss", (log_probs.node,), saved, nll_backward)
    return loss


def scale(w: Writer, x: Tensor, name: str, category: str = "activation") -> Tensor:
    """A tensor times a constant: nothing is saved."""
    y = w.empty(name, category, x.shape, x.dtype)
    shape, dtype = x.shape, x.dtype

    def backward(grad: Tensor, saved: Saved) -> list[Tensor]:
        return [w.empty(f"{name} gradient", "temporary", shape, dtype)]

    y.node = w.record(name, (x.node,), (), backward)
    return y


def placeholder() -> Node:
    """Stands for the node that made a tensor outside the loop body that uses it."""
    return Node("input", (), (), None)


def _numel(shape: Shape) -> int:
    n = 1
    for size in shape:
        n *= size
    return n
