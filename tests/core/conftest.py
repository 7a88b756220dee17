"""What the core tests share: random weights under the names of a released file."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


def official_state(
    width: int = 64,
    depth: int = 2,
    *,
    grid: tuple[int, int] = (2, 8),
    patch: int = 4,
    channels: int = 3,
    decoder: int | None = 32,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Random tensors under the names of a released file; ``decoder`` is the decoder's width, None leaves it out."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * (0.02 if len(shape) > 1 else 0.1)

    def block(name: str, D: int) -> dict[str, Tensor]:
        sizes = {"norm1": (D,), "attn.qkv": (3 * D, D), "attn.proj": (D, D), "norm2": (D,)}
        sizes |= {"mlp.fc1": (4 * D, D), "mlp.fc2": (D, 4 * D)}
        return {
            f"{name}.{part}.{leaf}": 1 + draw(*size)
            if len(size) == 1 and leaf == "weight"
            else draw(*size[: len(size) if leaf == "weight" else 1])
            for part, size in sizes.items()
            for leaf in ("weight", "bias")
        }

    positions = 1 + grid[0] * grid[1]
    state = {
        "cls_token": draw(1, 1, width),
        "pos_embed": draw(1, positions, width),
        "patch_embed.proj.weight": draw(width, channels, patch, patch),
        "patch_embed.proj.bias": draw(width),
    }
    for index in range(depth):
        state |= block(f"blocks.{index}", width)
    state |= {"norm.weight": 1 + draw(width), "norm.bias": draw(width)}
    if decoder is not None:
        state |= {
            "mask_token": draw(1, 1, decoder),
            "decoder_pos_embed": draw(1, positions, decoder),
            "decoder_embed.weight": draw(decoder, width),
            "decoder_embed.bias": draw(decoder),
            **block("decoder_blocks.0", decoder),
            "decoder_norm.weight": 1 + draw(decoder),
            "decoder_norm.bias": draw(decoder),
            "decoder_pred.weight": draw(patch * patch * channels, decoder),
            "decoder_pred.bias": draw(patch * patch * channels),
        }
    return state


@pytest.fixture(scope="session", name="official_state")
def official_state_fixture() -> Callable[..., dict[str, Tensor]]:
    """(width, depth, grid, patch, channels, decoder, seed) -> random tensors under the official names."""
    return official_state
