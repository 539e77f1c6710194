"""Which slices of which tensors live and die together."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from ..errors import MaskSparsityError
from ..tracing.labels import Cut, Norm, Reason, Record, Slot
from ..tracing.network import named_tensors, unwrap
from ..tracing.tracer import Rule
from . import constraints as limits
from .cost import Cost, Counter, Layer
from .silence import Branches


class Kept(Protocol):
    """The part of `KeepMask` that graphs need; it knows graphs itself."""

    graph: "ChannelGraph"

    @property
    def kept(self) -> Tensor:
        """int64 [groups]: how many units each group keeps."""


@dataclass(frozen=True)
class Slice:
    """The part of one axis of one tensor that belongs to a group."""

    tensor: str
    axis: int
    index: Tensor
    """int64 [size, k]: the k positions along the axis that each unit of the group owns."""


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """`size` units of one pattern, nearly always channels: each can go by itself, everywhere at
    once."""

    name: str
    size: int
    start: int
    """Number of the group's first unit in the whole graph."""
    reason: Reason | None
    scales: tuple[str, ...]
    """Names of the BatchNorm modules whose scales are (partly) this group's."""
    slots: Mapping[Slot, Tensor] = field(repr=False)

    @cached_property
    def slices(self) -> tuple[Slice, ...]:
        """The parts of tensors that go with the group's channels."""
        found = []
        for (tensor, axis), units in self.slots.items():
            position = (
                ((units >= self.start) & (units < self.start + self.size)).nonzero().squeeze(1)
            )
            if len(position):
                position = position[torch.argsort(units[position], stable=True)]
                found.append(Slice(tensor, axis, position.view(self.size, -1)))
        return tuple(found)

    @property
    def prunable(self) -> bool:
        """Whether its channels may be removed. If not, `reason` says why."""
        return self.reason is None

    @cached_property
    def width(self) -> int:
        """How many channels of a layer one unit is of: several where a GroupNorm or a grouped
        convolution lets only all of them go."""
        return min((s.index.shape[1] for s in self.slices), default=1)

    def __repr__(self) -> str:
        what = "" if self.prunable else f"  protected: {self.reason}"
        units = f"channels in units of {self.width}" if self.width > 1 else "channels"
        return f"{self.name}: {self.size * self.width} {units} in {len(self.slices)} tensors{what}"


