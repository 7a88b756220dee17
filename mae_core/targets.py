"""What the decoder predicts for a patch, and how far a prediction is from it (paper, section 3 and Table 1d)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mae_core.errors import UserError
from mae_core.patches import PatchGrid, as_pair, patchify
from mae_core.tokenizers import Tokenizer, rebuild_tokenizer

EPSILON = 1e-6
"""Added to the variance of a patch by the official code (models_mae.py); in the units of the model's standardised
pixels."""


class Target(nn.Module):
    """A prediction target on patches. A module, so that what it was fitted on travels with the model's weights."""

    name: ClassVar[str]
    """What configurations and checkpoints call it."""
    shows_truth: ClassVar[bool] = False
    """Whether ``to_pixels`` borrows statistics from the true image; pictures made with it must say so."""

    @property
    def gives_pixels(self) -> bool:
        """Whether a prediction can be made pixels, to look at."""
        return True

    def dim(self, grid: PatchGrid, channels: int) -> int:
        """Numbers to predict per patch. Raises ``UserError`` where the target does not fit such images."""
        return grid.patch * grid.patch * channels

    def forward(self, images: Tensor, patch: int) -> Tensor:
        """(B, C, H, W) -> (B, N, ...), what ``distance`` compares a prediction with."""
        raise NotImplementedError

    def distance(self, prediction: Tensor, truth: Tensor) -> Tensor:
        """(B, n, dim) predictions of any n patches and their truth -> a scalar, the mean over patches and batch."""
        return (prediction.float() - truth).square().mean()

    def to_pixels(self, prediction: Tensor, images: Tensor, patch: int) -> Tensor:
        """(B, N, dim) -> (B, N, patch*patch*C) pixel patches, to look at.

        Raises ``UserError`` where ``gives_pixels`` is false.
        """
        return prediction

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """Names of the constructor's arguments, each of which is an attribute too: ``target.options.NAME`` in a
        configuration, ``target_options`` in a checkpoint."""
        return tuple(
            name
            for name, parameter in inspect.signature(cls).parameters.items()
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        )

    def describe(self) -> dict[str, Any]:
        """What ``rebuild`` needs besides the tensors; JSON values."""
        return {name: getattr(self, name) for name in self.options()}

    @classmethod
    def named(cls, **options: Any) -> Target:
        """The target, asked for by its name and its options. Raises ``UserError`` where it has to be fitted or read
        first."""
        return cls(**options)

    @classmethod
    def rebuild(cls, described: Mapping[str, Any], state: Mapping[str, Tensor]) -> Target:
        """An empty target of this kind that ``state``, the tensors of a stored one, fits."""
        return cls(**{name: described[name] for name in cls.options() if name in described})


class PixelTarget(Target):
    """The pixels of the patch, as the encoder gets them (standardised per channel by the data set's mean and std)."""

    name = "pixels"

    def forward(self, images: Tensor, patch: int) -> Tensor:
        """(B, C, H, W) -> (B, N, patch*patch*C)."""
        return patchify(images, patch)


