"""The names of GPUs as people, shops and drivers write them, taken apart into what can be compared."""

import re
from dataclasses import dataclass, replace
from typing import Self

from gptfit.units import GiB, MiB

# No card's name is longer; what is, is not read to its end.
MAX_NAME = 200

# "8x NVIDIA H100": how many there are does not change what each is.
_COUNT = re.compile(r"^\s*[0-9]{1,3}\s*[x×]\s+")
_SIZE = re.compile(r"(?<![0-9.])([0-9]{1,6}(?:\.[0-9]{1,3})?)[\s-]?(gi?b?|mi?b)(?![a-z0-9])")
_SIZE_UNITS = {"g": GiB, "m": MiB}
# What stands in brackets or after a comma is a remark; a size in it has been read by then.
_REMARK = re.compile(r"\([^)]*\)|,.*$")
# Words that no two cards differ by.
_NOISE = re.compile(
    r"nvidia|geforce|corporation|amd|instinct|tesla|graphics|tensorcore|lovelace|generation|blackwell|workstation"
    r"|edition|gpu|card|hbm[23]e?"
)
# Words that two cards of one model differ by. maxq comes first: of the RTX PRO cards, Max-Q is a desktop card.
_WORDS = {
    "maxq": re.compile(r"(?<=pro6000)maxq"),
    "laptop": re.compile(r"laptop|notebook|mobile|(?:with)?maxq(?:design)?"),
    "pcie": re.compile(r"pcie"),
    "sxm": re.compile(r"sxm[2-5]?"),
    "nvl": re.compile(r"nvl(?![a-z])"),
    "server": re.compile(r"server"),
    "quadro": re.compile(r"quadro"),
    "ada": re.compile(r"(?<=[0-9])ada"),
}
_REWRITES = (
    (re.compile(r"(?<=[0-9i])super$"), "s"),
    (re.compile(r"^(?=1[06][0-9]0(?![0-9]))"), "gtx"),
    (re.compile(r"^(?=[2-5]0[5-9]0(?![0-9]))"), "rtx"),  # 4070ti
    (re.compile(r"^(?=[2-6][05]00$)"), "rtx"),  # 6000 (Ada)
    (re.compile(r"^(?=a[2456][05]00$|pro6000)"), "rtx"),  # A6000, PRO 6000
)


@dataclass(frozen=True, slots=True)
class Spelling:
    """A GPU's name taken apart: the compact model (`rtx4070ti`), the words that qualify it (`laptop`, `pcie` …),
    and the memory size if it has one. The model is empty where the name gives two sizes, as that of a MIG slice does:
    what is left of such a name would be the whole card's.
    """

    model: str
    words: frozenset[str]
    size_bytes: int | None

    @classmethod
    def read(cls, name: str) -> Self:
        text = _COUNT.sub("", name[:MAX_NAME].lower().replace("_", " "))
        sizes = {round(float(number) * _SIZE_UNITS[unit[0]]) for number, unit in _SIZE.findall(text)}
        model = _compact(_REMARK.sub(" ", _SIZE.sub(" ", text)))
        words = set()
        for word, pattern in _WORDS.items():
            model, n_found = pattern.subn("", model)
            if n_found:
                words.add(word)
        for pattern, replacement in _REWRITES:
            model = pattern.sub(replacement, model)
        return cls(model if len(sizes) < 2 else "", frozenset(words), sizes.pop() if len(sizes) == 1 else None)

    def without(self, word: str) -> Self:
        return replace(self, words=self.words - {word})

    def is_like(self, other: Self) -> bool:
        """Whether both are the same model and qualified the same, whatever their sizes."""
        return self.model == other.model and self.words == other.words


def letters_of(name: str) -> str:
    """The letters and digits of a name in their order, without the words that no two cards differ by."""
    return _compact(_COUNT.sub("", name[:MAX_NAME].lower()))


def _compact(lowered: str) -> str:
    return _NOISE.sub("", re.sub(r"[^a-z0-9]", "", lowered))
