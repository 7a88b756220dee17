"""The ViT sizes, one row each; every other number of a size is derived from its row."""

from __future__ import annotations

from dataclasses import dataclass

from mae_core.errors import UserError


@dataclass(frozen=True)
class ViTSize:
    """Shape of a ViT trunk; ``patch_size`` is the published one and may be overridden."""

    width: int
    depth: int
    heads: int
    patch_size: int = 16

    @property
    def quarter_taps(self) -> tuple[int, int, int, int]:
        """Last block of each quarter of the trunk, 0-based: what a four-stage pyramid reads."""
        return tuple(self.depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4))  # type: ignore[return-value]


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


def size_of(name: str) -> ViTSize:
    """The row of a size. Raises ``UserError`` for an unknown name."""
    if name not in SIZES:
        raise UserError(f"unknown model size {name!r}; known sizes: {', '.join(SIZES)}")
    return SIZES[name]
