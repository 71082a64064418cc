"""Checkpoints of sharded runs: a folder to which each rank writes the parts that it holds; nobody holds the whole.

The tensors are a checkpoint of torch.distributed.checkpoint, which other programs read as well: parts in *.distcp,
and `.metadata`, which says where each tensor's parts are. `plain.pt` beside them has the rest, and of each file its
size and CRC-32, as the zip that torch.save writes has them: DCP compares none. It is written last.

DCP unpickles `.metadata`, and a pickle may call anything. It is read here by names: what describes tensors, and
nothing else. Parts are read by torch.load(weights_only=True). (DCP's safetensors form needs no pickle, but makes two
copies of a rank's parts in memory to write them.)
"""

import io
import json
import pickle
import queue
import shutil
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import metadata as described
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from gptfit.distributed import Ranks
from gptfit.errors import GptfitError
from gptfit.optim import Stepper, load_state
from gptfit.replacing import not_written, os_error, replacing, sync_folder

METADATA, PLAIN = ".metadata", "plain.pt"

# What a rank copies to the host at a time: DCP keeps the tensors of a file until it is written.
FILE_BYTES = 256 * 1024**2

UNREADABLE = (
    OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, IndexError, EOFError, AssertionError,
    zipfile.BadZipFile, pickle.UnpicklingError, CheckpointException,
)  # fmt: skip


def parameter_names(model: nn.Module, optimizer: Stepper) -> list[list[str]]:
    """The parameters of each part of the optimizer, in the order in which its state_dict counts them."""
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    parts = getattr(optimizer, "parts", (optimizer,))
    return [[name_of[id(p)] for group in part.param_groups for p in group["params"]] for part in parts]


