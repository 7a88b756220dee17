"""How a library runs a file's encoder: what it is given, and the features that come back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from mae_core.models.sizes import ViTSize
from mae_core.weights.encoder_file import EncoderInfo


@dataclass(frozen=True)
class Geometry:
    """What the tensors alone do not tell of a ViT. ``config``: the config.json of the folder, which has the last word
    on heads, epsilon and activation."""

    image_size: tuple[int, int]
    patch_size: int
    in_chans: int
    heads: int
    norm_eps: float = ViTSize.norm_eps
    activation: str = ViTSize.activation
    config: Mapping[str, Any] | None = None

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return (self.image_size[0] // self.patch_size) * (self.image_size[1] // self.patch_size)

    @classmethod
    def of(cls, info: EncoderInfo, config: Mapping[str, Any] | None = None) -> Geometry:
        """Of a file's facts."""
        trunk, (height, width) = info.trunk, info.image_size
        sizes = (height, width), trunk.patch_size, int(info.in_chans or 0)
        return cls(*sizes, trunk.heads, trunk.norm_eps, trunk.activation, config)


class Tokens(NamedTuple):
    """(B, prefix + N, D) after the last block and, where there is one, after the final norm; prefix: cls tokens."""

    raw: Tensor
    normed: Tensor | None
    prefix: int


Runner = Callable[[Mapping[str, Tensor], Geometry, Tensor], Tokens]
