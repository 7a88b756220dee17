"""Who we are under ``torchrun`` or ``srun``; one process is a world of one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mae_core.errors import UserError
from mae_core.training.slurm import adopt_step
from mae_core.weights.files import tensors_below

Value = TypeVar("Value")


class Place(NamedTuple):
    """This process among the ranks, and its device."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0


def world_size() -> int:
    """How many ranks the launcher announces; known before they join."""
    return _announced("WORLD_SIZE", 1)


def announced_rank() -> int:
    """Which rank the launcher announces that this process is; known before they join."""
    return _announced("RANK", 0)


def _announced(name: str, alone: int) -> int:
    """What ``torchrun`` has put into the environment, or ``srun`` in words of its own; ``alone`` where neither did."""
    adopt_step(os.environ)
    return int(os.environ.get(name, alone))


def check_device(device: str) -> None:
    """Raise ``UserError`` for another word than auto, cpu and cuda, and for cuda where there is none."""
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device={device} is not known; write auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda was asked for, but torch sees no GPU; use device=auto or device=cpu")


def device_of(device: str = "auto") -> torch.device:
    """The device that auto, cpu or cuda means for one process alone. Raises ``UserError`` as ``check_device``."""
    check_device(device)
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def join(device: str, timeout: float = 1800) -> Place:
    """Join the process group that the launcher announces (NCCL on GPUs, gloo on CPUs), or stay alone.

    ``device``: auto, cpu or cuda. ``timeout``: seconds that ranks wait for one another. Raises ``UserError`` for cuda
    where there is none.
    """
    on_gpu = device_of(device).type == "cuda"
    world = world_size()
    local = _announced("LOCAL_RANK", 0)
    if on_gpu:
        local %= torch.cuda.device_count()  # Slurm may show each process its own GPU alone
        torch.cuda.set_device(local)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(seconds=timeout))
    rank = dist.get_rank() if dist.is_initialized() else 0
    return Place(rank, world, torch.device("cuda", local) if on_gpu else torch.device("cpu"))


@contextmanager
def meet(backend: str, rank: int, world: int, place: str) -> Iterator[None]:
    """Inside, this process is ``rank`` of ``world`` that meet at ``place``, such as file:///a/name."""
    dist.init_process_group(backend, init_method=place, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    try:
        yield
    finally:
        dist.destroy_process_group()


def leave() -> None:
    """Leave the process group, if we are in one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of a tensor over all ranks, on every rank."""
    return sum_over_ranks(values) / dist.get_world_size() if dist.is_initialized() else values


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, on every rank."""
    if dist.is_initialized():
        values = values.clone()
        dist.all_reduce(values)
    return values


class OnItsWay:
    """Numbers that are copied to the host while the device goes on."""

    def __init__(self, values: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        self._values = values
        if values.device.type == "cuda":
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> list[float]:
        """The numbers, as soon as they are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        found: list[float] = self._values.tolist()
        return found


def share_buffers(model: nn.Module) -> None:
    """Give all ranks the buffers of rank 0, as DDP does before a step: after it, running statistics differ."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def refuse_unused(parallel: nn.Module) -> nn.Module:
    """``parallel``, a model under DDP, which raises ``UserError`` on all ranks in its first training pass, before any
    gradient, where parameters that should learn have no part in what it returns on some rank: DDP would wait for their
    gradients without end, or fail at the next step with numbers for names. Another model comes back as it is."""
    if not isinstance(parallel, DistributedDataParallel) or parallel.find_unused_parameters:
        return parallel

    def look(module: nn.Module, _: Any, output: Any) -> None:
        if not torch.is_grad_enabled() or not module.training:
            return
        watching.remove()
        names = sorted({name for names in gather(_without_gradient(parallel.module, output)) for name in names})
        if names:
            raise UserError(
                f"{len(names)} tensors of the model that should learn have no part in the loss, such as {names[0]}; "
                "several ranks would wait for their gradients: freeze them (requires_grad=False), leave that part out "
                "of the model, or train on one rank"
            )

    watching = parallel.register_forward_hook(look)
    return parallel


def _without_gradient(model: nn.Module, output: Any) -> list[str]:
    """Names of the parameters that learn and that no tensor in ``output`` depends on."""
    nodes = [tensor.grad_fn for tensor in tensors_below(output) if tensor.grad_fn is not None]
    seen, used = set(nodes), set()
    while nodes:
        node = nodes.pop()
        used.add(id(getattr(node, "variable", None)))
        new = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= new
        nodes += new
    return [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in used]


def on_main(work: Callable[[], object], *, is_main: bool) -> None:
    """Do ``work`` on rank 0 while the others wait; a ``UserError`` of it is raised on all ranks, which must all call
    it."""
    problem = ""
    if is_main:
        try:
            work()
        except UserError as error:
            problem = str(error)
    for found in gather(problem):
        if found:
            raise UserError(found)


def gather(value: Value) -> list[Value]:
    """The values of all ranks, in their order, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Value] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
