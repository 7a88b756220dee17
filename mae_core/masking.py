"""Which patches the encoder may not see (paper, section 3, Table 1f)."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
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

    @property
    def ratio(self) -> float:
        """Share of hidden patches."""
        ...

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
        device = None if generator is None else generator.device
        return torch.rand(batch, size, generator=generator, device=device).cpu()
    if len(generator) != batch:
        raise ValueError(f"{len(generator)} generators for a batch of {batch}")
    return torch.stack([torch.rand(size, generator=one) for one in generator])


def keep_lowest(noise: Tensor, kept: int) -> PatchMask:
    """(B, N) -> the mask that leaves the ``kept`` patches of lowest value visible in each sample."""
    order = noise.argsort(dim=1)
    return PatchMask.from_hidden(torch.ones_like(noise, dtype=torch.bool).scatter_(1, order[:, :kept], False))


@dataclass(frozen=True)
class RandomMasking:
    """Hide ``ratio`` of the patches of each sample, uniformly without replacement (the paper's default)."""

    ratio: float

    def __post_init__(self) -> None:
        num_visible(1 << 20, self.ratio)

    def __call__(self, batch: int, grid: PatchGrid, generator: Randomness = None) -> PatchMask:
        """Draw a mask for ``batch`` samples on the CPU."""
        kept = num_visible(grid.num_patches, self.ratio)
        return keep_lowest(_noise(batch, grid.num_patches, generator), kept)


LATTICE = ((0, 8, 2, 10), (12, 4, 14, 6), (3, 11, 1, 9), (15, 7, 13, 5))
"""The order in which a 4x4 cell fills up while it stays as regular as it can (Bayer's matrix): its first four places
are one of every 2x2 cell, its first eight a checkerboard."""


@dataclass(frozen=True)
class GridMasking(RandomMasking):
    """Keep patches on a regular lattice: at 75 %, one of every 2x2 cell (paper, Table 1f and Figure 6).

    At other ratios the lattice is thinned or filled in the order of ``LATTICE``; a level that is needed in part is
    drawn at random, so that the count is exact. The paper does not say where the lattice starts: here it is drawn for
    each sample, so that every patch is hidden as often as any other (on grids that 4 divides; at 75 %, that 2 divides).
    """

    def __call__(self, batch: int, grid: PatchGrid, generator: Randomness = None) -> PatchMask:
        """Draw a mask for ``batch`` samples on the CPU."""
        kept = num_visible(grid.num_patches, self.ratio)
        noise = _noise(batch, grid.num_patches + 2, generator)
        shift = (noise[:, -2:] * 4).long()
        rows = (torch.arange(grid.rows) + shift[:, :1]) % 4
        cols = (torch.arange(grid.cols) + shift[:, 1:]) % 4
        level = torch.tensor(LATTICE)[rows[:, :, None], cols[:, None, :]].flatten(1)
        return keep_lowest(level + noise[:, :-2], kept)


@dataclass(frozen=True)
class BlockMasking(RandomMasking):
    """Hide rectangles, as BEiT does (its paper, Algorithm 1 and section 2.3; MAE's Table 1f and Figure 6).

    Rectangles of 16 patches or more (of the 14x14 grid: the same share of other grids) and an aspect ratio of 0.3 to
    1/0.3 are laid over each other until none fits into what is left to hide. BEiT stops there, short of its target;
    here the hidden area then grows at its borders, patch by patch, until the count is exact.
    """

    def __call__(self, batch: int, grid: PatchGrid, generator: Randomness = None) -> PatchMask:
        """Draw a mask for ``batch`` samples on the CPU; a few hundred microseconds a sample."""
        wanted = grid.num_patches - num_visible(grid.num_patches, self.ratio)
        seeds = (_noise(batch, 1, generator).double() * 2**24).long()[:, 0].tolist()
        hidden = [_hide_blocks(grid.rows, grid.cols, wanted, random.Random(seed)) for seed in seeds]
        return PatchMask.from_hidden(torch.from_numpy(np.stack(hidden)).flatten(1))


SMALLEST_BLOCK = 16 / 196
LARGEST_STRETCH = math.log(1 / 0.3)
TRIES = 10
"""BEiT's: a rectangle's least share of the grid, its largest aspect ratio (a logarithm), misses before the end."""


def _hide_blocks(rows: int, cols: int, wanted: int, rng: random.Random) -> np.ndarray:
    """(rows, cols) bool with ``wanted`` hidden patches."""
    hidden: np.ndarray = np.zeros((rows, cols), dtype=bool)
    smallest = max(1.0, SMALLEST_BLOCK * rows * cols)
    left, failures = wanted, 0
    while left and failures < TRIES:
        area = rng.uniform(smallest, left)
        stretch = math.exp(rng.uniform(-LARGEST_STRETCH, LARGEST_STRETCH))
        height, width = round(math.sqrt(area * stretch)), round(math.sqrt(area / stretch))
        failures += 1
        if not (0 < height < rows and 0 < width < cols):
            continue
        top, start = rng.randint(0, rows - height), rng.randint(0, cols - width)
        block = hidden[top : top + height, start : start + width]
        new = height * width - int(block.sum())
        if 0 < new <= left:
            block[:] = True
            left, failures = left - new, 0
    while left:
        hidden[_border_patch(hidden, rng)] = True
        left -= 1
    return hidden


def _border_patch(hidden: np.ndarray, rng: random.Random) -> tuple[int, int]:
    """A visible patch beside a hidden one; any patch where none is hidden yet."""
    beside = np.zeros_like(hidden)
    beside[1:] |= hidden[:-1]
    beside[:-1] |= hidden[1:]
    beside[:, 1:] |= hidden[:, :-1]
    beside[:, :-1] |= hidden[:, 1:]
    places = np.argwhere(beside & ~hidden) if hidden.any() else np.argwhere(~hidden)
    row, col = places[rng.randrange(len(places))]
    return int(row), int(col)


def name_of_masker(masker: Masker) -> str:
    """The name a checkpoint gives a strategy: its row in ``MASKERS``, or the name of a class that has none."""
    return next((name for name, row in MASKERS.items() if row is type(masker)), type(masker).__name__)


MASKERS: dict[str, Callable[[float], Masker]] = {"random": RandomMasking, "block": BlockMasking, "grid": GridMasking}
"""Name in a config -> strategy, made from its ratio. To add one: a class with this call, and a row."""
