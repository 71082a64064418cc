"""A vocabulary of byte pairs learned from one's own text, through the package tokenizers."""

import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path

from gptfit.errors import GptfitError
from gptfit.prepare import make_folder
from gptfit.replacing import replacing
from gptfit.sources import Source, documents, list_files
from gptfit.tokenizer import get_tokenizer
from gptfit.unfinished import read

FILE = "vocab.bpe"

# Of a vocabulary: the bytes, and the end of a text.
GIVEN = 256 + 1


def train_bpe(sources: Iterable[Source], n_vocab: int, out_dir: Path, field: str = "", restart: bool = False) -> str:
    """Writes `out_dir`/vocab.bpe, in GPT-2's form, and returns its path, which is a tokenizer's name.

    The text is cut into words by GPT-2's pattern. Raises GptfitError without the package, for fewer than 258
    ids, and for stdin, whose text could not be read a second time. A preparation that was cut short keeps its own.
    """
    if importlib.util.find_spec("tokenizers") is None:
        raise GptfitError("--train-bpe needs the package tokenizers, which is not installed", "pip install tokenizers")
    if n_vocab <= GIVEN:
        raise GptfitError(f"--train-bpe {n_vocab}: {GIVEN} ids are the bytes and the end of a text", "4096 or more")
    listed = list_files(sources, out_dir)
    if None in listed.files:
        raise GptfitError("--train-bpe reads its text twice, and stdin comes once", "write it to a file first")
    path = out_dir / FILE
    if not restart and (known := begun_with(out_dir, str(path.resolve()))):
        if known != n_vocab:
            raise GptfitError(
                f'"{out_dir}" holds a preparation that was cut short, with --train-bpe {known}, not {n_vocab}',
                f"go on with --train-bpe {known}, or give that up with --restart",
            )
        return str(path.resolve())
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=n_vocab - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    texts = (piece.text.decode("utf-8", errors="replace") for piece in documents(listed.files, field))
    tokenizer.train_from_iterator(texts, trainer)
    make_folder(out_dir)
    with replacing(path) as file:
        file.write(_merges(tokenizer.to_str()).encode())
    return str(path.resolve())


def begun_with(out_dir: Path, tokenizer: str) -> int:
    """The ids of `tokenizer` where an unfinished preparation in `out_dir` uses it, else 0."""
    question, progress = read(out_dir)
    uses = progress.n and question["options"]["tokenizer"] == tokenizer and Path(tokenizer).is_file()
    return get_tokenizer(tokenizer).n_vocab if uses else 0


def _merges(saved: str) -> str:
    """The merges of a saved tokenizer as vocab.bpe has them, each token once."""
    lines, seen = ["#version: 0.2"], set[str]()
    for merge in json.loads(saved)["model"]["merges"]:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if (token := "".join(pair)) not in seen:  # two pairs may make the same bytes
            seen.add(token)
            lines.append(" ".join(pair))
    return "\n".join(lines) + "\n"
