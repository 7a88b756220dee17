"""The masked autoencoder (paper, section 3): encoder on visible patches, light decoder, loss on hidden patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mae_core.errors import UserError
from mae_core.masking import Masker, PatchMask, Randomness, build_masker, describe_masker
from mae_core.models.decoder import BlockFusion, MAEDecoder
from mae_core.models.distillation import AttentionDistillation
from mae_core.models.encoder import ViTEncoder
from mae_core.models.sizes import AnySize
from mae_core.patches import patchify, unpatchify
from mae_core.targets import TARGETS, Target


class MAEOutput(NamedTuple):
    """loss: scalar, mean over hidden patches; prediction: (B, N, target_dim) in raster order, of visible patches too,
    or (B, n, target_dim) of ``mask.hidden_ids`` where no others were asked for; mask: what was hidden; distillation:
    scalar to be added to the loss, in training with a teacher."""

    loss: Tensor
    prediction: Tensor
    mask: PatchMask
    distillation: Tensor | None = None

    @property
    def total(self) -> Tensor:
        """What a training minimises."""
        return self.loss if self.distillation is None else self.loss + self.distillation


class Reconstruction(NamedTuple):
    """Images (B, C, H, W) in the model's normalised pixels: ``masked`` has zeros (the mean colour) where patches are
    hidden,
    ``predicted`` is the prediction everywhere, ``pasted`` shows the input where visible and the prediction where
    hidden."""

    masked: Tensor
    predicted: Tensor
    pasted: Tensor


class MaskedAutoencoder(nn.Module):
    """Encoder + masker + decoder + target.

    ``mask_tokens_in_encoder``: the encoder runs on all patches, a learned token in place of the hidden ones, as the
    paper's Table 1c tries (worse, and several times slower). The attribute ``loss_on_all_patches`` counts visible
    patches too (the paper's footnote 1: about 0.5 % less accurate). ``fuse_blocks``: blocks that the decoder reads
    beside the last one, see ``BlockFusion``. The attribute ``distillation``: what the encoder learns from a larger one,
    beside; it reads visible patches, and so does not go with mask tokens in the encoder.
    """

    def __init__(
        self,
        encoder: ViTEncoder,
        decoder: MAEDecoder,
        masker: Masker,
        target: Target,
        *,
        mask_tokens_in_encoder: bool = False,
        loss_on_all_patches: bool = False,
        fuse_blocks: Sequence[int] = (),
    ) -> None:
        super().__init__()
        if fuse_blocks and mask_tokens_in_encoder:
            raise UserError(
                "decoder.fuse_blocks and masking.mask_tokens_in_encoder exclude each other; leave one of them out"
            )
        self.encoder = encoder
        self.decoder = decoder
        self.masker = masker
        self.target = target
        self.loss_on_all_patches = loss_on_all_patches
        self.fusion = BlockFusion(encoder.embed_dim, len(encoder.blocks), fuse_blocks) if fuse_blocks else None
        self.distillation: AttentionDistillation | None = None
        self.mask_token = nn.Parameter(torch.zeros(1, 1, encoder.embed_dim)) if mask_tokens_in_encoder else None
        if self.mask_token is not None:
            nn.init.normal_(self.mask_token, std=0.02)
        encoder.pos_embed.requires_grad_(False)

    @property
    def target_name(self) -> str:
        """Row of the target in ``TARGETS``."""
        return self.target.name

    def forward(
        self,
        images: Tensor,
        mask: PatchMask | None = None,
        generator: Randomness = None,
        *,
        predict_visible: bool = True,
    ) -> MAEOutput:
        """(B, C, H, W) -> ``MAEOutput``. ``mask`` is honoured where given, otherwise drawn with ``generator``.

        ``predict_visible=False`` leaves visible patches out of the decoder's last block, where no loss needs them: the
        same loss for less work.

        Raises ``UserError`` for images of another shape and for a mask that does not fit them.
        """
        self.encoder.check_images(images)
        if mask is None:
            mask = self.masker(len(images), self.encoder.grid, generator)
        elif not isinstance(mask, PatchMask):
            raise UserError(
                f"a mask is a PatchMask, not a {type(mask).__name__}; make one with PatchMask.from_hidden(hidden), "
                "where hidden is (B, N) bool and True hides a patch"
            )
        elif mask.hidden.shape != (len(images), self.encoder.grid.num_patches):
            raise UserError(
                f"mask {tuple(mask.hidden.shape)} does not fit {len(images)} images "
                f"of {self.encoder.grid.num_patches} patches"
            )
        mask = mask.to(images.device)
        distance = None
        if self.mask_token is None:
            outputs = self.encoder.visible_outputs(images, mask, self._read_blocks())
            last = outputs[len(self.encoder.blocks) - 1]
            tokens = self.encoder.norm(last if self.fusion is None else self.fusion(outputs))
            if self.distillation is not None and self.training:
                distance = self.distillation(images, mask, self.encoder, outputs)
        else:
            tokens = self.encoder.encode_with_mask_tokens(images, mask, self.mask_token)
        only_hidden = not (predict_visible or self.loss_on_all_patches)
        prediction = self.decoder(tokens, mask, only_hidden=only_hidden)
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            truth = self.target(images.float(), self.encoder.grid.patch)
        scored = prediction
        if not self.loss_on_all_patches:
            truth = _pick(truth, mask.hidden_ids)
            scored = prediction if only_hidden else _pick(prediction, mask.hidden_ids)
        return MAEOutput(self.target.distance(scored, truth), prediction, mask, distance)

    def _read_blocks(self) -> list[int]:
        """Blocks of the encoder whose outputs are read, beside the last."""
        fused = () if self.fusion is None else self.fusion.blocks
        distilled = () if self.distillation is None else self.distillation.inputs_of(self.encoder)
        return [*fused, *distilled]

    def describe(self) -> dict[str, Any]:
        """What ``load_mae`` needs, besides the tensors and the encoder's shape, to build it again; JSON values."""
        return {
            "target": self.target.name,
            "target_options": self.target.describe(),
            **describe_masker(self.masker),
            "decoder_heads": self.decoder.heads,
            "fuse_blocks": None if self.fusion is None else list(self.fusion.blocks),
            "mask_tokens_in_encoder": self.mask_token is not None,
            "loss_on_all_patches": self.loss_on_all_patches,
        }

    def reconstruct(self, images: Tensor, output: MAEOutput) -> Reconstruction:
        """Pictures of an output; see ``target.shows_truth`` for what they may borrow from the truth.

        Raises ``UserError`` where the target is one of tokens and their tokenizer has no decoder, and where the output
        lacks the visible patches.
        """
        grid = self.encoder.grid
        if output.prediction.shape[1] != grid.num_patches:
            raise UserError("the output has no prediction of visible patches; call the model with predict_visible=True")
        truth = patchify(images.float(), grid.patch)
        predicted = self.target.to_pixels(output.prediction.float(), images.float(), grid.patch)
        hidden = output.mask.hidden[:, :, None]
        masked, pasted = truth.masked_fill(hidden, 0.0), predicted.where(hidden, truth)
        return Reconstruction(*(unpatchify(x, grid) for x in (masked, predicted, pasted)))


def _pick(values: Tensor, ids: Tensor) -> Tensor:
    """(B, N, D) or (B, N), and ids (B, n) -> (B, n, D) or (B, n)."""
    return values.gather(1, ids if values.ndim == 2 else ids[:, :, None].expand(-1, -1, values.shape[2]))


class OwnPatchSize(int):
    """The patch size of the model's size, used because none was given."""


PATCH_SIZE = OwnPatchSize(16)


def build_mae(
    size: AnySize = "base",
    *,
    image_size: int | Sequence[int] = 224,
    patch_size: int | None = PATCH_SIZE,
    in_chans: int = 3,
    decoder_depth: int = 8,
    decoder_width: int = 512,
    decoder_heads: int = 16,
    target: str | Target = "normalized_pixels",
    masking: str | Masker = "random",
    mask_ratio: float = 0.75,
    mask_tokens_in_encoder: bool = False,
    fuse_blocks: Sequence[int] = (),
) -> MaskedAutoencoder:
    """A masked autoencoder with the paper's defaults.

    ``patch_size``: left out, 16, but 14 for ``huge``, which the paper has at 14; ``patch_size=16`` is honoured for
    every size. ``target``: a row of ``TARGETS``, or a target object: those that are fitted have no name to build them
    by, see ``mae_core.load_pca`` and ``mae_core.load_tokenizer``. ``masking``: a row of ``MASKERS``, or a strategy
    with its own ratio and options, as ``build_masker`` makes it. Raises ``UserError`` for unknown names and what does
    not fit.
    """
    encoder = ViTEncoder(
        size,
        image_size=image_size,
        patch_size=None if isinstance(patch_size, OwnPatchSize) else patch_size,
        in_chans=in_chans,
    )
    decoder = {"width": decoder_width, "depth": decoder_depth, "heads": decoder_heads}
    masks: dict[str, Any] = {"masking": masking, "mask_ratio": mask_ratio}
    masks |= {"mask_tokens_in_encoder": mask_tokens_in_encoder}
    return assemble_mae(encoder, target, decoder, fuse_blocks=fuse_blocks, **masks)


def assemble_mae(
    encoder: ViTEncoder,
    target: str | Target,
    decoder: Mapping[str, Any],
    *,
    masking: str | Masker = "random",
    mask_ratio: float = 0.75,
    masking_options: Mapping[str, Any] | None = None,
    mask_tokens_in_encoder: bool = False,
    fuse_blocks: Sequence[int] = (),
) -> MaskedAutoencoder:
    """A masked autoencoder around an encoder; ``decoder``: width, depth, heads and MLP ratio of ``MAEDecoder``, whose
    norms and activation are the encoder's. Raises ``UserError`` as ``build_mae`` does."""
    if isinstance(target, str) and target not in TARGETS:
        raise UserError(f"unknown name {target!r}; known: {', '.join(TARGETS)}")
    masker = build_masker(masking, mask_ratio, masking_options) if isinstance(masking, str) else masking
    masker(1, encoder.grid, torch.Generator())
    objective = TARGETS[target].named() if isinstance(target, str) else target
    decoder_model = MAEDecoder(
        encoder.embed_dim,
        encoder.grid,
        objective.dim(encoder.grid, encoder.in_channels),
        norm_eps=encoder.shape.norm_eps,
        activation=encoder.shape.activation,
        mask_tokens=not mask_tokens_in_encoder,
        prefix=encoder.prefix,
        **decoder,
    )
    more: dict[str, Any] = {"mask_tokens_in_encoder": mask_tokens_in_encoder, "fuse_blocks": fuse_blocks}
    return MaskedAutoencoder(encoder, decoder_model, masker, objective, **more)
