"""Recordings from real GPUs through the allocator model, beside what they say themselves; and files that are none."""

import copy
import gzip
import json
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptfit.errors import GptfitError
from gptfit.memory import recording as recording_module
from gptfit.memory.plainpickle import MAX_TUPLES, load_plain
from gptfit.memory.recording import TRACE_FORMAT, read_recording
from gptfit.memory.replay import replay, replay_file
from gptfit.memory.replayed import ReplayResult
from snapshots import NAMES, document_of, path_of, torch_snapshot

MiB = 1 << 20

# The start of this one is known in part only, and its totals come from a replay that took a wrong turn there.
INEXACT_TOTALS = "lm-large-forward-grad-ctx256-bf16-a10"


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


@pytest.mark.parametrize("name", NAMES)
def test_a_replay_is_as_recorded(name: str) -> None:
    totals, answer = document_of(name)["totals"], replay_file(path_of(name))
    assert answer.peak_reserved_bytes == totals["peak_reserved"]
    assert answer.final_reserved_bytes == totals["final_reserved"]
    assert answer.final_allocated_bytes == totals["final_active"]
    if name != INEXACT_TOTALS:
        assert answer.peak_allocated_bytes == totals["peak_allocated_by_replay"]
    recorded = answer.recorded
    assert recorded is not None and recorded.peak_reserved_bytes == totals["peak_reserved"]
    assert recorded.segment_events_matched == recorded.segment_events_total == recorded.segment_events_modelled
    assert answer.notes == () and answer.out_of_memory is None


@pytest.mark.parametrize("name", NAMES)
def test_what_is_compared_with_is_never_used(name: str, tmp_path: Path) -> None:
    document = document_of(name)
    given_all = replay_document(tmp_path, document)
    for key in ("totals", "final_segments", "probe_replay"):
        del document[key]
    document["events"] = [event for event in document["events"] if event[0] not in "SM"]
    given_less = replay_document(tmp_path, document)
    for field in ("peak_allocated_bytes", "peak_reserved_bytes", "final_reserved_bytes", "alive_at_peak", "retries"):
        assert getattr(given_less, field) == getattr(given_all, field)
    assert given_less.recorded is None or given_less.recorded.segment_events_total > 0  # what was released


@pytest.mark.parametrize("name", NAMES)
def test_torchs_own_snapshot_gives_the_same(name: str, tmp_path: Path) -> None:
    document = document_of(name)
    expected = replay_file(path_of(name))
    answer = replay_pickle(tmp_path, torch_snapshot(document))
    for field in ("peak_allocated_bytes", "peak_reserved_bytes", "final_reserved_bytes", "retries", "recorded"):
        assert getattr(answer, field) == getattr(expected, field)
    assert answer.events == document["totals"]["events_recorded"]
    assert answer.expandable_segments == expected.expandable_segments
    labels = {row.tag for row in answer.alive_at_peak} - {"before the recording"}
    assert labels and all(label.startswith("train.py:") for label in labels)


@pytest.mark.parametrize("name", NAMES)
def test_what_was_alive_adds_up(name: str) -> None:
    answer = replay_file(path_of(name))
    assert sum(row.block_bytes for row in answer.alive_at_peak) == answer.peak_allocated_bytes
    assert answer.at_allocated_peak.allocated_bytes == answer.peak_allocated_bytes
    assert answer.fragmentation.reserved_bytes == answer.peak_reserved_bytes
    for at in (answer.at_allocated_peak, answer.fragmentation):
        parts = at.allocated_bytes + at.pending_bytes + at.free_small_bytes + at.free_large_bytes
        assert parts == at.reserved_bytes
        assert at.inactive_split_bytes <= at.free_small_bytes + at.free_large_bytes
        assert 0 <= at.requested_bytes <= at.allocated_bytes
        assert at.largest_free_bytes <= max(at.free_small_bytes, at.free_large_bytes)


