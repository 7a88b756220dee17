"""``distributed=fsdp``: parameters, gradients and moments in shards, a block at a time (FSDP2); files hold them whole,
so that a run continues on any number of ranks, sharded or not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from mae_core.models.block import Block


def shard(model: nn.Module) -> None:
    """Shard ``model`` over all ranks, every transformer block by itself, in place; before its optimizer is made. All
    ranks must hold the same weights."""
    mesh = torch.distributed.device_mesh.init_device_mesh(
        next(model.parameters()).device.type, (torch.distributed.get_world_size(),)
    )
    for module in model.modules():
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh)
            register_fsdp_forward_method(module, "only_at")
    fully_shard(model, mesh=mesh)


def shard_if_asked(model: nn.Module, distributed: str) -> None:
    """``shard``, where ``distributed`` is "fsdp" and there are several ranks."""
    if distributed == "fsdp" and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        shard(model)


def is_sharded(model: nn.Module) -> bool:
    """Whether ``shard`` was called with it."""
    return isinstance(model, FSDPModule)


def whole(value: Any) -> Any:
    """``value``, a tensor or what holds tensors, with the shards of all ranks put together in the memory of rank 0, a
    tensor at a time; the others get None for what is in shards. All ranks must call it."""
    if isinstance(value, DTensor):
        full = value.full_tensor()
        return full.cpu() if torch.distributed.get_rank() == 0 else None
    if isinstance(value, Mapping):
        return {key: whole(inner) for key, inner in value.items()}
    return [whole(inner) for inner in value] if isinstance(value, list) else value


def load_model(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """``model.load_state_dict`` of whole tensors, of which every rank has all."""
    own = model.state_dict()
    model.load_state_dict({name: _like(own[name], value) for name, value in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """``optimizer.load_state_dict`` of whole moments, of which every rank has all."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries = {
        number: {name: _like(parameters[number], value) for name, value in entry.items()}
        for number, entry in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": entries})


def _like(own: Any, value: Any) -> Any:
    """``value`` in the shards of ``own``, where that is sharded and of the same shape."""
    if not isinstance(own, DTensor) or not isinstance(value, Tensor) or own.shape != value.shape:
        return value
    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Inside, every rank holds all parameters, so that one may compute what the others do not."""
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()
