"""The exponential moving average of a detector's weights, kept beside them while it trains."""

from __future__ import annotations

from typing import Any

from timm.utils import ModelEmaV3
from torch import nn


class Averaged(nn.Module):
    """A network in training and the moving average of its weights: one module, so that a checkpoint holds both."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        super().__init__()
        self.network = network
        self.average = ModelEmaV3(network, decay=decay, use_warmup=True)
        self.average.requires_grad_(False)

    def forward(self, *inputs: Any) -> Any:
        """What the network in training gives."""
        return self.network(*inputs)

    def follow(self, step: int) -> None:
        """Take the weights after ``step`` steps into the average, which is a plain mean at first."""
        self.average.update(self.network, step)