@pytest.mark.parametrize("mib", [21_476, 21_490, 21_511])
def test_a_capacity_alone_gives_all_39_retries(mib: int) -> None:
    answer = replay(read_recording(path_of("llama-offload-10streams-retries")), mib * MiB)
    assert answer.retries == 39 and answer.out_of_memory is None
    assert answer.peak_reserved_bytes == 21_476 * MiB
    assert answer.recorded is not None
    assert answer.recorded.segment_events_matched == answer.recorded.segment_events_modelled == 1163


def test_another_capacity_gives_other_retries() -> None:
    recording = read_recording(path_of("llama-offload-10streams-retries"))
    assert replay(recording, 21_475 * MiB).retries != 39 != replay(recording, 21_512 * MiB).retries
    assert replay(recording, 1 << 40).retries == 0


def test_the_retry_of_a_24_gb_card_comes_out_of_its_capacity() -> None:
    recording = read_recording(path_of("nca-train-retry"))
    answer = replay(recording, 23 * 1024 * MiB)
    assert (answer.retries, answer.peak_reserved_bytes) == (1, replay(recording).peak_reserved_bytes)
    assert replay(recording).retries == 1, "told from the empty_cache at its beginning"
    assert replay(read_recording(path_of("lm-2p7b-forward-ctx512"))).retries == 0


def test_out_of_memory_is_reported_with_its_figures() -> None:
    recording = read_recording(path_of("nca-train-retry"))
    capacity = 18_700 * MiB
    answer = replay(recording, capacity)
    failed = answer.out_of_memory
    assert failed is not None and not failed.recorded
    assert failed.reserved_bytes + (failed.free_bytes or 0) == capacity
    assert failed.tried_bytes > (failed.free_bytes or 0)
    assert answer.final_reserved_bytes == failed.reserved_bytes, "the run ends there"
    assert "fragmentation" in f"{failed}"
    short = replay(recording, 18_600 * MiB).out_of_memory
    assert short is not None and "more would be needed" in f"{short}"
    assert failed.to_json()["explanation"] == f"{failed}"


def test_a_capacity_below_the_start_fails_at_the_start() -> None:
    for expandable in (None, True):
        failed = replay(read_recording(path_of("attention-backward-3090")), MiB, expandable).out_of_memory
        assert failed is not None and failed.event == -1


def test_expandable_segments_instead() -> None:
    recording = read_recording(path_of("nca-mixed-near-empty"))
    plain, expandable = replay(recording), replay(recording, expandable_segments=True)
    assert expandable.peak_allocated_bytes <= plain.peak_allocated_bytes, "no slack in large blocks"
    assert expandable.peak_reserved_bytes < plain.peak_reserved_bytes
    assert expandable.fragmentation.inactive_split_bytes == 0 < plain.fragmentation.inactive_split_bytes
    assert replay(recording, expandable_segments=False) == plain
    back = replay(read_recording(path_of("gnn-llm-expandable-dev2-empty-start")), expandable_segments=False)
    assert not back.expandable_segments and back.peak_reserved_bytes % (2 * MiB) == 0


def test_the_json_is_as_promised() -> None:
    answer = replay_file(path_of("linear-grad-empty-start")).to_json()
    assert answer["schema"] == "gptfit.replay/1"
    keys = ("events", "peak_allocated_bytes", "peak_reserved_bytes", "final_reserved_bytes", "retries")
    assert all(type(answer[key]) is int for key in keys)
    assert answer["out_of_memory"] is None
    assert set(answer["recorded"]) >= {"peak_reserved_bytes", "segment_events_matched", "segment_events_total"}
    assert json.loads(json.dumps(answer)) == answer


