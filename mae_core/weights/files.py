"""Reads and writes weight files. Nothing here executes what a file contains, and every refusal is one sentence."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mae_core.atomic import atomic_path
from mae_core.errors import UserError
from mae_core.weights.parts import Joined, Values, as_tensor
from mae_core.weights.pickles import PICKLE, read_pickle
from mae_core.weights.unwrapping import arguments_of, unwrap

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
SAFETENSORS = ".safetensors"
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What safetensors calls them."""
ZIP_START = b"PK\x03\x04"


@dataclass
class WeightsFile:
    """What a file holds: tensors by name, what it says of them, and what lay around them.

    metadata  the header of a safetensors file of ours, or what a trainer's arguments say in the same words
    notes     wrappers that were taken off
    beside    names of what lay beside the weights, such as a trainer's optimizer
    """

    path: Path
    state: dict[str, Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    beside: tuple[str, ...] = ()


def write_weights(
    path: Path | str, state: Mapping[str, Values], metadata: Mapping[str, Any], *, unchanged: bool = False
) -> None:
    """Write tensors and metadata (JSON values) as safetensors, atomically, one tensor at a time.

    Equal input makes files of equal bytes. ``unchanged``: no mapped tensor was changed in place, so that its bytes may
    be taken from its file.
    """
    texts = {key: json.dumps(value) for key, value in metadata.items()}
    with atomic_path(path) as temporary:
        save_file(state, temporary, metadata=texts, unchanged=unchanged)


def save_file(state: Mapping[str, Values], path: Path, metadata: Mapping[str, str], *, unchanged: bool = False) -> None:
    """A safetensors file with a sorted header. No more than one joined tensor is in memory beside ``state``; the
    library's own writer copies all of them."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    place = 0
    names = sorted(state)
    for name in names:
        values = state[name]
        length = values.shape.numel() * values.dtype.itemsize
        header[name] = {
            "dtype": DTYPES[values.dtype],
            "shape": list(values.shape),
            "data_offsets": [place, place + length],
        }
        place += length
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with path.open("wb") as file, Mappings() as mappings:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in names:
            values = state[name]
            for part in values.parts if isinstance(values, Joined) else (values,):
                tensor = part.detach().to("cpu", values.dtype).contiguous()
                if not (unchanged and mappings.send(tensor, file)):
                    file.write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))


class Mappings:
    """Files that are mapped into this process, so that a tensor that was only renamed goes from file to file inside the
    kernel: not one page of it is touched here. Linux only; elsewhere there are none and tensors are written."""

    def __enter__(self) -> Mappings:
        """Read the table of this process."""
        self._open: dict[str, int] = {}
        self._regions: list[tuple[int, int, int, str]] = []
        table = Path("/proc/self/maps")
        for line in table.read_text().splitlines() if table.exists() and hasattr(os, "sendfile") else []:
            addresses, _, offset, _, inode, *path = line.split(maxsplit=5)
            if inode != "0" and path and path[0].endswith((SAFETENSORS, *TORCH_SUFFIXES)):
                start, end = (int(number, 16) for number in addresses.split("-"))
                self._regions.append((start, end, int(offset, 16), path[0]))
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)

    def send(self, tensor: Tensor, out: BinaryIO) -> bool:
        """Append the bytes of a contiguous ``tensor`` to ``out`` if they lie in a mapped file; whether they did."""
        first, length = tensor.data_ptr(), tensor.nbytes
        for start, end, offset, path in self._regions:
            if start <= first and first + length <= end and length:
                place = offset + first - start
                if path not in self._open:
                    self._open[path] = os.open(path, os.O_RDONLY)
                out.flush()
                while length:
                    sent = os.sendfile(out.fileno(), self._open[path], place, length)
                    if not sent:
                        raise UserError(f"{path} became shorter while it was read; run the command again")
                    place, length = place + sent, length - sent
                return True
        return False


def write_torch(path: Path | str, state: dict[str, Values], metadata: Mapping[str, Any], wrapper: str | None) -> None:
    """Write a torch file, atomically: the tensors under ``wrapper`` with ``metadata`` beside them, or, with no wrapper,
    the tensors alone. Empties ``state``, so that joined tensors take the place of their parts."""
    tensors = {name: as_tensor(state.pop(name)).detach().cpu().contiguous() for name in list(state)}
    with atomic_path(path) as temporary:
        torch.save({wrapper: tensors, "metadata": dict(metadata)} if wrapper else tensors, temporary)


def read_weights(path: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a ``.safetensors`` or torch file -> (tensors by name, metadata), all in memory.

    Of a torch file that wraps its weights (``model``, ``state_dict``) the weights come back. Raises ``UserError`` for a
    missing, truncated or foreign file, and for a torch file that would need to execute code.
    """
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
    if path.suffix == SAFETENSORS:
        return _read_safetensors(path, mapped)
    if path.suffix == PICKLE and not _is_of_torch(path):
        return _unwrapped(path, read_pickle(path))
    return _read_torch(path, mapped)


def _is_of_torch(path: Path) -> bool:
    """Whether ``torch.save`` wrote a file, now or before it wrote zips, whatever its ending."""
    starts = (ZIP_START, pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2))
    with path.open("rb") as file:
        return file.read(max(map(len, starts))).startswith(starts)


