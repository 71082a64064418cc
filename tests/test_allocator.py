"""The allocator model against rules written down a second time, slowly, and against figures worked out by hand."""

import random
from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptfit.memory.allocator import CachingAllocator, OutOfMemory
from gptfit.memory.allocator_options import AllocatorOptions
from gptfit.memory.blocks import ALLOCATED, FREE, PENDING, UNMAPPED, Block
from slow_allocator import Pages, Plain

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30


SIZES = st.one_of(
    st.sampled_from((1, 512, 513, 4096, MiB, MiB + 1, 10 * MiB - 512, 10 * MiB, 25165824, 3 * MiB)),
    st.sampled_from((2, 5, 6, 11, 12, 18, 20, 36)).map(lambda n: n * MiB),
    st.integers(1, 3 * MiB),
    st.integers(1, 40 * MiB),
)
# (bytes, stream) allocates; a float frees that part of the way through what is alive; None is empty_cache.
STEPS = st.lists(st.one_of(st.tuples(SIZES, st.integers(0, 1)), st.floats(0, 0.999), st.none()), max_size=60)


def chain(head: Block | None) -> Iterable[Block]:
    while head is not None:
        yield head
        head = head.next


def check(allocator: CachingAllocator) -> None:
    """What holds after every call."""
    blocks = [block for head in allocator.heads.values() for block in chain(head)]
    mapped = [block for block in blocks if block.state != UNMAPPED]
    assert allocator.reserved_bytes == sum(block.size for block in mapped)
    assert allocator.allocated_bytes == sum(block.size for block in mapped if block.state == ALLOCATED)
    assert set(allocator.pending) == {block for block in mapped if block.state == PENDING}
    for block in blocks:
        assert block.size > 0
        if block.next is not None:
            assert block.next.prev is block
            assert block.next.address == block.address + block.size, "blocks cover their segment and do not overlap"
            assert not block.state == block.next.state != ALLOCATED or block.state == PENDING, "neighbours merge"
            assert block.next.pool is block.pool
    for pool in allocator.pools.values():
        free = [block for block in blocks if block.pool is pool and block.state == FREE]
        assert pool.free == sorted((block.size, block.address, block) for block in free)
        unmapped = [block for block in blocks if block.pool is pool and block.state == UNMAPPED]
        assert pool.unmapped == sorted((block.address, block) for block in unmapped)
        if not pool.small and not allocator.expandable:
            assert all(block.size > MiB for block in free)
    ends = sorted((head.address, sum(block.size for block in chain(head))) for head in allocator.heads.values())
    assert [(low, low + n) for low, n in ends] == allocator.extents
    assert all(low + n <= above for (low, n), (above, _) in pairwise(ends))


@given(STEPS, st.sampled_from((60 * MiB, 130 * MiB, GiB)))
@settings(max_examples=150, deadline=None)
def test_plain_segments_are_as_the_slow_rules_have_them(steps, capacity):
    fast, slow = CachingAllocator(capacity), Plain(capacity)
    alive: list[Block] = []
    for step in steps:
        if isinstance(step, tuple):
            expected = slow.malloc(*step)
            try:
                block = fast.malloc(*step)
                alive.append(block)
                assert (block.address, block.size) == expected
            except OutOfMemory as error:
                assert expected is None
                assert (error.allocated_bytes, error.reserved_bytes) == (slow.allocated(), slow.reserved())
        elif step is None:
            fast.empty_cache()
            slow.segments = [s for s in slow.segments if any(piece[2] for piece in s[2])]
        elif alive:
            block = alive.pop(int(step * len(alive)))
            slow.free(block.address)
            fast.free(block)
        assert (fast.reserved_bytes, fast.allocated_bytes) == (slow.reserved(), slow.allocated())
    assert (fast.peak_reserved_bytes, fast.num_alloc_retries) == (slow.peak, slow.retries)
    check(fast)