class NormalizedPixelTarget(Target):
    """Pixels standardised by the mean and the (unbiased) variance of their own patch: better features in the paper.

    ``eps`` is added to the variance. The published one, ``EPSILON``, gives a patch of nothing but noise as large a
    target as any other; a larger one keeps such a target small.
    """

    name = "normalized_pixels"
    shows_truth = True

    def __init__(self, eps: float = EPSILON) -> None:
        super().__init__()
        self.eps = eps

    def dim(self, grid: PatchGrid, channels: int) -> int:
        """patch * patch * channels; a patch of a single number has no variance and is refused."""
        values = super().dim(grid, channels)
        if values < 2:
            raise UserError("a patch of one pixel and one channel cannot be normalised; use target.kind=pixels")
        return values

    def forward(self, images: Tensor, patch: int) -> Tensor:
        """(B, C, H, W) -> (B, N, patch*patch*C), mean 0 and variance v / (v + eps) in a patch of variance v."""
        patches = patchify(images, patch)
        mean, std = self._statistics(patches)
        return (patches - mean) / std

    def to_pixels(self, prediction: Tensor, images: Tensor, patch: int) -> Tensor:
        """Undo the normalisation with the statistics of the true patches."""
        mean, std = self._statistics(patchify(images, patch))
        return prediction * std + mean

    def _statistics(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, P) -> mean and std of each patch, (B, N, 1); channels are pooled together, as in the official code."""
        return patches.mean(dim=-1, keepdim=True), (patches.var(dim=-1, keepdim=True) + self.eps).sqrt()

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """None: ``target.eps`` is a key of its own in a configuration."""
        return ()

    def describe(self) -> dict[str, Any]:
        """Its eps."""
        return {"eps": self.eps}

    @classmethod
    def rebuild(cls, described: Mapping[str, Any], state: Mapping[str, Tensor]) -> NormalizedPixelTarget:
        """Of a file that states no eps: with the published one."""
        return cls(described.get("eps", EPSILON))


class FittedTarget(Target):
    """A target that comes from a file, not from options."""

    remedy: ClassVar[str]
    """How to get one."""

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """None: what it is made of is in its file."""
        return ()

    @classmethod
    def named(cls, **options: Any) -> Target:
        """Never: it is fitted."""
        raise UserError(f"the target {cls.name!r} needs {cls.remedy}")


class PCATarget(FittedTarget):
    """The largest principal components of a patch (the paper keeps 96), fitted on the training set by ``mae fit-pca``.

    components  (K, patch*patch*C), orthonormal rows, the largest variance first
    mean        (patch*patch*C,), the mean patch
    """

    name = "pca"
    remedy = (
        "a fitted file: write one with mae fit-pca, then set target.pca=FILE in a configuration, or pass "
        "target=mae_core.load_pca(FILE)"
    )
    components: Tensor
    mean: Tensor

    def __init__(self, components: Tensor, mean: Tensor) -> None:
        super().__init__()
        if components.ndim != 2 or mean.shape != components.shape[1:]:
            raise ValueError(f"components {tuple(components.shape)} and mean {tuple(mean.shape)} do not match")
        self.register_buffer("components", components.float())
        self.register_buffer("mean", mean.float())

    def dim(self, grid: PatchGrid, channels: int) -> int:
        """K, the number of components."""
        fitted, wanted = self.components.shape[1], super().dim(grid, channels)
        if fitted != wanted:
            raise UserError(
                f"the PCA was fitted on patches of {fitted} numbers, but this model's patches have {wanted} "
                f"({grid.patch}x{grid.patch} pixels, {channels} channels); fit one on these with mae fit-pca"
            )
        return self.components.shape[0]

    def forward(self, images: Tensor, patch: int) -> Tensor:
        """(B, C, H, W) -> (B, N, K)."""
        return (patchify(images, patch) - self.mean) @ self.components.T

    def to_pixels(self, prediction: Tensor, images: Tensor, patch: int) -> Tensor:
        """Back-projection: as near to the patch as K components come."""
        return prediction @ self.components + self.mean

    @classmethod
    def rebuild(cls, described: Mapping[str, Any], state: Mapping[str, Tensor]) -> PCATarget:
        """Of the stored shapes."""
        return cls(torch.zeros_like(state["components"]), torch.zeros_like(state["mean"]))


class TokenTarget(FittedTarget):
    """The token that a frozen tokenizer gives the patch; cross-entropy (BEiT's target, paper, Table 1d and 7).

    ``mean`` and ``std``: of the pixels the model gets, to undo their standardisation: the tokenizer gets pixels as they
    were read. ``image_size``: what the tokenizer sees the images at, such as 112 for one of stride 8 beside 16-pixel
    patches at 224; None: the same pixels as the model.
    """

    name = "tokens"
    remedy = (
        "a tokenizer: train one with mae train-tokenizer, then set target.tokenizer=FILE in a configuration, or pass "
        "target=mae_core.TokenTarget(mae_core.load_tokenizer(FILE), mean=..., std=...)"
    )
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        image_size: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        if isinstance(tokenizer, nn.Module):
            tokenizer.requires_grad_(False).eval()
        self.image_size = None if image_size is None else as_pair(image_size)
        self.register_buffer("mean", torch.tensor([*mean], dtype=torch.float32)[:, None, None])
        self.register_buffer("std", torch.tensor([*std], dtype=torch.float32)[:, None, None])

    def train(self, mode: bool = True) -> TokenTarget:
        """The tokenizer is frozen: it stays in eval mode."""
        return super().train(False)

    @property
    def gives_pixels(self) -> bool:
        """Whether the tokenizer has a decoder."""
        return hasattr(self.tokenizer, "decode")

    def dim(self, grid: PatchGrid, channels: int) -> int:
        """The vocabulary; the tokenizer's grid must be the model's."""
        wanted = getattr(self.tokenizer, "channels", channels)
        if wanted != channels:
            raise UserError(f"the tokenizer takes images of {wanted} channels, the model's have {channels}")
        stride = getattr(self.tokenizer, "stride", None)
        if stride is not None:
            height, width = self.image_size or grid.image_size
            fitting = (grid.rows * stride, grid.cols * stride)
            if (height, width) != fitting:
                raise UserError(
                    f"the tokenizer makes a token of {stride}x{stride} pixels, {height // stride}x{width // stride} of "
                    f"an image of {height}x{width}, and the model has {grid.rows}x{grid.cols} patches; set "
                    f"target.tokenizer_image_size=[{fitting[0]},{fitting[1]}], or take one of stride {grid.patch}"
                )
        return self.tokenizer.vocabulary

    def forward(self, images: Tensor, patch: int) -> Tensor:
        """(B, C, H, W) -> (B, N) int64."""
        grid = PatchGrid.of(tuple(images.shape[2:]), patch)
        pixels = images * self.std + self.mean
        if self.image_size is not None and self.image_size != grid.image_size:
            pixels = _resize(pixels, self.image_size)
        ids = self.tokenizer(pixels).flatten(1)
        if ids.shape[1] != grid.num_patches:
            raise UserError(
                f"the tokenizer gives {ids.shape[1]} tokens an image, the model has {grid.num_patches} patches "
                f"({grid.rows}x{grid.cols}); set target.tokenizer_image_size, or take a tokenizer of the model's grid"
            )
        return ids

    def distance(self, prediction: Tensor, truth: Tensor) -> Tensor:
        """Cross-entropy of (B, n, vocabulary) logits and (B, n) ids."""
        return F.cross_entropy(prediction.float().flatten(0, 1), truth.flatten())

    def to_pixels(self, prediction: Tensor, images: Tensor, patch: int) -> Tensor:
        """The likeliest tokens through the tokenizer's decoder."""
        if not self.gives_pixels:
            raise UserError(
                f"the tokenizer ({type(self.tokenizer).__name__}) has no decoder: its tokens cannot be drawn as pixels"
            )
        grid = PatchGrid.of(tuple(images.shape[2:]), patch)
        decode: Callable[[Tensor], Tensor] = self.tokenizer.decode  # type: ignore[attr-defined]
        pixels = decode(prediction.argmax(dim=-1).unflatten(1, (grid.rows, grid.cols)))
        if tuple(pixels.shape[2:]) != grid.image_size:
            pixels = _resize(pixels, grid.image_size)
        return patchify((pixels - self.mean) / self.std, patch)

    def describe(self) -> dict[str, Any]:
        """Which tokenizer, and what it sees the images at."""
        describe: Callable[[], dict[str, Any]] = getattr(self.tokenizer, "describe", dict)
        return {"tokenizer": describe(), "image_size": self.image_size}

    @classmethod
    def rebuild(cls, described: Mapping[str, Any], state: Mapping[str, Tensor]) -> TokenTarget:
        """With a tokenizer of the stored kind. Raises ``UserError`` for one that is not of this package."""
        zeros, ones = ([value] * len(state["mean"]) for value in (0.0, 1.0))
        tokenizer = rebuild_tokenizer(described["tokenizer"])
        return cls(tokenizer, mean=zeros, std=ones, image_size=described["image_size"])


def _resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(images, size=size, mode="bicubic", align_corners=False, antialias=True)


TARGETS: dict[str, type[Target]] = {
    row.name: row for row in (PixelTarget, NormalizedPixelTarget, PCATarget, TokenTarget)
}
"""Name in a config and in a checkpoint -> target. To add one, with options of its own or without: a class with these
methods whose constructor takes the options, and a row."""


def rebuild_target(name: str, described: Mapping[str, Any], state: Mapping[str, Tensor]) -> Target:
    """The empty target of a checkpoint. ``state``: its tensors, without prefix.

    Raises ``UserError`` for an unknown name, and where what the target was fitted on is not in the file.
    """
    if name not in TARGETS:
        raise UserError(f"unknown name {name!r}; known: {', '.join(TARGETS)}")
    try:
        return TARGETS[name].rebuild(described, state)
    except KeyError as error:
        raise UserError(f"the target {name!r} of this file is incomplete: {error.args[0]} is missing") from None
