"""Pickles of numpy arrays, as detectron2's model zoo publishes its weights, read without executing anything."""

from __future__ import annotations

import _codecs
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mae_core.errors import UserError

PICKLE = ".pkl"

_ARRAY = np.zeros(1)
_REBUILD, _REBUILD_SCALAR = _ARRAY.__reduce__()[0], np.float64(0).__reduce__()[0]
_OF_BUFFER = _ARRAY.__reduce_ex__(5)[0]
HARMLESS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _codecs.encode,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _REBUILD for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _REBUILD_SCALAR for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _OF_BUFFER for core in ("core", "_core")},
}
"""All that a pickle may name: what builds arrays, and nothing that does anything else."""


class _Arrays(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in HARMLESS:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return HARMLESS[module, name]


def read_pickle(path: Path) -> Any:
    """What a pickle of numpy arrays holds, the arrays as tensors.

    Raises ``UserError`` for a pickle that names anything but arrays, which is never executed, and for a broken one.
    """
    try:
        with path.open("rb") as file:
            content = _Arrays(file).load()
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds other objects than arrays, or is truncated ({error}), and loading it could execute code; "
            "save its arrays alone"
        ) from None
    except Exception as error:  # on foreign bytes the unpickler fails in every way there is
        raise UserError(f"{path} is truncated or no pickle of arrays ({type(error).__name__}); copy it again") from None
    return _as_tensors(content)


def _as_tensors(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _as_tensors(inner) for name, inner in value.items()}
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        return torch.from_numpy(value.copy())
    return value
