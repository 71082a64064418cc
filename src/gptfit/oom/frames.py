"""The frames of a traceback, and the phase of training that they tell."""

import re
from dataclasses import dataclass

_FRAME = re.compile(r'^\s*File "([^"\n]{1,300})", line (\d{1,7})(?:, in (.{1,120}))?')
_CELL = re.compile(r"^(?:Cell In\[\d{1,5}\]|/\S{1,200}|<ipython-input-\S{1,40}>) (?:in |, line |line )")
_CARETS = re.compile(r"^[\s^~]+$")


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame: where, and the line of code if it was printed."""

    file: str
    line: int
    function: str
    code: str


def read_frames(lines: list[str]) -> list[Frame]:
    """Frames in the order printed, outermost first; wrapped file names are joined again."""
    frames: list[Frame] = []
    index = 0
    while index < len(lines) and len(frames) < 200:
        text = lines[index]
        found = _FRAME.match(text)
        if found is None and 'File "' in text and index + 1 < len(lines):  # wrapped inside the frame's own line
            text = text + lines[index + 1]
            found = _FRAME.match(text)
            index += 1 if found else 0
        if found is not None:
            code = ""
            for follower in lines[index + 1 : index + 4]:
                if 'File "' in follower or not follower.strip():
                    break
                if not _CARETS.match(follower):
                    code = follower.strip()
                    break
            frames.append(Frame(found.group(1), int(found.group(2)), (found.group(3) or "").strip(), code[:400]))
        elif text.lstrip().startswith(("---->", "--> ")) or _CELL.match(text):
            code = text.split(maxsplit=2)[-1] if text.lstrip().startswith("--") else ""
            frames.append(Frame("notebook", 0, "", code[:400]))
        index += 1
    return frames


# Tested in this order on everything that was printed of frames; the first that is found decides.
PHASES: tuple[tuple[str, str], ...] = (
    (
        "eval",
        r"estimate_loss|def evaluate|\bin evaluate|\bevaluate\(|validate\(|in validate|evaluation_loop|prediction_step|"
        r"eval_step|compute_perplexity|\bgenerate\(|in generate|model\.eval\(|val_loss|test_loop|in eval",
    ),
    (
        "checkpoint",
        r"torch\.load\(|load_state_dict|load_checkpoint|torch\.save\(|save_checkpoint|in _load|restore_location",
    ),
    (
        "optimizer",
        r"optimizer\.step|optim[/\\]|opt\.step\(|_foreach_|_multi_tensor|_single_tensor|clip_grad|scaler\.step|"
        r"exp_avg|zero_grad|_init_group",
    ),
    (
        "compile",
        r"autotune|benchmark_all_configs|benchmark_choice|do_bench|select_algorithm|coordesc|_inductor[/\\]compile_fx|"
        r"AsyncCompile|compile_worker",
    ),
    (
        "backward",
        r"\.backward\(|autograd[/\\]__init__|_engine_run_backward|run_backward|call_compiled_backward|in backward|"
        r"recompute_fn|CompiledFunctionBackward",
    ),
    (
        "model_load",
        r"\.to\(device|\.to\('cuda|\.to\(\"cuda|\.cuda\(|_apply\(|in _apply|from_pretrained|module\.to\(|"
        r"model\.to\(|t\.to\(|\.half\(\)|in convert|load_model|init_empty|wrap_model|DDP\(",
    ),
    ("data", r"pin_memory|get_batch|DataLoader|dataloader|collate|in __next__|_next_data"),
    (
        "forward",
        r"in forward|forward_call|_call_impl|forward\(|lm_head|cross_entropy|self\.attn|self\.mlp|"
        r"logits\s*[,=]|call_compiled|model\(|net\(",
    ),
)
_PHASES = tuple((name, re.compile(pattern)) for name, pattern in PHASES)


def phase_of(frames: list[Frame], lines: list[str]) -> str:
    """eval, checkpoint, optimizer, compile, backward, model_load, data, forward, or unknown."""
    printed = [f"in {frame.function} {frame.file} {frame.code}" for frame in frames]
    text = (
        "\n".join(printed)
        if printed
        else "\n".join(line[:300] for line in lines[-60:] if "out of memory" not in line.lower())
    )
    for name, pattern in _PHASES:
        if pattern.search(text):
            return name
    return "unknown"
