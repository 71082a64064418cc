"""Small data sets of bytes."""

import json
from pathlib import Path

import numpy as np


def few_tokens(folder: Path, n_train: int = 20_000, n_val: int = 2_000, seed: int = 0) -> Path:
    """A folder to train on: 16 different bytes, drawn at random."""
    rng = np.random.default_rng(seed)
    for part, n in (("train", n_train), ("val", n_val)):
        (rng.integers(0, 32, n) // 2 * 3).astype(np.uint16).tofile(folder / f"{part}.bin")
    (folder / "meta.json").write_text(json.dumps({"dtype": "uint16", "vocab_size": 257, "tokenizer": "byte"}))
    return folder
