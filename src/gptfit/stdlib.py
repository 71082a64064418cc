"""The default data: the sources of the Python that runs, about ten million bytes. Nothing is downloaded.

They differ from one Python to the next, so no result may depend on them to the digit.
"""

import hashlib
import os
import sysconfig
import tempfile
from pathlib import Path

from gptfit.errors import GptfitError
from gptfit.prepare import META, prepare
from gptfit.sources import is_text
from gptfit.tokenizer import get_tokenizer

# Not library code that reads as such: tests, generated tables, a second grammar, demos, installed packages.
LEFT_OUT = {
    "__pycache__", "encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages", "dist-packages",
    "test", "tests", "turtledemo",
}  # fmt: skip

# Fewer files than this are no standard library but a frozen or zipped one.
MIN_FILES = 100


def default_folder(tokenizer: str = "") -> Path:
    """The folder of the default data set, prepared when it is not there yet (a second for bytes).

    Raises GptfitError where this Python comes without sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = source_files(root)
    if len(files) < MIN_FILES:
        raise GptfitError(
            f"the built-in data are Python's own sources, but there are only {len(files)} in {root}",
            "give text with dataset=DIR, made by: gptfit data prepare FILE … --out DIR",
        )
    name = get_tokenizer(tokenizer).name
    digest = hashlib.sha256(name.encode())
    for path in files:
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    folder = cache_folder() / f"python-{digest.hexdigest()[:16]}"
    if not (folder / META).is_file():
        # Made aside: several processes may come to this at once.
        with tempfile.TemporaryDirectory(dir=cache_folder()) as made:
            prepare(files, tokenizer, Path(made), split="tail")
            folder.mkdir(exist_ok=True)
            for name in ("train.bin", "val.bin", META):
                (Path(made) / name).replace(folder / name)
    return folder


def source_files(root: Path) -> list[Path]:
    """The library's .py files that are kept, in an order that mixes the subjects, so that the last twentieth,
    which is for validation, is like the rest. The order depends on the paths within the library alone."""
    found: list[tuple[bytes, Path]] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in LEFT_OUT and not name.startswith("config-")]
        for name in names:
            path = Path(folder) / name
            if name.endswith(".py") and is_text(path):
                found.append((hashlib.sha256(path.relative_to(root).as_posix().encode()).digest(), path))
    return [path for _, path in sorted(found)]


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/gptfit or ~/.cache/gptfit; where that cannot be written, a folder of this user's in the
    temporary directory."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "")
    for folder in (Path(base) / "gptfit", Path(tempfile.gettempdir()) / f"gptfit-{user}"):
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError:
            continue
    raise GptfitError(
        "there is no folder to keep the built-in data in", "set XDG_CACHE_HOME to a folder that can be written"
    )
