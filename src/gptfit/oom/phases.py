"""The phase of training that a traceback tells: model_load, forward, loss, backward, optimizer, eval, checkpoint,
data, compile or unknown."""

import re
from collections.abc import Callable, Sequence

from gptfit.oom.frames import Frame
from gptfit.oom.pattern import lazy

# Functions and files by their own names, without class names in front.
_EVAL = lazy(
    r"(?:run_|do_|_)?(?:estimate_loss|evaluate|evaluation|eval|evaluator|validate|validation|valid)"
    r"(?:_loop|_step|_epoch|_model|_loss|_one_epoch|_end|_bpb|_core|_perplexity|_hellaswag|ion_loop|ion_step)?"
    r"|evaluate_\w{1,30}|eval_\w{1,30}|val_\w{1,30}|quick_eval|test_loop|test_step|test_epoch|prediction_step|prediction_loop"
    r"|predict|predict_step|compute_perplexity|perplexity|generate|generate_\w{1,30}|sample|sample_\w{1,20}|greedy_search"
    r"|beam_search|_sample|inference|run_inference|compute_val_loss|get_val_loss|validation_step"
)
_EVAL_CODE = lazy(
    r"\b(?:estimate_loss|evaluate(?:_\w{1,30})?|validate(?:_\w{1,30})?|run_validation|eval_(?:epoch|model|step|loop)"
    r"|compute_val_loss|get_val_loss|\.generate|sample_text)\(|#\s*estimate_loss"
)
_COMPILE_FILE = lazy(
    r"torch[/\\]_inductor[/\\](?:select_algorithm|autotune_process|compile_fx|async_compile|scheduler|graph|codecache|"
    r"compile_worker|codegen|lowering|fx_passes|ir|kernel|runtime[/\\](?:benchmarking|coordinate_descent_tuner))"
    r"|triton[/\\](?:testing|runtime[/\\]autotuner|compiler)|torch[/\\]_dynamo[/\\](?:convert_frame|symbolic_convert|output_graph|variables)"
)
_COMPILE_FUNCTION = lazy(
    r"(?:\w{0,40}autotune\w{0,40}|do_bench\w{0,30}|benchmark\w{0,40}|_?bench|compile_fx\w{0,20}|precompile|"
    r"warmup|warm_up|_?record|record_function|coordesc\w{0,20}|coordinate_descent_tuning)"
)
# What these files do at run time, with the compiled code in hand.
_COMPILED_RUN = frozenset(("run", "__call__", "_run_from_cache", "call", "new_callable", "wrapper", "run_node_cached"))
_COMPILE_RECORD = lazy(r"cudagraph_trees|cuda[/\\]graphs")
_CHECKPOINT_FILE = lazy(
    r"torch[/\\]serialization|fsdp[/\\]_state_dict_utils|torch[/\\]distributed[/\\]checkpoint|safetensors"
)
_CHECKPOINT_FUNCTION = lazy(
    r"(?:load|save|resume|restore)_(?:from_)?(?:checkpoint|ckpt|state|training_state)\w{0,20}|_save_checkpoint|load_state_dict"
    r"|_load_state_dict\w{0,20}|persistent_load|_cuda_deserialize|restore_location|_rebuild_tensor\w{0,10}|state_dict|full_state_dict"
    r"|_load_optimizer_and_scheduler|save_model"
)
_CHECKPOINT_CODE = lazy(r"\btorch\.(?:load|save)\(|\bload_state_dict\(|\b(?:load|save)_checkpoint\(|\w\.state_dict\(\)")
_OPTIMIZER_FILE = lazy(
    r"torch[/\\]optim[/\\]|bitsandbytes[/\\]optim|apex[/\\]optimizers|torchao[/\\]optim|torch[/\\]amp[/\\]grad_scaler"
    r"|torch[/\\]cuda[/\\]amp[/\\]grad_scaler|nn[/\\]utils[/\\]clip_grad|transformer_engine[/\\].{0,40}optim|[/\\]\w{0,12}muon\w{0,12}\.py|(?:^|[/\\])optim\w{0,12}\.py"
)
_OPTIMIZER_FUNCTION = lazy(
    r"_?(?:multi_tensor|single_tensor|fused)_\w{1,20}|_init_group|init_state|clip_grad\w{0,20}|_clip_grads\w{0,20}|optimizer_step"
    r"|zeropower_via_newtonschulz5|newton_schulz\w{0,10}|unscale_|_unscale_grads_|_take_model_step|step_update"
)
_OPTIMIZER_CODE = lazy(
    r"\b(?:\w{0,30}optim\w{0,20}|opt|scaler|self\.opt)(?:\[[^\]]{1,30}\])?\.step\(|\bclip_grad_(?:norm|value)_?\(|_foreach_\w{2,20}\(|_multi_tensor_|_single_tensor_"
    r"|\bexp_avg(?:_sq)?\b|\.unscale_\(|state\[[\"']?\w{1,24}[\"']?\]\s*=|\boptimizer\.zero_grad\(|denom\s*="
)
_CLOSURE = lazy(r"\bclosure\(\)|optimizer_closure\(")
_BACKWARD_FILE = lazy(
    r"torch[/\\]autograd[/\\](?:__init__|graph)|torch[/\\]_tensor\.py|_functorch[/\\]_aot_autograd[/\\].{0,40}$"
)
_BACKWARD_FUNCTION = lazy(
    r"_engine_run_backward|run_backward|call_compiled_backward|backward|_?backward_\w{1,20}|(?!forward)\w{1,30}_backward"
)
_BACKWARD_CODE = lazy(r"\.backward\(|run_backward\(|call_compiled_backward\(|autograd\.grad\(|CompiledFunctionBackward")
_MODULE_FILE = lazy(r"torch[/\\]nn[/\\]modules[/\\]module\.py")
_LOAD_FUNCTION = lazy(
    r"from_pretrained|_from_pretrained|_?load_pretrained_model|load_model\w{0,20}|_load_state_dict_into\w{0,20}|dispatch_model|init_model"
    r"|set_module_tensor_to_device|_init_weights|reset_parameters|init_weights|build_model|create_model|setup_model|get_model|fully_shard"
    r"|load_checkpoint_in_model|_move_model_to_device|prepare_model|_prepare_model|to_empty|_broadcast_coalesced|_sync_module_states"
    r"|create_weights|load_weights|_?initialize_model|_replace_with_\w{1,30}|materialize_\w{1,20}|post_init|__init__"
)
_LOAD_MODULE_FUNCTION = lazy(r"to|_apply|convert|cuda|half|float|bfloat16|double|to_empty")
_LOAD_CODE = lazy(
    r"\b(?:\w{0,30}model\w{0,20}|net|network|module|gpt|llm|llama|policy|transformer|backbone|decoder|encoder)\.(?:to|cuda|half|float|bfloat16)\("
    r"|\bfrom_pretrained\(|\b(?:DDP|FSDP|DistributedDataParallel|FullyShardedDataParallel|fully_shard)\(|\bt\.to\($|self\._apply\("
    r"|\bparam_applied\b|\bself\.to\(|=\s*(?:GPT|Transformer|Llama)\w{0,20}\("
)
_DATA_FILE = lazy(
    r"torch[/\\]utils[/\\]data[/\\]|(?:^|[/\\])(?:data|dataset|dataloader|datasets|loader)\w{0,20}\.py$|torch[/\\]multiprocessing"
)
_DATA_FUNCTION = lazy(
    r"get_batch|next_batch|get_next_batch|pin_memory|_pin_memory\w{0,10}|__next__|_next_data|\w{0,20}collate\w{0,20}|send_to_device|_prepare_inputs?"
    r"|_next_index|__getitem__|_process_data|_try_get_data|_get_data|fetch|_move_to_device|batch_to_device|data_generator"
)
_DATA_CODE = lazy(
    r"\bget_batch\(|\.pin_memory\(|non_blocking\s?=\s?True|\b(?:x|y|X|Y|xb|yb|\w{0,16}(?:batch|inputs?|_ids|idx|tokens?|targets?|labels?|data|images?))"
    r"(?:\[\S{1,30}\])?\.(?:to|cuda)\("
)
_LOSS_CODE = lazy(
    r"\bcross_entropy(?:_loss)?\(|\bnll_loss\(|\b(?:criterion|loss_fn|loss_func|loss_function|compute_loss|loss_fct|calc_loss|CrossEntropyLoss\(\))\("
    r"|\blog_softmax\(|\blinear_cross_entropy\("
)
_LOSS_FUNCTION = lazy(
    r"cross_entropy(?:_loss)?|compute_loss|loss_fn|loss_func|loss_function|ForCausalLMLoss|fixed_cross_entropy|nll_loss|log_softmax|"
    r"chunked_cross_entropy|linear_cross_entropy|calc_loss|criterion|get_loss"
)
_LOSS_FILE = lazy(
    r"torch[/\\]nn[/\\]modules[/\\]loss\.py|torch[/\\]nn[/\\]functional\.py|[/\\]\w{0,20}loss\w{0,20}\.py"
)
_LOSS_MODULE = lazy(r"nn[/\\]modules[/\\]loss\.py")
_LOSS_KERNEL = lazy(r"[/\\](?:fused_losses|losses?)[/\\]|[/\\]\w{0,30}cross_entropy\w{0,20}\.py$")
_FORWARD_FUNCTION = lazy(
    r"forward|\w{1,30}_forward|forward_\w{1,30}|_call_impl|_wrapped_call_impl|training_step|compute_loss|__call__"
)
_FORWARD_CODE = lazy(
    r"\b(?:\w{0,20}model\w{0,20}|net|network|module|gpt|llm)\(|forward_call\(|\.forward\(|\blm_head\(|self\.(?:attn|mlp|wte|wpe|gelu|c_fc|c_attn|c_proj|ln_\w)\("
    r"|\b(?:logits|att|scores|attn\w{0,12})\s*(?:,\s*\w{1,12}\s*)?=|scaled_dot_product_attention\(|\bF\.\w{2,30}\("
)


