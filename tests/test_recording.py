"""Files that hold recordings in one form or another, and files that hold none."""

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
from gptfit.memory import recorded_file
from gptfit.memory.plainpickle import MAX_TUPLES, check_plain, load_plain
from gptfit.memory.recorded_file import TRACE_FORMAT
from gptfit.memory.replay import replay_file
from snapshots import document_of, path_of, replay_document, replay_pickle, torch_snapshot, trace

MiB = 1 << 20


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


@pytest.mark.parametrize("name", [name for name in PICKLES if "chain" in name or "memo" in name or "code" in name])
def test_a_dangerous_pickle_is_refused_before_it_is_obeyed(name: str) -> None:
    with pytest.raises(GptfitError):
        check_plain(PICKLES[name], "it")


def test_a_profile_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(GptfitError, match="cannot be replayed"):
        replay_document(tmp_path, DOCUMENTS["a profile"])


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(GptfitError, match="cannot read"):
            replay_file(path)
    monkeypatch.setattr(recorded_file, "MAX_FILE_BYTES", 1000)
    monkeypatch.setattr(recorded_file, "MAX_JSON_BYTES", 1000)
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
