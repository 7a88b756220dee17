"""The optimizer constructor that is registered with mmengine: layer-wise learning rate decay."""

from __future__ import annotations

from typing import Any

from mmengine.optim import DefaultOptimWrapperConstructor
from mmseg.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from mae_core.training.groups import layer_decay_groups


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class MAECoreLayerDecay(DefaultOptimWrapperConstructor):
    """Learning rates that fall layer by layer towards the input: ``paramwise_cfg=dict(layer_decay_rate=0.65)``.

    Embeddings are layer 0, block i is layer i + 1 and gets rate ** (depth - i) of the learning rate; neck and heads get
    all of it. Positions, cls token, biases and norms are not decayed. The constructors of BEiT and mmseg mean the same,
    but compare ``backbone.pos_embed`` with ``pos_embed`` and do decay positions and cls token.
    """

    def add_params(self, params: list[dict], module: nn.Module, **_: Any) -> None:
        """Append the groups of ``module``, a segmentor whose backbone has ``blocks``, to ``params``; heads first."""
        groups = layer_decay_groups(
            module,
            len(module.backbone.blocks),
            layer_decay=self.paramwise_cfg["layer_decay_rate"],
            weight_decay=self.base_wd,
            trunk="backbone.",
        )
        params += [{**group, "lr": group["lr_scale"] * self.base_lr} for group in groups]
