"""Pickles that hold plain data: read without building a single object, importing or calling anything."""

import io
import pickle
import re
from typing import Any, NoReturn

from gptfit.errors import GptfitError

HINT = "nothing in it was run; copy or record it again"

# Opcodes with their arguments, as pickle writes plain data. Pairs of numbers made a tuple (ids of memory pools)
# stand first, for tuples in general are counted.
NUMBER = rb"(?:K.|M..|J.{4}|\x8a(?:\x00|\x01.|\x02..|\x03.{3}|\x04.{4}|\x05.{5}|\x06.{6}|\x07.{7}|\x08.{8}|\x09.{9}))"
RUN = re.compile(
    rb"(?:" + NUMBER + NUMBER + rb"\x86|" + NUMBER + rb"|[\x94(\]}esuaN\x88\x89)]|h.|q.|j.{4}|\x95.{8}|G.{8}){1,4000}",
    re.DOTALL,
)
SIZED = {ord("X"): 4, 0x8C: 1, 0x8D: 8}  # text: bytes of its length
MEMO = ord("r")  # LONG_BINPUT
TUPLES = frozenset((0x85, 0x86, 0x87, ord("t")))
PROTO, STOP = 0x80, ord(".")
LONGEST = 9  # an opcode and a number of 8 bytes: what is left of one that was cut off is shorter
# Nested tuples are hashed by recursion in C, which a long chain of them would overflow.
MAX_TUPLES = 10_000
# Lists, dictionaries and pairs: an upper bound, as it counts bytes. 64 bytes and more each, made by a single one.
MAX_CONTAINERS = 20_000_000


class PlainUnpickler(pickle.Unpickler):
    """Lists, dictionaries, tuples, text and numbers; whatever would name a class or function is refused."""

    def find_class(self, module_name: str, global_name: str, /) -> NoReturn:
        raise pickle.UnpicklingError("it asks for code")

    def persistent_load(self, pid: Any, /) -> NoReturn:
        raise pickle.UnpicklingError("it refers to storage outside itself")


def load_plain(raw: bytes, name: str) -> Any:
    """The data in a pickle called `name`. Raises GptfitError where it is damaged, or holds more than plain data."""
    check_plain(raw, name)
    try:
        return PlainUnpickler(io.BytesIO(raw)).load()
    except Exception:  # the pickle machine raises what its input makes it raise
        raise GptfitError(f"{name} is a damaged pickle", HINT) from None


def check_plain(raw: bytes, name: str) -> None:
    """Walks over the opcodes of a pickle, before any is obeyed.

    Raises GptfitError for one that is not needed for plain data, for a memo slot beyond the pickle's length (a few
    bytes would ask for gigabytes), for long chains of tuples, and for an end in the middle.
    """
    if sum(raw.count(opcode) for opcode in (b"]", b"}", b"\x86")) > MAX_CONTAINERS:
        raise GptfitError(f"{name} holds too many objects", "record fewer events: max_entries")
    at, n_tuples = 0, 0
    while True:
        run = RUN.match(raw, at) if at < len(raw) else None
        if run is not None:
            at = run.end()
        opcode = raw[at] if at < len(raw) else -1
        if opcode == STOP and at:
            return
        if opcode in SIZED:
            width = SIZED[opcode]
            at += 1 + width + int.from_bytes(raw[at + 1 : at + 1 + width], "little")
        elif opcode == MEMO and int.from_bytes(raw[at + 1 : at + 5], "little") <= len(raw):
            at += 5
        elif opcode == PROTO:
            at += 2
        elif opcode in TUPLES and n_tuples < MAX_TUPLES:
            n_tuples += 1
            at += 1
        elif run is None or at >= len(raw):
            what = "ends in the middle" if at >= len(raw) else f"holds more than plain data at byte {at}"
            if at < len(raw) < at + LONGEST:
                what = f"ends in the middle, or {what}"
            raise GptfitError(f"{name} is not a readable memory snapshot: it {what}", HINT)
