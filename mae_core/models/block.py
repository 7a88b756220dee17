"""The transformer block of encoder and decoder, and the attention that dense trunks share with it.

The parameters are those of timm's block; here is only how they are applied.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import timm.models.vision_transformer as timm_vit
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LONGEST_AS_PRODUCTS: dict[tuple[str, torch.dtype], tuple[int, int]] = {
    ("cpu", torch.bfloat16): (256, 1280),
    ("cpu", torch.float32): (0, 1280),
}
"""By device type and dtype, the longest sequence whose attention is computed as batched products: plain attention, and
attention with biases or with values that are narrower than the keys. No row: none.

On a CPU with AVX-512 BF16, products take 0.5 to 0.7 of the time of ``scaled_dot_product_attention`` at 37 to 197 tokens
in bfloat16, backward included; for biases that learn, torch's own way computes in float32 there. In float32 plain
products take 0.8 to 2.3 times as long; with a table of biases 0.9 to 1.2 times, and with decomposed positions, whose
entries would pad queries, keys and values alike, 0.6 to 0.75 times (AVX2, 196 and 1024 tokens). GPUs have flash
attention.
"""
MULTIPLE = 8
"""What fused kernels want the size of a head to be a multiple of."""

_device_type: str | None = None  # a plain global: torch.compile of torch 2.11 cannot look into a ContextVar


@contextmanager
def kernels_as_on(device_type: str) -> Iterator[None]:
    """Attend as on a device of this type, on whatever device: for estimates of memory that are made on the CPU."""
    global _device_type
    before, _device_type = _device_type, device_type
    try:
        yield
    finally:
        _device_type = before


def as_products(query: Tensor, key: Tensor, *, special: bool) -> bool:
    """Whether the attention of (B, heads, M, d) and (B, heads, N, d) is computed as batched products here; ``special``
    as in ``LONGEST_AS_PRODUCTS``."""
    plain, other = LONGEST_AS_PRODUCTS.get((_device_type or query.device.type, query.dtype), (0, 0))
    return max(query.shape[2], key.shape[2]) <= (other if special else plain)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, scale: float | None = None) -> Tensor:
    """softmax(scale * query key^T + bias) value, by the kernel that suits device, dtype and length.

    query (B, heads, M, d), key (B, heads, N, d), value (B, heads, N, e <= d) -> (B, heads, M, e); ``bias`` broadcasts
    to (B, heads, M, N); ``scale`` is d^-0.5 when None.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    width = value.shape[-1]
    if as_products(query, key, special=bias is not None or width != query.shape[-1]):
        return products(query, key, value, *(() if bias is None else (bias,)), scale=scale)
    if width != query.shape[-1]:
        room = -query.shape[-1] % MULTIPLE
        query, key = F.pad(query, (0, room)), F.pad(key, (0, room))
        value = F.pad(value, (0, query.shape[-1] - width))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)[..., :width]


def products(
    query: Tensor, key: Tensor, value: Tensor, *biases: Tensor, scale: float, grid: tuple[int, ...] = (-1,)
) -> Tensor:
    """``attend`` as batched products, with any number of biases, each of which broadcasts to (B, heads, M, *grid);
    ``grid`` is that of the N keys: all of them, or rows and cols."""
    attended: Tensor = AttentionProducts.apply(query, key, value, scale, grid, *biases)
    return attended


class AttentionProducts(torch.autograd.Function):
    """Attention that keeps its probabilities for the backward pass: cheap at short lengths, faster than new ones."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, grid: tuple[int, ...], *biases: Tensor
    ) -> Tensor:
        """As ``products``, in the dtype of ``query``."""
        scaled = query * scale
        logits = scaled @ key.transpose(-2, -1)
        for bias in biases:
            logits.unflatten(-1, grid).add_(bias)
        probabilities = logits.softmax(dim=-1, dtype=query.dtype)
        ctx.save_for_backward(scaled, key, value, probabilities)
        ctx.scale, ctx.grid, ctx.bias_shapes = scale, grid, [bias.shape for bias in biases]
        return probabilities @ value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Of the attended (B, heads, M, e) -> of query, key, value and biases."""
        scaled, key, value, probabilities = ctx.saved_tensors
        (gradient,) = gradients
        of_value = probabilities.transpose(-2, -1) @ gradient
        of_probabilities = gradient @ value.transpose(-2, -1)
        of_logits = torch._softmax_backward_data(of_probabilities, probabilities, -1, probabilities.dtype)
        on_grid, wanted = of_logits.unflatten(-1, ctx.grid), ctx.needs_input_grad[5:]
        of_biases = [on_grid.sum_to_size(s) if w else None for s, w in zip(ctx.bias_shapes, wanted, strict=True)]
        return of_logits @ (key * ctx.scale), of_logits.transpose(-2, -1) @ scaled, of_value, None, None, *of_biases


class Block(timm_vit.Block):
    """timm's block (pre-norm attention, then MLP), its attention through ``attend``.

    ``checkpointing``: keep the block's input alone and compute the rest again in the backward pass.
    """

    checkpointing = False

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        if attn_mask is not None or is_causal:
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        if self.checkpointing and torch.is_grad_enabled():
            again: Tensor = checkpoint(self._forward, x, use_reentrant=False)
            return again
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        query, key, value = self._split(self.attn.qkv(self.norm1(x)), 3)
        return self._finish(x, attend(query, key, value))

    def only_at(self, x: Tensor, ids: Tensor) -> Tensor:
        """(B, N, D), all of which are looked at, and ids (B, n) -> (B, n, D), the block's output at ``ids`` alone."""
        D = x.shape[2]
        places = ids[:, :, None].expand(-1, -1, D)
        normed, qkv = self.norm1(x), self.attn.qkv
        of_query, of_rest = (None, None) if qkv.bias is None else (qkv.bias[:D], qkv.bias[D:])
        (query,) = self._split(F.linear(normed.gather(1, places), qkv.weight[:D], of_query), 1)
        key, value = self._split(F.linear(normed, qkv.weight[D:], of_rest), 2)
        return self._finish(x.gather(1, places), attend(query, key, value))

    def attention_map(self, x: Tensor) -> Tensor:
        """(B, N, D) as the block takes it -> (B, heads, N, N): the shares with which each token looks at each, rows
        adding up to 1, in float32."""
        query, key, _ = self._split(self.attn.qkv(self.norm1(x)), 3)
        logits = (query * self.attn.scale) @ key.transpose(-2, -1)
        return logits.softmax(dim=-1, dtype=torch.float32)

    def _split(self, projected: Tensor, parts: int) -> tuple[Tensor, ...]:
        """(B, N, parts * D) -> ``parts`` of (B, heads, N, d)."""
        B, N, _ = projected.shape
        return projected.view(B, N, parts, self.attn.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)

    def _finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """The residual branches: x (B, n, D), attended (B, heads, n, d) -> (B, n, D)."""
        x = x + self.drop_path1(self.ls1(self.attn.proj(attended.transpose(1, 2).flatten(2))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def blocks_of(model: nn.Module) -> list[Block]:
    """All blocks of a model."""
    return [module for module in model.modules() if isinstance(module, Block)]
