"""A prediction as torch's memory snapshot: read by torch's own tools and by ours, and counted by hand."""

import base64
import json
import pickle
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from torch.cuda import _memory_viz as viz

from gptfit.cli import main
from gptfit.config import RunConfig, make_run
from gptfit.estimate import estimate
from gptfit.memory.replay import replay_file
from gptfit.memory.tape import Event, Tape, make_buffer
from gptfit.report.torch_snapshot import predicted_tape, snapshot, write_snapshot

SMALL = {"n_layer": 2, "n_head": 4, "n_embd": 256, "block_size": 256, "vocab_size": 5003, "batch_size": 4}
RUNS = {
    "segments": {"expandable_segments": False},
    "expandable": {"expandable_segments": True},
    "eager, full loss": {"expandable_segments": False, "compile": False, "loss": "full"},
    "one micro-step": {"expandable_segments": False, "gradient_accumulation_steps": 1},
}
# What torch writes (c10/cuda/CUDACachingAllocator.h, torch/csrc/cuda/memory_snapshot.cpp).
SEGMENT_KEYS = {"device", "address", "total_size", "allocated_size", "active_size", "stream", "segment_type", "blocks"}
BLOCK_KEYS = {"address", "size", "requested_size", "state", "frames"}


def run_of(name: str) -> RunConfig:
    return make_run({**SMALL, **RUNS[name]})


def test_no_event_claims_a_time() -> None:
    """Seen in the viewer: an entry without `timestamp` reads "timestamp Invalid Date", one that is None has no time."""
    (trace,) = snapshot(predicted_tape(run_of("segments"), "gptfit"), False)["device_traces"]
    assert trace and all(event["timestamp"] is None and "time_us" not in event for event in trace)


def written(tmp_path: Path, run: RunConfig, program: str = "gptfit") -> tuple[Path, Any]:
    path = tmp_path / "out.pickle"
    write_snapshot(path, predicted_tape(run, program), run.expandable_segments)
    return path, pickle.loads(path.read_bytes())


@pytest.mark.parametrize("program", ["gptfit", "nanogpt"])
@pytest.mark.parametrize("name", RUNS)
def test_our_replay_of_it_finds_the_peaks_of_the_estimate(tmp_path: Path, name: str, program: str) -> None:
    run = run_of(name) if program == "gptfit" else make_run({**SMALL, "expandable_segments": name == "expandable"})
    path, _ = written(tmp_path, run, program)
    answer, expected = replay_file(path), estimate(run, program)
    assert answer.peak_reserved_bytes == expected.reserved_bytes
    # The estimate's is that of the last step, once blocks are cut as they will be; the first steps may hold a bit more.
    assert 1 <= answer.peak_allocated_bytes / expected.allocated_bytes < 1.002
    assert answer.expandable_segments == run.expandable_segments
    assert answer.recorded is not None
    assert answer.recorded.peak_reserved_bytes == expected.reserved_bytes
    assert answer.recorded.segment_events_matched == answer.recorded.segment_events_total > 0
    assert answer.notes == ()


@pytest.mark.parametrize("program", ["gptfit", "nanogpt"])
@pytest.mark.parametrize("name", RUNS)
def test_what_is_freed_is_what_was_allocated(name: str, program: str) -> None:
    """Two buffers of one name that are alive together must be of one size: the tape frees the older of them."""
    keys = RUNS[name] if program == "gptfit" else {"expandable_segments": name == "expandable"}
    made: list[int] = []
    for sign, serial, buffer in predicted_tape(make_run({**SMALL, **keys}), program).expand():
        if sign > 0:
            made.append(buffer.n_bytes)
        assert made[serial] == buffer.n_bytes, buffer.name


@pytest.mark.parametrize("name", RUNS)
def test_counted_by_hand_it_is_consistent(tmp_path: Path, name: str) -> None:
    """Every block lies in memory that is held, over no other; what is left at the end is what the segments say."""
    run = run_of(name)
    _, document = written(tmp_path, run)
    held: dict[int, int] = {}  # page starts, by 2 MiB
    alive: dict[int, int] = {}
    pending: set[int] = set()
    held_bytes = peak_bytes = 0
    page = 2 << 20
    for event in document["device_traces"][0]:
        action, address, size = event["action"], event["addr"], event["size"]
        assert event["frames"][0]["name"] and event["frames"][0]["filename"]
        if action in ("segment_alloc", "segment_map"):
            assert size % page == 0
            held_bytes += size
            peak_bytes = max(peak_bytes, held_bytes)
            held |= dict.fromkeys(range(address, address + size, page), 1)
        elif action == "alloc":
            assert not [a for a in alive if a < address + size and address < a + alive[a]]
            first = next(start for start in held if start <= address < start + page)
            assert all(start in held for start in range(first, address + size, page))
            alive[address] = size
        elif action == "free_requested":
            assert alive[address] == size
            pending.add(address)
        else:
            assert action == "free_completed"
            pending.remove(address)
            del alive[address]
    assert peak_bytes == estimate(run).reserved_bytes
    segments = document["segments"]
    blocks = [block for segment in segments for block in segment["blocks"]]
    used = {block["address"]: block["requested_size"] for block in blocks if block["state"] == "active_allocated"}
    assert used == alive and not pending
    assert sum(segment["total_size"] for segment in segments) == held_bytes
    for one in segments:
        assert one.keys() >= SEGMENT_KEYS
        assert all(block.keys() >= BLOCK_KEYS for block in one["blocks"])
        assert sum(block["size"] for block in one["blocks"]) == one["total_size"]