@dataclass(frozen=True, eq=False, repr=False)
class ChannelGraph:
    """The coupled channels of a network, as `trace` found them. `print` it for a report."""

    groups: tuple[ChannelGroup, ...]
    slots: Mapping[Slot, Tensor]
    """(tensor, axis) -> int64 unit of every index, -1 where it belongs to none."""
    norms: tuple[Norm, ...]
    producers: frozenset[Slot]
    """Axes along which a channel is made: zero there, and it is zero."""
    exposed: frozenset[Slot]
    """All that has to be zero for removal to change nothing: producers that something other than a
    norm reads, and consumers of channels that are not zero with their producers."""
    consumers: frozenset[Slot]
    """Axes that a convolution or matrix product sums over."""
    behind: Mapping[str, str]
    """Weight -> running mean of the norm that alone reads what it makes."""
    swallowed: Tensor
    """int64: units that something without weights of its own sums over."""
    constraints: tuple[limits.Equal, ...]
    """Pieces that must keep equal counts."""
    cuts: tuple[Cut, ...]
    """Where code takes axes apart, in units."""
    training: int
    """How many times it was traced in train mode as well, for what is done there only."""
    doubled: bool
    """There, on two examples instead of one."""
    records: tuple[Record, ...]
    """In labels: several may be of one unit, and their order matters."""
    labels: Mapping[Slot, Tensor]
    """(tensor, axis) -> int64 label of every index."""
    unit_of: Tensor
    """int64, one per label: its unit, -1 where it belongs to none."""
    layers: tuple[Layer, ...]
    modules: Mapping[str, type]
    shapes: Mapping[str, torch.Size]
    parameters: frozenset[str]
    unused: tuple[str, ...]
    """Parameters that no operation used on the example inputs: they keep their shape."""
    example: tuple[tuple, dict]
    depthwise: frozenset[str]
    made_up: bool
    """It was traced without computing convolutions, no value having mattered."""
    rules: Mapping[str, Rule]
    """Those of the caller, beside the table."""

    @cached_property
    def by_name(self) -> dict[str, ChannelGroup]:
        """The groups under their names, in their order."""
        return {group.name: group for group in self.groups}

    @property
    def prunable(self) -> tuple[ChannelGroup, ...]:
        """The groups that masks may remove channels of."""
        return tuple(group for group in self.groups if group.prunable)

    @property
    def protected(self) -> tuple[ChannelGroup, ...]:
        """The groups that stay whole; each has its `reason`."""
        return tuple(group for group in self.groups if not group.prunable)

    @cached_property
    def counter(self) -> Counter:
        """Counts MACs and parameters; made at first use."""
        shapes = {name: self.shapes[name] for name in sorted(self.parameters)}
        return Counter([group.size for group in self.groups], self.layers, self.slots, shapes)

    @cached_property
    def branches(self) -> Branches:
        """Which groups may go altogether, found at first use."""
        reading = {record.module for record in self.records if record.ids}
        return Branches(
            self.counter,
            [group.prunable for group in self.groups],
            [self.modules.get(tensor.rpartition(".")[0]) for tensor, _ in self.slots],
            # A norm of nothing is zero, and something may be divided by it; nor has it pieces.
            [*(cut.whole.reshape(-1) for cut in self.cuts if cut.pieces), self.swallowed],
            [self.modules.get(layer.module) for layer in self.layers],
            [layer.module in reading for layer in self.layers],
        )

    @property
    def units(self) -> int:
        """How many channels all groups have together."""
        return sum(group.size for group in self.groups)

    def cost(self, keep: Kept | None = None) -> Cost:
        """MACs and parameters, dense or under a mask, without building the slim model."""
        if keep is None:
            return self.counter(self.counter.sizes)
        self.check_mask(keep)
        return self.counter(keep.kept)

    def check(self, model: nn.Module, keep: Kept | None = None) -> None:
        """Refuse a model of another shape than the traced one, naming the first difference, and a
        mask of another graph."""
        shapes = {name: tensor.shape for name, tensor in named_tensors(unwrap(model))}
        for name in {**self.shapes, **shapes}:
            if shapes.get(name) != self.shapes.get(name):
                raise MaskSparsityError(
                    f"this graph was traced from another model: {name} is "
                    f"{_shape(shapes.get(name))} here and {_shape(self.shapes.get(name))} there; "
                    "trace the model that you prune"
                )
        if keep is not None:
            self.check_mask(keep)

    def check_mask(self, keep: Kept) -> None:
        """Refuse what is no mask, and a mask of another graph."""
        if not hasattr(keep, "kept"):
            raise MaskSparsityError(
                f"expected a KeepMask, got a {type(keep).__name__}: KeepMask(graph, ...) makes one"
            )
        if keep.graph is not self:
            theirs, ours = ([(g.name, g.size) for g in x.groups] for x in (keep.graph, self))
            if theirs != ours:
                raise MaskSparsityError(
                    "this mask was made for another graph: its groups are others than those of "
                    "this one; make it, or load it, with this graph"
                )

    def __repr__(self) -> str:
        dense = self.cost()
        return (
            f"{len(self.prunable)} prunable groups with "
            f"{sum(g.size * g.width for g in self.prunable)} "
            f"channels, {len(self.protected)} protected; {dense.macs / 1e6:,.1f} M MACs, "
            f"{dense.params / 1e6:,.2f} M parameters"
        )

    def __str__(self) -> str:
        lines = [repr(self)]
        for group in self.groups:
            made = [f"{s.tensor}" for s in group.slices if (s.tensor, s.axis) in self.producers]
            read = [f"{s.tensor}" for s in group.slices if (s.tensor, s.axis) in self.consumers]
            lines.append(repr(group))
            lines.append(f"    made by {_some(made)}; read by {_some(read)}")
        lines += [str(constraint) for constraint in self.constraints]
        if self.unused:
            lines.append(f"not used on these inputs: {_some([*self.unused])}")
        return "\n".join(lines)


def expect_graph(graph: object) -> None:
    """Refuse what is no graph, as where arguments come in another order."""
    if not isinstance(graph, ChannelGraph):
        raise MaskSparsityError(
            f"expected a ChannelGraph, as trace gives it, got a {type(graph).__name__}"
        )


def _some(names: list[str], most: int = 6) -> str:
    names = list(dict.fromkeys(n.removesuffix(".weight") for n in names if not n.endswith(".bias")))
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "nothing known"


def _shape(shape: torch.Size | None) -> str:
    return "absent" if shape is None else "x".join(map(str, shape)) or "a scalar"
