"""PYTORCH_CUDA_ALLOC_CONF: the settings that change sizes, and the rounding of a request."""

import re
from dataclasses import dataclass

from gptfit.errors import GptfitError, nearest

MiB = 1 << 20
MIN_BLOCK, LARGE_SEGMENT = 512, 20 * MiB
N_INTERVALS = 16  # of roundup_power2_divisions: by the power of two below a size, from 1 MiB to 64 GiB

# Settings that change no size on the device.
WITHOUT_EFFECT = frozenset(
    (
        "graph_capture_record_stream_reuse",
        "pinned_num_register_threads",
        "pinned_reserve_segment_size_mb",
        "pinned_use_background_threads",
        "pinned_use_cuda_host_register",
        "pinned_use_hip_host_register",
        "release_lock_on_cudamalloc",
        "release_lock_on_hipmalloc",
    )
)
HINT = "the form is key:value,key:value, as in expandable_segments:True,max_split_size_mb:256"


@dataclass(frozen=True, slots=True)
class AllocatorOptions:
    """What torch reads from PYTORCH_CUDA_ALLOC_CONF, where it changes sizes.

    `max_split_bytes` None is without limit. `roundup_power2_divisions` is empty (off) or has one number for each of
    16 intervals: sizes below 2 MiB, below 4 MiB, and so on. The garbage collection works only below a memory
    fraction of 1, and `throw_on_cudamalloc_oom` refuses what is above that fraction without a retry.
    """

    expandable_segments: bool = False
    max_split_bytes: int | None = None
    max_non_split_rounding_bytes: int = LARGE_SEGMENT
    roundup_power2_divisions: tuple[int, ...] = ()
    garbage_collection_threshold: float = 0.0
    large_segment_bytes: int = LARGE_SEGMENT
    per_process_memory_fraction: float = 1.0
    throw_on_cudamalloc_oom: bool = False

    def rounded(self, n_bytes: int) -> int:
        """The block size that a request of `n_bytes` asks for (c10/cuda/CUDACachingAllocator.cpp, round_size)."""
        if n_bytes < MIN_BLOCK:
            return MIN_BLOCK
        if self.roundup_power2_divisions:
            power = 1 << (n_bytes.bit_length() - 1)
            interval = min(max(n_bytes.bit_length() - 21, 0), N_INTERVALS - 1)
            divisions = self.roundup_power2_divisions[interval]
            if divisions > 1 and n_bytes > MIN_BLOCK * divisions:
                step = power // divisions or 2 * power
                return n_bytes if n_bytes == power else -(-n_bytes // step) * step
        return -(-n_bytes // MIN_BLOCK) * MIN_BLOCK


def parse_options(text: str) -> AllocatorOptions:
    """Options from a PYTORCH_CUDA_ALLOC_CONF string; an empty one gives the defaults.

    Raises GptfitError for what torch refuses too, and for the cudaMallocAsync backend, which is another allocator.
    """
    given = _pairs(text)
    unknown = [key for key in given if key not in READERS and key not in WITHOUT_EFFECT]
    if unknown:
        close = nearest(unknown[0], (*READERS, *WITHOUT_EFFECT))
        raise GptfitError(f'unknown allocator setting "{unknown[0][:60]}"{close}', HINT)
    if given.get("backend", "native") != "native":
        raise GptfitError(f'the backend "{given["backend"][:60]}" is another allocator', "gptfit models the native one")
    values: dict[str, object] = {}
    for key, value in given.items():
        if key in READERS and key != "backend":
            field, read = READERS[key]
            values[field] = read(key, value)
    options = AllocatorOptions(**values)  # pyright: ignore[reportArgumentType]
    if "max_non_split_rounding_mb" not in given and "large_segment_size_mb" in given:
        values["max_non_split_rounding_bytes"] = options.large_segment_bytes
        options = AllocatorOptions(**values)  # pyright: ignore[reportArgumentType]
    if options.max_split_bytes is not None and options.max_split_bytes < options.large_segment_bytes:
        least = options.large_segment_bytes // MiB
        raise GptfitError(
            f"max_split_size_mb:{options.max_split_bytes // MiB} is below {least}, the size of a large segment",
            f"torch takes {least} or more",
        )
    return options


def _pairs(text: str) -> dict[str, str]:
    """Keys and values as text; a list in brackets is one value."""
    text = re.sub(r"\s", "", text)
    pairs: dict[str, str] = {}
    for part in re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+|[\[\]]", text):
        key, colon, value = part.partition(":")
        if not (colon and key and value):
            raise GptfitError(f'cannot read "{part[:60]}" in the allocator settings', HINT)
        pairs[key] = value
    return pairs


def _flag(key: str, value: str) -> bool:
    if value not in ("True", "False"):
        raise GptfitError(f"{key}:{value[:60]} is neither True nor False", "torch takes these two spellings alone")
    return value == "True"


def _mib(key: str, value: str) -> int:
    return _whole(key, value) * MiB


def _whole(key: str, value: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", value) or int(value) == 0:
        raise GptfitError(f"{key}:{value[:60]} is not a whole number above 0", HINT)
    return int(value)


def _fraction(key: str, value: str) -> float:
    number = float(value) if re.fullmatch(r"[0-9]{0,9}\.?[0-9]{1,18}", value) else -1.0
    if not 0 < number <= 1 or (number == 1 and key == "garbage_collection_threshold"):
        raise GptfitError(f"{key}:{value[:60]} is not between 0 and 1", "write it as 0.8")
    return number


def _divisions(key: str, value: str) -> tuple[int, ...]:
    """One number for all intervals, or `[256:1,512:2,>:8]`: from the interval of a key in MiB; `>` fills the rest."""
    if not value.startswith("["):
        return (_power(key, value, 0),) * N_INTERVALS
    intervals = [0] * N_INTERVALS
    last = -1
    for part in value.strip("[]").split(","):
        size, _, number = part.partition(":")
        divisions = _power(key, number, 0)
        if size == ">":
            start = max(last, 0)
            intervals[start:] = [divisions] * (N_INTERVALS - start)
            continue
        index = min(_power(key, size).bit_length() - 1, N_INTERVALS - 1)
        start = index if last >= 0 else 0  # the first key is for all smaller sizes as well
        intervals[start : index + 1] = [divisions] * (index + 1 - start)
        last = index
    return tuple(intervals)


def _power(key: str, value: str, least: int = 1) -> int:
    number = int(value) if re.fullmatch("[0-9]{1,9}", value) else -1
    if number < least or number & (number - 1):
        raise GptfitError(f"{key}: {value[:60] or 'nothing'} is not a power of two", "as in [256:1,512:2,1024:4,>:8]")
    return number


READERS = {
    "backend": ("", lambda _, value: value),
    "expandable_segments": ("expandable_segments", _flag),
    "garbage_collection_threshold": ("garbage_collection_threshold", _fraction),
    "large_segment_size_mb": ("large_segment_bytes", _mib),
    "max_non_split_rounding_mb": ("max_non_split_rounding_bytes", _mib),
    "max_split_size_mb": ("max_split_bytes", _mib),
    "per_process_memory_fraction": ("per_process_memory_fraction", _fraction),
    "roundup_power2_divisions": ("roundup_power2_divisions", _divisions),
    "throw_on_cudamalloc_oom": ("throw_on_cudamalloc_oom", _flag),
}
