"""Precise BatchNorm statistics: measured over given batches instead of remembered from training."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MaskSparsityError
from ..tracing.network import arguments
from ..tracing.state import in_mode


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Any]) -> int:
    """Set running means and variances to their plain average over `batches`, in place.

    A batch is a tensor of inputs, a dict of keyword inputs, or a sequence that begins with the
    inputs, as loaders give it; a tuple in that place stands for several. Returns the number of
    batches. Other modules stay in eval mode meanwhile; modes are restored.
    A layer that sees its batch more than once in a forward counts each time. Where a forward or
    the loader fails, the statistics are as they were.
    """
    norms = [
        m
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
    ]
    momenta = [norm.momentum for norm in norms]
    seen: Counter[Any] = Counter()

    def count_up(norm: Any, _: Any) -> None:
        seen[norm] += 1
        norm.momentum = 1 / seen[norm]

    # None says so, but may not to norms with a forward of their own.
    others = [n for n in norms if type(n).forward is not nn.modules.batchnorm._BatchNorm.forward]
    hooks = [norm.register_forward_pre_hook(count_up) for norm in others]
    before = [(b, b.clone()) for norm in norms for b in norm.buffers(recurse=False)]
    count = 0
    try:
        with in_mode(model.modules()):
            for batch in batches:
                if not count:  # not before there is something to measure
                    for norm in norms:
                        norm.reset_running_stats()
                        norm.momentum = None  # cumulative average
                        norm.training = True
                inputs = batch if isinstance(batch, (Tensor, Mapping)) else batch[0]
                # A list is one input: the images of a detector.
                args, kwargs = arguments((inputs,) if isinstance(inputs, list) else inputs)
                model(*args, **kwargs)
                count += 1
    except BaseException:
        for buffer, value in before:
            buffer.copy_(value)
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for hook in hooks:
            hook.remove()
    if not count:
        raise MaskSparsityError("recalibrate: no batches to measure on; nothing has changed")
    return count
