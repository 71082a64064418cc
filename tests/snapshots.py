"""Recordings in tests/data/snapshots, as JSON documents, and the same as torch would have written them."""

import gzip
import json
import pickle
from pathlib import Path
from typing import Any

from gptfit.memory.recorded_file import TRACE_FORMAT
from gptfit.memory.replay import replay_file
from gptfit.memory.replayed import ReplayResult

FOLDER = Path(__file__).parent / "data" / "snapshots"
NAMES = sorted(path.name.removesuffix(".json.gz") for path in FOLDER.glob("*.json.gz"))

ACTIONS = {
    "A": ("alloc",),
    "F": ("free_requested", "free_completed"),
    "Q": ("free_requested",),
    "C": ("free_completed",),
    "S": ("segment_alloc",),
    "R": ("segment_free",),
    "M": ("segment_map",),
    "U": ("segment_unmap",),
    "O": ("oom",),
    "N": ("snapshot",),
}
STATES = ("inactive", "active_allocated", "active_pending_free")


def path_of(name: str) -> Path:
    return FOLDER / f"{name}.json.gz"


def document_of(name: str) -> dict[str, Any]:
    return json.loads(gzip.decompress(path_of(name).read_bytes()))


def torch_snapshot(document: dict[str, Any]) -> dict[str, Any]:
    """What torch.cuda.memory._snapshot() returns: the last state, and one trace a device."""
    device = document["device"]
    frames = [
        [
            {"name": "at::native::empty", "filename": "??", "line": 0},
            {"name": "inner", "filename": "/lib/torch/nn/functional.py", "line": 7},
            {"name": tag.split("|")[-2] or "main", "filename": "/home/me/train.py", "line": 10 + number},
        ]
        for number, tag in enumerate(document["tags"])
    ]
    trace: list[dict[str, Any]] = []
    for kind, address, n_bytes, stream, time_us, tag in document["events"]:
        for action in ACTIONS[kind]:
            entry: dict[str, Any] = {"action": action, "size": n_bytes, "stream": stream, "time_us": time_us}
            entry["device_free" if kind == "O" else "addr"] = address
            if kind == "A":
                entry["frames"] = frames[tag]
            trace.append(entry)
    segments = [
        {
            "device": device,
            "address": address,
            "total_size": total,
            "stream": stream,
            "segment_type": pool,
            "segment_pool_id": (0, 0),
            "is_expandable": expandable,
            "active_size": active,
            "blocks": [
                {"size": size, "state": STATES[state], "requested_size": requested} for size, state, requested in blocks
            ],
        }
        for address, total, stream, pool, expandable, active, blocks in document["final_segments"]
    ]
    settings = {**(document["settings"] or {})}
    if document["roundup_power2_divisions"]:
        settings["roundup_power2_divisions"] = document["roundup_power2_divisions"]
    return {
        "segments": segments,
        "device_traces": [[] for _ in range(device)] + [trace],
        "allocator_settings": settings,
        "external_annotations": [],
    }


def replay_document(tmp_path: Path, document: dict[str, Any], *arguments: Any) -> ReplayResult:
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(document))
    return replay_file(path, *arguments)


def replay_pickle(tmp_path: Path, snapshot: Any, *arguments: Any) -> ReplayResult:
    path = tmp_path / "snapshot.pickle"
    path.write_bytes(pickle.dumps(snapshot))
    return replay_file(path, *arguments)


def trace(events: list[list[Any]], **more: Any) -> dict[str, Any]:
    return {"format": TRACE_FORMAT, "device": 0, "events": [[*event, 0, -1, -1][:6] for event in events], **more}
