"""Convolutions that give ones, in no time, where values do not matter."""

import functools
import operator
from itertools import accumulate

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
    if (
        transposed
        or any(t.dtype != x.dtype or t.device != x.device for t in (weight, bias) if t is not None)
        or (bias is not None and bias.shape != weight.shape[:1])
        or x.stride() != _in_order(x.shape)
        or weight.stride() != _in_order(weight.shape)
    ):
        return None
    how = tuple(stride), tuple(padding), tuple(dilation)
    size = _size(x.shape, weight.shape, *how, groups)
    return None if size is None else x.new_ones(size)


@functools.lru_cache(1024)  # layers are much alike
def _size(
    x: torch.Size,
    weight: torch.Size,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> tuple[int, ...] | None:
    """The result's, of plain arguments."""
    if (
        len(weight) != len(x)
        or x[1] != weight[1] * groups
        or weight[0] % groups
        or not len(stride) == len(padding) == len(dilation) == len(x) - 2
        or min(*stride, *dilation) < 1
        or min(padding) < 0
    ):
        return None
    room = [
        n + 2 * p - d * (k - 1) - 1
        for n, p, d, k in zip(x[2:], padding, dilation, weight[2:], strict=True)
    ]
    if min(room) < 0:
        return None
    return x[0], weight[0], *[r // s + 1 for r, s in zip(room, stride, strict=True)]


@functools.lru_cache(1024)
def _in_order(shape: torch.Size) -> tuple[int, ...]:
    """The strides of what is contiguous, and in no other memory format as well, as maps of one
    channel may be."""
    return tuple(accumulate(reversed(shape[1:]), operator.mul, initial=1))[::-1]
