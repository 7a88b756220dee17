"""The shape of a ViT trunk, and the named ones, one row each; every other number of a size is derived from its row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from mae_core.errors import UserError

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "relu", "silu")
"""Of the hidden layer of a block's MLP, under timm's names; MAE's is ``gelu``."""

Pooling: TypeAlias = Literal["mean", "cls", "map"]
"""Which tokens of the trunk a classifier reads: the mean of the patches', the cls token, or what the attention pooling
of a trunk of timm makes of them (SigLIP)."""


@dataclass(frozen=True)
class ViTSize:
    """Shape of a ViT trunk and what its tensors do not tell.

    width       channels of a token
    mlp_ratio   hidden units of a block's MLP, in widths
    patch_size  the published one; may be overridden
    norm_eps    epsilon of every LayerNorm
    activation  a row of ``ACTIVATIONS``
    cls_token   whether a token precedes the patches'; MAE works as well without (paper, A.1)

    Raises ``UserError`` for numbers that no ViT has.
    """

    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    patch_size: int = 16
    norm_eps: float = 1e-6
    activation: str = "gelu"
    cls_token: bool = True

    def __post_init__(self) -> None:
        for name in ("width", "depth", "heads", "patch_size", "mlp_ratio", "norm_eps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise UserError(f"a ViT has a positive {name}, got {value!r}")
        if self.width % self.heads or self.width % 4:
            raise UserError(f"a width of {self.width} does not divide into {self.heads} heads, or into 4 for positions")
        if self.activation not in ACTIVATIONS:
            raise UserError(f"unknown activation {self.activation!r}; known: {', '.join(ACTIVATIONS)}")

    @property
    def name(self) -> str:
        """The row of ``SIZES`` with this width, depth, heads and MLP, or ``<width>x<depth>``."""
        return next((name for name, row in SIZES.items() if row.trunk == self.trunk), f"{self.width}x{self.depth}")

    @property
    def trunk(self) -> tuple[int, int, int, float]:
        """(width, depth, heads, MLP ratio)."""
        return self.width, self.depth, self.heads, self.mlp_ratio

    @property
    def hidden(self) -> int:
        """Hidden units of a block's MLP."""
        return int(self.width * self.mlp_ratio)

    @property
    def quarter_taps(self) -> tuple[int, int, int, int]:
        """Last block of each quarter of the trunk, 0-based: what a four-stage pyramid reads. A trunk of fewer than four
        blocks is read at its first one more than once."""
        return tuple(max(self.depth * quarter // 4 - 1, 0) for quarter in (1, 2, 3, 4))  # type: ignore[return-value]


SIZES = {
    "nano": ViTSize(128, 6, 4),
    "tiny": ViTSize(192, 12, 3),
    "small": ViTSize(384, 12, 6),
    "base": ViTSize(768, 12, 12),
    "large": ViTSize(1024, 24, 16),
    "huge": ViTSize(1280, 32, 16, patch_size=14),
}
"""``nano`` is for tests and for the demonstration on a laptop; tiny and small are DeiT's shapes; the rest are the
paper's."""

AnySize: TypeAlias = str | ViTSize | Mapping[str, Any]
"""A row's name, a description, or the fields of one."""


def size_of(size: AnySize) -> ViTSize:
    """The description of a trunk. Raises ``UserError`` for an unknown name or field."""
    if isinstance(size, ViTSize):
        return size
    if isinstance(size, Mapping):
        try:
            return ViTSize(**size)
        except TypeError as error:
            raise UserError(f"{dict(size)} does not describe a ViT: {error}") from None
    if size not in SIZES:
        raise UserError(f"unknown model size {size!r}; known sizes: {', '.join(SIZES)}, or give a ViTSize")
    return SIZES[size]


def alike(one: AnySize, other: AnySize) -> bool:
    """Whether two sizes have the same width, depth and MLP and, unless one is a mere name, the same attention heads,
    which a weights file may know better: MoCo v3's ViT-S has 12."""
    first, second = size_of(one), size_of(other)
    if isinstance(one, str) or isinstance(other, str):
        second = replace(second, heads=first.heads)
    return first.trunk == second.trunk


def heads_of_width(width: int) -> int | None:
    """Heads of the named size of that width; None where there is none."""
    return next((row.heads for row in SIZES.values() if row.width == width), None)


def trunk_of(
    size: AnySize,
    *,
    width: int | None = None,
    depth: int | None = None,
    heads: int | None = None,
    mlp_ratio: float | None = None,
) -> ViTSize:
    """A size with some of its numbers replaced; another width has the heads of the named size of that width.

    Raises ``UserError`` where a new width comes without heads and no named size has it.
    """
    row = size_of(size)
    if width not in (None, row.width) and heads is None:
        heads = heads_of_width(width or 0)
        if heads is None:
            raise UserError(f"no named size is {width} wide, so its attention heads are not known; give model.heads=N")
    return ViTSize(
        row.width if width is None else width,
        row.depth if depth is None else depth,
        row.heads if heads is None else heads,
        row.mlp_ratio if mlp_ratio is None else mlp_ratio,
        row.patch_size,
        row.norm_eps,
        row.activation,
    )
