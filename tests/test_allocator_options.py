"""PYTORCH_CUDA_ALLOC_CONF as torch reads it, and the rounding of requests."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptfit.errors import GptfitError
from gptfit.memory.allocator_options import AllocatorOptions, parse_options

KiB, MiB = 1 << 10, 1 << 20


# Sizes and blocks worked out by hand from the rule: the power of two below, cut into as many parts.
@pytest.mark.parametrize(
    ("divisions", "n_bytes", "block_bytes"),
    [
        (4, 1200 * KiB, 1280 * KiB),  # 1 MiB in quarters of 256 KiB
        (4, 2048, 2048),  # 512 times 4 is not exceeded
        (4, 2049, 2560),
        (4, 4 * MiB, 4 * MiB),
        (1, 700, 1024),  # one part: off
        (0, 513, 1024),
        (8, 100, 512),
        (2, 5 * MiB, 6 * MiB),
    ],
)
def test_rounding_up_to_parts_of_a_power_of_two(divisions, n_bytes, block_bytes):
    assert AllocatorOptions(roundup_power2_divisions=(divisions,) * 16).rounded(n_bytes) == block_bytes


def test_settings_are_read_as_torch_writes_them():
    assert parse_options("") == AllocatorOptions()
    assert parse_options(" expandable_segments:True , max_split_size_mb:256,pinned_use_cuda_host_register:True") == (
        AllocatorOptions(expandable_segments=True, max_split_bytes=256 * MiB)
    )
    read = parse_options("garbage_collection_threshold:0.8,roundup_power2_divisions:[256:1,512:2,1024:4,>:8]")
    assert read.garbage_collection_threshold == 0.8
    assert read.roundup_power2_divisions == (*(1,) * 9, 2, *(8,) * 6)  # > begins at the last key's interval
    assert parse_options("roundup_power2_divisions:[4:2,32:8]").roundup_power2_divisions == (
        *(2, 2, 2, 0, 0, 8),
        *(0,) * 10,
    )
    assert parse_options("roundup_power2_divisions:16").roundup_power2_divisions == (16,) * 16
    read = parse_options("large_segment_size_mb:32,per_process_memory_fraction:0.5,throw_on_cudamalloc_oom:True")
    assert (read.large_segment_bytes, read.max_non_split_rounding_bytes) == (32 * MiB, 32 * MiB)
    assert (read.per_process_memory_fraction, read.throw_on_cudamalloc_oom) == (0.5, True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("expandable_segment:True", "did you mean expandable_segments"),
        ("expandable_segments:true", "neither True nor False"),
        ("max_split_size_mb:16", "is below 20"),
        ("max_split_size_mb:-1", "not a whole number"),
        ("garbage_collection_threshold:1.0", "not between 0 and 1"),
        ("roundup_power2_divisions:3", "not a power of two"),
        ("roundup_power2_divisions:[3:4]", "not a power of two"),
        ("roundup_power2_divisions:[256:", "cannot read"),
        ("max_split_size_mb", "cannot read"),
        ("backend:cudaMallocAsync", "another allocator"),
        ("max_split_size_mb:" + "9" * 5000, "not a whole number"),
    ],
)
def test_what_torch_refuses_is_refused(text, said):
    with pytest.raises(GptfitError) as caught:
        parse_options(text)
    assert said in caught.value.message
    assert "\n" not in caught.value.message and len(caught.value.message) < 200


@given(st.text(st.sampled_from("abmx_:,[]>0123456789. TrueFals"), max_size=40))
def test_any_text_is_read_or_refused(text):
    try:
        assert isinstance(parse_options(text), AllocatorOptions)
    except GptfitError as error:
        assert error.message
