"""How much memory a training step of a detector takes, found without taking it.

The step is traced with tensors that have shapes and no values; every storage that comes to life and goes again is
counted. Attention counts as the fused kernels work, without an N x N matrix. What chooses among boxes (suppression,
sampling) is left out, it is small; the heads run on as many regions as the configuration samples.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

MOMENTS = 2
"""Of AdamW, each as large as the parameters."""
BYTES = 4
"""Of a float32 number: parameters, gradients and moments."""
GIB = 2**30


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` and count what it made."""
        made = func(*args, **(kwargs or {}))
        for value in tree_flatten(made)[0]:
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return made

    def _count(self, storage: Any) -> None:
        key = id(storage)
        if key in self._seen and self._seen[key]() is storage:
            return
        size = storage.nbytes()

        def gone(_: Any) -> None:
            self.now -= size
            self._seen.pop(key, None)

        self._seen[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


class _Fused(torch.autograd.Function):
    """The memory of fused attention: keeps its inputs, its output and one number a query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        attended = query.new_empty(*query.shape[:-1], value.shape[-1])
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, attended, sums)
        ctx.mask_like = None if mask is None or not mask.requires_grad else mask
        return attended

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        query, key, value, _, _ = ctx.saved_tensors
        of_mask = None if ctx.mask_like is None else torch.empty_like(ctx.mask_like)
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), of_mask


def _fused(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
    return _Fused.apply(query, key, value, attn_mask)


def peak_of_step(model: nn.Module, loss: Callable[[], Tensor], precision: torch.dtype) -> int:
    """Most bytes alive in a training step, parameters with gradients and AdamW's moments included.

    ``loss()`` makes its inputs and calls ``model``, whose tensors are replaced by ones without values: it is of no use
    afterwards.
    """
    mode = FakeTensorMode()
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    model._apply(mode.from_tensor)
    live = LiveBytes()
    with mode, live, patch.object(F, "scaled_dot_product_attention", _fused):
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            total = loss()
        total.backward()
    every = [*model.parameters(), *model.buffers()]
    return live.peak + sum(t.numel() * t.element_size() for t in every) + numbers * BYTES * MOMENTS
