"""What trainers put around the weights: nested dictionaries, arguments, averaged copies."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mae_core.errors import UserError

WRAPPERS = (
    "model", "state_dict", "model_state_dict", "module", "net", "network", "model_ema", "state_dict_ema",
    "ema_state_dict", "ema", "teacher", "student",
)  # fmt: skip
"""Keys under which trainers put the weights; where a file has several, the first of them is meant."""


def unwrap(content: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[str], dict[str, Any]]:
    """What a torch file holds -> (named tensors, what was unwrapped, what lay beside them).

    Raises ``UserError`` where it holds no named tensors.
    """
    notes: list[str] = []
    beside: dict[str, Any] = {}
    while not any(isinstance(value, Tensor) for value in content.values()) or isinstance(
        content.get(WRAPPERS[0]), Mapping
    ):
        found = [key for key in WRAPPERS if isinstance(content.get(key), Mapping)]
        if not found:
            raise UserError(f"it holds no tensors under {', '.join(WRAPPERS)} or at its top level")
        notes.append(f"unwrapped {found[0]!r}")
        notes += [f"{key!r} lies beside it and is not used" for key in found[1:]]
        beside.update({key: value for key, value in content.items() if key != found[0] and key not in WRAPPERS})
        content = content[found[0]]
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    others = sorted(str(name) for name, value in content.items() if not isinstance(value, Tensor))
    if others:
        notes.append(f"passed over what is no tensor: {', '.join(others[:4])}")
    return tensors, notes, beside


def arguments_of(beside: Mapping[str, Any]) -> dict[str, Any]:
    """The trainer's arguments that lay beside the weights; empty where there are none."""
    arguments = beside.get("args")
    if isinstance(arguments, argparse.Namespace):
        return dict(vars(arguments))
    return dict(arguments) if isinstance(arguments, Mapping) else {}
