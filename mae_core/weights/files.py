"""Reads and writes weight files. Nothing here executes what a file contains, and every refusal is one sentence."""

from __future__ import annotations

import _codecs
import argparse
import json
import pickle
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mae_core.atomic import atomic_path
from mae_core.errors import UserError
from mae_core.weights.formats import WRAPPERS

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
SAFETENSORS = ".safetensors"
PICKLE = ".pkl"
ZIP_START = b"PK\x03\x04"
LARGEST_HEADER = 1 << 28
"""Bytes of a safetensors header; more is not one."""
DEEPEST = 5
"""Mappings within mappings in which weights are looked for."""
MOST_TENSORS = 100_000
"""Names in a file; a ViT-H with its decoder has some 600."""
LONGEST_HEADER = 300 * MOST_TENSORS
"""Bytes of a safetensors header: so many names with their shapes, and metadata. A longer one takes minutes to read."""
CHECKSUM = "crc32"
"""Key of the metadata that holds the checksum of all tensors; read here, and not passed on."""
SHARD_INDEX = ".index.json"
REMEDIES = {
    "npz": "holds NumPy arrays without a model around them; save them by name with safetensors.numpy.save_file",
    "lfs": "is a Git LFS pointer, not the weights; run git lfs pull in its repository, or download the file itself",
    "html": "is a web page, not weights; download the file itself (on a hub: the link 'download', not the page)",
    "hdf5": "is an HDF5 file, as Keras writes; save the model's tensors by name as safetensors",
    "gzip": "is compressed with gzip; unpack it first",
}
"""What a file is instead of weights -> what to do."""
STARTS = {
    pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2): "torch",
    b"version https://git-lfs": "lfs",
    b"\x93NUMPY": "npz",
    b"\x89HDF": "hdf5",
    b"\x1f\x8b": "gzip",
}
"""How a file begins -> what it is."""

_ARRAY = np.zeros(1)
_REBUILD: Any = _ARRAY.__reduce__()[0]
_REBUILD_SCALAR: Any = np.float64(0).__reduce__()[0]
_OF_BUFFER: Any = _ARRAY.__reduce_ex__(5)[0]
HARMLESS: dict[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "_codecs.encode": _codecs.encode,
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    **{f"numpy.{core}.multiarray._reconstruct": _REBUILD for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _REBUILD_SCALAR for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _OF_BUFFER for core in ("core", "_core")},
}
"""All that a pickle may name: what builds arrays, and nothing that does anything else."""
HARMLESS_BESIDE_TENSORS: list[Any] = [
    *((value, name) for name, value in HARMLESS.items()),
    *{type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "u1", "?")},
    argparse.Namespace,
]
"""What torch's reader may build of a torch file besides tensors and plain values."""


