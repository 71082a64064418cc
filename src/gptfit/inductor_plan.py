"""What torch.compile would allocate, without compiling: inductor's own plan, run on fake tensors.

AOTAutograd traces forward and backward into one graph, inductor's partitioner cuts it in two, its passes and
lowering fuse each into kernels, and its code generator writes a Python function that allocates every buffer,
calls the kernels, and reuses and deletes buffers. All of that runs here as it does in torch.compile; then
the kernels are left out. What remains is a step that allocates and frees what the compiled one does, in that order,
under AOTAutograd's own runtime: it makes the zero gradients of unused outputs, too.

The lowering is for the CPU, with what a GPU computes again and a CPU keeps set right. It fuses nearly as for CUDA;
cuBLAS padding of odd shapes (vocab_size 50257) and Triton's choices in detail are not in it.
"""

import builtins
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch.nn.utils.stateless import _reparametrize_module

from gptfit.recorder import Recorder, tensors_in

Call = Callable[[list[Any]], Any]

# Plain C++ without vectors, so that no compiler is asked what it can do; and nothing from or into a cache.
SETTINGS = {"cpp.simdlen": 1, "fx_graph_cache": False}


def plan_module(model: nn.Module, recorder: Recorder, method: str = "forward", budget: float = 1.0) -> None:
    """Replaces `method` of `model` by what torch.compile would run for it, kernels left out. Training and evaluation
    are lowered each at its first call, unrecorded. `budget` is torch's activation_memory_budget. From torch 2.6 on a
    backward may write over saved tensors that no one else has, unless a user turned that off (donated_buffer)."""
    original = getattr(type(model), method)
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if method == "hidden":  # Dynamo takes what the code reads, which a head of its own is not
        own.pop("lm_head.weight", None)
    ready: dict[bool, Callable[..., Any]] = {}

    def functional(tensors: list[Tensor], *inputs: Tensor) -> Any:
        with _reparametrize_module(model, dict(zip(own, tensors, strict=True)), tie_weights=True), marked_checkpoints():
            return original(model, *inputs)

    def call(*inputs: Tensor) -> Any:
        key = torch.is_grad_enabled()
        if key not in ready:
            with (
                recorder.paused(),
                warnings.catch_warnings(action="ignore"),
                functorch_config.patch(activation_memory_budget=budget),
            ):  # they are about compiling, or torch's own
                ready[key] = planned(functional, recorder)
                lower_now(ready[key], list(own.values()), tuple(torch.empty_like(tensor) for tensor in inputs))
        return ready[key](list(own.values()), *inputs)

    setattr(model, method, call)


def plan_function(function: Callable[..., Any], recorder: Recorder) -> Callable[..., Any]:
    """What torch.compile with dynamic=False would run for `function` of tensors and constants, without gradients,
    kernels left out. Each combination of shapes and constants is lowered at its first call, unrecorded."""
    ready: dict[tuple[object, ...], Callable[..., Any]] = {}

    def call(*given: Any) -> Any:
        tensors = [value for value in given if isinstance(value, Tensor)]
        key = tuple((value.shape, value.dtype) if isinstance(value, Tensor) else value for value in given)
        if key not in ready:
            constants = [None if isinstance(value, Tensor) else value for value in given]
            with recorder.paused(), warnings.catch_warnings(action="ignore"):
                ready[key] = planned(with_constants(function, constants), recorder)
                lowered_once(ready[key], [torch.empty_like(tensor) for tensor in tensors])
        return ready[key](*tensors)

    return call


def with_constants(function: Callable[..., Any], constants: Sequence[Any]) -> Callable[..., Any]:
    """`function` of tensors alone, which come where `constants` has None."""

    def of_tensors(*tensors: Tensor) -> Any:
        left = iter(tensors)
        return function(*(next(left) if value is None else value for value in constants))

    return of_tensors


