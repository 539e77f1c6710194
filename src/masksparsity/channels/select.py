"""Scores -> KeepMask.

All selectors take `Limits` as keywords, which take part in the choice: `min_keep`, `round_to`,
`ignore`, `max_pruned`. Where a group would lose more than it
may, its units with the highest scores stay; of equal scores the first stay.
"""

import math
from collections.abc import Callable, Mapping
from typing import Unpack

import torch

from ..errors import MaskSparsityError
from .groups import ChannelGraph
from .mask import KeepMask
from .ranking import Limits, Ranking, hint
from .scores import Scores


def threshold(
    graph: ChannelGraph,
    scores: Scores,
    threshold: float = 0.01,
    **limits: Unpack[Limits],
) -> KeepMask:
    """Units whose score is under `threshold` go (the original's rule and value)."""
    if math.isnan(threshold):
        raise MaskSparsityError("threshold=nan: expected a number")
    ranking = Ranking(graph, scores, **limits)
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
    _share("energy", energy)
    ranking = Ranking(graph, scores, **limits)
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
    ranking = Ranking(graph, scores, **limits)
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
    ranking = Ranking(graph, scores, **limits)
    what = f"fraction={fraction}"
    count = _smallest(ranking, None, lambda mask: mask.pruned_fraction, fraction, what, limits)
    return _from(ranking.keep(count), "fraction", fraction=fraction, **limits)


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
        ranking = Ranking(graph, scores(kept) if callable(scores) else scores, kept, **limits)
        prices = _prices(ranking, measure, kept) if per_cost else None
        goal = share * part / rounds
        count = _smallest(ranking, prices, removed, goal, f"pruned_{what}={share}", limits)
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
        unknown = "".join(f"; no {n}{hint(n)}" for n in limits if n not in Limits.__annotations__)
        raise MaskSparsityError(
            "give one budget: pruned_macs, pruned_params, or pruned_latency with latency" + unknown
        )
    ((what, (share, cost)),) = asked.items()
    if costs["latency"][1] is not None and what != "latency":
        raise MaskSparsityError("latency= is for the budget pruned_latency, which is not given")
    if cost is None or share is None:
        raise MaskSparsityError("pruned_latency needs latency=, a function that measures a mask")
    _share(f"pruned_{what}", share)
    return what, share, cost


def _prices(
    ranking: Ranking, measure: Callable[[KeepMask], float], kept: KeepMask
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
    ranking: Ranking, prices: Mapping[str, float] | None
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
    ranking: Ranking,
    prices: Mapping[str, float] | None,
    removed: Callable[[KeepMask], float],
    goal: float,
    what: str,
    limits: Limits,
) -> _Count:
    """The first of a nested sequence of masks that removes as much as `goal`."""
    counts, units = _nested(ranking, prices)
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
    ranking: Ranking,
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


def _share(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise MaskSparsityError(f"{name}={value}: expected a share of what there is, in [0, 1)")