def test_a_recorded_failure(tmp_path: Path) -> None:
    events = [["A", 1 << 40, 30 * MiB], ["O", 5 * MiB, 12 * MiB], ["F", 1 << 40, 30 * MiB], ["A", 1 << 41, 12 * MiB]]
    as_recorded = replay_document(tmp_path, trace(events))
    failed = as_recorded.out_of_memory
    assert failed is not None and failed.recorded
    assert (failed.event, failed.tried_bytes, failed.reserved_bytes, failed.free_bytes) == (
        *(1, 12 * MiB),
        *(30 * MiB, 5 * MiB),
    )
    assert as_recorded.retries == 1
    predicted = replay_document(tmp_path, trace(events), 35 * MiB)
    assert predicted.out_of_memory == failed and predicted.retries == 1
    assert predicted.final_allocated_bytes == 12 * MiB, "what follows a failure that was survived is replayed"
    avoided = replay_document(tmp_path, trace(events), 60 * MiB)
    assert avoided.out_of_memory is None and "succeed" in avoided.notes[0]
    assert avoided.peak_allocated_bytes == 30 * MiB and avoided.peak_reserved_bytes == 42 * MiB


def test_a_free_that_waits_for_another_stream(tmp_path: Path) -> None:
    events = [["A", 100 * MiB, 12 * MiB], ["Q", 100 * MiB, 12 * MiB], ["A", 200 * MiB, 12 * MiB]]
    events += [["C", 100 * MiB, 12 * MiB], ["A", 100 * MiB, 12 * MiB]]
    answer = replay_document(tmp_path, trace(events))
    assert (answer.peak_allocated_bytes, answer.peak_reserved_bytes) == (24 * MiB, 24 * MiB)
    assert answer.at_allocated_peak.event == 4
    start = {"segments": [[100 * MiB, 12 * MiB, 0]], "blocks": [[100 * MiB, 12 * MiB, None, 0]]}
    answer = replay_document(tmp_path, trace(events[2:], initial=start))
    assert (answer.peak_allocated_bytes, answer.peak_reserved_bytes) == (24 * MiB, 24 * MiB)


def test_unmapped_pages_are_released_as_recorded(tmp_path: Path) -> None:
    options = {"expandable_segments": True}
    events = [["A", 0, 30 * MiB], ["A", 30 * MiB, 50 * MiB], ["F", 0, 30 * MiB], ["U", 0, 20 * MiB]]
    events += [["A", 80 * MiB, 40 * MiB], ["A", 0, 25 * MiB]]
    answer = replay_document(tmp_path, trace(events, settings=options))
    # 30 + 50 MiB take four pages of 20; one goes back, two are mapped at the end, and one for the last 25 MiB.
    assert (answer.peak_reserved_bytes, answer.final_reserved_bytes) == (120 * MiB, 120 * MiB)
    assert answer.recorded is not None and answer.recorded.segment_events_matched == 1


def test_lost_and_unknown_frees_are_told(tmp_path: Path) -> None:
    answer = replay_document(tmp_path, trace([["A", 512, 512], ["A", 512, 1024], ["F", 1024, 512]]))
    assert answer.final_allocated_bytes == 1024
    assert [note.split()[0] for note in answer.notes] == ["1", "1"]


def test_fields_in_another_order(tmp_path: Path) -> None:
    document = trace([])
    document["event_fields"] = ["bytes", "kind", "address"]
    document["events"] = [[12 * MiB, "A", 512]]
    assert replay_document(tmp_path, document).peak_reserved_bytes == 12 * MiB


def test_a_device_can_be_picked(tmp_path: Path) -> None:
    small, large = (
        torch_snapshot(document_of(name)) for name in ("linear-grad-empty-start", "attention-backward-3090")
    )
    both = copy.deepcopy(small)
    both["device_traces"].append(large["device_traces"][0])
    both["segments"] += [{**segment, "device": 1} for segment in large["segments"]]
    assert replay_pickle(tmp_path, both).device == 1, "the one with more events"
    first = replay_pickle(tmp_path, both, None, None, 0)
    assert first.peak_reserved_bytes == replay_file(path_of("linear-grad-empty-start")).peak_reserved_bytes
    with pytest.raises(GptfitError, match="no history of device 7"):
        replay_pickle(tmp_path, both, None, None, 7)
    with pytest.raises(GptfitError, match="no device 1"):
        replay_file(path_of("linear-grad-empty-start"), device=1)


