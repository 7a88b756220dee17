"""Which patches the encoder may not see (paper, section 3, Table 1f)."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol, TypeAlias

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
        visible_ids, hidden_ids = (mask.nonzero()[:, 1].view(len(hidden), -1) for mask in (~hidden, hidden))
        return cls(hidden, visible_ids, hidden_ids)

    @classmethod
    def cat(cls, masks: Sequence[PatchMask]) -> PatchMask:
        """The masks of several samples as one batch. Raises ``UserError`` where they hide different numbers."""
        counts = [mask.hidden_ids.shape[1] for mask in masks]
        if len(set(counts)) > 1:
            raise UserError(f"samples hide different numbers of patches ({counts}); make them equal in a batch")
        return cls(*(torch.cat(parts) for parts in zip(*(mask.tensors() for mask in masks), strict=True)))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """hidden, visible_ids, hidden_ids."""
        return self.hidden, self.visible_ids, self.hidden_ids

    def samples(self, start: int, stop: int) -> PatchMask:
        """The masks of a part of the batch."""
        return PatchMask(*(values[start:stop] for values in self.tensors()))

    def to(self, device: torch.device | str) -> PatchMask:
        """The same mask on another device."""
        return PatchMask(*(values.to(device, non_blocking=True) for values in self.tensors()))

    def pin_memory(self) -> PatchMask:
        """The same mask in page-locked memory; a DataLoader with ``pin_memory`` calls this."""
        return PatchMask(*(values.pin_memory() for values in self.tensors()))


class Masker(Protocol):
    """A masking strategy: draws a mask for a batch. A frozen dataclass, whose fields beside ``ratio`` are its options:
    ``masking.options.NAME`` in a configuration, ``masking_options`` in a checkpoint."""

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
    visible, hidden = (ids.sort(dim=1).values for ids in noise.argsort(dim=1).tensor_split([kept], dim=1))
    return PatchMask(torch.ones_like(noise, dtype=torch.bool).scatter_(1, visible, False), visible, hidden)


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


MASKERS: dict[str, Callable[..., Masker]] = {"random": RandomMasking, "block": BlockMasking, "grid": GridMasking}
"""Name in a config and in a checkpoint -> strategy. To add one, with options of its own or without: a frozen dataclass
with this call, and a row."""


def masker_options(strategy: Any) -> tuple[str, ...]:
    """Names of the options of a strategy, a row of ``MASKERS`` or made from one: its fields beside ``ratio``."""
    return tuple(field.name for field in fields(strategy) if field.name != "ratio") if is_dataclass(strategy) else ()


def build_masker(name: str, ratio: float, options: Mapping[str, Any] | None = None) -> Masker:
    """The strategy of a row of ``MASKERS``. Raises ``UserError`` for unknown names, and for options that are missing or
    are not the strategy's."""
    if name not in MASKERS:
        raise UserError(f"unknown name {name!r}; known: {', '.join(MASKERS)}")
    try:
        return MASKERS[name](ratio, **(options or {}))
    except TypeError:
        known = ", ".join(masker_options(MASKERS[name])) or "none"
        raise UserError(
            f"masking {name!r} does not take the options {dict(options or {})}; it has {known}, and those without a "
            "default must be given"
        ) from None


def describe_masker(masker: Masker) -> dict[str, Any]:
    """What a checkpoint says of a strategy: ``masking``, its row in ``MASKERS`` (or the name of a class that has none),
    ``mask_ratio`` and ``masking_options``; what ``build_masker`` makes it from."""
    row = next((name for name, row in MASKERS.items() if row is type(masker)), type(masker).__name__)
    options = {name: getattr(masker, name) for name in masker_options(masker)}
    return {"masking": row, "mask_ratio": masker.ratio, "masking_options": options}


@dataclass(frozen=True)
class SampleMasks:
    """Draws the masks of samples, each from a seed of its own: what the workers of a loader do."""

    masker: Masker
    grid: PatchGrid

    def draw(self, *seeds: int) -> PatchMask:
        """The masks of a batch, a seed each: each is what it would be alone."""
        return self.masker(len(seeds), self.grid, [torch.Generator().manual_seed(seed) for seed in seeds])
