"""What is registered with mmengine for the optimizer: layer-wise learning rate decay, and bfloat16 on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmseg.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS
from torch import nn

from mae_core.config.schema import hint
from mae_core.errors import UserError
from mae_core.training.groups import NEVER_DECAYED, layer_decay_groups
from transfer.segmentation.config import CPU_MIXED

RULE = "layer_decay_rate"
PAPER_BUG = "paper_bug"


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class MAECoreLayerDecay(DefaultOptimWrapperConstructor):
    """Learning rates that fall layer by layer towards the input: ``paramwise_cfg=dict(layer_decay_rate=0.65)``.

    Embeddings are layer 0, block i is layer i + 1 and gets rate ** (depth - i) of the learning rate; neck and heads get
    all of it. Biases, norms, LayerScale, positions, cls token and relative-position tables are not weight-decayed. The
    constructors of BEiT, mae_segmentation and mmseg mean the same, but compare ``backbone.pos_embed`` with
    ``pos_embed``, and so do decay positions, cls token and tables: ``paper_bug=True`` does as they do.
    """

    def add_params(self, params: list[dict], module: nn.Module, **_: Any) -> None:
        """Append the groups of ``module``, a segmentor whose backbone has ``blocks``, to ``params``; heads first.

        Raises ``UserError`` for a ``paramwise_cfg`` without a rate or with a key that nothing reads.
        """
        for key in self.paramwise_cfg:
            if key not in (RULE, PAPER_BUG):
                raise UserError(f"unknown key {key!r} in paramwise_cfg; {hint(key, (RULE, PAPER_BUG))}")
        if RULE not in self.paramwise_cfg:
            raise UserError(f"paramwise_cfg has no {RULE}; set it, to 1.0 for one learning rate everywhere")
        groups = layer_decay_groups(
            module,
            module.backbone,
            layer_decay=self.paramwise_cfg[RULE],
            weight_decay=self.base_wd,
            trunk="backbone.",
            never_decayed=() if self.paramwise_cfg.get(PAPER_BUG) else NEVER_DECAYED,
        )
        params += [{**group, "lr": group["lr_scale"] * self.base_lr} for group in groups]


@OPTIM_WRAPPERS.register_module(name=CPU_MIXED)
class CPUMixed(OptimWrapper):
    """Forward passes and losses under bfloat16 autocast; parameters and gradients stay float32, no loss is scaled."""

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """What a training step of ``model`` runs in."""
        with super().optim_context(model), torch.autocast("cpu", torch.bfloat16):
            yield
