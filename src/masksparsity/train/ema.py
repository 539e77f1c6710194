"""An average of a network over the steps of its training, to end with in the network's place."""

import torch
from torch import nn

from masksparsity.channels.penalty import Penalty
from masksparsity.tracing.copies import duplicate
from masksparsity.tracing.network import named_tensors


class Ema:
    """The exponential moving average of a network's weights and statistics, in a copy of it.

    Args:
        decay: what stays of the average at each step; the rest is the weights as they are then.
        penalty: what it drives to zero is copied: an average would never get there.
    """

    def __init__(self, model: nn.Module, decay: float, penalty: Penalty | None = None) -> None:
        masked = penalty.masked if penalty is not None and penalty.reaches_zero else {}
        self.network = duplicate(model)
        own, now = dict(named_tensors(self.network)), dict(named_tensors(model))
        names = [name for name, x in now.items() if x.is_floating_point()]
        self.averages, self.now = [own[n] for n in names], [now[n] for n in names]
        self.shares = [masked.get(n, now[n].new_zeros(())).clamp(min=1 - decay) for n in names]
        self.counts = [(own[n], now[n]) for n in now.keys() - names]

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights of now in."""
        torch._foreach_lerp_(self.averages, self.now, self.shares)
        for mine, theirs in self.counts:
            mine.copy_(theirs)
