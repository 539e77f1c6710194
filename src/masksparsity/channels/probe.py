"""Find out, while tracing, which channels no mask may remove because of how the code is written.

Where a network takes an axis apart, its code may hold lengths that do not follow the tensors. Only
running it tells. So a mask is tried on it, as it would be on the day of pruning; what the proof
refuses is protected, and the next mask is tried. Networks that take nothing apart pay nothing.
"""

from collections import Counter
from collections.abc import Callable

import torch
from torch import nn

from .errors import MaskSparsityError
from .groups import ChannelGraph
from .mask import KeepMask
from .surgery import prune
from .trace import Reason, Tracer
from .verify import Refusal

_MOST = 64  # tries: what is refused then is refused when one prunes


def protect_what_is_refused(
    tracer: Tracer, model: nn.Module, solve: Callable[[], ChannelGraph]
) -> ChannelGraph:
    graph = solve()
    modules = dict(model.named_modules())
    failed: Counter[tuple[type, str]] = Counter()
    for _ in range(_MOST):
        if not graph.prunable:
            break
        try:
            prune(model, graph, _some(graph))
            break
        except Refusal as refusal:
            kind = type(modules.get(refusal.module, model))
            failed[kind, refusal.operation] += 1
            # What fails twice is how this kind of module is written.
            everywhere = failed[kind, refusal.operation] > 1
            places = [n for n, m in modules.items() if type(m) is kind] if everywhere else []
            before = len(tracer.pins)
            _protect(tracer, refusal, {refusal.module, *places})
            if len(tracer.pins) == before:
                break
            graph = solve()
        except MaskSparsityError:
            break
    return graph


def _some(graph: ChannelGraph) -> KeepMask:
    """About a third of every group goes, another number in each."""
    generator = torch.Generator().manual_seed(0)
    keep = {}
    for group in graph.prunable:
        values = torch.rand(group.size, generator=generator)
        share = 0.2 + 0.3 * float(torch.rand((), generator=generator))
        keep[group.name] = (values >= share) | (values == values.max())
    return KeepMask(graph, keep).repaired()


def _protect(tracer: Tracer, refusal: Refusal, modules: set[str]) -> None:
    why = f"the code of this module does not follow other widths: {refusal.why}"
    ids = [] if refusal.record is None else list(tracer.records[refusal.record].ids)
    for name in modules:
        ids += [c.whole for c in tracer.cuts if c.module == name]
        if refusal.record is not None:
            ids += [i for r in tracer.records for i in r.ids
                    if (r.module, r.operation) == (name, refusal.operation)]  # fmt: skip
    if not ids:
        ids = [i for r in tracer.records if r.module in modules for i in r.ids]
    for part in ids:
        tracer.pins.append((part, Reason(why, refusal.operation, refusal.module)))
