"""Find out, while tracing, which channels no mask may remove because of how the code is written.

Code may hold lengths that do not follow the tensors. Only running it tells. So a mask is tried on
it, as it would be on the day of pruning; what the proof refuses is protected, and the next mask is
tried. Networks of libraries' modules that take no axis apart pay nothing. Copies with channels left
out at random compute nothing that makes sense, so their convolutions are not computed at first.
"""

from collections import Counter
from collections.abc import Callable
from itertools import count

import torch
from torch import Tensor, nn

from ..errors import MaskSparsityError
from ..tracing.labels import Reason
from ..tracing.tracer import Tracer
from .groups import ChannelGraph, ChannelGroup
from .mask import KeepMask
from .surgery import remove
from .verify import ALONE, Refusal

_MOST = 64  # tries: what is refused then is refused when one prunes
_ENOUGH = 2  # masks in a row that pass: one may fit by chance
_WIDE = 3  # the level from which on whole modules are suspected
_PATIENCE = 8  # refusals in modules of one kind, until more of them is protected in one go


def protect_what_is_refused(
    tracer: Tracer, model: nn.Module, solve: Callable[[], ChannelGraph]
) -> ChannelGraph:
    """The graph that `solve` makes of what `tracer` saw, with more of it protected."""
    graph = solve()
    refusals: Counter[str] = Counter()
    zeros = [*tracer.zeros]
    passed = 0
    for trial in range(_MOST):
        try:
            remove(model, graph, _some(graph, trial), made_up=True)
            passed += 1
            if passed == _ENOUGH:
                break
        except Refusal as refusal:
            passed = 0
            why = f"code that does not follow other widths: {refusal.why}"[:160]
            reason = Reason(why, refusal.operation or "forward", refusal.module)
            pairs = _pairs(tracer, graph, refusal) if refusal.why == ALONE else []
            if pairs:  # which can lose one only
                tracer.pins += [(ids, reason) for ids in pairs]
                graph = solve()
                continue
            if zeros:  # whose width may be written down
                tracer.pins += [(ids, reason) for ids in zeros]
                graph, zeros = solve(), []
                continue
            alike = _of_one_class(model, refusal.module)
            level = refusals[alike[0]] // _PATIENCE
            refusals[alike[0]] += 1
            free = _free(graph)
            while _free(graph) == free:
                parts = _suspects(tracer, graph, refusal, alike, level)
                if parts is None:
                    return graph
                if level >= _WIDE:
                    parts = _guilty(tracer, model, graph, parts, trial) or parts
                tracer.pins += [(part, reason) for part in parts]
                graph = solve() if parts else graph
                level += 1
        except MaskSparsityError:
            break
    return graph


def _free(graph: ChannelGraph) -> int:
    return sum(group.size for group in graph.prunable)