def _read_safetensors(path: Path, mapped: bool) -> WeightsFile:
    try:
        with safe_open(path, framework="pt") as file:  # the library compares the header with the size of the file
            metadata = {key: _json_or_text(value) for key, value in (file.metadata() or {}).items()}
            state = {name: file.get_tensor(name) for name in file.keys()}
        if not mapped:
            _read_into_memory(path, state)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or not a safetensors file ({error}); copy or export it again") from None
    return WeightsFile(path, state, metadata)


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
    except json.JSONDecodeError:
        return value


def _read_torch(path: Path, mapped: bool) -> WeightsFile:
    broken = f"{path} is truncated or not a weights file; copy or export it again"
    with path.open("rb") as file:
        zipped = file.read(4) == ZIP_START
    harmless = [argparse.Namespace, np.dtype, *(type(np.dtype(kind)) for kind in ("float64", "int64", "bool"))]
    rebuild_scalar: Any = np.float64(0).__reduce__()[0]
    names = [(rebuild_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    try:
        with torch.serialization.safe_globals([*harmless, *names]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if zipped:  # what it claims to hold, before memory is taken for it
                claimed = torch.load(path, map_location="meta", weights_only=True)
                if storage_bytes(claimed) > path.stat().st_size:
                    raise UserError(broken)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped and mapped)
    except UserError:
        raise
    except Exception as error:  # on foreign bytes the unpickler fails in every way there is
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error).upper():
            raise UserError(
                f"{path} holds Python objects besides tensors, and loading them could execute code; "
                "save its state_dict alone, as safetensors"
            ) from None
        raise UserError(broken) from None
    return _unwrapped(path, content)


def _unwrapped(path: Path, content: Any) -> WeightsFile:
    """The weights in what a file holds, with what it says of them."""
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not named tensors")
    try:
        state, notes, beside = unwrap(content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    stated = beside.get("metadata")
    metadata = dict(stated) if isinstance(stated, Mapping) else metadata_of_arguments(arguments_of(beside))
    return WeightsFile(path, state, metadata, notes, tuple(map(str, beside)))


def storage_bytes(content: Any) -> int:
    """Bytes of all tensors below ``content``, shared storages once."""
    found: dict[int, int] = {}
    queue = [content]
    while queue:
        value = queue.pop()
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            found[storage._cdata] = storage.nbytes()
        elif isinstance(value, Mapping):
            queue += value.values()
        elif isinstance(value, list | tuple):
            queue += value
    return sum(found.values())


def metadata_of_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What the arguments of the official trainer say, in the words of our metadata."""
    metadata: dict[str, Any] = {}
    if isinstance(arguments.get("norm_pix_loss"), bool):
        metadata["target"] = "normalized_pixels" if arguments["norm_pix_loss"] else "pixels"
    for theirs, ours, kind in (("mask_ratio", "mask_ratio", float), ("epochs", "epochs", int)):
        if isinstance(arguments.get(theirs), kind):
            metadata[ours] = arguments[theirs]
    return metadata
