"""What the decoder predicts for a hidden patch (paper, section 3 and Table 1d)."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from mae_core.patches import patchify

EPSILON = 1e-6


class Target(Protocol):
    """A prediction target on patches."""

    shows_truth: bool
    """Whether ``to_pixels`` borrows statistics from the true image; pictures made with it must say so."""

    def dim(self, patch: int, channels: int) -> int:
        """Numbers to predict per patch."""
        ...

    def __call__(self, images: Tensor, patch: int) -> Tensor:
        """(B, C, H, W) -> (B, N, dim): what a perfect decoder would say."""
        ...

    def to_pixels(self, prediction: Tensor, images: Tensor, patch: int) -> Tensor:
        """(B, N, dim) -> (B, N, patch*patch*C) pixel patches, to look at."""
        ...


class PixelTarget:
    """The pixels of the patch, as the encoder gets them (standardised per channel by the data set's mean and std)."""

    shows_truth = False

    def dim(self, patch: int, channels: int) -> int:
        """patch * patch * channels."""
        return patch * patch * channels

    def __call__(self, images: Tensor, patch: int) -> Tensor:
        """(B, C, H, W) -> (B, N, patch*patch*C)."""
        return patchify(images, patch)

    def to_pixels(self, prediction: Tensor, images: Tensor, patch: int) -> Tensor:
        """The prediction is pixels already."""
        return prediction


class NormalizedPixelTarget(PixelTarget):
    """Pixels standardised by the mean and the (unbiased) variance of their own patch: better features in the paper."""

    shows_truth = True

    def __call__(self, images: Tensor, patch: int) -> Tensor:
        """(B, C, H, W) -> (B, N, patch*patch*C), mean 0 and variance 1 in each patch."""
        patches = patchify(images, patch)
        mean, std = _patch_statistics(patches)
        return (patches - mean) / std

    def to_pixels(self, prediction: Tensor, images: Tensor, patch: int) -> Tensor:
        """Undo the normalisation with the statistics of the true patches."""
        mean, std = _patch_statistics(patchify(images, patch))
        return prediction * std + mean


def _patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """(B, N, P) -> mean and std of each patch, (B, N, 1); channels are pooled together, as in the official code."""
    return patches.mean(dim=-1, keepdim=True), (patches.var(dim=-1, keepdim=True) + EPSILON).sqrt()


TARGETS: dict[str, type[PixelTarget]] = {"pixels": PixelTarget, "normalized_pixels": NormalizedPixelTarget}
"""Name in a config and in a checkpoint -> target. To add one: a class with these methods, and a row."""