@given(STEPS)
@settings(max_examples=150, deadline=None)
def test_expandable_segments_are_as_the_slow_rules_have_them(steps):
    fast = CachingAllocator(options=AllocatorOptions(expandable_segments=True))
    slow = {True: Pages(2 * MiB), False: Pages(20 * MiB)}
    base: dict[bool, int] = {}
    alive: list[tuple[Block, int]] = []
    for step in steps:
        if isinstance(step, tuple):
            block = fast.malloc(step[0])
            small = block.pool.small
            start = slow[small].malloc(step[0])
            base[small] = block.address - start if start == 0 and len(slow[small].used) == 1 else base[small]
            assert block.address - base[small] == start
            alive.append((block, start))
        elif step is None:
            fast.empty_cache()
            for pages in slow.values():
                pages.release()
        elif alive:
            block, start = alive.pop(int(step * len(alive)))
            del slow[block.pool.small].used[start]
            fast.free(block)
        assert fast.reserved_bytes == slow[True].reserved() + slow[False].reserved()
    check(fast)


OPTIONS = st.builds(
    AllocatorOptions,
    expandable_segments=st.booleans(),
    max_split_bytes=st.sampled_from((None, 20 * MiB, 32 * MiB)),
    garbage_collection_threshold=st.sampled_from((0.0, 0.5, 0.9)),
    per_process_memory_fraction=st.sampled_from((1.0, 0.8)),
    roundup_power2_divisions=st.sampled_from(((), (4,) * 16, (0, 0, 8, *(2,) * 13))),
    large_segment_bytes=st.sampled_from((20 * MiB, 32 * MiB)),
)


