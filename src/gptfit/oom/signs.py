"""What a paste shows beside its message: cards that nvidia-smi lists, how many steps ran before, code that keeps
tensors from step to step."""

import re
from collections.abc import Sequence

from gptfit.oom.clean import uncoloured
from gptfit.oom.frames import Frame
from gptfit.oom.pattern import lazy

MiB = 1 << 20
LAST = 20_000  # characters before the message in which a log tells the step
BAR_WIDTH = 300  # characters of a progress bar and what stands before it
LEAST_STEPS = 20  # by then every tensor of a step has been made, its optimizer's state too

_CARD = lazy(r"(?<![\d.])(\d{1,7})MiB\s{0,4}/\s{0,4}(\d{3,7})MiB")
_MESSAGE = lazy(r"out of memory|tried to allocate", re.I)
_STEP = lazy(
    r"(?:\b|\\n)(?:iter(?:ation)?|(?:global_|train_?)?step|batch)[\"']?\s{0,2}[:= ]\s{0,4}(\d{1,9})(?![\d.]*[%x])", re.I
)
_BAR = lazy(r"\|\s{0,3}(\d{1,9})/(\d{1,9}) \[\d{1,3}:\d\d[^\]\n\r]{0,60}(?:it/s|s/it|step/s|ba/s)")
_NO_STEPS = lazy(
    r"map|load|download|token|generat|process|filter|fetch|shard|extract|pack|convert|sanity|valid|eval", re.I
)

_NUMBER = r"(?:\.(?:item|detach|cpu|numpy|tolist|data)\b|float\()"
# `total += loss` keeps the graph of each step; so does what is appended as it is.
_KEPT = (
    lazy(
        r"^(?:self\.)?\w*(?:loss|losses|running|total)\w*(?:\[.{1,30}\])?\s?\+=\s?"
        rf"(?!.*{_NUMBER})\w*loss\w*"
    ),
    lazy(rf"\.append\(\s?(?!.*{_NUMBER})(?:self\.)?\w*(?:loss|logits|output|pred|hidden)\w*"),
    lazy(r"\bretain_graph\s?=\s?True"),
)
# A Trainer that collects what the model returns for each batch of an evaluation.
_COLLECTED = lazy(r"\bnested_concat\(|\b(?:all_)?(?:preds?|logits)(?:_host)?\s?=\s?.{0,60}(?:torch\.cat\(|\bcat\()")
_GATHERED = lazy(
    r"fsdp[/\\]_(?:state_dict_utils|unshard_param_utils|optim_utils)|_full_pre_state_dict_hook|summon_full_params"
    r"|_unshard_fsdp_state_params|\.full_tensor\(\)|full_optim_state_dict"
)
_RANKS = lazy(
    r"torchrun|nproc_per_node|torch[./]distributed|\[?rank ?\d{1,4}\]?:|LOCAL_RANK|DistributedDataParallel|FullySharded"
    r"|deepspeed|accelerate launch|mpirun|DDP\(",
    re.I,
)
_OFFLOAD = lazy(r"offload_(?:optimizer|param|opt)|ZeRoOffload|zero\d?_offload|DeepSpeedCPUAdam|cpu_offload")


def cards_in(text: str) -> tuple[tuple[int, int], ...]:
    """Bytes in use and in all of each GPU, in nvidia-smi's order; of the first table in the text."""
    found: list[tuple[int, int]] = []
    for match in _CARD.finditer(text[-200_000:]):
        found.append((int(match.group(1)) * MiB, int(match.group(2)) * MiB))
    return tuple(found[:16])


def steps_before(text: str) -> int:
    """The steps that a log counts up to the first message, 0 where it counts none. A bar of something else (a map over
    a data set, shards of a model) is no step."""
    message = _MESSAGE.search(text)
    end = message.start() if message is not None else len(text)
    log = uncoloured(text[max(0, end - LAST) : end])
    counted = [(match.start(), int(match.group(1))) for match in _STEP.finditer(log)]
    for match in _BAR.finditer(log):
        name = log[max(0, match.start() - BAR_WIDTH) : match.start()].replace("\r", "\n").rpartition("\n")[2]
        if match.group(1) != match.group(2) and not _NO_STEPS.search(name):
            counted.append((match.start(), int(match.group(1))))
    return max(counted)[1] if counted else 0


def kept_by(frames: Sequence[Frame]) -> str:
    """The line of the traceback that keeps a tensor and its graph from step to step, or ""."""
    lines = [frame.code for frame in frames if frame.code]
    return next((line for line in lines for pattern in _KEPT if pattern.search(line)), "")


def gathers(frames: Sequence[Frame], text: str) -> bool:
    """Whether FSDP puts whole parameters together for a full state dict."""
    named = any(_GATHERED.search(f"{frame.file} {frame.function} {frame.code}") for frame in frames)
    return named or "Failed to clone() tensor with name" in text


def has_ranks(text: str) -> bool:
    """Whether several processes train together."""
    return _RANKS.search(text[-200_000:]) is not None


def offloads(text: str) -> bool:
    """Whether DeepSpeed keeps optimizer state or parameters in the computer's memory."""
    return _OFFLOAD.search(text[-200_000:]) is not None


def collects(frames: Sequence[Frame]) -> bool:
    """Whether an evaluation failed as it put the logits of one more batch to those of the batches before."""
    return any(frame.function.endswith("nested_concat") or _COLLECTED.search(frame.code) for frame in frames)
