"""Parameter groups with layer-wise learning rate decay, the same rule for a classifier, a detector and a segmenter."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from mae_core.models.timm_trunk import Encoder

NEVER_DECAYED = ("pos_embed", "cls_token", "relative_position_bias_table", "rel_pos_h", "rel_pos_w")


def layer_decay_groups(
    model: nn.Module,
    vit: Encoder,
    *,
    layer_decay: float,
    weight_decay: float,
    trunk: str = "",
    never_decayed: Collection[str] = NEVER_DECAYED,
) -> list[dict[str, Any]]:
    """Groups for AdamW: params, their names, ``lr_scale`` = layer_decay ** (depth + 1 - layer), weight_decay.

    The rule of the official ``lr_decay.py`` (paper, A.1): the last block already has one factor of decay, heads have
    none. 1-D tensors and those whose last name is in ``never_decayed`` (positions, absolute and relative, and the cls
    token) are not weight-decayed, nor what timm says of a trunk of its own. ``vit`` is the trunk, ``trunk`` the prefix
    of its names.
    timm's own function gives the last block the head's rate where the trunk has no final norm, so it is not used here;
    the layer of a tensor in a trunk of timm is timm's.
    """
    depth, exempt = len(vit.blocks), {f"{trunk}{name}" for name in vit.no_weight_decay() if never_decayed}
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = vit.layer_of(name.removeprefix(trunk)) if name.startswith(trunk) else depth + 1
        decayed = parameter.ndim > 1 and name.rpartition(".")[2] not in never_decayed and name not in exempt
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