def write_folder(
    path: Path, model: nn.Module, optimizer: Stepper, ema: Mapping[str, Tensor], plain: Mapping[str, Any], ranks: Ranks
) -> None:
    """On all ranks together: the folder `path`, whole or not at all. What was there before is replaced.

    `plain` are tensors, numbers and text that are the same on all ranks. Raises GptfitError where one of them
    cannot write, and where they do not write to the same folder; nothing is left then.
    """
    partial = path.with_name(f".{path.name}.partial")
    names = parameter_names(model, optimizer)
    states, rest = _by_name(optimizer.state_dict(), names)
    unique = {name for name, _ in model.named_parameters()}
    weights = {name: tensor for name, tensor in model.state_dict().items() if name in unique}
    tensors = {"model": weights, "optimizer": {"state": states}, "ema": dict(ema)}
    try:
        with ranks.together(), _written(path):
            if ranks.first:
                partial.mkdir()
        with ranks.together(), _written(path):
            save({key: part for key, part in tensors.items() if part}, storage_writer=_Writer(partial))
            own = {file.name: _checksum(file) for file in partial.glob(f"__{ranks.rank}_*")}
        written = {name: sums for words in ranks.words(json.dumps(own)) for name, sums in json.loads(words).items()}
        with ranks.together(), _written(path):
            if ranks.first:
                written[METADATA] = _checksum(partial / METADATA)
                kept = {**plain, "tied": _tied(model), "optimizer": rest, "names": names, "files": written}
                _finish(partial, path, kept)
    except BaseException:
        if ranks.first:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _finish(partial: Path, path: Path, plain: dict[str, Any]) -> None:
    """The last file, and the rename."""
    if missing := [name for name in plain["files"] if not (partial / name).is_file()]:
        raise GptfitError(
            f'"{path}" is not the same folder to all processes: {missing[0]} is not in it',
            "--out must be a folder that all machines share",
        )
    with replacing(partial / PLAIN) as file:  # which syncs the folder, too
        torch.save(plain, file)
    replaced = path.with_name(f".{path.name}.replaced.partial")
    if path.exists():  # a damaged one that was passed over
        path.rename(replaced)
    partial.rename(path)
    sync_folder(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


class _Writer(FileSystemWriter):
    """DCP's, of several files a rank, each synced, and without the path that the folder has while it is written."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[Any]:
        files: queue.Queue[Any] = queue.Queue()
        for number, items in enumerate(_bins(plan.items)):
            name = f"{plan.storage_data.prefix}{number}.distcp"
            files.put((self.fs.concat_path(self.path, name), name, items))
        try:
            return self._write_data(planner, files)
        except RuntimeError as error:  # torch.save's: the cause is lost on the way to the other ranks
            raise os_error(error) or error from error

    def storage_meta(self) -> None:
        return None


def _bins(items: Iterable[Any]) -> Iterator[list[Any]]:
    """`items` in their order, FILE_BYTES or a single one in each bin."""
    together: list[Any] = []
    n_bytes = 0
    for item in items:
        chunk = item.tensor_data.chunk
        size = chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize
        if together and n_bytes + size > FILE_BYTES:
            yield together
            together, n_bytes = [], 0
        together.append(item)
        n_bytes += size
    if together:
        yield together


@contextmanager
def _written(path: Path) -> Iterator[None]:
    """Says in a line what keeps a rank from writing."""
    try:
        yield
    except (OSError, RuntimeError, CheckpointException) as error:
        causes = [error]
        if isinstance(error, CheckpointException):  # DCP's, of all ranks, on all ranks
            causes = [cause for cause, _ in error.failures.values()]
        cause = next((found for found in map(os_error, causes) if found is not None), None)
        if cause is None:
            raise
        raise not_written(path, cause) from error


def _checksum(file: Path) -> tuple[int, int]:
    """Bytes, and their CRC-32."""
    n_bytes = crc = 0
    with file.open("rb") as stream:
        while block := stream.read(1024**2):
            n_bytes, crc = n_bytes + len(block), zlib.crc32(block, crc)
    return n_bytes, crc


def _tied(model: nn.Module) -> dict[str, str]:
    """Names of parameters that are others by another name."""
    first: dict[int, str] = {}
    named = [(n, first.setdefault(id(p), n)) for n, p in model.named_parameters(remove_duplicate=False)]
    return {name: other for name, other in named if name != other}


def _by_name(states: Mapping[str, Any], names: list[list[str]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors of an optimizer's states by the names of its parameters, and all that is no state tensor."""
    tensors: dict[str, Any] = {}
    rest: list[dict[str, Any]] = []
    for part, own in zip(states.get("parts", [states]), names, strict=True):
        for index, state in part["state"].items():
            tensors[own[index]] = {field: value for field, value in state.items() if isinstance(value, Tensor)}
        others = {
            index: {field: value for field, value in state.items() if not isinstance(value, Tensor)}
            for index, state in part["state"].items()
        }
        rest.append({**part, "state": others})
    return tensors, ({"parts": rest} if "parts" in states else rest[0])


class Shards:
    """A folder's tensors, of which each process reads what it needs, into what it has."""

    def __init__(self, folder: Path, plain: Mapping[str, Any]) -> None:
        self.folder = folder
        self.names: list[list[str]] = plain["names"]
        self.rest: Mapping[str, Any] = plain["optimizer"]
        self.tied: Mapping[str, str] = plain["tied"]
        self.metadata = _read_metadata(folder, plain["files"])
        self.tensors = self.metadata.state_dict_metadata

    # Each of these raises GptfitError for what cannot be read.

    def restore(self, model: nn.Module, optimizer: Stepper) -> None:
        """Puts weights and states into `model` and `optimizer`, sharded or not as they are."""
        parameters = dict(model.named_parameters())
        self.read_weights("model", parameters)
        with readable(self.folder):
            load_state(optimizer, self._states(lambda name: parameters[name]))

    def read_weights(self, part: str, parameters: Mapping[str, Tensor]) -> None:
        """Puts those of "model" or "ema" into tensors that are sharded or not."""
        with readable(self.folder):
            self._read({f"{part}.{name}": parameter.detach() for name, parameter in parameters.items()})

    def weights(self, part: str) -> dict[str, Tensor]:
        """Those of "model" or "ema", whole, on the CPU."""
        prefix = f"{part}."
        with readable(self.folder):
            tensors = self._read({key: self._empty(key) for key in self.tensors if key.startswith(prefix)})
            whole = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
            return {**whole, **{name: whole[other] for name, other in self.tied.items()}}

    def states(self) -> dict[str, Any]:
        """The optimizer's state_dict, whole, on the CPU."""
        with readable(self.folder):
            return self._states(lambda name: None)

    def has(self, part: str) -> bool:
        return any(key.startswith(f"{part}.") for key in self.tensors)

    def _states(self, like: Callable[[str], Tensor | None]) -> dict[str, Any]:
        """The optimizer's state_dict; a state as large as its parameter is sharded as `like` of its name is."""
        fields: dict[str, dict[str, str]] = {}
        prefix = "optimizer.state."
        for key in (key for key in self.tensors if key.startswith(prefix)):
            name, field = key.removeprefix(prefix).rsplit(".", 1)
            fields.setdefault(name, {})[field] = key
        read = self._read({
            key: self._empty(key, like(name)) for name, keys in fields.items() for key in keys.values()
        })  # fmt: skip
        parts = []
        for part, own in zip(self.rest.get("parts", [self.rest]), self.names, strict=True):
            state = {
                index: {**others, **{field: read[key] for field, key in fields.get(own[index], {}).items()}}
                for index, others in part["state"].items()
            }
            parts.append({**part, "state": state})
        return {"parts": parts} if "parts" in self.rest else parts[0]

    def _empty(self, key: str, like: Tensor | None = None) -> Tensor:
        stored = self.tensors[key]
        assert _is_tensor(stored)
        if isinstance(like, DTensor) and like.shape == stored.size:
            return torch.empty_like(like, dtype=stored.properties.dtype, requires_grad=False)
        return torch.empty(stored.size, dtype=stored.properties.dtype)

    def _read(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Fills `tensors` with what is stored under their names."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it is meant to be without words between ranks
            planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
            load(tensors, storage_reader=_Reader(self.folder, self.metadata), planner=planner, no_dist=True)
        return tensors


class _Reader(FileSystemReader):
    """DCP's, with metadata that were read already."""

    def __init__(self, folder: Path, metadata: described.Metadata) -> None:
        super().__init__(folder)
        self.metadata = metadata

    def read_metadata(self) -> described.Metadata:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.metadata


class Lazy(Mapping[str, Any]):
    """A mapping that is read when it is first looked into."""

    def __init__(self, read: Callable[[], Mapping[str, Any]]) -> None:
        self._read = read

    @cached_property
    def _whole(self) -> Mapping[str, Any]:
        return self._read()

    def __getitem__(self, key: str) -> Any:
        return self._whole[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._whole)

    def __len__(self) -> int:
        return len(self._whole)

    def __bool__(self) -> bool:
        return True


def check_files(folder: Path, files: Mapping[str, Any], ranks: Ranks) -> None:
    """Raises ValueError for a file that is not as it was written; each of the ranks looks at its share of them."""
    for name in sorted(files)[ranks.rank :: ranks.size]:
        if Path(name).name != name:
            raise ValueError(f"it names the file {name[:100]}")
        if not (folder / name).is_file():
            raise ValueError(f"its part {name} is missing")
        if _checksum(folder / name) != tuple(files[name]):
            raise ValueError(f"its part {name} has changed")


def _read_metadata(folder: Path, files: Mapping[str, Any]) -> described.Metadata:
    """What is stored where. Raises pickle.UnpicklingError for anything else, which is not run."""
    found = _Unpickler(io.BytesIO((folder / METADATA).read_bytes())).load()
    if not isinstance(found, described.Metadata):
        raise ValueError(f"its {METADATA} describes no tensors")
    if not all(_is_tensor(entry) for entry in found.state_dict_metadata.values()):
        raise ValueError(f"its {METADATA} names what is no tensor")
    if any(place.relative_path not in files for place in found.storage_data.values()):
        raise ValueError(f"its {METADATA} names a file that it does not have")
    return found


def _is_tensor(entry: object) -> TypeGuard[described.TensorStorageMetadata]:
    return isinstance(entry, described.TensorStorageMetadata)


# Not among them: BytesStorageMetadata, of what DCP reads by torch.load(weights_only=False).
DESCRIBING = (
    described.Metadata, described.MetadataIndex, described.TensorStorageMetadata, described.ChunkStorageMetadata,
    described.TensorProperties, described._MEM_FORMAT_ENCODING, _StorageInfo, torch.Size,
)  # fmt: skip


class _Unpickler(pickle.Unpickler):
    """Knows the classes that describe tensors, and no other name."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        for known in DESCRIBING:
            if (module_name, global_name) == (known.__module__, known.__qualname__):
                return known
        if (module_name, global_name) == ("torch.serialization", "_get_layout"):
            return torch.serialization._get_layout
        found = getattr(torch, global_name, None) if module_name == "torch" else None
        if isinstance(found, torch.dtype):
            return found
        raise pickle.UnpicklingError(f"its {METADATA} names {module_name}.{global_name}"[:150])


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Says in a line what keeps the checkpoint at `path` from being read."""
    try:
        yield
    except UNREADABLE as error:
        if isinstance(error, CheckpointException):
            error = next((cause for cause, _ in error.failures.values()), error)
        why = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise GptfitError(f'cannot read the checkpoint "{path}": {why}', "use an older one, or start anew") from None