def phase_of(frames: Sequence[Frame]) -> str:
    """The phase, from the frames of one traceback, outermost first; "unknown" where they do not tell."""
    if not frames:
        return "unknown"
    if any(_is_compile(frame) for frame in frames):
        return "compile"
    if any(_is_eval(frame) for frame in frames):
        return "eval"
    step = _last(frames, _is_optimizer)
    closure = _last(frames, lambda frame: bool(_CLOSURE.search(frame.code)))
    if max(closure, _last(frames, _is_forward_work)) >= step:
        closure, step = max(closure, step), -1  # Lightning and L-BFGS run forward and backward within optimizer.step()
    backward = _last(frames, _is_backward)
    if max(step, backward) >= 0:
        return "optimizer" if step > backward else "backward"
    inner = frames[closure + 1 :] or frames
    if _last(inner, _is_own_forward) >= 0:  # whatever is moved or loaded in the midst of it
        return "forward"
    for phase, test in (("checkpoint", _is_checkpoint), ("model_load", _is_load), ("data", _is_data)):
        if any(test(frame) for frame in (inner if phase != "data" else inner[-4:])):
            return _told(phase, inner)
    if any(_is_loss(frame) for frame in inner[-3:]):
        return "loss"
    forward = any(_FORWARD_FUNCTION.fullmatch(_name(frame)) or _FORWARD_CODE.search(frame.code) for frame in inner)
    return "forward" if forward or any(_LOSS_CODE.search(frame.code) for frame in inner) else "unknown"


