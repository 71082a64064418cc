"""Tokenizers by name: bytes (the default, nothing to download), GPT-2's, any rank file, nanoGPT's characters.

Text goes in as bytes, so that files need not be valid UTF-8 to be trained on; ids come out as numpy arrays.
"""

import base64
import binascii
import hashlib
import os
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from gptfit.errors import GptfitError, nearest

if TYPE_CHECKING:
    import tiktoken

END_OF_TEXT = "<|endoftext|>"

# GPT-2's splitting pattern in tiktoken's faster spelling (tiktoken_ext/openai_public.py, r50k_pat_str).
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# tiktoken_ext/openai_public.py, gpt2
GPT2_FILES = tuple(
    f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}" for name in ("vocab.bpe", "encoder.json")
)

GPT2_HINT = (
    "be online once, or set TIKTOKEN_CACHE_DIR to a folder that tiktoken filled, or give the rank file as "
    "tokenizer=PATH (gpt2.tiktoken or vocab.bpe), or use tokenizer=byte, which needs nothing"
)


class Tokenizer(Protocol):
    """`encode` takes bytes, `decode` never fails on ids below n_vocab. `name` finds it again, through get_tokenizer."""

    @property
    def name(self) -> str: ...
    @property
    def n_vocab(self) -> int: ...
    @property
    def end_of_text(self) -> int | None: ...
    def encode(self, data: bytes) -> np.ndarray: ...
    def decode(self, ids: Sequence[int]) -> str: ...


class ByteTokenizer:
    """One token a byte, and one for the end of a text: 257 ids."""

    name = "byte"
    n_vocab = 257
    end_of_text = 256

    def encode(self, data: bytes) -> np.ndarray:
        return np.frombuffer(data, dtype=np.uint8).astype(np.uint16)

    def decode(self, ids: Sequence[int]) -> str:
        pieces = (END_OF_TEXT.encode() if i == self.end_of_text else bytes([i]) for i in ids)
        return b"".join(pieces).decode("utf-8", errors="replace")

    @cached_property
    def encoding(self) -> "tiktoken.Encoding":
        """The same ids as a tiktoken object, for code that wants one; a hundred times slower than `encode`."""
        import tiktoken

        ranks = {bytes([i]): i for i in range(256)}
        return tiktoken.Encoding(
            "byte", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens={END_OF_TEXT: self.end_of_text}
        )


class RankTokenizer:
    """Byte pairs, through tiktoken. Special tokens in the text are read as text."""

    def __init__(self, name: str, encoding: "tiktoken.Encoding") -> None:
        self.name = name
        self.encoding = encoding
        self.n_vocab = encoding.n_vocab
        self.end_of_text: int | None = encoding.eot_token

    def encode(self, data: bytes) -> np.ndarray:
        return self.encoding.encode_to_numpy(data.decode("utf-8", errors="replace"), disallowed_special=())

    def decode(self, ids: Sequence[int]) -> str:
        return self.encoding.decode(list(ids), errors="replace")


class CharTokenizer:
    """One token a character of a fixed alphabet, as in nanoGPT's shakespeare_char."""

    end_of_text = None

    def __init__(self, characters: str) -> None:
        self.characters = characters
        self.name = f"char:{characters}"
        self.n_vocab = len(characters)
        self.ids = {character: i for i, character in enumerate(characters)}

    def encode(self, data: bytes) -> np.ndarray:
        """Raises GptfitError for a character that is not in the alphabet."""
        text = data.decode("utf-8", errors="replace")
        try:
            return np.array([self.ids[character] for character in text], dtype=np.uint16)
        except KeyError as error:
            raise GptfitError(
                f"the character {error} is not one of the {self.n_vocab} that this model knows",
                f"it knows {self.characters!r}",
            ) from None

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.characters[i] for i in ids)


