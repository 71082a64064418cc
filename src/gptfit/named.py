"""What a command line names, checked for being there before torch is loaded for it: a typo is told at once."""

from pathlib import Path

from gptfit.config import shown
from gptfit.errors import GptfitError, nearest

FORMATS = ("hf", "nanogpt")
FORM = "write it as FILE.py:NAME, where NAME is a function in FILE.py that makes the step"


def function_in(spec: str) -> tuple[Path, str]:
    """The file and the name in `FILE.py:NAME`. Raises GptfitError for another form, or a file that is not there."""
    text, colon, name = spec.rpartition(":")
    if not colon or not text or not name.isidentifier():
        raise GptfitError(f'"{shown(spec)}" names no function of a file', FORM)
    path = Path(text)
    if not path.is_file():
        beside = [str(other) for other in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise GptfitError(f"there is no file {shown(text)}{nearest(text, beside)}", FORM)
    return path.resolve(), name


def check_checkpoint(folder: Path | str) -> None:
    """Raises GptfitError for a folder without anything that is called as a checkpoint is."""
    if not any(Path(folder).glob("checkpoint-*")):
        raise no_checkpoint(folder)


def no_checkpoint(folder: Path | str) -> GptfitError:
    return GptfitError(f'there is no checkpoint in "{folder}"', "give the --out folder of a gptfit train")


def check_format(format: str) -> None:
    """Raises GptfitError for a form that `export` does not write."""
    if format not in FORMATS:
        raise GptfitError(f'unknown format "{format}"{nearest(format, FORMATS, 1)}', f"formats: {', '.join(FORMATS)}")
