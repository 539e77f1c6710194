"""Convolutions that give ones, in no time, where values do not matter."""

import torch
from torch import Tensor

CONVOLUTION = torch.ops.aten.convolution.default


def stand_in(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> Tensor | None:
    """Ones in place of a convolution's result, in no time; None for all but plain arguments, to be
    computed or refused."""
    axes = x.ndim - 2
    if (
        transposed
        or weight.ndim != x.ndim
        or x.shape[1] != weight.shape[1] * groups
        or weight.shape[0] % groups
        or not len(stride) == len(padding) == len(dilation) == axes
        or any(t.dtype != x.dtype or t.device != x.device for t in (weight, bias) if t is not None)
        or (bias is not None and bias.shape != weight.shape[:1])
        or min(*stride, *dilation) < 1
        or min(padding) < 0
        or not _in_order(x)
        or not _in_order(weight)
    ):
        return None
    room = [
        n + 2 * p - d * (k - 1) - 1
        for n, p, d, k in zip(x.shape[2:], padding, dilation, weight.shape[2:], strict=True)
    ]
    if min(room) < 0:
        return None
    return x.new_ones(
        x.shape[0], weight.shape[0], *[r // s + 1 for r, s in zip(room, stride, strict=True)]
    )


def _in_order(x: Tensor) -> bool:
    """Contiguous, and in no other memory format as well, as maps of one channel may be."""
    step = 1
    for n, stride in zip(reversed(x.shape), reversed(x.stride()), strict=True):
        if stride != step:
            return False
        step *= n
    return True
