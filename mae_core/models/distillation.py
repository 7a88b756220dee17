"""Distillation from a larger encoder while a masked autoencoder is pre-trained: attention maps of the last blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mae_core.errors import UserError
from mae_core.masking import PatchMask
from mae_core.models.encoder import ViTEncoder


class AttentionDistillation(nn.Module):
    """``weight`` times the mean squared distance between the attention maps of a student's last ``blocks`` blocks,
    its heads mixed by a learned matrix, and those of a frozen teacher, on the same visible patches (MAE-Lite, arXiv
    2205.14443, section 5).

    The teacher is no part of the state: it is a file of its own. Raises ``UserError`` where teacher and student see
    other patches or channels, and where one of them has fewer blocks.
    """

    def __init__(self, teacher: ViTEncoder, student: ViTEncoder, *, blocks: int = 1, weight: float = 1.0) -> None:
        super().__init__()
        seen = [(vit.grid, vit.in_channels, vit.prefix) for vit in (teacher, student)]
        if seen[0] != seen[1]:
            raise UserError(
                "distill.teacher and the model must see the same tokens; the teacher has (grid, channels, cls tokens) "
                f"{_shown(teacher)}, the model {_shown(student)}; choose another teacher, or set model.patch_size, "
                "data.image_size and data.channels to the teacher's"
            )
        fewest = min(len(teacher.blocks), len(student.blocks))
        if blocks > fewest:
            raise UserError(f"distill.blocks={blocks}, but one of teacher and model has {fewest} blocks; lower it")
        self.weight, self.blocks = weight, blocks
        self.mix = nn.ModuleList(
            nn.Conv2d(_heads(student), _heads(teacher), kernel_size=1, bias=False) for _ in range(blocks)
        )
        self._teacher = (teacher.requires_grad_(False).eval(),)  # in a tuple, so that it is no sub-module

    @property
    def teacher(self) -> ViTEncoder:
        """The frozen encoder that is learnt from."""
        return self._teacher[0]

    def inputs_of(self, encoder: ViTEncoder) -> Sequence[int]:
        """The blocks whose outputs the last ``blocks`` blocks of ``encoder`` take; -1 is the embedding."""
        return range(len(encoder.blocks) - self.blocks - 1, len(encoder.blocks) - 1)

    def forward(self, images: Tensor, mask: PatchMask, student: ViTEncoder, outputs: Mapping[int, Tensor]) -> Tensor:
        """(B, C, H, W), a mask, and the student's ``visible_outputs`` of at least ``inputs_of(student)`` -> scalar."""
        with torch.no_grad():
            theirs = self._maps(self.teacher, self.teacher.visible_outputs(images, mask, self.inputs_of(self.teacher)))
        ours = self._maps(student, outputs)
        distances = [
            F.mse_loss(mix(own).float(), other) for mix, own, other in zip(self.mix, ours, theirs, strict=True)
        ]
        return self.weight * torch.stack(distances).sum()

    def _maps(self, encoder: ViTEncoder, outputs: Mapping[int, Tensor]) -> list[Tensor]:
        """(B, heads, n, n) of each of the last blocks."""
        return [encoder.blocks[place + 1].attention_map(outputs[place]) for place in self.inputs_of(encoder)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """What moves this module moves its teacher too."""
        self.teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)


def _heads(encoder: ViTEncoder) -> int:
    return int(encoder.blocks[0].attn.num_heads)


def _shown(encoder: ViTEncoder) -> tuple[str, int, int]:
    grid = encoder.grid
    return f"{grid.rows}x{grid.cols} patches of {grid.patch}", encoder.in_channels, encoder.prefix
