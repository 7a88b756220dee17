"""Fixed 2-D sine-cosine position embeddings (paper, A.1) and the one place that resizes position embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sincos_2d(width: int, rows: int, cols: int, *, prefix: int = 1) -> Tensor:
    """Position table (1, prefix + rows*cols, width) in float32; prefix (cls) rows are zero.

    Column first, as in the released MAE weights: ``[sin(x) | cos(x) | sin(y) | cos(y)]`` for a patch in column x and
    row y; positions are integers from 0, frequencies ``10000 ** (-k / (width/4))``. Raises ``ValueError`` unless 4
    divides width.
    """
    if width % 4:
        raise ValueError(f"a 2-D sine-cosine embedding needs a width divisible by 4, not {width}")
    omega = 1.0 / 10000.0 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))

    def one_axis(positions: Tensor) -> Tensor:
        angles = positions[:, None] * omega
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    y, x = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64), torch.arange(cols, dtype=torch.float64), indexing="ij"
    )
    table = torch.cat([one_axis(x.flatten()), one_axis(y.flatten())], dim=1).float()
    return torch.cat([torch.zeros(prefix, width), table])[None]


def resize_pos_embed(
    table: Tensor, old: tuple[int, int], new: tuple[int, int], *, prefix: int = 1, antialias: bool = False
) -> Tensor:
    """(1, prefix + old rows*cols, D) -> (1, prefix + new rows*cols, D); bicubic, prefix rows kept as they are.

    ``antialias=False`` is the convention of the official MAE, detectron2 and mmseg code; timm resizes with ``True``.
    A grid of another shape with as many cells (14x14 and 7x28) is resized, not passed through.
    """
    rows, cols = old
    if table.shape[1] != prefix + rows * cols:
        raise ValueError(f"a {rows}x{cols} grid needs {prefix + rows * cols} positions, the table has {table.shape[1]}")
    if tuple(old) == tuple(new):
        return table
    head, body = table[:, :prefix], table[:, prefix:]
    body = body.float().transpose(1, 2).unflatten(2, (rows, cols))
    body = F.interpolate(body, size=tuple(new), mode="bicubic", align_corners=False, antialias=antialias)
    return torch.cat([head, body.flatten(2).transpose(1, 2).to(head.dtype)], dim=1)