def lowered_once(function: Callable[..., Any], tensors: list[Tensor]) -> None:
    """Runs `function`; what is lowered holds on to its first inputs, so that they are to be others than a step's."""
    from torch._guards import detect_fake_mode
    from torch._inductor.virtualized import V

    with V.set_fake_mode(detect_fake_mode(tensors)):
        function(*tensors)


@contextmanager
def marked_checkpoints() -> Iterator[None]:
    """Checkpoints as Dynamo hands them on: what runs inside is marked for the partitioner, to be computed again
    (torch/_higher_order_ops/wrap.py, tag_activation_checkpoint_impl)."""
    import torch.utils.checkpoint as checkpoints
    from torch._higher_order_ops.wrap import _always_prefer_recompute, uid
    from torch.fx.traceback import current_meta

    module: Any = checkpoints
    original = module._checkpoint_without_reentrant_generator

    def contexts() -> Any:
        forward, again = checkpoints.create_selective_checkpoint_contexts(_always_prefer_recompute)
        forward.ac_graph_id = next(uid)
        return forward, again

    def generator(
        function: Any, preserve: bool, context_fn: Any, check: str, debug: bool, early: bool, *args: Any, **kwargs: Any
    ) -> Any:
        try:
            yield from original(function, False, contexts, check, debug, False, *args, **kwargs)
        finally:  # or the nodes that follow would inherit the marks
            for key in ("recompute", "ac_graph_id"):
                current_meta.pop(key, None)

    module._checkpoint_without_reentrant_generator = generator
    try:
        yield
    finally:
        module._checkpoint_without_reentrant_generator = original


def lower_now(function: Callable[..., Any], tensors: list[Tensor], inputs: tuple[Tensor, ...]) -> None:
    """Runs `function` once, backward too: AOTAutograd lowers a backward when it is first needed."""
    from torch._guards import TracingContext, detect_fake_mode, tracing
    from torch._inductor.virtualized import V

    fake_mode = detect_fake_mode(tensors)
    # In the context AOTAutograd tells inductor which saved tensors a backward may write over: those no one else has.
    with V.set_fake_mode(fake_mode), tracing(TracingContext(fake_mode)):
        outputs = [tensor for tensor in tensors_in(function(tensors, *inputs)) if tensor.requires_grad]
        if outputs:
            seeds = [torch.empty_like(tensor) for tensor in outputs]
            torch.autograd.grad(
                outputs, [tensor for tensor in tensors if tensor.requires_grad], seeds, allow_unused=True
            )


def planned(function: Callable[..., Any], recorder: Recorder) -> Callable[..., Any]:
    """`function` of a list of parameters and inputs as inductor would run it. Its first call lowers it."""
    # Imported here: they take seconds, and only a compiled run needs them.
    from torch._functorch.aot_autograd import aot_function
    from torch._inductor.compile_fx import partition_fn
    from torch._inductor.decomposition import select_decomp_table

    def compiler(backward: bool = False, inference: bool = False) -> Any:
        return lambda graph, inputs: runnable(lower(graph, inputs, backward, inference), recorder)

    def partition(graph: Any, inputs: Any, **settings: Any) -> Any:
        # Function modes off: inductor traces the patterns that it looks for, once in a process.
        with torch._C.DisableTorchFunction():
            return partition_fn(graph, inputs, **settings)

    return aot_function(
        function,
        fw_compiler=compiler(),
        bw_compiler=compiler(backward=True),
        inference_compiler=compiler(inference=True),
        partition_fn=partition,
        decompositions=select_decomp_table(),
        keep_inference_input_mutations=True,  # as compile_fx.py has it: what writes over its input, does so
    )