@dataclass
class WeightsFile:
    """What a file holds: tensors by name, what it says of them, and what lay around them.

    metadata  as the file has it: of a safetensors file its header, of a torch file what was saved as ``metadata``
    arguments the arguments of the trainer that wrote it, where they lay beside the weights
    notes     wrappers that were taken off
    branches  keys -> tensors, where several models are in the file; ``state`` is the first of them
    beside    names of what lay beside the weights, such as a trainer's optimizer
    """

    path: Path
    state: dict[str, Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    beside: tuple[str, ...] = ()
    arguments: dict[str, Any] = field(default_factory=dict)
    branches: dict[tuple[str, ...], dict[str, Tensor]] = field(default_factory=dict)


def write_weights(path: Path | str, state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors and metadata (JSON values) as safetensors, atomically, with a checksum that is compared when the
    file is read. Equal input makes files of equal bytes."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    texts = {key: json.dumps(value) for key, value in {**metadata, CHECKSUM: checksum_of(tensors)}.items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=texts)
        _sort_header(temporary)


def checksum_of(state: Mapping[str, Tensor]) -> str:
    """CRC-32 of the names and the bytes of contiguous tensors on the CPU, in the order of the names, in hexadecimal."""
    value = 0
    for name in sorted(state):
        value = zlib.crc32(state[name].reshape(-1).view(torch.uint8).numpy(), zlib.crc32(name.encode(), value))
    return f"{value:08x}"


def _sort_header(path: Path) -> None:
    """Put the keys of a safetensors header in order, in place: the library writes the metadata in a random one."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:
            file.seek(8)
            file.write(text.ljust(length))


def write_torch(
    path: Path | str, state: Mapping[str, Tensor], metadata: Mapping[str, Any], wrapper: str | None
) -> None:
    """Write a torch file, atomically: the tensors under ``wrapper`` with ``metadata`` beside them, or, with no wrapper,
    the tensors alone."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with atomic_path(path) as temporary:
        torch.save({wrapper: tensors, "metadata": dict(metadata)} if wrapper else tensors, temporary)


def read_weights(path: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a ``.safetensors`` or torch file -> (tensors by name, without wrappers, and metadata), all in memory. Raises
    ``UserError`` for a missing, truncated or foreign file, and for a torch file that would need to execute code."""
    file = read_file(path, mapped=False)
    return file.state, file.metadata


def read_file(path: Path | str, *, mapped: bool = True) -> WeightsFile:
    """Read a weights file; with ``mapped`` its tensors stay on disk until they are used, and the file must not change
    while they are. Raises ``UserError`` as ``read_weights`` does."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; give a weights file, such as the encoder.safetensors of a run")
    if not path.is_file():
        raise UserError(f"weights file {path} does not exist")
    if path.name.endswith(SHARD_INDEX):
        return _read_shards(path, mapped)
    kind = kind_of_content(path)
    if kind in REMEDIES:
        raise UserError(f"{path} {REMEDIES[kind]}")
    if kind == "safetensors":
        return _read_safetensors(path, mapped)
    if path.suffix == PICKLE and kind != "torch":
        return _read_pickle(path)
    return _read_torch(path, mapped)


def kind_of_content(path: Path) -> str:
    """``torch``, ``safetensors``, a row of ``REMEDIES``, or ``unknown``: by the first bytes, whatever the ending."""
    with path.open("rb") as file:
        head = file.read(512)
    if head.startswith(ZIP_START):
        try:
            with zipfile.ZipFile(path) as archive:
                arrays = all(name.endswith(".npy") for name in archive.namelist())
        except (zipfile.BadZipFile, OSError, ValueError):
            return "torch"  # whose reader says that it is truncated
        return "npz" if arrays else "torch"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < LARGEST_HEADER:
        return "safetensors"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "html"
    kind = next((kind for start, kind in STARTS.items() if head.startswith(start)), None)
    return kind or ("safetensors" if path.suffix == SAFETENSORS else "unknown")


def _read_shards(path: Path, mapped: bool) -> WeightsFile:
    """The shards that an index of transformers names, as one file. Raises ``UserError`` where they are not whole."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(index.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is not an index of weight shards; download the folder again") from None
    whole = WeightsFile(path, {}, notes=[f"read from {len(shards)} shards"])
    for name in shards:
        if not (path.parent / name).is_file():
            raise UserError(f"{path} names the shard {name}, which is missing; download it into {path.parent}")
        whole.state.update(read_file(path.parent / name, mapped=mapped).state)
    missing = sorted(set(index) - whole.state.keys())
    if missing:
        raise UserError(f"{path} names {len(missing)} tensors that no shard holds, such as {missing[0]}")
    return whole


def _read_safetensors(path: Path, mapped: bool) -> WeightsFile:
    with path.open("rb") as opened:
        if path.stat().st_size > (length := int.from_bytes(opened.read(8), "little")) > LONGEST_HEADER:
            raise UserError(f"{path} has a header of {length} bytes, longer than any model's; it is no weights file")
    try:
        with safe_open(path, framework="pt") as file:  # the library compares the header with the size of the file
            metadata = {key: _json_or_text(value) for key, value in (file.metadata() or {}).items()}
            _check_number(path, file.keys())
            state = {name: file.get_tensor(name) for name in file.keys()}
        if not mapped:
            _read_into_memory(path, state)
    except (SafetensorError, OSError) as error:
        kind = "safetensors" if path.suffix == SAFETENSORS else "weights"
        raise UserError(f"{path} is truncated or not a {kind} file ({error}); copy or export it again") from None
    stated = metadata.pop(CHECKSUM, None)
    if stated is not None and stated != checksum_of(state):
        raise UserError(
            f"{path} is damaged: its tensors have another checksum than was written with them; copy it again"
        )
    return WeightsFile(path, state, metadata)


def _check_number(path: Path, names: Collection[str]) -> None:
    if len(names) > MOST_TENSORS:
        raise UserError(
            f"{path} names {len(names)} tensors, more than any model has ({MOST_TENSORS}); it is no weights file"
        )


def _read_into_memory(path: Path, state: dict[str, Tensor]) -> None:
    """Replace mapped tensors by copies, read one by one: copying from the map would hold the file twice."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        for name, mapped in state.items():
            tensor = torch.empty(mapped.shape, dtype=mapped.dtype)
            file.seek(8 + length + header[name]["data_offsets"][0])
            file.readinto(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
            state[name] = tensor


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError):  # no JSON, an integer of thousands of digits, thousands of brackets
        return value


def _read_torch(path: Path, mapped: bool) -> WeightsFile:
    """With one ``torch.load``: zipped files are mapped, and what they claim to hold is compared with their size before
    memory is taken for it."""
    broken = f"{path} is truncated or not a weights file; copy or export it again"
    with path.open("rb") as file:
        zipped = file.read(4) == ZIP_START
    try:
        with torch.serialization.safe_globals(HARMLESS_BESIDE_TENSORS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
            if zipped and storage_bytes(content) > path.stat().st_size:
                raise UserError(broken)
            if zipped and (record := damaged_record(path)):
                raise UserError(f"{path} is damaged: {record} in it is not what was written; copy or download it again")
    except UserError:
        raise
    except Exception as error:  # on foreign bytes the unpickler fails in every way there is
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error).upper():
            raise UserError(
                f"{path} holds Python objects besides tensors, and loading them could execute code; "
                "save its state_dict alone, as safetensors"
            ) from None
        raise UserError(broken) from None
    found = unwrapped(path, content)
    if zipped and not mapped:
        found.branches = {keys: _copied(state) for keys, state in found.branches.items()}
        found.state = next(iter(found.branches.values())) if found.branches else _copied(found.state)
    return found


def damaged_record(path: Path) -> str | None:
    """The first record of a zipped torch file whose bytes do not fit the checksum beside them, which torch never
    looks at; None where all fit. A checksum of 0 is none: torch can be told to write no others."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            try:
                with archive.open(entry) as record:
                    while entry.CRC and record.read(2**20):
                        pass
            except zipfile.BadZipFile:
                return entry.filename
    return None


def _copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def unwrapped(path: Path, content: Any) -> WeightsFile:
    """The weights in what a file holds, with what it says of them. Raises ``UserError`` where it holds none."""
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not named tensors")
    found = _unwrap(content, (), {})
    if not found:
        raise UserError(f"{path}: it holds no tensors, neither under {', '.join(WRAPPERS)} nor at its top level")
    state, notes, beside = next(iter(found.values()))
    branches = {keys: row[0] for keys, row in found.items()} if len(found) > 1 else {}
    for each in branches.values() or [state]:
        _check_number(path, each)
    arguments, stated = beside.get("args"), beside.get("metadata")
    if isinstance(arguments, argparse.Namespace):
        arguments = vars(arguments)
    metadata, arguments = (dict(each) if isinstance(each, Mapping) else {} for each in (stated, arguments))
    return WeightsFile(path, state, metadata, notes, tuple(map(str, beside)), arguments, branches)


def tensors_below(content: Any) -> Iterator[Tensor]:
    """All tensors in mappings, lists and tuples, however deep."""
    queue = [content]
    while queue:
        value = queue.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            queue += value.values()
        elif isinstance(value, list | tuple):
            queue += value


def storage_bytes(content: Any) -> int:
    """Bytes of all tensors below ``content``, shared storages once."""
    storages = {storage._cdata: storage for storage in (each.untyped_storage() for each in tensors_below(content))}
    return sum(storage.nbytes() for storage in storages.values())


class _Arrays(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in HARMLESS:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return HARMLESS[f"{module}.{name}"]


def _read_pickle(path: Path) -> WeightsFile:
    """A pickle of numpy arrays, as detectron2's model zoo publishes its weights. One that names anything else is
    refused and never executed."""
    try:
        with path.open("rb") as file:
            content = _Arrays(file).load()
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds objects other than arrays, or is truncated ({error}), and loading it could execute code; "
            "save its arrays alone"
        ) from None
    except Exception as error:  # on foreign bytes the unpickler fails in every way there is
        raise UserError(
            f"{path} is truncated or not a pickle of arrays ({type(error).__name__}); copy it again"
        ) from None
    return unwrapped(path, _as_tensors(content))


def _as_tensors(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _as_tensors(inner) for name, inner in value.items()}
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        return torch.from_numpy(value.copy())
    return value


Found = dict[tuple[str, ...], tuple[dict[str, Tensor], list[str], dict[str, Any]]]


def _unwrap(content: Mapping[str, Any], keys: tuple[str, ...], beside: Mapping[str, Any]) -> Found:
    """Keys that lead to named tensors -> (these, what was done, what lay beside them); none, one, or one for each of
    several models."""
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors or isinstance(content.get(WRAPPERS[0]), Mapping):
        other = {**beside, **{key: value for key, value in content.items() if key not in WRAPPERS}}
        found: Found = {}
        inside = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Mapping)}
        known = [key for key in WRAPPERS if key in inside]
        for key in (known or inside) if len(keys) < DEEPEST else ():
            found |= _unwrap(inside[key], (*keys, key), other)
        if found or not tensors:
            return found
    others = sorted(str(name) for name, value in content.items() if not isinstance(value, Tensor))
    skipped = [f"skipped entries that are not tensors: {', '.join(others[:4])}"] if others else []
    return {keys: (tensors, [f"unwrapped {key!r}" for key in keys] + skipped, dict(beside))}
