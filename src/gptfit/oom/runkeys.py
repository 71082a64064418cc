"""The run that a paste tells: keys that were typed, printed or echoed, and whose program it was."""

import re

from gptfit.config import RunConfig

_KEYS = "|".join(sorted(RunConfig.model_fields, key=len, reverse=True))
_QUOTED = r"'[\w.-]{1,40}'|\"[\w.-]{1,40}\""
_VALUE = rf"(-?\d{{1,12}}(?:\.\d{{1,12}})?(?:e-?\d{{1,3}})?|True|False|true|false|{_QUOTED}|float32|float16|bfloat16)"
# --batch_size=8, "Overriding: batch_size = 16", batch_size = 16, batch_size: 16, Namespace(batch_size=16, …)
_ASSIGNED = re.compile(rf"(?<![\w.])(?:--|Overriding: )?({_KEYS})\s{{0,3}}[=:]\s{{0,3}}{_VALUE}")
_OTHER_NAMES = {
    "per_device_train_batch_size": "batch_size",
    "device_batch_size": "batch_size",
    "micro_batch_size": "batch_size",
    "max_seq_len": "block_size",
    "sequence_len": "block_size",
    "max_seq_length": "block_size",
    "depth": "n_layer",
}
_OTHERS = re.compile(rf"(?<![\w.])(?:--)?({'|'.join(_OTHER_NAMES)})\s{{0,3}}[=:\s]\s{{0,3}}(\d{{1,9}})\b")
_LOGITS = re.compile(
    r"empty_strided(?:_cuda)?\(\s*\((\d{1,6}), (\d{1,7}), (\d{4,7})\)\s*,\s*\([\d, ]{1,60}\)\s*,\s*torch\.(\w{3,10})"
)

PROGRAMS: tuple[tuple[str, str], ...] = (
    ("gptfit", r"gptfit[/\\]|\bgptfit train"),
    ("nanochat", r"nanochat|base_train\.py|chat_sft"),
    ("trl", r"\btrl[/\\]|SFTTrainer|DPOTrainer"),
    ("torchtune", r"torchtune|\btune run"),
    ("litgpt", r"litgpt|lit_gpt|lightning[/\\]fabric"),
    ("huggingface", r"transformers[/\\]|TrainingArguments|per_device_train_batch_size|Trainer\.train"),
    (
        "nanogpt",
        r"nanoGPT|estimate_loss|configurator\.py|logits, loss = model\(X, Y\)|scaler\.scale\(loss\)|get_batch\(",
    ),
)
_PROGRAMS = tuple((name, re.compile(pattern)) for name, pattern in PROGRAMS)


def run_keys(lines: list[str]) -> dict[str, object]:
    """Keys of the failed run that the text tells; the last value of a key wins, as it does in nanoGPT."""
    found: dict[str, object] = {}
    for line in lines[:4000]:
        short = line[:2000]
        if "=" in short or ":" in short:
            for key, value in _ASSIGNED.findall(short):
                if (parsed := _parsed(key, value)) is not None:
                    found[key] = parsed
        for name, value in _OTHERS.findall(short) if "_" in short or "depth" in short else ():
            found.setdefault(_OTHER_NAMES[name], int(value))
        shape = _LOGITS.search(short) if "empty_strided" in short else None
        if shape is not None and int(shape.group(3)) >= 4096:
            found |= {
                "batch_size": int(shape.group(1)),
                "block_size": int(shape.group(2)),
                "vocab_size": int(shape.group(3)),
            }
            found.setdefault("compile", True)
            if shape.group(4) in ("bfloat16", "float16"):
                found.setdefault("dtype", shape.group(4))
    return found


def _parsed(key: str, text: str) -> object | None:
    """The value in the type that the key takes; None where it has another."""
    text = text.strip("'\"")
    kind = RunConfig.model_fields[key].annotation
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower())
    try:
        if kind is int:
            return int(text)
        if kind is float:
            return float(text)
    except ValueError:
        return None
    choices = getattr(kind, "__args__", ())
    return text if text in choices else None


def program_of(lines: list[str]) -> str:
    """Whose training code it was: gptfit, nanogpt, huggingface, nanochat, litgpt, trl, torchtune, or unknown."""
    text = "\n".join(line[:400] for line in lines[:2000])
    for name, pattern in _PROGRAMS:
        if pattern.search(text):
            return name
    return "unknown"