def test_any_protocol_and_gzip(tmp_path: Path) -> None:
    snapshot = torch_snapshot(document_of("nca-mixed-near-empty"))
    path = tmp_path / "snapshot"
    answers = []
    for protocol in (2, 3, 4, 5):
        path.write_bytes(gzip.compress(pickle.dumps(snapshot, protocol)))
        answers.append(replay_file(path))
    assert answers.count(answers[0]) == 4


class Evil:
    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> Any:
        return self.reduced


def nested(depth: int) -> bytes:
    return b"\x80\x04}(" + b")" + b"\x85" * depth + b"Nu."  # tuples in tuples, hashed as the key of a dictionary


PICKLES = {
    "code": pickle.dumps({"device_traces": Evil(open, ("/nonexistent/evil", "w"))}),
    "code of protocol 0": b"cos\nsystem\n(S'true'\ntR.",
    "a class": pickle.dumps([Path("x")]),
    "a set": pickle.dumps({1, 2}),
    "bytes": pickle.dumps(b"x" * 10),
    "a memo slot far away": b"\x80\x04Nr\xff\xff\xff\x7f.",
    "a chain of tuples": nested(200_000),
    "a chain of tuples over the memo": b"\x80\x04)" + b"\x94h\x00\x85" * (MAX_TUPLES + 1) + b".",
    "a huge number": b"\x80\x04\x8b\xff\xff\xff\x7f" + b"\xff" * 64 + b".",
    "text longer than the file": b"\x80\x04\x8d" + b"\xff" * 8 + b".",
    "an end in the middle": pickle.dumps({"device_traces": []})[:-3],
    "another word": b"hello world, this is no pickle",
    "lists in lists": b"\x80\x04" + b"]" * 300_000 + b"a" * 299_999 + b".",
    "a number": pickle.dumps(3),
    "a state without history": pickle.dumps({"segments": [], "device_traces": [[]]}),
    "an older state": pickle.dumps([{"address": 1, "blocks": []}]),
    "traces of a wrong kind": pickle.dumps({"device_traces": [3]}),
    "events of a wrong kind": pickle.dumps({"device_traces": [[3]]}),
    "an unknown action": pickle.dumps({"device_traces": [[{"action": "teleport", "addr": 1, "size": 1}]]}),
    "an unhashable action": pickle.dumps({"device_traces": [[{"action": [], "addr": 1, "size": 1}]]}),
    "a size that is none": pickle.dumps({"device_traces": [[{"action": "alloc", "addr": 1, "size": True}]]}),
    "an endless size": pickle.dumps({"device_traces": [[{"action": "alloc", "addr": 1, "size": 1 << 200}]]}),
    "a negative address": pickle.dumps({"device_traces": [[{"action": "alloc", "addr": -1, "size": 1}]]}),
}
DOCUMENTS: dict[str, Any] = {
    "no format": {"events": []},
    "another format": {"format": "x" * 5000, "events": []},
    "a profile": {"format": "profiler-memory-events/1", "events": [[0, 1, 2, 3, 4]]},
    "a profiler's trace": {"traceEvents": []},
    "a list": [1, 2],
    "an unknown kind": trace([["X", 1, 1]]),
    "a kind that is none": trace([[["A"], 1, 1]]),
    "a row that is too short": {"format": TRACE_FORMAT, "events": [["A", 1]]},
    "a row that is none": {"format": TRACE_FORMAT, "events": [5]},
    "a size that is none": trace([["A", 1, 1.5]]),
    "a negative size": trace([["A", 1, -512]]),
    "an endless address": trace([["A", 1 << 80, 1]]),
    "no events": {"format": TRACE_FORMAT},
    "a start that is none": trace([], initial=[1]),
    "blocks in one another": trace(
        [], initial={"segments": [[0, 2 * MiB, 0]], "blocks": [[0, 1024, 1024, 0], [512, 512, 512, 0]]}
    ),
    "a block outside": trace([], initial={"segments": [[0, 2 * MiB, 0]], "blocks": [[4 * MiB, 512, 512, 0]]}),
    "segments in one another": trace([], initial={"segments": [[0, 20 * MiB, 0], [MiB, 20 * MiB, 0]]}),
    "fields that are missing": {**trace([["A", 1, 1]]), "event_fields": ["kind", "bytes"]},
    "settings of another allocator": trace([], settings={"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}),
}
TEXTS = {
    "nothing": b"",
    "white space": b" \n" * 20,
    "half a document": b'{"format": "cuda-caching',
    "deep lists": b'{"format": ' + b"[" * 100_000,
    "a long number": b'{"format": ' + b"9" * 10_000 + b"}",
    "half a gzip": gzip.compress(b"{}" * 1000)[:-9],
    "a broken gzip": b"\x1f\x8b" + b"\x00" * 30,
}
FILES = {**PICKLES, **TEXTS, **{name: json.dumps(value).encode() for name, value in DOCUMENTS.items()}}


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_recording_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / "file\n.pickle"
    path.write_bytes(FILES[name])
    with pytest.raises(GptfitError) as caught:
        replay_file(path)
    assert "\n" not in caught.value.message + caught.value.hint
    assert len(caught.value.message) < 300


def test_a_profile_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(GptfitError, match="cannot be replayed"):
        replay_document(tmp_path, DOCUMENTS["a profile"])


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(GptfitError, match="cannot read"):
            replay_file(path)
    monkeypatch.setattr(recording_module, "MAX_FILE_BYTES", 1000)
    monkeypatch.setattr(recording_module, "MAX_JSON_BYTES", 1000)
    with pytest.raises(GptfitError, match="larger than"):
        replay_file(path_of("linear-grad-empty-start"))


PLAIN_DATA = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), 1 << 63) | st.floats(allow_nan=False) | st.text(max_size=300),
    lambda inner: (
        st.lists(inner, max_size=5) | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=5), inner, max_size=5)
    ),
    max_leaves=40,
)


