"""A linear probe: a frozen trunk, batch norm without affine, one linear layer (paper, A.1, Table 10)."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from mae_core.errors import UserError
from mae_core.models.encoder import ViTEncoder

NORM_EPS = 1e-6


class LinearProbe(nn.Module):
    """Heads on the features of a frozen trunk; several heads, for several learning rates, share its pass.

    Features are standardised by the batch while training and by running statistics after (momentum 0.1); the norm has
    nothing to learn, so that all heads share it too. Without a ``trunk`` the input is features.

    The trunk is no part of the module's state: checkpoints name its digest alone, and refuse another trunk. Nor does
    ``to`` move it.
    """

    def __init__(self, trunk: ViTEncoder | None, width: int, num_classes: int, *, heads: int = 1) -> None:
        super().__init__()
        self._trunk = () if trunk is None else (trunk.requires_grad_(False).eval(),)  # a tuple: no submodule
        self.norm = nn.BatchNorm1d(width, affine=False, eps=NORM_EPS)
        start = nn.init.trunc_normal_(torch.empty(num_classes, width), std=0.01)  # the same for all, however many
        self.heads = nn.ModuleList(nn.Linear(width, num_classes) for _ in range(heads))
        for head in self.heads:
            head.load_state_dict({"weight": start, "bias": torch.zeros(num_classes)})
        if trunk is not None:
            self._digest = digest_of(trunk)
            self.register_buffer("trunk_digest", self._digest.clone())
            self.register_load_state_dict_post_hook(_check_trunk)

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, C, H, W) images, or (B, D) features without a trunk -> (heads, B, classes)."""
        for trunk in self._trunk:
            with torch.no_grad():
                inputs = trunk(inputs)
        standardised = self.norm(inputs.float())
        return torch.stack([head(standardised) for head in self.heads])

    def folded(self, number: int) -> tuple[Tensor, Tensor]:
        """Weight (classes, D) and bias of one linear layer that does what batch norm and head ``number`` do after
        training."""
        head = self.heads[number]
        deviation = (self.norm.running_var + NORM_EPS).sqrt()
        weight = head.weight / deviation
        return weight, head.bias - weight @ self.norm.running_mean


def digest_of(model: nn.Module) -> Tensor:
    """(32,) uint8 on the CPU: SHA-256 of the names and values of a model's tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


def _check_trunk(probe: LinearProbe, _: object) -> None:
    if not torch.equal(probe.trunk_digest.cpu(), probe._digest):
        raise UserError(
            "this probe was trained on another trunk: the weights file has changed since; put it back, or start anew "
            "in another output folder"
        )
