"""Scores -> KeepMask.

All selectors take `Limits` as keywords, which take part in the choice: `min_keep`, `round_to`,
`ignore`, `max_pruned`. Where a group would lose more than it
may, its units with the highest scores stay; of equal scores the first stay.
"""

import math
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import TypedDict, Unpack

import torch

from ..errors import MaskSparsityError
from .groups import ChannelGraph, ChannelGroup
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


class _Ranking:
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
            raise MaskSparsityError(f"a selector takes no {name}{_hint(name)}")
        if graph.prunable and not scores:
            raise MaskSparsityError("no channel group has a score; scores.norm scores all filters")
        ignore = (ignore,) if isinstance(ignore, str) else tuple(ignore)
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
            if not 0 <= share <= 1:
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
        if kept is not None:  # what is gone already does not come back
            lowest = torch.finfo(torch.float64).min
            self.scores = {n: s.masked_fill(~kept[n], lowest) for n, s in self.scores.items()}
        # Position of every unit among its group's, best first.
        self.order = {
            name: torch.argsort(torch.argsort(values, descending=True, stable=True))
            for name, values in self.scores.items()
        }

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


def threshold(
    graph: ChannelGraph,
    scores: Scores,
    threshold: float = 0.01,
    **limits: Unpack[Limits],
) -> KeepMask:
    """Units whose score is under `threshold` go (the original's rule and value)."""
    if math.isnan(threshold):
        raise MaskSparsityError("threshold=nan: expected a number")
    ranking = _Ranking(graph, scores, **limits)
    kept = ranking.keep({n: int((s >= threshold).sum()) for n, s in ranking.scores.items()})
    return _from(kept, "threshold", threshold=threshold, **limits)


def optimal(
    graph: ChannelGraph,
    scores: Scores,
    energy: float = 1e-4,
    **limits: Unpack[Limits],
) -> KeepMask:
    """Optimal thresholding (arXiv 2003.04566): in every group the smallest scores go that together
    hold at most the share `energy` of the group's sum of squares."""
    ranking = _Ranking(graph, scores, **limits)
    count = {}
    for name, values in ranking.scores.items():
        squares = values.double().sort().values ** 2
        count[name] = len(squares) - int((squares.cumsum(0) <= energy * squares.sum()).sum())
    return _from(ranking.keep(count), "optimal", energy=energy, **limits)


def uniform(
    graph: ChannelGraph,
    scores: Scores,
    fraction: float,
    **limits: Unpack[Limits],
) -> KeepMask:
    """The same pruned fraction in every group, nearest number of units."""
    _share("fraction", fraction)
    ranking = _Ranking(graph, scores, **limits)
    count = {g.name: g.size - math.floor(fraction * g.size + 0.5) for g in ranking.groups}
    return _from(ranking.keep(count), "uniform", fraction=fraction, **limits)


def fraction(
    graph: ChannelGraph,
    scores: Scores,
    fraction: float,
    **limits: Unpack[Limits],
) -> KeepMask:
    """The lowest scores of the whole network go until this fraction of its units is pruned."""
    _share("fraction", fraction)
    ranking = _Ranking(graph, scores, **limits)
    counts, units = _nested(ranking)
    what = f"fraction={fraction}"
    kept = ranking.keep(
        _smallest(ranking, counts, units, lambda m: m.pruned_fraction, fraction, what, limits)
    )
    return _from(kept, "fraction", fraction=fraction, **limits)


def budget(
    graph: ChannelGraph,
    scores: Scores | Callable[[KeepMask], Scores],
    *,
    pruned_macs: float | None = None,
    pruned_params: float | None = None,
    pruned_latency: float | None = None,
    latency: Callable[[KeepMask], float] | None = None,
    per_cost: bool = False,
    rounds: int = 1,
    **limits: Unpack[Limits],
) -> KeepMask:
    """The lowest scores of the whole network go until this share of the cost does.

    One of `pruned_macs`, `pruned_params` and `pruned_latency` is the budget, a share of the dense
    network's; the last goes with `latency`, a function that measures what a mask leaves, such as
    `masksparsity.latency(model, graph)`.

    With `per_cost` the lowest scores per MAC (or parameter) go, those that a unit saves:
    greedily, what keeps much of the sum of scores under the budget, for scores that add up, like
    `scores.taylor`.

    What a channel is worth, and what it saves, changes as others go. In several `rounds` each
    takes its share of the budget, and the next looks again: at costs, and at scores, if these are
    a function of the mask so far, such as
    `lambda keep: scores.taylor(apply_mask(model, graph, keep), graph, batches)`.

    The nested masks along the global order of scores are searched by bisection for the first that
    meets the budget, so the cost is within one channel (or one step of `round_to`) of it. Of what
    went last as much comes back, group by group, as the budget has room for.

    Raises:
        MaskSparsityError: if the budget cannot be met, saying how far one can get.
    """
    costs: _Costs = {
        "macs": (pruned_macs, lambda mask: graph.cost(mask).macs),
        "params": (pruned_params, lambda mask: graph.cost(mask).params),
        "latency": (pruned_latency, latency),
    }
    what, share, measure = _asked(costs, limits)
    if per_cost and what == "latency":
        raise MaskSparsityError("per_cost: of MACs or parameters; latency moves in jumps")
    if rounds < 1:
        raise MaskSparsityError(f"rounds={rounds}: at least 1")
    kept = KeepMask(graph)
    dense = measure(kept)

    def removed(mask: KeepMask) -> float:
        return 1 - measure(mask) / max(dense, 1e-12)

    for part in range(1, rounds + 1):
        ranking = _Ranking(graph, scores(kept) if callable(scores) else scores, kept, **limits)
        prices = _prices(ranking, measure, kept) if per_cost else None
        counts, units = _nested(ranking, prices)
        goal = share * part / rounds
        count = _smallest(ranking, counts, units, removed, goal, f"pruned_{what}={share}", limits)
        if part == rounds and what != "latency":  # which is measured, and moves in jumps
            count = _refilled(ranking, count, prices, lambda mask: removed(mask) >= share)
        kept = ranking.keep(count)
    chosen = {f"pruned_{what}": share, **limits}
    chosen |= {"per_cost": True} if per_cost else {}
    chosen |= {"rounds": rounds} if rounds > 1 else {}
    return _from(kept, "budget", **chosen)