def embedded(html: str) -> Any:
    """The snapshot that a page of torch's holds."""
    found = re.search(r'"base64": "([^"]+)"', html)
    assert found is not None
    return pickle.loads(base64.b64decode(found[1]))


@pytest.mark.parametrize("name", ["segments", "expandable"])
def test_torchs_own_tools_read_it(tmp_path: Path, name: str) -> None:
    path, document = written(tmp_path, run_of(name))
    assert embedded(viz.trace_plot(document)) == document
    assert "Active Cached Memory Timeline" in viz.trace_plot(document, plot_segments=True)
    assert embedded(viz.segment_plot(document)) == document
    assert "total_reserved" in viz.segsum(document)  # it checks its own sums
    lines = viz.trace(document).splitlines()
    mallocs = [line for line in lines if "cudaMalloc" in line]
    assert bool(mallocs) == (name == "segments")
    shown: defaultdict[str, int] = defaultdict(int)
    for line in viz.memory(document, format_flamegraph=lambda text: text).splitlines():
        stack, _, n_bytes = line.rpartition(" ")
        shown[stack.split(";")[1]] += int(n_bytes)
    assert sum(shown.values()) == sum(one["total_size"] for one in document["segments"])
    assert shown["active_allocated"] == replay_file(path).final_allocated_bytes
    assert viz.segments(document, format_flamegraph=lambda text: text)
    kept = viz.filter_alloc_free_pairs(pickle.loads(path.read_bytes()))["device_traces"][0]
    assert sum(event["size"] for event in kept if event["action"] == "alloc") <= shown["active_allocated"]


def test_a_tape_of_three_buffers_is_written_as_torch_would_record_it() -> None:
    x, y = make_buffer("x", "activation", (3 << 20,), "uint8"), make_buffer("w", "parameter", (100,), "float32")
    events = snapshot(Tape([Event(1, x), Event(1, y), Event(-1, x), Event(1, x)]), False)["device_traces"][0]
    seen = [(event["action"], event["size"], event["frames"][0]["name"]) for event in events]
    assert seen == [
        ("segment_alloc", 20 << 20, "x"),
        ("alloc", 3 << 20, "x"),
        ("segment_alloc", 2 << 20, "w"),
        ("alloc", 512, "w"),
        ("free_requested", 3 << 20, "x"),
        ("free_completed", 3 << 20, "x"),
        ("alloc", 3 << 20, "x"),
    ]
    allocs = [event["addr"] for event in events if event["action"] == "alloc"]
    assert allocs[0] == allocs[2] != allocs[1]


def ran(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(words)
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


def test_the_command_writes_it_and_answers_as_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "step.pickle"
    words = ("estimate", "gpt2", "batch_size=4", "--gpu", "rtx4070", "--json")
    assert ran(capsys, *words, "--snapshot", str(path)) == ran(capsys, *words)
    code, out, _ = ran(capsys, "replay", str(path), "--json")
    replayed = json.loads(out)
    answer = json.loads(ran(capsys, *words)[1])
    assert code == 0
    assert replayed["peak_reserved_bytes"] == answer["peak"]["reserved_bytes"]
    tags = {row["tag"] for row in replayed["alive_at_peak"]}
    assert "parameter: wte.weight" in tags, "a buffer keeps its name and category"


FACTORY = """
import torch

def step(batch_size=8):
    model = torch.nn.Linear(1000, 2000)
    x = torch.randn(batch_size, 1000)
    return lambda: model(x).square().mean(), model
"""


def test_a_traced_step_is_written_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, path = tmp_path / "mine.py", tmp_path / "step.pickle"
    file.write_text(FACTORY)
    code, out, err = ran(capsys, "trace", f"{file}:step", "--json", "--snapshot", str(path))
    assert code == 0, err
    assert replay_file(path).peak_reserved_bytes == json.loads(out)["peak"]["reserved_bytes"]
    assert viz.segsum(pickle.loads(path.read_bytes()))


@pytest.mark.parametrize("where", ["missing/out.pickle", "", "/", "."])
def test_where_it_cannot_be_written_one_line_says_so(capsys: pytest.CaptureFixture[str], where: str) -> None:
    code, out, err = ran(capsys, "estimate", "gpt2", "--snapshot", where)
    assert (code, out) == (2, "")
    assert err.startswith("error: cannot write") and len(err.splitlines()) == 2


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.pickle"
    path.write_text("old")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gptfit.report.torch_snapshot.pickle.dump", fail)
    with pytest.raises(Exception, match="no space left"):
        write_snapshot(path, Tape([]), False)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
