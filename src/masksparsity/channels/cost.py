"""MACs and parameters under any mask, without building the slim model.

MACs are multiply-accumulates of convolutions and matrix products, per example; norms, pooling and
activations count nothing. Papers of this field print the same number as FLOPs. Parameters count
everything that is a parameter, norms included, but no buffers.
"""

import math
from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Cost(NamedTuple):
    """MACs per example, and parameters."""

    macs: int
    params: int


class Layer(NamedTuple):
    """A product of the dense network: `factor` times the lengths of all these MACs per example."""

    module: str
    factor: float
    outputs: Tensor
    """int64: unit of every output channel, -1 where none."""
    inputs: Tensor
    rows: tuple[Tensor, ...]


class Counter:
    """Lengths of all axes as linear functions of how many units each group keeps.

    All units of a group own the same axes equally often, so the number kept per group is all that
    cost depends on: one small matrix product per mask.
    """

    def __init__(
        self,
        sizes: Collection[int],
        layers: Collection[Layer],
        slots: Mapping[tuple[str, int], Tensor],
        shapes: Mapping[str, torch.Size],
    ):
        """`sizes` of the groups, `slots` of all labelled axes, `shapes` of all parameters."""
        self.sizes = torch.tensor(sizes, dtype=torch.float64)
        rows = [x for layer in layers for x in (layer.outputs, layer.inputs)] + list(slots.values())
        rows += [x for layer in layers for x in layer.rows]
        lengths = torch.tensor([len(r) for r in rows], dtype=torch.int64)
        row_of = torch.repeat_interleave(torch.arange(len(rows)), lengths)
        width = len(sizes) + 1  # the last column: indices of no group
        group_of = torch.repeat_interleave(torch.arange(width - 1), self.sizes.long())
        group_of = torch.cat([group_of, torch.tensor([width - 1])])
        column = group_of[torch.cat([torch.zeros(0, dtype=torch.int64), *rows])]
        owned = torch.bincount(row_of * width + column, minlength=len(rows) * width)
        self.matrix = owned.view(len(rows), width) / torch.cat([self.sizes, self.sizes.new_ones(1)])
        self.parts = [2 * len(layers), len(slots), len(rows) - 2 * len(layers) - len(slots)]
        """How many rows of it are the two sides of layers, axes, and the layers' own rows."""
        number = iter(range(self.parts[-1]))
        beside = [[next(number) for _ in layer.rows] for layer in layers]
        most, none = max(map(len, beside), default=0), self.parts[-1]
        padded = [[*row, *[none] * (most - len(row))] for row in beside]
        self.beside = torch.tensor(padded, dtype=torch.int64).view(len(layers), most)
        self.factor = torch.tensor([layer.factor for layer in layers], dtype=torch.float64)

        # Each parameter is a constant times the lengths of its (at most three) labelled axes.
        row = {slot: k for k, slot in enumerate(slots)}
        constants, factors = [], []
        for name, shape in shapes.items():
            labelled = [a for a in range(len(shape)) if (name, a) in row]
            constants.append(shape.numel() / max(1, math.prod(shape[a] for a in labelled)))
            factors.append(([row[name, a] for a in labelled] + [len(slots)] * 3)[:3])
        self.constants = torch.tensor(constants, dtype=torch.float64)
        self.factors = torch.tensor(factors, dtype=torch.int64).view(-1, 3)

    def macs_per_layer(self, kept: Tensor) -> Tensor:
        """float64 [layers], for `kept` units per group."""
        return self._count(kept)[0]

    def __call__(self, kept: Tensor) -> Cost:
        macs, params = self._count(kept)
        return Cost(round(float(macs.sum())), round(float(params)))

    def _count(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        one = torch.ones(1, dtype=torch.float64)
        sides, axes, rows = (self.matrix @ torch.cat([kept.double(), one])).split(self.parts)
        macs = self.factor * sides.view(-1, 2).prod(1)
        macs *= torch.cat([rows, one])[self.beside].prod(1)
        return macs, self.constants @ torch.cat([axes, one])[self.factors].prod(1)