def _some(graph: ChannelGraph, seed: int) -> KeepMask:
    """A part of every group goes, and of all pieces that keep equal counts, as they would come back
    else: in every other mask of each another part, in the rest of all the same."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(graph.units, generator=generator)
    rows = [torch.arange(g.start, g.start + g.size)[None] for g in graph.groups]
    rows += [c.pieces for c in graph.constraints if (c.pieces >= 0).all()]
    # Multiples of the golden ratio: those of neighbours differ. Less than half of a group, as a
    # width that is written down may fit half of it; pieces are short.
    shares = (0.618034 * (torch.arange(len(rows)) + seed) % 1).tolist()
    shares = [0.2 + (0.3 if len(r) == 1 else 0.5) * s for r, s in zip(rows, shares, strict=True)]
    if seed % 2:
        shares = shares[:1] * len(rows)
    keep = torch.ones(graph.units, dtype=torch.bool)
    # Few channels at an end may be taken by a number.
    for units in rows:
        values[units[:, 0 if seed % 2 else -1]] = -1
    # What is taken by itself is gone in one mask and there in the next.
    alone = [p.reshape(-1) for c in graph.cuts for p in c.pieces if p.shape[1] == 1]
    picked = torch.cat([values.new_zeros(0).long(), *alone])
    values[picked[picked >= 0]] = seed % 2 * 2.0 - 0.5
    for units, share in zip(rows, shares, strict=True):
        length = units.shape[1]
        number = max(min(int(share * length + (len(units) > 1) / 2), length - 1), length > 1)
        least = values[units].argsort(1)[:, :number]
        keep[units] = True
        keep[units.gather(1, least)] = False
    chosen = {g.name: keep[g.start : g.start + g.size] for g in graph.prunable}
    return KeepMask(graph, chosen).repaired()


def _of_one_class(model: nn.Module, name: str) -> list[str]:
    """Names of all modules of the same class: what is written in one is written in all."""
    modules = dict(model.named_modules())
    kind = type(modules.get(name))
    if kind.__module__.startswith("torch.nn."):
        return [name]
    return [other for other, module in modules.items() if type(module) is kind] or [name]


def _suspects(
    tracer: Tracer, graph: ChannelGraph, refusal: Refusal, alike: list[str], level: int
) -> list[Tensor] | None:
    """Labels to protect: those that entered the operation that failed; on the next levels, those
    that the operation before it read, that modules of its kind take apart, that they read at all,
    that are in the module around it, and so on. None if there is nothing more."""
    if level == 0:
        units = {*refusal.entered.tolist()}
        entered = [g for g in graph.prunable if units & {*range(g.start, g.start + g.size)}]
        return [_ids(tracer, group) for group in entered]
    if level == 1:
        return [*refusal.read]
    if level == 2:
        return [c.whole for c in tracer.cuts if c.module in alike]
    if level == 3:
        return [i for r in tracer.records if r.module in alike for i in r.ids]
    around = refusal.module
    for _ in range(level - 4):
        if not around:
            return None
        around = around.rpartition(".")[0]
    inside = f"{around}." if around else ""
    parts = [i for r in tracer.records if f"{r.module}.".startswith(inside) for i in r.ids]
    return parts + [c.whole for c in tracer.cuts if f"{c.module}.".startswith(inside)]


def _guilty(
    tracer: Tracer, model: nn.Module, graph: ChannelGraph, suspects: list[Tensor], trial: int
) -> list[Tensor]:
    """Labels of those among many suspected groups that cannot go alone either, found by halving. A
    number that follows from one width would protect all that its module reads else."""
    suspected = torch.zeros(graph.units + 1, dtype=torch.bool)
    for ids in suspects:
        suspected[graph.unit_of[ids.reshape(-1)]] = True
    keep, tries = _some(graph, trial), count()

    def found(groups: list[ChannelGroup]) -> list[ChannelGroup]:
        if next(tries) >= _MOST:
            return groups
        chosen = {group.name: keep[group.name] for group in groups}
        try:
            remove(model, graph, KeepMask(graph, chosen).repaired(), made_up=True)
            return []
        except MaskSparsityError:
            half = len(groups) // 2
            return (found(groups[:half]) + found(groups[half:]) if half else []) or groups

    groups = [g for g in graph.prunable if suspected[g.start : g.start + g.size].any()]
    return [_ids(tracer, group) for group in found(groups)]


def _pairs(tracer: Tracer, graph: ChannelGraph, refusal: Refusal) -> list[Tensor]:
    """Labels of the groups of two that the operation which was refused reads."""
    read = [graph.unit_of[ids.reshape(-1)] for ids in refusal.read]
    units = {*torch.cat(read).tolist()} if read else set()
    return [_ids(tracer, g) for g in graph.prunable if g.size == 2 and g.start in units]


def _ids(tracer: Tracer, group: ChannelGroup) -> Tensor:
    """The labels of a group, as one of its tensors has them."""
    slot, units = next(iter(group.slots.items()))
    return tracer.slots[slot][(units >= group.start) & (units < group.start + group.size)]
