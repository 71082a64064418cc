"""The run that a paste tells: keys that were typed, printed, echoed or seen in shapes, each with where."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

from gptfit.config import RunConfig
from gptfit.oom.pattern import lazy

# Of two places that tell a key the later one in this list is right: a command line overrides a config file.
PLACES = (
    "code",
    "frames",
    "shapes",
    "printed model",
    "printed config",
    "config file",
    "log",
    "command line",
    "override",
)
MOST_LINES = 6000

INTEGERS = frozenset(
    ("n_layer", "n_head", "n_embd", "n_kv_head", "vocab_size", "block_size", "n_hidden", "batch_size", "n_gpus")
) | frozenset(
    ("gradient_accumulation_steps", "eval_batch_size", "eval_iters", "eval_interval", "max_iters", "warmup_iters")
)
NUMBERS = frozenset(("learning_rate", "weight_decay", "dropout", "grad_clip", "beta1", "beta2"))
FLAGS = frozenset(("compile", "bias"))
CHOICES = {
    key: get_args(RunConfig.model_fields[key].annotation)
    for key in ("dtype", "optimizer", "attention", "activation_checkpointing", "loss", "optimizer_impl")
}
# Names that other programs give these keys: transformers, litgpt, nanochat, torchtune.
OTHER_NAMES = {
    "per_device_train_batch_size": "batch_size",
    "per_gpu_train_batch_size": "batch_size",
    "train_micro_batch_size_per_gpu": "batch_size",
    "device_batch_size": "batch_size",
    "micro_batch_size": "batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "gradient_accumulation_iters": "gradient_accumulation_steps",
    "grad_accum_steps": "gradient_accumulation_steps",
    "accumulate_grad_batches": "gradient_accumulation_steps",
    "gradient_clip_val": "grad_clip",
    "max_seq_length": "block_size",
    "max_seq_len": "block_size",
    "sequence_length": "block_size",
    "sequence_len": "block_size",
    "seq_len": "block_size",
    "seq_length": "block_size",
    "context_length": "block_size",
    "n_positions": "block_size",
    "n_ctx": "block_size",
    "max_position_embeddings": "block_size",
    "hidden_size": "n_embd",
    "d_model": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_heads": "n_head",
    "num_key_value_heads": "n_kv_head",
    "intermediate_size": "n_hidden",
    "padded_vocab_size": "vocab_size",
    "torch_compile": "compile",
    "nproc_per_node": "n_gpus",
    "num_processes": "n_gpus",
    "max_steps": "max_iters",
}
# Keys of other programs whose values are to be translated, too.
SPELLED = (
    *("bf16", "fp16", "gradient_checkpointing", "enable_activation_checkpointing", "optim", "precision"),
    *("global_batch_size", "max_length", "model_type"),
)
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "16": "float16", "32": "float32"}
# What most of today's models have in common (transformers: modeling_llama.py and those made after it).
LLAMA = {"norm": "rmsnorm", "mlp": "swiglu", "position": "rope"}
LIKE_LLAMA = frozenset(("llama", "mistral", "qwen2", "qwen3", "smollm3", "olmo2"))
# Words that also stand in code and prose: believed where a config is printed or typed, not elsewhere.
COMMON_WORDS = frozenset(
    ("dropout", "bias", "compile", "loss", "attention", "optimizer", "dtype", "num_heads", "num_layers")
)

_NAMES = "|".join(
    sorted(
        (*INTEGERS, *NUMBERS, *FLAGS, *CHOICES, *OTHER_NAMES, *SPELLED),
        key=len,
        reverse=True,
    )
)
_VALUE = (
    r"(?P<value>['\"]?(?:16|32|bf16)-(?:mixed|true)['\"]?|-?\d{1,12}(?:_\d{3}){0,4}(?:\.\d{0,12})?(?:[eE]-?\d{1,3})?(?:\s?\*\s?\d{1,9}){0,3}"
    r"|True|False|true|false|None|['\"]?[A-Za-z][\w.-]{1,40}['\"]?)"
)
_PAIR = lazy(
    rf"(?<![\w.])(?:tokenizer\.)?(?P<dash>--(?:[a-z]{{1,12}}\.)?)?[\"']?(?P<key>{_NAMES})[\"']?\s{{0,6}}[=:]\s{{0,6}}{_VALUE}(?![\w(\[.])"
)
_OPTION = lazy(rf"(?<!\S)--(?:[a-z]{{1,12}}\.)?(?P<key>{_NAMES})(?:\s{{1,4}}(?!-){_VALUE})?(?=\s|\\|$)")
# DeepSpeed's list: `batch_size ......... 4.........updated`
_DOTTED = lazy(rf"\s{{0,8}}(?P<key>{_NAMES}) \.{{3,80}} {_VALUE}(?:\.{{2,80}}|\s|$)")
# argparse takes --max-seq-len for max_seq_len; a value keeps its hyphens.
_HYPHENS = lazy(r"--[a-z][\w.-]{1,60}")
_OVERRIDE = lazy(r"Overriding:|overriding:|Overriding ")
_COMMAND = lazy(
    r"(?:^|[\s$#>!])(?:python[\d.]{0,4}|torchrun|accelerate|deepspeed|tune|litgpt|gptfit|srun|\S{0,60}\.py)\s.{0,2000}"
)
_PRINTED = lazy(
    r"Namespace\(|Arguments\(|Config\(|Args\(|\bconfig:|\bargs:|[{}]\s*$|^\s*[\"']?\w{1,40}[\"']?\s?[:=]\s?\S{1,60},?\s*(?:#.*)?$"
)
_FROM_FILE = lazy(r"Overriding config with")

# What trainers say in words. nanoGPT: train.py and model.py; transformers: Trainer's banner.
SAYINGS: tuple[tuple[str, str, re.Pattern[str]], ...] = (
    ("batch_size", "log", lazy(r"Instantaneous batch size per (?:device|GPU)\s?=\s?([\d,]{1,9})")),
    ("gradient_accumulation_steps", "log", lazy(r"Gradient Accumulation steps\s?=\s?([\d,]{1,9})")),
    ("vocab_size", "log", lazy(r"found vocab_size = (\d{1,7})")),
    ("vocab_size", "log", lazy(r"defaulting to vocab_size of GPT-2 to (\d{1,7})")),
    ("n_gpus", "log", lazy(r"(?:world[_ ]size|World size|WORLD_SIZE)\s?[:=]\s?(\d{1,4})\b")),
    ("gradient_accumulation_steps", "log", lazy(r"=> gradient accumulation steps: ([\d,]{1,9})")),
    ("batch_size", "log", lazy(r"Tokens / micro-batch / rank: (\d{1,6}) x \d")),
    ("block_size", "log", lazy(r"Tokens / micro-batch / rank: \d{1,6} x (\d{1,7})")),
    ("vocab_size", "log", lazy(r"^Vocab size: ([\d,]{1,9})\s*$")),
    ("n_layer", "printed model", lazy(r"\(0-\d{1,3}\): (\d{1,3}) x \w{0,24}(?:Block|Layer)\(")),
    ("vocab_size", "printed model", lazy(r"\((?:wte|embed_tokens|tok_emb\w{0,10})\): Embedding\((\d{3,7}), ")),
    ("n_embd", "printed model", lazy(r"\((?:wte|embed_tokens|tok_emb\w{0,10})\): Embedding\(\d{3,7}, (\d{1,6})")),
    ("block_size", "printed model", lazy(r"\((?:wpe|pos_emb\w{0,10})\): Embedding\((\d{1,7}), ")),
)
_N_PARAMS = lazy(
    r"number of parameters: ([\d.]{1,12})\s?([MB])|(?:with|params:?|parameters(?::| =)?) ([\d,]{7,18}) ?(?:parameters)?"
)
_TOKENS = lazy(r"tokens per iteration will be: ([\d,]{1,15})|Total train batch size[^=]{0,80}= ([\d,]{1,9})")
_PRETRAINED = lazy(
    r"(?:Initializing from OpenAI GPT-2 weights|loading weights from pretrained gpt): (gpt2(?:-medium|-large|-xl)?)\b"
)
_AMP = lazy(r"Using (bfloat16|16bit) (?:native )?Automatic Mixed Precision")  # Lightning, plugins/precision/amp.py
# model.py, from_pretrained
GPT2 = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600)}


@dataclass(frozen=True, slots=True)
class RunKeys:
    """Keys of the run, the place that tells each, and what was printed of its size."""

    values: dict[str, object]
    places: dict[str, str]
    n_params: int | None
    tokens_per_step: int | None


def run_keys(lines: Sequence[str], code: Sequence[str], program: str = "unknown") -> RunKeys:
    """What the lines tell of the run of `program`. `code` are lines that tracebacks quote: they are not settings."""
    quoted = set(code)
    values: dict[str, object] = {}
    places: dict[str, str] = {}
    n_params: int | None = None
    tokens: int | None = None
    echoed = 0
    for line in lines[:MOST_LINES]:
        short = _HYPHENS.sub(_underscored, line[:3000]) if "--" in line else line[:3000]
        echoed = 40 if _FROM_FILE.search(short) else max(0, echoed - 1)
        told = list(_told(short, short.strip()[:400] in quoted, echoed > 0))
        if program == "nanochat" and "depth" in short:
            told += _nanochat(short)
        for key, value, place in told:
            if key == "max_length" and program != "trl":  # elsewhere the length of what is generated, mostly
                continue
            key = "block_size" if key == "max_length" else key
            if key not in places or PLACES.index(place) >= PLACES.index(places[key]):
                values[key], places[key] = value, place
        if n_params is None and "param" in short and (size := _N_PARAMS.search(short)):
            n_params = _count(size)
        if tokens is None and ("tokens per" in short) and (found := _TOKENS.search(short)):
            tokens = int((found.group(1) or "0").replace(",", "")) or None
    whole = values.pop("global_batch_size", None)
    places.pop("global_batch_size", None)
    if isinstance(whole, int) and "gradient_accumulation_steps" not in values:
        micro, gpus = values.get("batch_size"), values.get("n_gpus", 1)
        if isinstance(micro, int) and isinstance(gpus, int):
            values["gradient_accumulation_steps"] = max(1, whole // (micro * gpus))
            places["gradient_accumulation_steps"] = places["batch_size"]
    return RunKeys(values, places, n_params, tokens)


def _nanochat(line: str) -> list[tuple[str, object, str]]:
    """nanochat's base_train.py makes all of a model's shape from its depth: 64 columns a layer, heads of 128."""
    found = _DEPTH.search(line)
    if found is None:
        return []
    depth = int(found.group(1))
    width = -(-64 * depth // 128) * 128
    sizes = (("n_layer", depth), ("n_embd", width), ("n_head", width // 128))
    return [(key, size, _place(line, False, False)) for key, size in sizes if size]


_DEPTH = lazy(r"(?:--|\bOverriding:? )?\bdepth[\"']?\s{0,3}[=: ]\s{0,3}(\d{1,3})\b")


def _count(found: re.Match[str]) -> int:
    if found.group(1):
        return round(float(found.group(1).strip(".") or 0) * (1e9 if found.group(2) == "B" else 1e6))
    return int(found.group(3).replace(",", ""))


def _told(line: str, is_code: bool, echoed: bool) -> Iterator[tuple[str, object, str]]:
    """(key, value, place) of what one line tells."""
    if ":" in line or "=" in line or "compiling" in line or "Automatic" in line:
        yield from _sayings(line)
    if " ..." in line and (dotted := _DOTTED.match(line)):
        yield from _setting(dotted.group("key"), dotted.group("value").rstrip("."), "printed config")
    if "=" not in line and ":" not in line and "--" not in line:
        return
    place = _place(line, is_code, echoed)
    for found in _PAIR.finditer(line):
        where = "command line" if found.group("dash") and place != "override" else place
        if not (where == "code" and found.group("key") in COMMON_WORDS):
            yield from _setting(found.group("key"), found.group("value"), where)
    if "--" in line and not is_code:
        for found in _OPTION.finditer(line):
            yield from _setting(found.group("key"), found.group("value") or "True", "command line")


def _place(line: str, is_code: bool, echoed: bool) -> str:
    if is_code:
        return "code"
    if _OVERRIDE.match(line.lstrip()):
        return "override"
    if _COMMAND.search(line):
        return "command line"
    if echoed:
        return "config file"
    return "printed config" if _PRINTED.search(line) else "code"


def _sayings(line: str) -> Iterator[tuple[str, object, str]]:
    for key, place, pattern in SAYINGS:
        found = pattern.search(line)
        if found is not None:
            yield key, int(found.group(1).replace(",", "") or 0), place
    if "compiling the model" in line:
        yield "compile", True, "log"
    if "8bit" in line and "_component_" in line and "AdamW" in line:  # torchtune: bitsandbytes.optim.PagedAdamW8bit
        yield "optimizer", "adamw8bit", "printed config"
    if (amp := _AMP.search(line)) is not None:
        yield "dtype", DTYPES[amp.group(1).replace("bfloat", "bf").removesuffix("bit")], "log"
    if "using fused AdamW: " in line:
        yield "optimizer_impl", "fused" if "AdamW: True" in line else "foreach", "log"
    found = _PRETRAINED.search(line) if "gpt" in line else None
    if found is not None:
        sizes = zip(("n_layer", "n_head", "n_embd"), GPT2[found.group(1)], strict=True)
        yield from ((key, size, "log") for key, size in (*sizes, ("vocab_size", 50257), ("block_size", 1024)))
        yield "bias", True, "log"


def _underscored(found: re.Match[str]) -> str:
    return "--" + found.group()[2:].replace("-", "_")


def _setting(name: str, text: str, place: str) -> Iterator[tuple[str, object, str]]:
    """The key in gptfit's name and type; nothing where the value is of another."""
    text = text.strip("'\"")
    truth = {"true": True, "false": False}.get(text.lower())
    if name in ("bf16", "fp16"):
        if truth:
            yield "dtype", DTYPES[name], place
    elif name in ("gradient_checkpointing", "enable_activation_checkpointing"):
        if truth is not None:
            yield "activation_checkpointing", "block" if truth else "none", place
    elif name == "precision":  # Lightning's: bf16-true, bf16-mixed, 16-mixed, 32-true
        kind, _, how = text.partition("-")
        if kind in DTYPES:
            yield "dtype", DTYPES[kind], place
            if (kind, how) == ("bf16", "true"):
                yield "param_dtype", "bfloat16", place
    elif name == "model_type":
        yield from ((key, value, place) for key, value in LLAMA.items() if text in LIKE_LLAMA)
    elif name == "optim":
        yield from ((key, value, place) for key, value in _optimizer(text).items())
    else:
        key = OTHER_NAMES.get(name, name)
        value = _typed(key, DTYPES.get(text, text) if key == "dtype" else text, truth)
        if value is not None:
            yield key, value, place


def _optimizer(text: str) -> dict[str, str]:
    """transformers' names: adamw_torch_fused, adamw_bnb_8bit, paged_adamw_8bit, adafactor, lion_32bit …"""
    low = text.lower()
    if "8bit" in low and "adamw" in low:
        return {"optimizer": "adamw8bit"}
    base = next((name for name in ("adamw", "adafactor", "lion", "muon", "sgd") if name in low), None)
    if base is None:
        return {}
    return {"optimizer": base} | ({"optimizer_impl": "fused"} if "fused" in low else {})


def _typed(key: str, text: str, truth: bool | None) -> object | None:
    if key in FLAGS:
        return truth
    if key in CHOICES:
        low = text.removeprefix("torch.")
        return low if low in CHOICES[key] else None
    try:
        if key in INTEGERS or key in ("global_batch_size", "max_length"):
            value = 1
            for factor in text.replace("_", "").split("*"):
                value *= int(factor)
            return value if 0 < value <= 10**9 else None
        return float(text) if key in NUMBERS and truth is None else None
    except ValueError:
        return None