_Costs = dict[str, tuple[float | None, Callable[[KeepMask], float] | None]]


def _asked(
    costs: _Costs, limits: Mapping[str, object]
) -> tuple[str, float, Callable[[KeepMask], float]]:
    """The one cost of which a share is given."""
    asked = {what: (share, cost) for what, (share, cost) in costs.items() if share is not None}
    if len(asked) != 1:
        unknown = "".join(f"; no {n}{_hint(n)}" for n in limits if n not in Limits.__annotations__)
        raise MaskSparsityError(
            "give one budget: pruned_macs, pruned_params, or pruned_latency with latency" + unknown
        )
    ((what, (share, cost)),) = asked.items()
    if cost is None or share is None:
        raise MaskSparsityError("pruned_latency needs latency=, a function that measures a mask")
    _share(f"pruned_{what}", share)
    return what, share, cost


def _prices(
    ranking: _Ranking, measure: Callable[[KeepMask], float], kept: KeepMask
) -> dict[str, float]:
    """The cost that one unit of each group saves, the next to go."""
    now = measure(kept)
    prices = {}
    for group in ranking.groups:
        less = kept[group.name].clone()
        less[less.nonzero()[:1]] = False
        prices[group.name] = max(1, now - measure(KeepMask(kept.graph, {**kept, group.name: less})))
    return prices


_Count = dict[str, int]
"""How many units of each group stay."""


def _nested(
    ranking: _Ranking, prices: Mapping[str, float] | None = None
) -> tuple[Callable[[int], _Count], int]:
    """k -> what is left without the k units of lowest score, divided by their group's price if
    there are some; and how many units there are."""
    names = list(ranking.scores)
    if not names:
        return lambda k: {}, 0
    group_of = torch.cat([torch.full_like(s, k) for k, s in enumerate(ranking.scores.values())])
    # Of equal scores the last of a group go first, as in `keep`.
    values = torch.cat(
        [s.flip(0) / (prices[name] if prices else 1) for name, s in ranking.scores.items()]
    )
    lowest_first = group_of[torch.argsort(values, stable=True)].long()

    def counts(k: int) -> _Count:
        gone = torch.bincount(lowest_first[:k], minlength=len(names)).tolist()
        sizes = [len(s) for s in ranking.scores.values()]
        return {n: size - g for n, size, g in zip(names, sizes, gone, strict=True)}

    return counts, len(lowest_first)


def _smallest(
    ranking: _Ranking,
    counts: Callable[[int], _Count],
    units: int,
    removed: Callable[[KeepMask], float],
    goal: float,
    what: str,
    limits: Limits,
) -> _Count:
    """The first of a nested sequence of masks that removes as much as `goal`."""
    most = removed(ranking.keep(counts(units)))
    if most < goal:
        raise MaskSparsityError(
            f"the budget cannot be met: {what}: at most {most:.4f} can go under {_words(limits)} "
            "and what is protected; ask for less"
        )
    low, high = -1, units
    while high - low > 1:
        middle = (low + high) // 2
        enough = removed(ranking.keep(counts(middle))) >= goal
        low, high = (low, middle) if enough else (middle, high)
    return counts(high)


def _refilled(
    ranking: _Ranking,
    count: _Count,
    prices: Mapping[str, float] | None,
    met: Callable[[KeepMask], bool],
) -> _Count:
    """With units back that there is room for, the best of each group first."""
    ordered = {n: s.sort(descending=True).values for n, s in ranking.scores.items()}
    kept = ranking.keep(count)
    count = {name: max(n, int(kept[name].sum())) for name, n in count.items()}
    waiting = {name for name, n in count.items() if n < len(ordered[name])}
    while waiting:
        name = max(
            sorted(waiting),
            key=lambda n: float(ordered[n][count[n]]) / (prices[n] if prices else 1),
        )
        more = {**count, name: count[name] + ranking.round_to}
        if met(ranking.keep(more)):
            count = more
        else:
            waiting.remove(name)
        waiting = {n for n in waiting if count[n] < len(ordered[n])}
    return count


def _words(limits: Limits) -> str:
    return ", ".join(f"{k}={v}" for k, v in limits.items() if v not in ((), {})) or "no limits"


def _from(mask: KeepMask, selector: str, **settings: object) -> KeepMask:
    mask.origin = {"selector": selector, **settings}
    return mask


def _hint(name: str) -> str:
    """The end of a message: what `name` may have been meant to be."""
    if name in _BUDGETS:
        return "; select.budget does"
    close = get_close_matches(name, [*Limits.__annotations__, *_BUDGETS], 1)
    return f": did you mean {close[0]}?" if close else ""


_BUDGETS = ("pruned_macs", "pruned_params", "pruned_latency")


def _share(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise MaskSparsityError(f"{name}={value}: expected a share of what there is, in [0, 1)")


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
