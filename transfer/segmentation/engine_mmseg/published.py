"""mmseg's own MAE backbone, for the proof of a conversion: ``mae convert --to mmseg --check`` finds it as an entry
point of the group ``mae_core.feature_readers``."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from mmseg.models.backbones import MAE
from torch import Tensor

from mae_core.errors import UserError
from mae_core.weights.features import Geometry, Tokens

ACTIVATIONS = {"gelu": {"type": "GELU"}, "relu": {"type": "ReLU"}, "silu": {"type": "SiLU"}}
"""Ours -> mmcv's."""


def run_backbone(state: Mapping[str, Tensor], geometry: Geometry, images: Tensor) -> Tokens:
    """(B, C, H, W) -> the patch tokens of the last block. Raises ``UserError`` where a tensor other than the relative
    positions, which start at zero, is missing or left over."""
    if geometry.activation not in ACTIVATIONS:
        raise UserError(f"mmseg has no activation {geometry.activation}; convert without --check")
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("layers."))
    width = state["patch_embed.projection.bias"].shape[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = MAE(
            img_size=geometry.image_size,
            patch_size=geometry.patch_size,
            in_channels=geometry.in_chans,
            embed_dims=width,
            num_layers=depth,
            num_heads=geometry.heads,
            mlp_ratio=state["layers.0.ffn.layers.0.0.bias"].shape[0] // width,
            norm_cfg={"type": "LN", "eps": geometry.norm_eps},
            act_cfg=ACTIVATIONS[geometry.activation],
            out_indices=[depth - 1],
        )
    wanted = model.state_dict()
    given = {name: tensor.float() for name, tensor in state.items() if not name.startswith(("ln1.", "norm."))}
    lacking = {name for name in wanted.keys() - given.keys() if "relative_position" not in name}
    if lacking or given.keys() - wanted.keys():
        names = sorted(lacking | (given.keys() - wanted.keys()))
        raise UserError(f"mmseg's MAE does not take these tensors: {', '.join(names[:4])} are missing or left over")
    model.load_state_dict({**wanted, **given})
    model.eval()
    (features,) = model(images)
    return Tokens(features.flatten(2).transpose(1, 2), None, 0)