def lower(graph: Any, inputs: Any, backward: bool, inference: bool) -> str:
    """The source of the function that inductor writes for one graph: compile_fx.py without the compiling."""
    import torch._inductor.config as config
    from torch._inductor.compile_fx import _recursive_joint_graph_passes, _recursive_post_grad_passes, fake_tensor_prop
    from torch._inductor.debug import DebugContext
    from torch._inductor.fx_passes.post_grad import view_to_reshape
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    with config.patch(SETTINGS), kept_as_on_gpu(), torch.no_grad(), torch._C.DisableTorchFunction():
        if inference:
            graph = _recursive_joint_graph_passes(graph, input_device=torch.device("cpu"))
        view_to_reshape(graph)
        fake_mode = fake_tensor_prop(graph, inputs)
        with V.set_fake_mode(fake_mode):
            _recursive_post_grad_passes(graph, is_inference=inference)
            lowering = GraphLowering(graph, example_inputs=inputs, is_inference=inference, is_backward=backward)
            with V.set_graph_handler(lowering), V.set_debug_handler(DebugContext()):
                lowering.run(*inputs)
                code, _ = lowering.codegen()
    return code.value


@contextmanager
def kept_as_on_gpu() -> Iterator[None]:
    """What a kernel would have to compute again, a buffer keeps for a CPU where it is an exp, a log, a sigmoid or a
    tanh, and where fewer or more operations make it up (torch/_inductor/ir.py, StorageBox.should_realize_on_reuse,
    has_large_inner_fn and has_exceeded_max_reads). Here it is a GPU's choice."""
    from torch._inductor import ir

    original = ir.is_cpu
    ir.is_cpu = lambda x: False
    try:
        yield
    finally:
        ir.is_cpu = original


def runnable(source: str, recorder: Recorder) -> Call:
    """The generated function with its kernels replaced by nothing. It empties the list of its arguments, as
    AOTAutograd expects of what says so in `_boxed_call`."""
    found = re.search(r"^( *)def call\(self, args\):\n.*?^\1    return \(.*?\)$", source, re.MULTILINE | re.DOTALL)
    if found is None:
        raise ValueError("the code that inductor generated has no function `call`")
    lines = [line[len(found.group(1)) :] for line in found.group(0).splitlines()]
    kernels = first_kernels(lines)
    text = "\n".join(lines).replace("def call(self, args)", "def call(args)", 1)
    text = re.sub(r"\b(\w+) = empty_strided_cpu\(", r"\1 = empty_strided_cpu('\1', ", text)
    namespace = Names(recorder, kernels)
    exec(compile(text, "<inductor>", "exec"), namespace)
    call = namespace["call"]
    call._boxed_call = True
    return call


def first_kernels(lines: Sequence[str]) -> dict[str, str]:
    """For each buffer the kernel that first touches it, by which it is named: `buf3: mm`."""
    kernels: dict[str, str] = {}
    for line in lines:
        called = re.match(r" +(?:cpp_fused_|extern_kernels\.)(\w+?)(?:_\d+)?\((.*)\)", line)
        if called:
            for name in re.findall(r"\bbuf\d+\b", called.group(2)):
                kernels.setdefault(name, called.group(1).strip("_"))
    return kernels


class Names(dict[str, Any]):
    """What the generated function may call: allocation, views and whole torch ops are real, kernels do nothing."""

    def __init__(self, recorder: Recorder, kernels: dict[str, str]) -> None:
        def empty_strided(name: str, size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            with recorder.within(f"{kernels.get(name, '')[:60]} {name}".strip()):
                return torch.empty_strided(size, stride, dtype=dtype)

        super().__init__(
            torch=torch, aten=torch.ops.aten, empty_strided_cpu=empty_strided, reinterpret_tensor=reinterpret
        )

    def __missing__(self, name: str) -> Any:
        if hasattr(builtins, name):
            raise KeyError(name)
        return Nothing()


class Nothing:
    """Stands for kernels and modules of kernels."""

    def __getattr__(self, name: str) -> "Nothing":
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        return None


def reinterpret(tensor: Tensor, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> Tensor:
    """A view; inductor's offset counts from the tensor's own."""
    return torch.as_strided(tensor, size, stride, int(tensor.storage_offset()) + offset)
