"""How much memory a training step takes, found without taking it.

Counted: parameters, gradients and AdamW's moments; every storage that the forward pass keeps for the backward pass; and
two gradients of the largest of these, which the backward pass holds at once. Attention counts as the fused kernels
work, without an N x N matrix. What a GPU's libraries and kernels take besides is not in it.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mae_core.models import block
from mae_core.models.distillation import AttentionDistillation
from mae_core.models.timm_trunk import checkpoint_blocks

GIB = 2**30
BYTES_PER_PARAMETER = {"parameters": 4, "gradients": 4, "AdamW's two moments": 8}
SYSTEM_MEMORY = Path("/proc/meminfo")
CONTAINER = Path("/sys/fs/cgroup")
"""Where a container's limit on memory stands, in ``LIMITS`` of either version of cgroups."""
LIMITS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


class StepMemory(NamedTuple):
    """Bytes: what does not depend on the images, what is kept for the backward pass, the largest storage of it."""

    fixed: int
    kept: int
    largest: int

    @property
    def peak(self) -> int:
        """At the start of the backward pass, when all is there."""
        return self.fixed + self.kept + 2 * self.largest


def fixed_bytes(model: nn.Module) -> int:
    """Parameters with their gradients and moments, and frozen tensors, a teacher's too."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    teachers = [module.teacher for module in model.modules() if isinstance(module, AttentionDistillation)]
    tensors = [tensor for part in (model, *teachers) for tensor in (*part.parameters(), *part.buffers())]
    frozen = sum(t.numel() * t.element_size() for t in tensors if not t.requires_grad)
    return trained * sum(BYTES_PER_PARAMETER.values()) + frozen


def kept_storages(forward: Callable[[], Tensor], model: nn.Module) -> list[int]:
    """Bytes of each storage that a forward pass keeps for its backward pass, without those of ``model``."""
    own = {id(tensor.untyped_storage()) for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Any] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[id(storage)] = storage  # held, so that no other gets its id
        return tensor

    def noted(function: Callable[[Tensor], Tensor], x: Tensor, **options: Any) -> Any:
        note(x)  # a checkpointed block keeps its input, which is no saved tensor
        return checkpoint(function, x, **options)

    checkpoint = block.checkpoint
    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with patch.object(block, "checkpoint", noted), hooks:
        forward()
    return [storage.nbytes() for number, storage in kept.items() if number not in own]


def kept_per_image(loss: Callable[[int], Tensor], model: nn.Module) -> int:
    """Bytes that an image adds to what is kept for the backward pass, and to what that computes again at once.

    The difference of two batches leaves out what is kept once: parameters, and their copies in lower precision.
    """

    def kept() -> int:
        return sum(kept_storages(lambda: loss(2), model)) - sum(kept_storages(lambda: loss(1), model))

    found = kept()
    again = [module for module in model.modules() if getattr(module, "checkpointing", False)]
    if again:  # one block at a time has all of its own
        checkpoint_blocks(model, on=False)
        found += (kept() - found) // len(again)
        checkpoint_blocks(model)
    return found


def step_memory(model: nn.Module, loss: Callable[[], Tensor], precision: torch.dtype) -> StepMemory:
    """Of a training step in ``precision``: ``loss()`` makes its inputs and calls ``model``.

    Both run on torch's meta device, where tensors have shapes and no values: ``model`` stays there.
    """
    fixed = fixed_bytes(model)
    model.to("meta")
    lower = nullcontext() if precision == torch.float32 else _LowerPrecision(precision)
    with torch.device("meta"), patch.object(F, "scaled_dot_product_attention", _fused_attention), lower:
        kept = kept_storages(loss, model)
    return StepMemory(fixed, sum(kept), max(kept, default=0))


class _LowerPrecision(TorchFunctionMode):
    """Autocast for the meta device, which has none: products in a lower precision, parameters cast once."""

    PRODUCTS = (F.linear, F.conv2d, F.conv_transpose2d, torch.matmul, Tensor.matmul, torch.bmm, torch.einsum)

    def __init__(self, precision: torch.dtype) -> None:
        super().__init__()
        self.precision = precision
        self.casts: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func``, a product with its float32 tensors cast."""
        kwargs = kwargs or {}
        if func in self.PRODUCTS:
            args = [self._cast(value) for value in args]
            kwargs = {name: self._cast(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)

    def _cast(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if not isinstance(value, nn.Parameter):
            return value.to(self.precision)
        if id(value) not in self.casts:
            self.casts[id(value)] = value.to(self.precision)
        return self.casts[id(value)]


class _FusedAttention(torch.autograd.Function):
    """The memory of fused attention: it keeps its inputs, its output and one number a query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        attended = query.new_empty(*query.shape[:-1], value.shape[-1])
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, attended, sums, *(() if bias is None else (bias,)))
        return attended

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        query, key, value, _, _, *bias = ctx.saved_tensors
        return (*(torch.empty_like(x) for x in (query, key, value, *bias)), *([] if bias else [None]))


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
    attended: Tensor = _FusedAttention.apply(query, key, value, attn_mask)
    return attended


def memory_held() -> int:
    """Bytes that were held at most so far: of its GPU by torch, and without one of the machine by the process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def available_memory(device: torch.device) -> int:
    """Bytes that are free on the device; of a CPU, no more than the process's container may still take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(_free_of_the_system(), *(_free_of_a_container(*files) for files in LIMITS))


def _free_of_the_system() -> int:
    try:  # what the system can give: pages that only cache files are not among the free ones
        return _numbers(SYSTEM_MEMORY)["MemAvailable"] * 1024
    except (OSError, ValueError, KeyError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 2**63


def _free_of_a_container(limit: str, used: str, details: str, caches: str) -> int:
    """Of its limit; without one, as good as endless."""
    try:
        most, taken = (int((CONTAINER / name).read_text(encoding="ascii")) for name in (limit, used))
        return max(0, most - taken + _numbers(CONTAINER / details).get(caches, 0))
    except (OSError, ValueError):  # "max", or no such file
        return 2**63


def _numbers(file: Path) -> dict[str, int]:
    """Name -> number, of lines such as "MemAvailable:  7000 kB"."""
    lines = [line.replace(":", " ").split() for line in file.read_text(encoding="ascii").splitlines()]
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdecimal()}