def _told(phase: str, frames: Sequence[Frame]) -> str:
    """A checkpoint read within from_pretrained is the model being loaded."""
    pretrained = any("from_pretrained" in _name(frame) for frame in frames)
    return "model_load" if phase == "checkpoint" and pretrained else phase


def phase_of_text(lines: Sequence[str]) -> str:
    """The phase from lines of code or talk alone, where no frame was pasted."""
    frames = [Frame("", 0, "", line[:300]) for line in lines[-80:] if "memory" not in line.lower()]
    for phase, pattern in (
        ("eval", _EVAL_CODE),
        ("optimizer", _OPTIMIZER_CODE),
        ("backward", _BACKWARD_CODE),
        ("model_load", _LOAD_CODE),
        ("checkpoint", _CHECKPOINT_CODE),
        ("loss", _LOSS_CODE),
        ("data", _DATA_CODE),
        ("forward", lazy(r"\bmodel\(|\.forward\(|in forward\b")),
    ):
        if any(pattern.search(frame.code) for frame in frames):
            return phase
    return "unknown"


_COMPILED = lazy(r"torchinductor|torch[/\\]_(?:inductor|dynamo|functorch)[/\\]")
_TORCHS_OWN = lazy(r"[/\\](?:torch|(?:pytorch_)?lightning)[/\\]|<")
_IMPLEMENTATION = lazy(r"_(multi_tensor|single_tensor|fused)_adam\w?")


