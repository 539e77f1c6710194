"""KeepMask: which channels of a graph stay. True = stays, everywhere."""

from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import MaskSparsityError
from .constraints import repair
from .groups import ChannelGraph, expect_graph


class KeepMask(Mapping[str, Tensor]):
    """One bool per unit of every group of a graph; protected groups are always kept whole.

    Args:
        graph: what the mask is bound to.
        keep: group name -> bool [size], as a tensor, an array or a list. Groups that are not named
            are kept whole.

    Raises:
        MaskSparsityError: for a name or a size that is not in the graph, and for a mask that
            would remove protected channels.
    """

    # The heart knows no files: the package binds these two to `masksparsity.files.mask`.
    save: ClassVar[Callable]
    load: ClassVar[Callable]
    from_original: ClassVar[Callable]

    def __init__(self, graph: ChannelGraph, keep: Mapping[str, Tensor] | None = None):
        expect_graph(graph)
        self.graph = graph
        self.units = torch.ones(graph.units, dtype=torch.bool)
        self.origin: dict[str, object] = {}
        """How the mask was chosen (selector, budget, ...): kept in its file."""
        for name, values in (keep or {}).items():
            group = graph.by_name.get(name)
            if group is None:
                raise MaskSparsityError(
                    f"mask names {name!r}, which is no channel group of this model; "
                    "is it a mask of another model? print(graph) lists the groups"
                )
            values = torch.as_tensor(values)
            if values.dtype != torch.bool:
                raise MaskSparsityError(f"mask of {name}: expected bools, got {values.dtype}")
            if tuple(values.shape) != (group.size,):
                raise MaskSparsityError(
                    f"mask of {name}: expected {group.size} bools, got {tuple(values.shape)}; is "
                    "it a mask of another model?"
                )
            if not group.prunable and not values.all():
                raise MaskSparsityError(f"mask of {name}: protected, {group.reason}")
            self.units[group.start : group.start + group.size] = values

    def __getitem__(self, group: str) -> Tensor:
        """bool [size] of one group; a copy, since masks do not change."""
        found = self.graph.by_name[group]
        return self.units[found.start : found.start + found.size].clone()

    def __iter__(self) -> Iterator[str]:
        """Names of all groups, protected ones too."""
        return iter(self.graph.by_name)

    def __len__(self) -> int:
        return len(self.graph.by_name)

    @property
    def kept(self) -> Tensor:
        """int64 [groups]: how many units each group keeps."""
        ends = torch.tensor([0, *(g.start + g.size for g in self.graph.groups)])
        total = torch.cat([torch.zeros(1, dtype=torch.int64), self.units.long().cumsum(0)])
        return total[ends].diff()

    @property
    def pruned_fraction(self) -> float:
        """Share of the prunable units that go."""
        prunable = sum(group.size for group in self.graph.prunable)
        return float((~self.units).sum()) / max(1, prunable)

    def slot(self, tensor: str, axis: int) -> Tensor:
        """bool, one per index of an axis of a parameter or buffer: does it stay?"""
        units = self.graph.slots[tensor, axis]
        # -1, an index of no group, reads the one that is added.
        return torch.cat([self.units, self.units.new_ones(1)])[units]

    def by_norm(self) -> dict[str, Tensor]:
        """BatchNorm name -> bool [num_features]."""
        return {norm.module: self.slot(norm.weight, 0) for norm in self.graph.norms}

    @classmethod
    def from_norms(
        cls, graph: ChannelGraph, keep: Mapping[str, Tensor], tie: str = "vote"
    ) -> "KeepMask":
        """A mask from one bool per BatchNorm channel.

        Norms whose channels are coupled may disagree. `tie` settles it, group by group:

        - "vote": every norm votes for the channels it wants to remove; those with the most votes
          go, down to the largest number of votes that still removes at least as many channels as
          the most cautious norm asked for, and never all of them. The rule that the original's
          vote was meant to be.
        - "any": goes if one norm wants it; "all": goes if all norms of the group do.
        - "equal": disagreement is an error.

        Norms that are not named want everything to stay.
        """
        if tie not in _TIES:
            raise MaskSparsityError(f"tie={tie!r}: use one of {', '.join(_TIES)}")
        norms = {norm.module: norm for norm in graph.norms}
        keep = {name: torch.as_tensor(values) for name, values in keep.items()}
        for name, values in keep.items():
            if name not in norms:
                raise MaskSparsityError(
                    f"mask names {name!r}, which is no BatchNorm of this model; "
                    f"it has {', '.join(list(norms)[:4])}, ..."
                )
            if values.numel() != len(graph.slots[norms[name].weight, 0]):
                raise MaskSparsityError(
                    f"mask of {name}: {values.numel()} channels, the model has "
                    f"{len(graph.slots[norms[name].weight, 0])}; is it a mask of another model?"
                )
        chosen = {}
        for group in graph.prunable:
            span = slice(group.start, group.start + group.size)
            votes = torch.zeros(len(group.scales), graph.units + 1, dtype=torch.bool)
            for row, name in zip(votes, group.scales, strict=True):
                if name in keep:
                    row[graph.slots[norms[name].weight, 0]] = ~keep[name].flatten().bool()
            if group.scales:
                chosen[group.name] = ~_TIES[tie](votes[:, span], group.name)
        return cls(graph, chosen)

    def compose(self, later: "KeepMask") -> "KeepMask":
        """One mask of this graph for two prunings in a row: this one, and `later`, a mask of the
        graph that was traced from the slim model."""
        for name, stays in later.items():
            if name not in self.graph.by_name and not stays.all():
                raise MaskSparsityError(
                    f"the later mask prunes {name}, which is no channel group here; compose with a "
                    "mask of the slim model, traced as this one was"
                )
        units = self.units.clone()
        for group in self.graph.groups:
            kept = self[group.name].nonzero().squeeze(1) + group.start
            again = later.graph.by_name.get(group.name)
            if again is None:  # a single channel left is no group any more
                continue
            if again.size != len(kept):
                raise MaskSparsityError(
                    f"{group.name}: {len(kept)} channels stay here, the later mask is of a model "
                    f"with {again.size}; compose with a mask of the slim model as it was pruned, "
                    "with no layer replaced"
                )
            units[kept] = later[group.name]
        return self._with(units)

    def repaired(self, scores: Mapping[str, Tensor] | None = None) -> "KeepMask":
        """The nearest mask that respects the graph's constraints: removed channels come back,
        those of the highest score first, where a piece has to be as long as others, and one of a
        group that the network cannot do without."""
        values = torch.zeros(self.graph.units, dtype=torch.float64)
        for group in self.graph.groups:
            if scores is not None and group.name in scores:
                values[group.start : group.start + group.size] = scores[group.name].double()
        mask = self._with(repair(self.graph.constraints, self.units.clone(), values))
        while (missed := self.graph.branches.missed(mask.kept)).any():
            for k in missed.nonzero().squeeze(1).tolist():
                group = self.graph.groups[k]
                span = slice(group.start, group.start + group.size)
                mask.units[group.start + int(values[span].argmax())] = True
            mask.units = repair(self.graph.constraints, mask.units, values)
        mask.origin = dict(self.origin)
        return mask

    def iou(self, other: "KeepMask") -> float:
        """Intersection over union of the pruned sets, counted per BatchNorm channel; per unit
        where no BatchNorm loses any."""
        self._same_graph(other)
        norms = zip(self.by_norm().values(), other.by_norm().values(), strict=True)
        for pairs in ([*norms], [(self.units, other.units)]):
            either = sum(int((~a | ~b).sum()) for a, b in pairs)
            if either:
                return sum(int((~a & ~b).sum()) for a, b in pairs) / either
        return 1.0

    def __and__(self, other: "KeepMask") -> "KeepMask":
        """Stays if it stays in both."""
        return self._with(self.units & self._same_graph(other).units)

    def __or__(self, other: "KeepMask") -> "KeepMask":
        """Stays if it stays in either."""
        return self._with(self.units | self._same_graph(other).units)

    def __invert__(self) -> "KeepMask":
        """The complement, in prunable groups."""
        units = ~self.units
        for group in self.graph.protected:
            units[group.start : group.start + group.size] = True
        return self._with(units)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, KeepMask)
            and list(self.graph.by_name) == list(other.graph.by_name)
            and torch.equal(self.units, other.units)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        dense, slim = self.graph.cost(), self.graph.cost(self)
        return (
            f"KeepMask({self.pruned_fraction:.1%} of the prunable channels go: "
            f"MACs -{1 - slim.macs / max(1, dense.macs):.2%}, "
            f"parameters -{1 - slim.params / max(1, dense.params):.2%})"
        )

    def _with(self, units: Tensor) -> "KeepMask":
        mask = KeepMask(self.graph)
        mask.units = units
        return mask

    def _same_graph(self, other: "KeepMask") -> "KeepMask":
        self.graph.check_mask(other)
        return other


def _vote(votes: Tensor, name: str) -> Tensor:
    """votes: bool [norms, size], True where a norm wants a channel to go -> bool [size]."""
    count, cautious = votes.sum(0), int(votes.sum(1).min())
    if cautious == 0:
        return torch.zeros_like(votes[0])
    gone = count >= count.sort(descending=True).values[cautious - 1]
    return count > count.min() if gone.all() else gone


def _equal(votes: Tensor, name: str) -> Tensor:
    if (votes != votes[:1]).any():
        raise MaskSparsityError(f"the norms of {name} disagree; say how to settle it with tie=")
    return votes[0]


_TIES: dict[str, Callable[[Tensor, str], Tensor]] = {
    "vote": _vote,
    "any": lambda votes, name: votes.any(0),
    "all": lambda votes, name: votes.all(0),
    "equal": _equal,
}
