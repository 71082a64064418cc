"""A predicted run as torch's memory snapshot, for pytorch.org/memory_viz and torch.cuda._memory_viz: without torch.

The layout is that of torch.cuda.memory._dump_snapshot (torch/cuda/memory.py, c10/cuda/CUDACachingAllocator.h):
`segments` is the state at the end, `device_traces` what led to it. Where torch has the stack of an allocation there is
one frame: the buffer's name as the function, its category as the file. There are no times, as nothing ran.
"""

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptfit.config import RunConfig
from gptfit.estimate import under_program
from gptfit.gpus import GpuProfile
from gptfit.memory.allocator import AllocatorOptions, CachingAllocator
from gptfit.memory.blocks import ALLOCATED, UNMAPPED, Block
from gptfit.memory.overhead import cublas_workspace_bytes
from gptfit.memory.reserve import with_workspaces
from gptfit.memory.step import pieces
from gptfit.memory.tape import Buffer, Tape
from gptfit.memory.whole_run import short_run
from gptfit.replacing import replacing

SEGMENT_ACTIONS = {"S": "segment_alloc", "R": "segment_free", "M": "segment_map", "U": "segment_unmap"}
STREAM, DEVICE = 0, 0

Frames = list[dict[str, Any]]


def predicted_tape(run: RunConfig, program: str, profile: GpuProfile | None = None) -> Tape:
    """What an estimate replays: evaluation, the first step, and three more, with the scratch of kernels."""
    run = under_program(run, program)
    workspace_bytes = cublas_workspace_bytes(profile.compute_capability if profile else None)
    return with_workspaces(short_run(run, pieces(run, program, kernels=True)), workspace_bytes)


def write_snapshot(path: str | Path, tape: Tape, expandable_segments: bool) -> None:
    """Replays `tape` and writes the snapshot to `path`. Raises GptfitError where that cannot be written."""
    document = snapshot(tape, expandable_segments)
    with replacing(Path(path)) as file:
        pickle.dump(document, file, protocol=4)  # the viewer (torch/utils/viz/MemoryViz.js) takes 2 to 4


def snapshot(tape: Tape, expandable_segments: bool) -> dict[str, Any]:
    """`tape` through an empty allocator of endless memory: the document that _dump_snapshot would pickle."""
    allocator = CachingAllocator(options=AllocatorOptions(expandable_segments=expandable_segments))
    frames: dict[Buffer, Frames] = {}
    blocks: dict[int, Block] = {}
    owners: dict[int, Frames] = {}  # by address, of what is in use
    trace: list[dict[str, Any]] = []
    n_noted = 0
    for sign, serial, buffer in tape.expand():
        if not buffer.n_bytes:
            continue
        if sign > 0:
            own = frames.setdefault(buffer, [{"name": buffer.name, "filename": buffer.category, "line": 0}])
            block = blocks[serial] = allocator.malloc(buffer.n_bytes)
            for kind, address, n_bytes, _ in allocator.segment_events[n_noted:]:
                trace.append(entry(SEGMENT_ACTIONS[kind], address, n_bytes, own))
            n_noted = len(allocator.segment_events)
            owners[block.address] = own
            trace.append(entry("alloc", block.address, buffer.n_bytes, own))
        else:
            block = blocks.pop(serial)
            own = owners.pop(block.address)
            trace += (entry(action, block.address, block.requested, own) for action in FREED)
            allocator.free(block)
    return {
        "segments": [segment(run, owners) for run in mapped(allocator)],
        "device_traces": [trace],
        "allocator_settings": settings(expandable_segments),
        "external_annotations": [],
    }


FREED = ("free_requested", "free_completed")


def entry(action: str, address: int, n_bytes: int, frames: Frames) -> dict[str, Any]:
    """`timestamp` is none, and says so: for a missing one the viewer prints an invalid date."""
    return {
        "action": action,
        "addr": address,
        "size": n_bytes,
        "stream": STREAM,
        "timestamp": None,
        "frames": frames,
    }


def mapped(allocator: CachingAllocator) -> Iterator[list[Block]]:
    """The blocks of each segment in order of address; of a virtual range those of each mapped stretch."""
    for _, head in sorted(allocator.heads.items()):
        run: list[Block] = []
        block: Block | None = head
        while block is not None:
            if block.state != UNMAPPED:
                run.append(block)
            elif run:
                yield run
                run = []
            block = block.next
        if run:
            yield run


def segment(run: list[Block], owners: dict[int, Frames]) -> dict[str, Any]:
    in_use = [block for block in run if block.state == ALLOCATED]
    allocated_bytes = sum(block.size for block in in_use)
    return {
        "device": DEVICE,
        "address": run[0].address,
        "total_size": sum(block.size for block in run),
        "allocated_size": allocated_bytes,
        "active_size": allocated_bytes,
        "requested_size": sum(block.requested for block in in_use),
        "stream": STREAM,
        "segment_type": "small" if run[0].pool.small else "large",
        "segment_pool_id": (0, 0),
        "is_expandable": run[0].expandable,
        "frames": [],
        "blocks": [
            {
                "address": block.address,
                "size": block.size,
                "requested_size": block.requested if block.state == ALLOCATED else 0,
                "state": "active_allocated" if block.state == ALLOCATED else "inactive",
                "frames": owners[block.address] if block.state == ALLOCATED else [],
            }
            for block in run
        ],
    }


def settings(expandable_segments: bool) -> dict[str, Any]:
    """Torch's defaults (CUDACachingAllocator.h, AllocatorConfigInfo) and the one that a run sets."""
    return {
        "PYTORCH_CUDA_ALLOC_CONF": f"expandable_segments:{expandable_segments}",
        "max_split_size": -1,
        "garbage_collection_threshold": 0.0,
        "expandable_segments": expandable_segments,
        "pinned_num_register_threads": 1,
        "release_lock_on_cudamalloc": False,
        "pinned_use_cuda_host_register": False,
        "last_allocator_settings": f"expandable_segments:{expandable_segments}",
        "roundup_power2_divisions": {},
    }
