"""The masked autoencoder (paper, section 3): encoder on visible patches, light decoder, loss on hidden patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mae_core.errors import UserError
from mae_core.masking import MASKERS, Masker, PatchMask, Randomness
from mae_core.models.decoder import MAEDecoder
from mae_core.models.encoder import ViTEncoder
from mae_core.patches import patchify, unpatchify
from mae_core.targets import TARGETS, Target


class MAEOutput(NamedTuple):
    """loss: scalar, mean over hidden patches; prediction: (B, N, target_dim) in raster order, of visible patches too;
    mask: what was hidden."""

    loss: Tensor
    prediction: Tensor
    mask: PatchMask


class Reconstruction(NamedTuple):
    """Images (B, C, H, W) in the model's normalised pixels: ``masked`` has zeros (the mean colour) where patches are
    hidden,
    ``predicted`` is the prediction everywhere, ``pasted`` shows the input where visible and the prediction where
    hidden."""

    masked: Tensor
    predicted: Tensor
    pasted: Tensor


class MaskedAutoencoder(nn.Module):
    """Encoder + masker + decoder + target."""

    def __init__(
        self, encoder: ViTEncoder, decoder: MAEDecoder, masker: Masker, target: Target, target_name: str
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.masker = masker
        self.target = target
        self.target_name = target_name
        encoder.pos_embed.requires_grad_(False)

    def forward(self, images: Tensor, mask: PatchMask | None = None, generator: Randomness = None) -> MAEOutput:
        """(B, C, H, W) -> ``MAEOutput``. ``mask`` is honoured where given, otherwise drawn with ``generator``.

        Raises ``UserError`` for images of another shape and for a mask that does not fit them.
        """
        self.encoder.check_images(images)
        if mask is None:
            mask = self.masker(len(images), self.encoder.grid, generator)
        elif mask.hidden.shape != (len(images), self.encoder.grid.num_patches):
            raise UserError(
                f"mask {tuple(mask.hidden.shape)} does not fit {len(images)} images "
                f"of {self.encoder.grid.num_patches} patches"
            )
        mask = mask.to(images.device)
        prediction = self.decoder(self.encoder.encode_visible(images, mask), mask)
        target = self.target(images.float(), self.encoder.grid.patch)
        hidden = mask.hidden_ids[:, :, None]
        truth, guess = (values.gather(1, hidden.expand(-1, -1, values.shape[2])) for values in (target, prediction))
        loss = (guess.float() - truth).square().mean()
        return MAEOutput(loss, prediction, mask)

    def reconstruct(self, images: Tensor, output: MAEOutput) -> Reconstruction:
        """Pictures of an output; see ``target.shows_truth`` for what they may borrow from the truth."""
        grid = self.encoder.grid
        truth = patchify(images.float(), grid.patch)
        predicted = self.target.to_pixels(output.prediction.float(), images.float(), grid.patch)
        hidden = output.mask.hidden[:, :, None]
        masked, pasted = truth.masked_fill(hidden, 0.0), predicted.where(hidden, truth)
        return Reconstruction(*(unpatchify(x, grid) for x in (masked, predicted, pasted)))


def build_mae(
    size: str = "base",
    *,
    image_size: int | Sequence[int] = 224,
    patch_size: int | None = None,
    in_chans: int = 3,
    decoder_depth: int = 8,
    decoder_width: int = 512,
    decoder_heads: int = 16,
    target: str = "normalized_pixels",
    masking: str = "random",
    mask_ratio: float = 0.75,
) -> MaskedAutoencoder:
    """A masked autoencoder with the paper's defaults; ``patch_size=None`` is the size's own (14 for huge, 16
    otherwise).

    Raises ``UserError`` for unknown names and sizes that do not fit.
    """
    for name, table in ((target, TARGETS), (masking, MASKERS)):
        if name not in table:
            raise UserError(f"unknown name {name!r}; known: {', '.join(table)}")
    encoder = ViTEncoder(size, image_size=image_size, patch_size=patch_size, in_chans=in_chans)
    masker = MASKERS[masking](mask_ratio)
    masker(1, encoder.grid, torch.Generator())
    objective = TARGETS[target]()
    decoder = MAEDecoder(
        encoder.embed_dim,
        encoder.grid,
        objective.dim(encoder.grid.patch, in_chans),
        width=decoder_width,
        depth=decoder_depth,
        heads=decoder_heads,
    )
    return MaskedAutoencoder(encoder, decoder, masker, objective, target)
