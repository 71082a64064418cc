"""What a paste tells beside the message: shapes, the program, the versions, the card."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from gptfit.oom.pattern import lazy


@dataclass(frozen=True, slots=True)
class ShapeHint:
    """A shape that the text prints, its dtype ("" where it does not say), and how it is told."""

    shape: tuple[int, ...]
    dtype: str
    source: str


_DTYPES = r"(?:float(?:16|32|64)|bfloat16|half|float|double|int(?:8|16|32|64)|uint8|bool|float8_e4m3fn|float8_e5m2)"
_STRIDED = lazy(
    rf"empty_strided(?:_cuda|_cpu|_xpu|_p2p)?\(\s{{0,4}}\(([\d, ]{{1,120}})\)\s{{0,4}},"
    rf"\s{{0,4}}\([\d, ]{{0,120}}\)\s{{0,4}}(?:,\s{{0,4}}(?:device='[\w:]{{1,12}}',\s?)?(?:dtype=)?torch\.({_DTYPES}))?"
)
_CALL = lazy(
    rf"torch\.(?:empty|zeros|ones|randn|rand|full)\(\s{{0,4}}[\[(]?(\d[\d, ]{{0,120}})[\])]?\s{{0,4}},"
    rf"[^)]{{0,80}}?dtype=torch\.({_DTYPES})"
)
_SIZE = lazy(r"torch\.Size\(\[([\d, ]{1,120})\]\)")
_NUMPY = lazy(rf"for an array with shape \(([\d, ]{{1,120}})\)(?: and data type ({_DTYPES}))?")
_SAME = {"half": "float16", "float": "float32", "double": "float64"}

PROGRAMS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("gptfit", lazy(r"gptfit[/\\]|\bgptfit train\b|\bgptfit\.train\b")),
    ("nanochat", lazy(r"nanochat|base_train\b|chat_sft\b|mid_train\b")),
    ("trl", lazy(r"\btrl[/\\]|\b(?:SFT|DPO|GRPO|PPO|ORPO|KTO)Trainer\b|\btrl sft\b")),
    ("torchtitan", lazy(r"torchtitan|\[titan\]")),
    ("torchtune", lazy(r"torchtune|\btune run\b")),
    ("litgpt", lazy(r"litgpt|lit_gpt|lit-gpt|lit-llama")),
    (
        "lightning",
        lazy(
            r"lightning[/\\.]pytorch\b|pytorch[-_]lightning|\bLightning(?:Module|DataModule|CLI)\b|accumulate_grad_batches"
        ),
    ),
    ("litgpt", lazy(r"lightning[/\\]fabric")),
    (
        "huggingface",
        lazy(
            r"transformers[/\\]|TrainingArguments|per_device_train_batch_size|\btrainer\.train\(\)"
            r"|run_clm\.py|accelerate launch"
        ),
    ),
    (
        "nanogpt",
        lazy(
            r"nanoGPT|estimate_loss|configurator\.py|logits, loss = model\(X, Y\)|scaler\.scale\(loss\)|get_batch\("
            r"|tokens per iteration will be|Overriding config with config/|scaler\.step\(optimizer\)"
            r"|out-shakespeare|train_gpt2\.py|train_shakespeare"
            r"|\btrain\.py\b.{0,200}--(?:compile|dataset|batch_size|init_from|eval_iters)="
        ),
    ),
)
_VERSION = lazy(
    r"(?:\btorch(?:\s{0,3}(?:==|version:?|ver\.?|v)\s{0,3}|\s{1,20}|-|:\s{0,8})|\b[Pp]y[Tt]orch(?:\s{0,3}(?:version)?\s{0,3}[:=]?\s{0,8}|\s|/)v?|torch\.__version__\W{1,6})"
    r"v?([0-2]\.\d{1,2}(?:\.\d{1,2})?)(?![\d.])"
)
_GPU = lazy(
    r"\b(?:(?:NVIDIA )?(?:GeForce )?(?:RTX|GTX)(?: PRO)?[ -]?A?\d{3,4}"
    r"(?: (?:Ti|SUPER|Super|Ada|D|Laptop|Max-Q|Generation|Blackwell)){0,3}"
    r"|(?:NVIDIA |Tesla )(?:RTX A?\d{4}|Quadro RTX \d{4}|TITAN \w{1,3}|[TLPKM]\d{1,3}S?)\b"
    r"|(?:NVIDIA |Tesla )?(?:A100|H100|H200|H800|H20|A800|GH200|B100|B200|GB200|V100|P100|A10G?|A16|A30|A40|L40S?)"
    r"(?:[- ](?:SXM\d?|PCIe|PCIE|NVL|HBM\d\w?|\d{2,3}\s?GB)){0,3}\b"
    r"|(?:NVIDIA )?TITAN (?:RTX|V|Xp|X)|Quadro (?:RTX )?[A-Z]?\d{4}"
    r"|(?:AMD )?(?:Instinct )?MI\d{3}[XA]?|Radeon (?:RX|PRO) \w{4,7}( XTX?)?"
    r"|Apple M[1-5](?: (?:Pro|Max|Ultra))?|Intel\(?R?\)? (?:Arc|Data Center GPU Max) \w{4,6})"
)


# Well-known models by the names that pastes give them; the presets of those names have their shapes.
MODELS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("llama-3.2-1b", lazy(r"llama[-_]?3[._]2[-_]1b(?!\w)", re.I)),
    ("qwen2.5-0.5b", lazy(r"qwen[-_]?2[._]5[-_]0[._]5b(?!\w)", re.I)),
    ("tinyllama-1.1b", lazy(r"tinyllama[-_/ ]{1,2}(?:v\d[._])?1[._]1b", re.I)),
    *(
        (
            name,
            lazy(
                rf"(?:openai-community/|model\w{{0,16}}[\"']?[=: ]{{1,3}}[\"']?|from_pretrained\([\"'])"
                rf"{name}(?![\w-])"
            ),
        )
        for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
    ),
)
_ADAPTERS = lazy(r"\bpeft[/\\]|LoraConfig|\bq?lora\b|_lora_|finetune_lora|load_in_4bit", re.I)


def model_name(lines: Sequence[str]) -> str:
    """The preset of the model that the text names, or ""."""
    text = "\n".join(line[:600] for line in lines[:4000])
    return next((name for name, pattern in MODELS if pattern.search(text)), "")


def has_adapters(lines: Sequence[str]) -> bool:
    """Whether a few added weights are trained (LoRA): gradients and optimizer state are those of few parameters."""
    return any(_ADAPTERS.search(line[:600]) for line in lines[:4000])


def shapes_in(lines: Sequence[str]) -> tuple[ShapeHint, ...]:
    """Shapes in the order told, each once, at most 20."""
    found: dict[tuple[tuple[int, ...], str], ShapeHint] = {}
    for line in lines:
        if "(" not in line:
            continue
        for source, pattern in (
            ("empty_strided", _STRIDED),
            ("allocation", _CALL),
            ("numpy", _NUMPY),
            ("torch.Size", _SIZE),
        ):
            for match in pattern.finditer(line[:3000]):
                sizes = tuple(
                    int(size) for size in match.group(1).split(",") if size.strip().isdigit() and len(size) < 16
                )
                dtype = (match.group(2) or "") if pattern.groups > 1 else ""
                if sizes and len(found) < 20:
                    found.setdefault((sizes, dtype), ShapeHint(sizes, _SAME.get(dtype, dtype), source))
    return tuple(found.values())


def program_of(lines: Sequence[str]) -> str:
    """Whose training code it was: a name in PROGRAMS, or unknown."""
    text = "\n".join(line[:600] for line in lines[:4000])
    return next((name for name, pattern in PROGRAMS if pattern.search(text)), "unknown")


_ITERATED = lazy(r"\biter \d{1,9}: loss|\bstep [1-9]\d{0,8}: train loss|Resuming training")
_EVALUATED = lazy(r"\bstep 0: train loss")
_BEGUN = lazy(r"tokens per iteration will be|number of parameters:")


def progress_of(lines: Sequence[str], phase: str) -> str:
    """How far nanoGPT's log got, which prints an evaluation, then `iter 0` after the first step: "first" before that
    step was over, "later" after it, or "" where the log does not tell."""
    if any(_ITERATED.search(line[:200]) for line in lines):
        return "later"
    evaluated = any(_EVALUATED.search(line[:200]) for line in lines)
    begun = phase == "eval" and any(_BEGUN.search(line[:200]) for line in lines)
    return "first" if evaluated or begun else ""


def torch_version(lines: Sequence[str], wording: str) -> str:
    """The version that the text names, else what the message's wording tells, as "2.1" or ">=2.2"; or ""."""
    for line in lines:
        if "orch" in line:
            found = _VERSION.search(line[:2000])
            if found is not None:
                return found.group(1)
    return {
        "torch<1.4": "<1.4",
        "torch1.x": "<2.1",
        "torch2.1": "2.1",
        "torch2.2": ">=2.2",
        "torch2.3": "2.3",
        "torch2.9": ">=2.9",
    }.get(wording, "")


def gpu_name(lines: Sequence[str]) -> str:
    """The card that the text names, or ""."""
    for line in lines:
        found = _GPU.search(line[:2000])
        if found is not None:
            return found.group()
    return ""
