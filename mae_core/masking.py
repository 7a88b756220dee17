"""Which patches the encoder may not see (paper, section 3, Table 1f)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from mae_core.errors import UserError
from mae_core.patches import PatchGrid

Randomness: TypeAlias = torch.Generator | Sequence[torch.Generator] | None
"""One generator for a batch, or one per sample (what a sample hides then depends on that sample alone); None: the
global one."""


@dataclass(frozen=True)
class PatchMask:
    """Which patches the encoder may not see; the same number in each sample of a batch.

    hidden       (B, N) bool, True where a patch is removed
    visible_ids  (B, V) int64, raster indices of the patches that stay, ascending
    hidden_ids   (B, N - V) int64, raster indices of the removed ones, ascending
    """

    hidden: Tensor
    visible_ids: Tensor
    hidden_ids: Tensor

    @classmethod
    def from_hidden(cls, hidden: Tensor) -> PatchMask:
        """Build from (B, N) bool, True = removed.

        Raises ``UserError`` for another type or shape, for samples that hide different numbers of patches, and where
        nothing is hidden or nothing visible.
        """
        if hidden.ndim != 2 or hidden.dtype != torch.bool:
            raise UserError(f"a patch mask is (B, N) bool, True = hidden; got {tuple(hidden.shape)} {hidden.dtype}")
        counts = hidden.sum(dim=1)
        if counts.numel() and bool((counts != counts[0]).any()):
            raise UserError(
                f"samples hide different numbers of patches ({counts.tolist()}); make them equal in a batch"
            )
        num_hidden, num_patches = int(counts[0]) if counts.numel() else 0, hidden.shape[1]
        if not 0 < num_hidden < num_patches:
            raise UserError(
                f"{num_hidden} of {num_patches} patches hidden; at least one must be hidden and one visible"
            )
        order = hidden.to(torch.uint8).argsort(dim=1, stable=True)
        num_visible = num_patches - num_hidden
        return cls(hidden=hidden, visible_ids=order[:, :num_visible], hidden_ids=order[:, num_visible:])

    def to(self, device: torch.device | str) -> PatchMask:
        """The same mask on another device."""
        return PatchMask(*(t.to(device, non_blocking=True) for t in (self.hidden, self.visible_ids, self.hidden_ids)))


class Masker(Protocol):
    """A masking strategy: draws a mask for a batch."""

    def __call__(self, batch: int, grid: PatchGrid, generator: Randomness = None) -> PatchMask: ...


def num_visible(num_patches: int, ratio: float) -> int:
    """Patches kept at a mask ratio, rounded down as in the official code.

    Raises ``UserError`` for a ratio outside (0, 1) or one that leaves nothing visible or nothing hidden.
    """
    if not 0.0 < ratio < 1.0:
        raise UserError(f"mask ratio {ratio:g} is outside (0, 1); the paper uses 0.75")
    kept = int(num_patches * (1 - ratio))
    if not 0 < kept < num_patches:
        raise UserError(
            f"mask ratio {ratio:g} keeps {kept} of {num_patches} patches; at least one must be visible and one hidden"
        )
    return kept


def _noise(batch: int, size: int, generator: Randomness) -> Tensor:
    """(batch, size) uniform numbers, a row per sample."""
    if generator is None or isinstance(generator, torch.Generator):
        return torch.rand(batch, size, generator=generator)
    if len(generator) != batch:
        raise ValueError(f"{len(generator)} generators for a batch of {batch}")
    return torch.stack([torch.rand(size, generator=one) for one in generator])


@dataclass(frozen=True)
class RandomMasking:
    """Hide ``ratio`` of the patches of each sample, uniformly without replacement (the paper's default)."""

    ratio: float

    def __post_init__(self) -> None:
        num_visible(1 << 20, self.ratio)

    def __call__(self, batch: int, grid: PatchGrid, generator: Randomness = None) -> PatchMask:
        """Draw a mask for ``batch`` samples on the CPU."""
        kept = num_visible(grid.num_patches, self.ratio)
        order = _noise(batch, grid.num_patches, generator).argsort(dim=1)
        hidden = torch.ones(batch, grid.num_patches, dtype=torch.bool).scatter_(1, order[:, :kept], False)
        return PatchMask.from_hidden(hidden)


MASKERS: dict[str, type[RandomMasking]] = {"random": RandomMasking}
"""Name in a config -> strategy. To add one: a class with this call, and a row."""
