"""Parameter groups with layer-wise learning rate decay, the same rule for a classifier, a detector and a segmenter."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

NEVER_DECAYED = ("pos_embed", "cls_token", "relative_position_bias_table", "rel_pos_h", "rel_pos_w")


def layer_of(name: str, depth: int, trunk: str = "") -> int:
    """Layer of a parameter: 0 for the trunk's embeddings, i + 1 for its block i, depth + 1 for everything else."""
    if not name.startswith(trunk):
        return depth + 1
    parts = name.removeprefix(trunk).split(".")
    if parts[0] == "blocks":
        return int(parts[1]) + 1
    return 0 if parts[0] in ("cls_token", "pos_embed", "patch_embed") else depth + 1


def layer_decay_groups(
    model: nn.Module,
    depth: int,
    *,
    layer_decay: float,
    weight_decay: float,
    trunk: str = "",
    never_decayed: Collection[str] = NEVER_DECAYED,
) -> list[dict[str, Any]]:
    """Groups for AdamW: params, their names, ``lr_scale`` = layer_decay ** (depth + 1 - layer), weight_decay.

    The rule of the official ``lr_decay.py`` (paper, A.1): the last block already has one factor of decay, heads have
    none. 1-D tensors and those whose last name is in ``never_decayed`` (positions, absolute and relative, and the cls
    token) are not weight-decayed. ``trunk`` is the prefix of the ViT's names.
    timm's own function gives the last block the head's rate where the trunk has no final norm, so it is not used here.
    """
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = layer_of(name, depth, trunk)
        decayed = parameter.ndim > 1 and name.rpartition(".")[2] not in never_decayed
        group = groups.setdefault(
            (layer, decayed),
            {
                "params": [],
                "param_names": [],
                "lr_scale": layer_decay ** (depth + 1 - layer),
                "weight_decay": weight_decay if decayed else 0.0,
            },
        )
        group["params"].append(parameter)
        group["param_names"].append(name)
    return [groups[place] for place in sorted(groups, reverse=True)]
