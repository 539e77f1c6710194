"""The units that a mask may remove, in order of their scores, within limits."""

import math
import operator
from collections.abc import Mapping
from difflib import get_close_matches
from typing import TypedDict

import torch
from torch import Tensor

from ..errors import MaskSparsityError
from .groups import ChannelGraph, ChannelGroup, expect_graph
from .mask import KeepMask
from .scores import Scores


class Limits(TypedDict, total=False):
    """Bounds of every choice."""

    min_keep: int
    """Units that every group keeps at least; 1 if not given. With 0 a whole branch may go, where
    a path around it is left."""
    round_to: int
    """Groups keep a multiple of this many, where they are long enough; 1 if not given."""
    ignore: tuple[str, ...]
    """Groups, or prefixes of names of layers, to leave whole."""
    max_pruned: float | Mapping[str, float]
    """Share of its units that a group may lose, in [0, 1]; or the shares of some, by name like
    `ignore`. Of several that fit a group the smallest counts."""


class Ranking:
    """The units that may go, and how many of each group really do."""

    def __init__(
        self,
        graph: ChannelGraph,
        scores: Scores,
        kept: KeepMask | None = None,
        /,
        *,
        min_keep: int = 1,
        round_to: int = 1,
        ignore: tuple[str, ...] = (),
        max_pruned: float | Mapping[str, float] = 1.0,
        **unknown: object,
    ):
        for name in unknown:
            raise MaskSparsityError(f"a selector takes no {name}{hint(name)}")
        expect_graph(graph)
        if graph.prunable and not scores:
            raise MaskSparsityError("no channel group has a score; scores.norm scores all filters")
        scores = {name: torch.as_tensor(values) for name, values in scores.items()}
        ignore = (ignore,) if isinstance(ignore, str) else tuple(ignore)
        try:
            min_keep, round_to = operator.index(min_keep), operator.index(round_to)
        except TypeError:
            raise MaskSparsityError(
                f"min_keep={min_keep}, round_to={round_to}: whole numbers"
            ) from None
        if min_keep < 0 or round_to < 1:
            raise MaskSparsityError("min_keep is at least 0, round_to at least 1")
        shares = dict(max_pruned) if isinstance(max_pruned, Mapping) else {"": max_pruned}
        shares |= dict.fromkeys(ignore, 0.0)
        for name in (*scores, *shares):
            known = graph.by_name if name in scores else _modules(graph)
            if name not in known:
                raise MaskSparsityError(
                    f"no layer or channel group named {name!r} in this model; "
                    "print(graph) lists the groups"
                )
        for name, share in shares.items():
            if isinstance(share, str) or not 0 <= share <= 1:
                raise MaskSparsityError(f"max_pruned of {name or 'all'} is {share}: not in [0, 1]")
        self.graph, self.round_to = graph, round_to
        self.groups = [g for g in graph.prunable if g.name in scores]
        self.least = {
            g.name: max(
                min(min_keep, g.size), g.size - math.floor(_share_of(g, graph, shares) * g.size)
            )
            for g in self.groups
        }
        self.groups = [g for g in self.groups if self.least[g.name] < g.size]
        for group in self.groups:
            values = scores[group.name]
            if tuple(values.shape) != (group.size,) or not values.isfinite().all():
                raise MaskSparsityError(
                    f"scores of {group.name}: expected {group.size} finite numbers"
                )
        self.scores = {g.name: scores[g.name].double() for g in self.groups}
        kept = KeepMask(graph) if kept is None else kept
        self.order = {name: _places(s, kept[name]) for name, s in self.scores.items()}
        lowest = torch.finfo(torch.float64).min
        self.scores = {n: s.masked_fill(~kept[n], lowest) for n, s in self.scores.items()}

    def keep(self, count: dict[str, int]) -> KeepMask:
        """The mask that leaves about `count[group]` of each group's best units."""
        kept = {}
        for group in self.groups:
            n = max(self.least[group.name], count[group.name])
            kept[group.name] = self.order[group.name] < min(
                group.size, math.ceil(n / self.round_to) * self.round_to
            )
        mask = KeepMask(self.graph, kept).repaired(self.scores)
        while back := [n for n, k in kept.items() if not k.any() and mask[n].any()]:
            kept |= {n: self.order[n] < self.round_to for n in back}
            mask = KeepMask(self.graph, kept).repaired(self.scores)
        while not mask.kept.all() and (unheard := self.graph.branches.unheard(mask.kept)).any():
            names = [self.graph.groups[k].name for k in unheard.nonzero().flatten().tolist()]
            useless = {name for name in names if self.least.get(name, 1) == 0}
            if not useless:
                break
            mask = KeepMask(self.graph, {n: v & (n not in useless) for n, v in mask.items()})
        return mask


def _places(scores: Tensor, kept: Tensor) -> Tensor:
    """The place of every unit among its group's, best first; those that are gone come last."""
    ranked = scores - (1 + scores.max() - scores.min()) * ~kept
    return torch.argsort(torch.argsort(ranked, descending=True, stable=True))


def hint(name: str) -> str:
    """The end of a message: what `name` may have been meant to be."""
    if name in _BUDGETS:
        return "; select.budget does"
    close = get_close_matches(name, [*Limits.__annotations__, *_BUDGETS], 1)
    return f": did you mean {close[0]}?" if close else ""


_BUDGETS = ("pruned_macs", "pruned_params", "pruned_latency")


def _modules(graph: ChannelGraph) -> set[str]:
    """All names and prefixes of names in the graph, the empty one included."""
    names = {""}
    for name in (*graph.shapes, *graph.by_name):
        parts = name.split(".")
        names |= {".".join(parts[: k + 1]) for k in range(len(parts))}
    return names


def _share_of(group: ChannelGroup, graph: ChannelGraph, shares: Mapping[str, float]) -> float:
    """The smallest of the shares whose names fit the group or a layer that makes its channels."""
    slices = group.slices if any(shares) else ()  # they cost a search
    makers = [s.tensor for s in slices if (s.tensor, s.axis) in graph.producers]
    names = [f".{name}." for name in (group.name, *makers)]
    fitting = [
        share
        for prefix, share in shares.items()
        if any(name.startswith(f".{prefix}." if prefix else ".") for name in names)
    ]
    return min(fitting, default=1.0)
