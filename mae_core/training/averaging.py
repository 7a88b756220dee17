"""An exponential moving average of the weights that travels with the optimizer (paper, Table 11: 0.9999)."""

from __future__ import annotations

from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn

STATE = "average"
"""Where the average stands in the optimizer's state."""


def attach_average(optimizer: torch.optim.Optimizer, model: nn.Module, decay: float) -> nn.Module:
    """The averaged model, in eval mode: starts as ``model`` and moves ``1 - decay`` of the way at every step.

    It follows each ``optimizer.step()`` that is taken, is saved in and restored from the optimizer's state, and so is
    part of a checkpoint without a word from the training loop.
    """
    average = ModelEmaV3(model, decay=decay)

    def follow(*_: Any) -> None:
        average.update(model)

    def save(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, STATE: average.module.state_dict()}

    def restore(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        average.module.load_state_dict(state[STATE])
        return {name: value for name, value in state.items() if name != STATE}

    optimizer.register_step_post_hook(follow)
    optimizer.register_state_dict_post_hook(save)
    optimizer.register_load_state_dict_pre_hook(restore)
    return average.module


def steps_averaged(decay: float) -> float:
    """How many steps an average of this decay looks back on."""
    return 1 / (1 - decay)
