"""A ViT's forward pass on the tensors of any layout, with no library's model: what conversions are compared with. Its
names are stated here a second time on purpose, so that the tables of ``formats`` do not vouch for themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mae_core.errors import UserError
from mae_core.weights.features import Geometry, Tokens


@dataclass(frozen=True)
class Names:
    """How a family of files names what a forward pass needs; a block's names go behind ``blocks.<index>.``."""

    cls: str
    positions: str
    patches: str
    norm: str
    blocks: str
    qkv: tuple[str, ...]
    out: str
    norms: tuple[str, str]
    hidden: tuple[str, str]


OWN = Names(
    "cls_token", "pos_embed", "patch_embed.proj", "norm", "blocks", ("attn.qkv",), "attn.proj", ("norm1", "norm2"),
    ("mlp.fc1", "mlp.fc2"),
)  # fmt: skip
OPENMMLAB = Names(
    "cls_token", "pos_embed", "patch_embed.projection", "ln1", "layers", ("attn.qkv",), "attn.proj", ("ln1", "ln2"),
    ("ffn.layers.0.0", "ffn.layers.1"),
)  # fmt: skip
TRANSFORMERS_4 = Names(
    "embeddings.cls_token", "embeddings.position_embeddings", "embeddings.patch_embeddings.projection", "layernorm",
    "encoder.layer", tuple(f"attention.attention.{name}" for name in ("query", "key", "value")),
    "attention.output.dense", ("layernorm_before", "layernorm_after"), ("intermediate.dense", "output.dense"),
)  # fmt: skip
TRANSFORMERS_5 = Names(
    "embeddings.cls_token", "embeddings.position_embeddings", "embeddings.patch_embeddings.projection", "layernorm",
    "layers", tuple(f"attention.{name}_proj" for name in "qkv"), "attention.o_proj",
    ("layernorm_before", "layernorm_after"), ("mlp.fc1", "mlp.fc2"),
)  # fmt: skip


def names_in(state: Mapping[str, Tensor]) -> Names:
    """Which family's names the encoder in ``state`` (no prefix) has."""
    if "embeddings.patch_embeddings.projection.weight" in state:
        return TRANSFORMERS_4 if any(name.startswith("encoder.layer.") for name in state) else TRANSFORMERS_5
    return OPENMMLAB if "patch_embed.projection.weight" in state else OWN


class OwnReading:
    """A ViT's forward pass on the tensors of any layout: positions added to patches and cls token, pre-norm blocks,
    exact GELU, layer scale and BEiT's relative positions where there are any; ``cls=False`` leaves the cls token out,
    as ViTDet does."""

    def __init__(self, *, cls: bool = True) -> None:
        self.cls = cls

    def __call__(self, state: Mapping[str, Tensor], geometry: Geometry, images: Tensor) -> Tokens:
        """Tokens of ``images`` (B, C, H, W). Raises ``UserError`` for decomposed relative positions in use."""
        names = names_in(state)

        def layer(name: str) -> tuple[Tensor, Tensor]:
            return state[f"{name}.weight"].float(), state[f"{name}.bias"].float()

        x = F.conv2d(images, *layer(names.patches), stride=geometry.patch_size).flatten(2).transpose(1, 2)
        if names.positions in state:
            x = x + state[names.positions][:, 1:].float()
        if self.cls:
            cls = state[names.cls].float()
            if names.positions in state:
                cls = cls + state[names.positions][:, :1].float()
            x = torch.cat([cls.expand(len(x), -1, -1), x], dim=1)
        depth = 1 + max(
            int(n[len(names.blocks) + 1 :].split(".")[0]) for n in state if n.startswith(names.blocks + ".")
        )
        for index in range(depth):
            x = self._block(x, {n: t for n, t in _below(state, f"{names.blocks}.{index}.")}, names, geometry)
        normed = None
        if f"{names.norm}.weight" in state:
            normed = F.layer_norm(x, x.shape[-1:], *layer(names.norm), eps=geometry.norm_eps)
        return Tokens(x, normed, int(self.cls))

    def _block(self, x: Tensor, block: Mapping[str, Tensor], names: Names, geometry: Geometry) -> Tensor:
        if any(name.endswith(("rel_pos_h", "rel_pos_w")) and tensor.count_nonzero() for name, tensor in block.items()):
            raise UserError("--check cannot run detectron2's relative positions; convert without --check")
        B, N, D = x.shape

        def norm(values: Tensor, name: str) -> Tensor:
            weight, bias = block[f"{name}.weight"].float(), block[f"{name}.bias"].float()
            return F.layer_norm(values, (D,), weight, bias, geometry.norm_eps)

        def linear(values: Tensor, name: str) -> Tensor:
            return F.linear(values, block[f"{name}.weight"].float(), block[f"{name}.bias"].float())

        y = norm(x, names.norms[0])
        if len(names.qkv) == 3:
            query, key, value = (linear(y, name) for name in names.qkv)
        elif "attn.q_bias" in block:
            query, key, value = F.linear(y, block["attn.qkv.weight"].float()).chunk(3, dim=-1)
            query, value = query + block["attn.q_bias"], value + block["attn.v_bias"]
        else:
            query, key, value = linear(y, names.qkv[0]).chunk(3, dim=-1)
        query, key, value = (t.reshape(B, N, geometry.heads, -1).transpose(1, 2) for t in (query, key, value))
        table = block.get("attn.relative_position_bias_table")
        bias = None if table is None else relative_bias(table.float(), geometry, cls=self.cls)
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2).reshape(B, N, D)
        x = x + linear(y, names.out) * _scale(block, 1)
        y = F.gelu(linear(norm(x, names.norms[1]), names.hidden[0]))
        return x + linear(y, names.hidden[1]) * _scale(block, 2)


def _below(state: Mapping[str, Tensor], prefix: str) -> list[tuple[str, Tensor]]:
    return [(name[len(prefix) :], tensor) for name, tensor in state.items() if name.startswith(prefix)]


def _scale(block: Mapping[str, Tensor], number: int) -> Tensor | float:
    return block.get(f"gamma_{number}", block.get(f"ls{number}.gamma", 1.0))


def relative_bias(table: Tensor, geometry: Geometry, *, cls: bool = True) -> Tensor:
    """BEiT's table ((2h-1)*(2w-1) + 3, heads) -> what is added to the attention of a h x w grid, (heads, N, N)."""
    rows, cols = (side // geometry.patch_size for side in geometry.image_size)
    row, col = torch.arange(rows).repeat_interleave(cols), torch.arange(cols).repeat(rows)
    offset = (row[:, None] - row + rows - 1) * (2 * cols - 1) + (col[:, None] - col + cols - 1)
    length = rows * cols + 1
    index = torch.empty(length, length, dtype=torch.long)
    index[1:, 1:] = offset
    index[0, :], index[:, 0], index[0, 0] = len(table) - 3, len(table) - 2, len(table) - 1
    return table[index if cls else index[1:, 1:]].permute(2, 0, 1)
