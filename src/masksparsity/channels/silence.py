"""Groups that lose all of their channels: a whole residual branch may go.

torch refuses convolutions without channels, so layers that have lost all channels on one side fall
*silent*: they compute nothing, and say what they would say to zeros, their bias, in the shape that
is expected behind them. What lies between two silent layers sees one channel of zeros.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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


class Silent(nn.Module):
    """A layer without channels on one side, under the names and with the attributes that it had: it
    says to anything what it would say to zeros. No size or tensor comes to Python: graph tracers
    follow that."""

    weight: Tensor
    bias: Tensor | None

    def _say(self, zeros: Tensor, channels: int, dims: int = 0) -> Tensor:
        """The bias, in the shape of `zeros`, which have one channel before the last `dims` axes;
        these themselves if there are no `channels` to come out."""
        if not channels:
            return zeros.clone()
        said = self.weight.flatten(1).sum(1)  # zeros, but those of this layer's channels
        said = said if self.bias is None else said + self.bias
        return zeros + said.to(zeros.dtype).view(-1, *[1] * dims)


class SilentConvolution(Silent):
    """Of any dimension: [B, in, ...] to the shape that the convolution would give."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: str | tuple[int, ...]
    groups: int
    out_channels: int
    extra_repr = nn.Conv2d.extra_repr  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        dims = len(self.kernel_size)
        spans = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        if self.padding == "same":
            grown = [0] * dims
        else:
            padding = (0,) * dims if isinstance(self.padding, str) else self.padding
            grown = [2 * p - span for p, span in zip(padding, spans, strict=True)]
        zeros = F.pad(_zeros_like(x, -dims - 1), [n for m in grown[::-1] for n in (0, m)])
        steps: list[Any] = [slice(None, None, s) for s in self.stride]
        return self._say(zeros[(..., *steps)], self.out_channels, dims)


class SilentLinear(Silent):
    """[..., in] to [..., out]."""

    out_features: int
    extra_repr = nn.Linear.extra_repr  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self._say(_zeros_like(x, -1), self.out_features)


class SilentNorm(Silent):
    """It gives back what it is given: one channel of zeros, or what nobody hears."""

    extra_repr = nn.BatchNorm2d.extra_repr  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return x


def _zeros_like(x: Tensor, axis: int) -> Tensor:
    """With one channel."""
    return x.new_zeros(1).expand_as(x).narrow(axis, 0, 1)


_FALLS: Mapping[type | None, type[Silent]] = {
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), SilentConvolution),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), SilentNorm),
    nn.Linear: SilentLinear,
}
_SILENT = frozenset({*_FALLS, *_FALLS.values()})
"""Module types that may be without channels."""


def silence(layer: Any) -> None:
    """Let `layer` say its bias only, if it has lost all channels on one side. It becomes another
    class, since what scripts, converts, quantises or copies layers knows them by theirs."""
    own = type(layer) not in _FALLS or "forward" in vars(layer)  # says something else
    tensor = getattr(layer, "running_mean", None) if layer.weight is None else layer.weight
    if tensor is not None and 0 in tensor.shape and not own:
        layer.__class__ = _FALLS[type(layer)]


def silent_modules(model: nn.Module) -> set[str]:
    """Names of the layers that have fallen silent."""
    return {name for name, module in model.named_modules() if isinstance(module, Silent)}
