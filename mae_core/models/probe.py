"""A linear probe: a frozen trunk, batch norm without affine, one linear layer (paper, A.1, Table 10)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import Self

from mae_core.models.encoder import ViTEncoder

NORM_EPS = 1e-6


class LinearProbe(nn.Module):
    """Heads on the features of a frozen trunk; several heads, for several learning rates, share its pass.

    Features are standardised by the batch while training and by running statistics after (momentum 0.1); the norm has
    nothing to learn, so that all heads share it too. Without a ``trunk`` the input is features.
    """

    def __init__(self, trunk: ViTEncoder | None, width: int, num_classes: int, *, heads: int = 1) -> None:
        super().__init__()
        self.trunk = trunk
        self.norm = nn.BatchNorm1d(width, affine=False, eps=NORM_EPS)
        start = nn.init.trunc_normal_(torch.empty(num_classes, width), std=0.01)  # the same for all, however many
        self.heads = nn.ModuleList(nn.Linear(width, num_classes) for _ in range(heads))
        for head in self.heads:
            head.load_state_dict({"weight": start, "bias": torch.zeros(num_classes)})
        if trunk is not None:
            trunk.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """The trunk stays in eval mode."""
        super().train(mode)
        if self.trunk is not None:
            self.trunk.eval()
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, C, H, W) images, or (B, D) features without a trunk -> (heads, B, classes)."""
        if self.trunk is not None:
            with torch.no_grad():
                inputs = self.trunk(inputs)
        standardised = self.norm(inputs.float())
        return torch.stack([head(standardised) for head in self.heads])

    def folded(self, number: int) -> tuple[Tensor, Tensor]:
        """Weight (classes, D) and bias of one linear layer that does what batch norm and head ``number`` do after
        training."""
        head = self.heads[number]
        deviation = (self.norm.running_var + NORM_EPS).sqrt()
        weight = head.weight / deviation
        return weight, head.bias - weight @ self.norm.running_mean
