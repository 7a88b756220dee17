"""Reads and writes weight files. Nothing here executes what a file contains, and every refusal is one sentence."""

from __future__ import annotations

import argparse
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mae_core.atomic import atomic_path
from mae_core.errors import UserError

WRAPPERS = ("model", "state_dict")
"""Keys under which trainers put the weights."""


def write_weights(path: Path | str, state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors and metadata (JSON values) as safetensors, atomically. Equal input makes files of equal bytes."""
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={key: json.dumps(value) for key, value in metadata.items()})
        _sort_header(temporary)


def _sort_header(path: Path) -> None:
    """Sort the JSON header of a safetensors file in place: the library writes metadata in a random order."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.dumps(json.loads(file.read(length)), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        content = header.encode().ljust(length)
        if len(content) == length:
            file.seek(8)
            file.write(content)


def read_weights(path: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a ``.safetensors`` or torch ``.pth`` file -> (tensors by name, metadata).

    Of a torch file that wraps its weights (``model``, ``state_dict``) the weights come back. Raises ``UserError`` for a
    missing, truncated or foreign file, and for a torch file that would need to execute code.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; give a weights file, such as the encoder.safetensors of a run")
    if not path.is_file():
        raise UserError(f"weights file {path} does not exist")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return _read_torch(path), {}


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = {key: _json_or_text(value) for key, value in (file.metadata() or {}).items()}
            return {name: file.get_tensor(name) for name in file.keys()}, metadata
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or not a safetensors file ({error}); copy or export it again") from None


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _read_torch(path: Path) -> dict[str, Tensor]:
    broken = f"{path} is truncated or not a weights file; copy or export it again"
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on foreign bytes the unpickler fails in every way there is
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error).upper():
            raise UserError(
                f"{path} holds Python objects besides tensors, and loading them could execute code; "
                "save its state_dict alone, as safetensors"
            ) from None
        raise UserError(broken) from None
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not named tensors")
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path} holds no tensors under {', '.join(WRAPPERS)} or at its top level")
    return tensors
