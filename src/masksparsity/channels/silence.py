"""Groups that lose all of their channels: a whole residual branch may go.

torch refuses convolutions without channels, so layers that have lost all channels on one side fall
*silent*: they compute nothing, and say what they would say to zeros, their bias, in the shape that
is expected behind them. What lies between two silent layers sees one channel of zeros.
"""

from collections.abc import Collection, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .cost import Counter


class Branches:
    """Which groups may go altogether, and which cannot or the network would fall apart."""

    def __init__(
        self,
        counter: Counter,
        prunable: Iterable[bool],
        modules: Iterable[type | None],
        pieces: Iterable[Tensor],
        layers: Iterable[type | None],
        reading: Collection[bool],
    ):
        """`prunable`: is each group? `modules`: of each labelled axis, the type of the module that
        owns it; `pieces`: units whose counts are constrained; `layers`: of each the type of the
        module that runs it; `reading`: does each layer read channels of a group?"""
        sides, axes, rows = (counter.matrix > 0).split(counter.parts)
        self.outputs, self.inputs = sides[0::2], sides[1::2]
        """bool [layers, groups + 1]; the last column is of channels of no group."""
        # A depthwise layer reads what is of its own group: it hands on, and makes nothing.
        self.makes = self.inputs[:, :-1].any(1) | ~torch.tensor(reading, dtype=torch.bool)
        foreign = torch.tensor([m not in _SILENT for m in modules], dtype=torch.bool)
        self.fixed = ~torch.tensor(list(prunable), dtype=torch.bool)
        """bool [groups]: those that keep at least one channel."""
        self.fixed |= axes[foreign].any(0)[:-1]
        foreign = torch.tensor([m not in _SILENT for m in layers], dtype=torch.bool)
        self.fixed |= sides[foreign.repeat_interleave(2)].any(0)[:-1]
        beside = counter.beside[foreign]
        self.fixed |= rows[beside[beside < len(rows)]].any(0)[:-1]
        self.fixed |= sides[sides.sum(1) > 1].any(0)[:-1]
        ends = counter.sizes.cumsum(0)
        for units in pieces:
            self.fixed[torch.bucketize(units[units >= 0], ends, right=True)] = True
        none = torch.zeros_like(self.fixed)
        self.sources = ~self._reached(torch.zeros_like(self.fixed), none)

    def _silent(self, empty: Tensor) -> Tensor:
        """bool [layers], given which groups are empty."""
        there = torch.cat([~empty, empty.new_ones(1)])
        return ~((self.inputs & there).any(1) & (self.outputs & there).any(1))

    def _reached(self, empty: Tensor, sources: Tensor) -> Tensor:
        """bool [groups]: what the network's inputs still get to."""
        makes = self.makes & ~self._silent(empty)
        reached = torch.cat([sources, sources.new_ones(1)])
        while True:
            more = reached | self.outputs[makes & (self.inputs & reached).any(1)].any(0)
            if torch.equal(more, reached):
                return reached[:-1]
            reached = more

    def missed(self, kept: Tensor) -> Tensor:
        """bool [groups]: empty ones that need a channel. `kept`: how many each has."""
        empty = kept == 0
        if not empty.any():
            return empty
        cut_off = ~empty & ~self._reached(empty, self.sources)
        feeding = (self.outputs[:, :-1] & cut_off).any(1)
        return empty & (self.fixed | self.inputs[feeding].any(0)[:-1])

    def unheard(self, kept: Tensor) -> Tensor:
        """bool [groups]: those that may go since nothing but silent layers reads them."""
        empty = kept == 0
        heard = self.inputs[~self._silent(empty)].any(0)[:-1]
        return ~empty & ~heard & self.inputs.any(0)[:-1] & ~self.fixed


def silence(layer: Any) -> None:
    """Let `layer` say its bias only, if it has lost all channels on one side."""
    own = type(layer) not in _SILENT or "forward" in vars(layer)  # says something else
    tensor = getattr(layer, "running_mean", None) if layer.weight is None else layer.weight
    if tensor is not None and 0 in tensor.shape and not own:
        layer.forward = partial(_SILENT[type(layer)], layer)


def silent_modules(model: nn.Module) -> set[str]:
    """Names of the layers that have fallen silent."""
    return {
        name
        for name, module in model.named_modules()
        if getattr(vars(module).get("forward"), "func", None) in _SILENT.values()
    }


def _said(layer: Any, x: Tensor) -> Tensor:
    if not len(layer.weight):
        return x.new_zeros(1)
    said = layer.weight.flatten(1).sum(1)  # zeros, but those of this layer's channels
    return (said if layer.bias is None else said + layer.bias).to(x.dtype)


def _convolution(layer: Any, x: Tensor) -> Tensor:
    dims = layer.weight.ndim - 2
    if layer.padding == "same":
        sizes = list(x.shape[-dims:])
    else:
        padding = (0,) * dims if layer.padding == "valid" else layer.padding
        sizes = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(
                x.shape[-dims:], padding, layer.dilation, layer.kernel_size, layer.stride,
                strict=True,
            )
        ]  # fmt: skip
    said = _said(layer, x)[(..., *[None] * dims)]
    return said.expand(*x.shape[: -dims - 1], -1, *sizes).clone()


def _linear(layer: Any, x: Tensor) -> Tensor:
    return _said(layer, x).expand(*x.shape[:-1], -1).clone()


def _norm(layer: Any, x: Tensor) -> Tensor:
    return x


_SILENT: Mapping[type | None, Any] = {
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _convolution),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _norm),
    nn.Linear: _linear,
}
"""Module type -> its forward when it is silent."""