@given(PLAIN_DATA, st.integers(2, 5))
def test_plain_data_is_read_as_it_is(data: Any, protocol: int) -> None:
    assert load_plain(pickle.dumps(data, protocol), "it") == data


@given(st.randoms(use_true_random=False), st.sampled_from(("nca-mixed-near-empty", "linear-grad-empty-start")))
@settings(max_examples=60, deadline=None)
def test_a_damaged_recording_is_replayed_or_refused(tmp_path_factory: Any, dice: random.Random, name: str) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged"
    document = document_of(name)
    raw = bytearray(json.dumps(document).encode() if dice.random() < 0.5 else pickle.dumps(torch_snapshot(document)))
    for _ in range(dice.randrange(1, 4)):
        raw[dice.randrange(len(raw))] = dice.randrange(256)
    path.write_bytes(raw)
    try:
        replay_file(path)
    except GptfitError as error:
        assert "\n" not in error.message


@given(st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_events_in_any_order_keep_the_books(tmp_path_factory: Any, dice: random.Random) -> None:
    document = document_of("nca-mixed-near-empty")
    rows = document["events"]
    for _ in range(20):
        at = dice.randrange(len(rows))
        rows[at] = [dice.choice("AFQCRSMUON"), *dice.choice(rows)[1:]]
    path = tmp_path_factory.getbasetemp() / "shuffled"
    path.write_text(json.dumps(document))
    for capacity in (None, 20_000 * MiB):
        answer = replay_file(path, capacity)
        assert sum(row.block_bytes for row in answer.alive_at_peak) == answer.peak_allocated_bytes
        assert answer.peak_allocated_bytes <= answer.peak_reserved_bytes <= (capacity or 1 << 60)
