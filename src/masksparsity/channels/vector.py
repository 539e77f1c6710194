"""Many small parameters as one vector: an operation on all of them is one."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import MaskSparsityError


class Vector:
    """Parameters of one device and dtype, side by side."""

    def __init__(self, tensors: Mapping[str, Tensor], masked: Mapping[str, Tensor]):
        self.names = list(tensors)
        self.tensors = list(tensors.values())
        self.sizes = [t.numel() for t in self.tensors]
        self.wide = [k for k, t in enumerate(self.tensors) if t.ndim != 1]
        self.masked = torch.cat([masked[n].expand_as(t).reshape(-1) for n, t in tensors.items()])
        """1 where driven to zero, 0 elsewhere."""
        self.values = torch.empty_like(self.masked)
        self.out = torch.empty_like(self.masked)
        """Where results go: `parts` are views of it, shaped like the parameters."""
        self.parts = self.split(self.out)
        self.runs: list[tuple[int, int]] = []
        """(elements, group of the optimizer) of neighbours in one group."""

    def gather(self) -> Tensor:
        """The parameters' values now, in memory that lasts: large allocations are slow. To be
        called without gradients."""
        dtype, device = self.values.dtype, self.values.device
        # Concatenation would round to the old dtype. (Asking every tensor's device would be slow.)
        if {t.dtype for t in self.tensors} != {dtype} or self.tensors[0].device != device:
            raise MaskSparsityError(
                f"{self.names[0]} or those beside it are no longer {dtype} on {device}, as when "
                "this penalty was made: make it after moving or converting the model"
            )
        flat = [*self.tensors]
        for k in self.wide:
            flat[k] = flat[k].reshape(-1)
        return torch.cat(flat, out=self.values)

    def split(self, vector: Tensor) -> list[Tensor]:
        parts = vector.split(self.sizes)
        return [part.view(t.shape) for part, t in zip(parts, self.tensors, strict=True)]

    def times(self, vector: Tensor, optimizer: Optimizer, factor: Callable[[dict], Any]) -> Tensor:
        """Each element times a factor of the optimizer's group that it belongs to."""
        factors = [factor(optimizer.param_groups[group]) for _, group in self.runs]
        if len(factors) == 1:
            return vector * factors[0]
        parts = vector.split([length for length, _ in self.runs])
        return torch.cat([part * factor for part, factor in zip(parts, factors, strict=True)])