def from_frames(frames: Sequence[Frame]) -> dict[str, object]:
    """What the frames tell of the run: whether the step was compiled, and how the optimizer steps."""
    found: dict[str, object] = {}
    if any(_COMPILED.search(frame.file) for frame in frames):
        found["compile"] = True
    elif any(_name(frame) == "forward" and not _TORCHS_OWN.search(frame.file) for frame in frames):
        found["compile"] = False  # the model's own lines run
    step = next((match for frame in frames if (match := _IMPLEMENTATION.match(_name(frame)))), None)
    if step is not None:
        kinds = {"multi_tensor": "foreach", "single_tensor": "for-loop", "fused": "fused"}
        found["optimizer_impl"] = kinds[step.group(1)]
    return found


def _name(frame: Frame) -> str:
    return frame.function.rpartition(".")[2]


def _last(frames: Sequence[Frame], test: Callable[[Frame], bool]) -> int:
    return max((index for index, frame in enumerate(frames) if test(frame)), default=-1)


def _is_compile(frame: Frame) -> bool:
    name = _name(frame)
    if _COMPILE_RECORD.search(frame.file):
        return bool(re.fullmatch(r"_?record\w{0,20}|\w{0,20}warmup\w{0,20}|run_eager|capture_begin|__enter__", name))
    if name in _COMPILED_RUN:
        return False
    tuning = bool(re.search(r"_inductor|triton", frame.file) and _COMPILE_FUNCTION.fullmatch(name))
    return tuning or bool(_COMPILE_FILE.search(frame.file)) or "autotune_to_one_config(" in frame.code


def _is_eval(frame: Frame) -> bool:
    named = bool(_EVAL.fullmatch(_name(frame))) and not re.search(r"_dynamo|_functorch|[/\\]fx[/\\]", frame.file)
    return named or bool(_EVAL_CODE.search(frame.code))


def _is_optimizer(frame: Frame) -> bool:
    if _CLOSURE.search(frame.code):
        return False
    if _name(frame) in ("load_state_dict", "state_dict", "_process_value_according_to_param_policy"):
        return False
    own = bool(_OPTIMIZER_FILE.search(frame.file)) and _name(frame) not in ("scale", "backward")
    return own or bool(_OPTIMIZER_FUNCTION.fullmatch(_name(frame)) or _OPTIMIZER_CODE.search(frame.code))


def _is_backward(frame: Frame) -> bool:
    return bool(
        (_BACKWARD_FUNCTION.fullmatch(_name(frame)) and _name(frame) != "register_backward")
        or _BACKWARD_CODE.search(frame.code)
        or ("autograd" in frame.file and _BACKWARD_FILE.search(frame.file) and "backward" in frame.code)
    )


def _is_checkpoint(frame: Frame) -> bool:
    name = _name(frame)
    in_file = bool(_CHECKPOINT_FILE.search(frame.file)) and name not in ("decorate_context", "forward")
    return in_file or bool(_CHECKPOINT_FUNCTION.fullmatch(name) or _CHECKPOINT_CODE.search(frame.code))


def _is_load(frame: Frame) -> bool:
    name = _name(frame)
    if _MODULE_FILE.search(frame.file) and _LOAD_MODULE_FUNCTION.fullmatch(name):
        return True
    if name == "__init__" and (re.search(r"[/\\]optim[/\\]|trainer", frame.file) or _DATA_FILE.search(frame.file)):
        return False
    return bool(_LOAD_FUNCTION.fullmatch(name) or _LOAD_CODE.search(frame.code))


def _is_data(frame: Frame) -> bool:
    in_file = bool(_DATA_FILE.search(frame.file)) and not _MODULE_FILE.search(frame.file)
    return in_file or bool(_DATA_FUNCTION.fullmatch(_name(frame)) or _DATA_CODE.search(frame.code))


def _is_forward_work(frame: Frame) -> bool:
    """What no optimizer does: a forward, or a trainer's step of the model."""
    return _name(frame) == "training_step" or _is_own_forward(frame)


def _is_own_forward(frame: Frame) -> bool:
    """A forward of the model's own code."""
    return _name(frame) == "forward" and not _LOSS_FILE.search(frame.file)


def _is_loss(frame: Frame) -> bool:
    """A loss taken outside of the model's own forward."""
    named = _LOSS_FUNCTION.fullmatch(_name(frame)) or _LOSS_CODE.search(frame.code)
    return bool(named or _LOSS_MODULE.search(frame.file) or _LOSS_KERNEL.search(frame.file))
