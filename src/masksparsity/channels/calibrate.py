"""Precise BatchNorm statistics: measured over given batches instead of remembered from training."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ..errors import MaskSparsityError


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Tensor | Sequence[Tensor]]) -> int:
    """Set running means and variances to their plain average over `batches`, in place.

    A batch is a tensor of inputs, or a sequence that begins with one, as loaders give it. Returns
    the number of batches. Other modules stay in eval mode meanwhile; modes are restored.
    A layer that sees its batch more than once in a forward counts each time.
    """
    norms = [
        m
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
    ]
    modes = [(m, m.training) for m in model.modules()]
    momenta = [norm.momentum for norm in norms]
    count = 0
    try:
        model.eval()
        for batch in batches:
            if not count:  # not before there is something to measure
                for norm in norms:
                    norm.reset_running_stats()
                    norm.momentum = None  # cumulative average
                    norm.training = True
            model(batch if isinstance(batch, Tensor) else batch[0])
            count += 1
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, training in modes:
            module.training = training
    if not count:
        raise MaskSparsityError("recalibrate: no batches to measure on; nothing has changed")
    return count
