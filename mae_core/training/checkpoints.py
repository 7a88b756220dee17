"""Training checkpoints: whole or absent, and checked before they are believed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mae_core.atomic import fsync_path, write_text
from mae_core.errors import UserError
from mae_core.layout import CHECKPOINTS, COMPLETE, MODEL, TRAINING_STATE, complete_checkpoints
from mae_core.weights.files import read_weights, write_weights


class Checkpoint(NamedTuple):
    """What a resume needs: steps done, the model's tensors, the optimizer's state."""

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Any]


def save_checkpoint(
    run: Path,
    step: int,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Any],
    metadata: Mapping[str, Any],
    *,
    keep: int,
) -> Path:
    """Write ``checkpoints/step_<step>`` in a temporary sibling, flush it to disk, rename it; then delete all but
    ``keep``.

    The COMPLETE marker is written last and names the size of each file, so that a reader recognises a torn folder.
    """
    root = run / CHECKPOINTS
    root.mkdir(parents=True, exist_ok=True)
    final, temporary = root / f"step_{step:08d}", root / f".writing_step_{step:08d}"
    for leftover in root.glob(".writing_*"):
        shutil.rmtree(leftover)
    temporary.mkdir()
    write_weights(temporary / MODEL, model, {**metadata, "step": step})
    torch.save({"step": step, "optimizer": optimizer}, temporary / TRAINING_STATE)
    fsync_path(temporary / TRAINING_STATE)
    write_text(
        temporary / COMPLETE, json.dumps({name: (temporary / name).stat().st_size for name in (MODEL, TRAINING_STATE)})
    )
    fsync_path(temporary)
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)
    fsync_path(root)
    for old in complete_checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return final


def load_checkpoint(run: Path) -> Checkpoint:
    """The last complete checkpoint of a run; torn ones are passed over. Raises ``UserError`` where there is none."""
    found = complete_checkpoints(run)
    if not found:
        raise UserError(f"nothing to resume: {run} has no complete checkpoint; start without --resume in a new folder")
    model, _ = read_weights(found[-1] / MODEL)
    state = torch.load(found[-1] / TRAINING_STATE, map_location="cpu", weights_only=True)
    return Checkpoint(state["step"], model, state["optimizer"])