@given(STEPS, OPTIONS, st.sampled_from((None, 100 * MiB, 300 * MiB)), st.booleans(), st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_every_option_keeps_the_books(steps, options, capacity, by_age, dice: random.Random):
    allocator = CachingAllocator(capacity, options, by_age)
    alive: list[Block] = []
    deferred: list[Block] = []
    for step in steps:
        if isinstance(step, tuple):
            try:
                block = allocator.malloc(*step)
            except OutOfMemory as error:
                assert error.reserved_bytes == allocator.reserved_bytes and not allocator.pending
                continue
            assert block.size >= options.rounded(step[0]) >= step[0]
            alive.append(block)
        elif step is None:
            allocator.empty_cache()
        elif deferred and dice.random() < 0.3:
            allocator.complete(deferred.pop(int(step * len(deferred))))
        elif alive:
            block = alive.pop(int(step * len(alive)))
            if dice.random() < 0.3:
                allocator.defer(block)
                deferred.append(block)
            else:
                allocator.free(block)
        check(allocator)
        if capacity is not None:
            # The fraction is compared with the segment that would be, so that pages may exceed it; the device not.
            fraction = 1.0 if options.expandable_segments else options.per_process_memory_fraction
            assert allocator.reserved_bytes <= capacity * fraction
    for block in deferred:
        allocator.complete(block)
    for block in alive:
        allocator.free(block)
    allocator.empty_cache()
    check(allocator)
    assert allocator.reserved_bytes == allocator.allocated_bytes == allocator.requested_bytes == 0
    assert not allocator.heads and not any(pool.free for pool in allocator.pools.values())
    grown = sum(event.n_bytes * (1 if event.kind in "SM" else -1) for event in allocator.segment_events)
    assert grown == 0


@pytest.mark.parametrize(
    ("n_bytes", "block_bytes", "reserved_bytes"),
    [
        (1, 512, 2 * MiB),
        (MiB, MiB, 2 * MiB),
        (MiB + 1, MiB + 512, 20 * MiB),
        (10 * MiB - 512, 10 * MiB - 512, 20 * MiB),
        (10 * MiB, 10 * MiB, 10 * MiB),
        (11 * MiB, 12 * MiB, 12 * MiB),  # 1 MiB would be left: not more than 1 MiB
        (1_000_000_000, 1_000_341_504, 1_000_341_504),  # 0.33 MiB would be left: not split
        (200_000_000, 200_000_000, 201_326_592),  # 1.27 MiB is left
    ],
)
def test_first_request(n_bytes, block_bytes, reserved_bytes):
    allocator = CachingAllocator()
    assert allocator.malloc(n_bytes).size == block_bytes
    assert allocator.reserved_bytes == reserved_bytes
    assert allocator.requested_bytes == n_bytes


def test_small_blocks_are_split_to_the_last_512_bytes():
    allocator = CachingAllocator()
    assert [allocator.malloc(n).size for n in (MiB, MiB - 512, 1)] == [MiB, MiB - 512, 512]
    assert allocator.reserved_bytes == 2 * MiB


def test_the_end_of_a_range_is_kept_for_what_fits_nowhere_else():
    allocator = CachingAllocator(options=AllocatorOptions(expandable_segments=True))
    first, _ = allocator.malloc(12 * MiB), allocator.malloc(2 * MiB)
    allocator.free(first)
    assert allocator.malloc(5 * MiB).address == first.address, "not in the last 6 MiB, though they fit better"


def test_a_deferred_free_serves_nobody_until_it_is_complete():
    allocator = CachingAllocator()
    block = allocator.malloc(12 * MiB)
    allocator.defer(block)
    assert allocator.allocated_bytes == 0
    allocator.malloc(12 * MiB)
    assert allocator.reserved_bytes == 24 * MiB
    allocator.complete(block)
    allocator.complete(block)
    allocator.malloc(12 * MiB)
    assert allocator.reserved_bytes == 24 * MiB


def test_a_retry_waits_for_deferred_frees():
    allocator = CachingAllocator(24 * MiB)
    block = allocator.malloc(20 * MiB)
    allocator.defer(block)
    allocator.malloc(22 * MiB)
    assert (allocator.num_alloc_retries, allocator.reserved_bytes) == (1, 22 * MiB)
    allocator.complete(block)
    check(allocator)


def test_the_figures_of_an_out_of_memory_message():
    allocator = CachingAllocator(46 * MiB)
    allocator.malloc(3 * MiB)
    allocator.malloc(512)
    allocator.malloc(22 * MiB)
    with pytest.raises(OutOfMemory) as caught:
        allocator.malloc(18 * MiB)  # 17 MiB are free behind the 3, and 2 on the device
    error = caught.value
    assert error.tried_bytes == 18 * MiB
    assert error.allocated_bytes == 25 * MiB + 512
    assert error.reserved_bytes == 44 * MiB
    assert error.reserved_unallocated_bytes == 19 * MiB - 512
    assert error.free_bytes == 2 * MiB
    assert error.message == (
        "CUDA out of memory. Tried to allocate 18.00 MiB. 2.00 MiB is free. 25.00 MiB is allocated by PyTorch, "
        "and 19.00 MiB is reserved by PyTorch but unallocated"
    )
    assert allocator.num_alloc_retries == 1
    assert allocator.malloc(17 * MiB).size == 17 * MiB, "it goes on after a failure"


@pytest.mark.parametrize(
    ("n_bytes", "tried_mib"), [(1, 2), (MiB, 2), (MiB + 1, 20), (10 * MiB, 10), (11 * MiB + 1, 12)]
)
def test_tried_to_allocate_is_the_segment(n_bytes, tried_mib):
    with pytest.raises(OutOfMemory) as caught:
        CachingAllocator(0).malloc(n_bytes)
    assert caught.value.tried_bytes == tried_mib * MiB


def test_max_split_size_keeps_large_blocks_whole():
    allocator = CachingAllocator(options=AllocatorOptions(max_split_bytes=32 * MiB))
    allocator.free(allocator.malloc(64 * MiB))
    assert allocator.malloc(2 * MiB).address != allocator.heads[max(allocator.heads)].address
    assert allocator.reserved_bytes == 84 * MiB, "a small request does not take an oversize block"
    allocator.malloc(40 * MiB)
    assert allocator.reserved_bytes == 124 * MiB, "nor does one that is 20 MiB smaller"
    assert allocator.malloc(46 * MiB).size == 64 * MiB, "within 20 MiB it takes all of it"


def test_with_max_split_size_the_smallest_sufficient_segment_goes_first():
    allocator = CachingAllocator(400 * MiB, AllocatorOptions(max_split_bytes=32 * MiB))
    for block in [allocator.malloc(n * MiB) for n in (100, 60, 200)]:
        allocator.free(block)
    allocator.malloc(76 * MiB)  # no room: 40 MiB are left. The 100 would do, but is 24 MiB too large
    released = [event.n_bytes // MiB for event in allocator.segment_events if event.kind == "R"]
    assert (released, allocator.num_alloc_retries) == ([100], 0)
    allocator.malloc(210 * MiB)  # no single one: the largest first, until 210 MiB are reached
    released = [event.n_bytes // MiB for event in allocator.segment_events if event.kind == "R"]
    assert (released, allocator.num_alloc_retries) == ([100, 200, 60], 0)


def test_garbage_collection_frees_what_is_older_than_the_mean():
    options = AllocatorOptions(garbage_collection_threshold=0.5, per_process_memory_fraction=0.5)
    allocator = CachingAllocator(options=options, total_bytes=400 * MiB)  # limit 200, threshold 100 MiB
    old, young = allocator.malloc(40 * MiB), allocator.malloc(62 * MiB)
    allocator.free(old)
    for _ in range(3):
        allocator.free(allocator.malloc(1))
    allocator.free(young)
    allocator.malloc(64 * MiB)  # 104 MiB reserved: 4 too many. The older segment goes, the younger stays
    released = [event.n_bytes for event in allocator.segment_events if event.kind == "R"]
    assert (released, allocator.num_alloc_retries) == ([40 * MiB], 0)


def test_a_memory_fraction_refuses_before_the_device_does():
    allocator = CachingAllocator(100 * MiB, AllocatorOptions(per_process_memory_fraction=0.5))
    allocator.free(allocator.malloc(40 * MiB))
    allocator.malloc(50 * MiB)
    assert allocator.num_alloc_retries == 1
    with pytest.raises(OutOfMemory):
        allocator.malloc(1)


def test_preemption_refuses_without_a_retry():
    allocator = CachingAllocator(100 * MiB, AllocatorOptions(throw_on_cudamalloc_oom=True))
    allocator.free(allocator.malloc(60 * MiB))
    with pytest.raises(OutOfMemory):
        allocator.malloc(80 * MiB)
    assert (allocator.num_alloc_retries, allocator.reserved_bytes) == (0, 60 * MiB)


def test_expandable_pages_mapped_before_a_failure_stay():
    allocator = CachingAllocator(60 * MiB, AllocatorOptions(expandable_segments=True))
    first, second = allocator.malloc(20 * MiB), allocator.malloc(20 * MiB)
    allocator.free(first)
    assert second.address == first.address + first.size
    allocator.malloc(20 * MiB)
    with pytest.raises(OutOfMemory) as caught:
        allocator.malloc(40 * MiB)
    assert caught.value.free_bytes == 20 * MiB
    assert allocator.malloc(20 * MiB).size == 20 * MiB
    check(allocator)


def test_ties_go_to_the_lower_address_or_to_the_older_segment():
    for by_age, winner in ((False, 1), (True, 0)):
        allocator = CachingAllocator(by_age=by_age)
        blocks = [allocator.malloc(12 * MiB) for _ in range(2)]
        addresses = [block.address for block in blocks]
        for block in blocks:
            allocator.free(block)
        assert allocator.malloc(12 * MiB).address == addresses[winner]


def test_a_hinted_address_is_taken_where_it_is_free():
    allocator = CachingAllocator()
    allocator.hint_address = 1 << 40
    assert allocator.malloc(12 * MiB).address == 1 << 40
    allocator.hint_address = (1 << 40) + MiB
    assert allocator.malloc(12 * MiB).address == (1 << 40) - 12 * MiB
    check(allocator)
