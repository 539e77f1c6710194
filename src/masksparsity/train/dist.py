"""One process or many: everything that knows about `torch.distributed`.

Under `torchrun` every process calls `start()` once; without it every function here is the
identity for a world of one.
"""

import os

import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from masksparsity.errors import MaskSparsityError


def start(device: str) -> torch.device:
    """Join the processes that `torchrun` started, if it did; return this process's device."""
    there = torch.cuda.is_available()
    if device == "cuda" and not there:
        raise MaskSparsityError("torch sees no GPU on this machine: use --device cpu")
    kind = ("cuda" if there else "cpu") if device == "auto" else device
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not td.is_initialized():
        td.init_process_group("nccl" if kind == "cuda" else "gloo")
    if kind == "cuda":
        kind = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(kind)
    return torch.device(kind)


def stop() -> None:
    """Leave the group, if there is one."""
    if td.is_initialized():
        td.destroy_process_group()


def rank() -> int:
    """This process's number; 0 is the one that writes and prints."""
    return td.get_rank() if td.is_initialized() else 0


def size() -> int:
    """How many processes work together."""
    return td.get_world_size() if td.is_initialized() else 1


def barrier() -> None:
    """Wait until every process is here."""
    if td.is_initialized():
        td.barrier()


def sum_(tensor: Tensor) -> Tensor:
    """Add `tensor` up over all processes, in place."""
    if td.is_initialized():
        td.all_reduce(tensor)
    return tensor


def wrap(model: nn.Module) -> nn.Module:
    """`model` with its gradients averaged over all processes."""
    if not td.is_initialized():
        return model
    device = next(model.parameters()).device
    return DistributedDataParallel(model, [device.index] if device.type == "cuda" else None)


def share_buffers(model: nn.Module) -> None:
    """Give every process the buffers of process 0, whose running statistics are the ones saved."""
    if td.is_initialized():
        for buffer in model.buffers():
            td.broadcast(buffer, 0)


def average_buffers(model: nn.Module) -> None:
    """Average running statistics that each process computed on its own images."""
    if td.is_initialized():
        for buffer in model.buffers():
            if buffer.is_floating_point():
                sum_(buffer).div_(size())