def get_tokenizer(name: str = "") -> Tokenizer:
    """The tokenizer of that name: `byte` (the default), `gpt2`, a rank file's path, or `char:` and an alphabet.

    Raises GptfitError for an unknown name, for gpt2 that is neither cached nor reachable, and for a damaged rank file.
    """
    if name in ("", "byte"):
        return ByteTokenizer()
    if name == "gpt2":
        return _gpt2()
    if name.startswith("char:"):
        return CharTokenizer(name.removeprefix("char:"))
    path = Path(name).expanduser()
    if path.is_file():
        return _from_rank_file(path)
    if path.suffix or path.name != name:  # no name of ours, but that of a file
        raise GptfitError(
            f'there is no rank file "{name}"', "the tokenizer that made these tokens is needed: copy it there"
        )
    raise GptfitError(
        f'unknown tokenizer "{name}"{nearest(name, ("byte", "gpt2"), 1)}',
        "tokenizers are byte, gpt2, and the path of a rank file (gpt2.tiktoken, vocab.bpe)",
    )


def nearer(name: str, folder: Path) -> str:
    """The rank file `name`, as the copy of it that `folder` has where it has one: folders are moved to other machines,
    and the file is made anew in the first place."""
    if name in ("", "byte", "gpt2") or name.startswith("char:"):
        return name
    copy = folder / Path(name).name
    return str(copy.resolve()) if copy.is_file() else name


def token_bytes(name: str) -> np.ndarray | None:
    """How many bytes of text each id stands for, 0 for an end of text; None where the tokenizer is not here."""
    if name == "gpt2" and not _gpt2_is_here():
        return None
    try:
        coder = get_tokenizer(name)
    except GptfitError:
        return None
    if isinstance(coder, CharTokenizer):
        return np.array([len(character.encode()) for character in coder.characters])
    if isinstance(coder, RankTokenizer):
        lengths = np.array([len(coder.encoding.decode_single_token_bytes(i)) for i in range(coder.n_vocab)])
        lengths[coder.end_of_text] = 0
        return lengths
    return np.array([1] * 256 + [0])


def _gpt2_is_here() -> bool:
    """Whether tiktoken needs no network for it: its cache holds it under the hash of its address (tiktoken/load.py)."""
    default = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", default))
    return all(os.path.isfile(os.path.join(folder, hashlib.sha1(url.encode()).hexdigest())) for url in GPT2_FILES)


def _gpt2() -> Tokenizer:
    import tiktoken

    try:
        return RankTokenizer("gpt2", tiktoken.get_encoding("gpt2"))
    except (OSError, ValueError):  # requests' errors are OSErrors; a file with another hash is a ValueError
        raise GptfitError("GPT-2's tokenizer is not on this machine and could not be downloaded", GPT2_HINT) from None


def _from_rank_file(path: Path) -> Tokenizer:
    import tiktoken

    try:
        data = path.read_bytes()
        ranks = _bpe_ranks(data.decode()) if path.suffix == ".bpe" else _tiktoken_ranks(data)
        n = len(ranks)
        if n < 256 or sorted(ranks.values()) != list(range(n)):
            raise ValueError("the ranks have gaps, or are fewer than 256")
        encoding: Any = tiktoken.Encoding(
            path.stem, pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: n}
        )
    except (OSError, ValueError, KeyError, binascii.Error) as error:
        raise GptfitError(
            f'cannot read the ranks in "{path}": {error}',
            "expected tiktoken's format (one base64 token and its rank a line) or GPT-2's vocab.bpe",
        ) from None
    return RankTokenizer(str(path.resolve()), encoding)


def _tiktoken_ranks(data: bytes) -> dict[bytes, int]:
    pairs = (line.split() for line in data.splitlines() if line.strip())
    return {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}


def _bpe_ranks(text: str) -> dict[bytes, int]:
    """Ranks of a vocab.bpe: the 256 bytes in GPT-2's order, then one merge a line.

    GPT-2 writes a byte as the character of that number where it is printable and not a space, and the
    others, in order, as the characters from 256 on (gpt-2/src/encoder.py, bytes_to_unicode); its ids
    number the printable bytes first.
    """
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in set(printable)]
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    ranks = {bytes([b]): i for i, b in enumerate(printable + others)}
    for line in text.splitlines():
        if line.startswith("#version") or not line:
            continue
        first, second = line.split(" ")
        ranks[bytes(byte_of[character] for character in first + second)] = len(ranks)
    return ranks
