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
    """The graph that `solve` makes of what `tracer` saw, with more of it protected."""
    graph = solve()
    reach: Counter[str] = Counter()
    for _ in range(_MOST):
        keep = _some(graph)
        try:
            prune(model, graph, keep)
            break
        except Refusal as refusal:
            free = _free(graph)
            while _free(graph) == free and refusal.module is not None:
                reach[refusal.module] += 1
                if not _protect(tracer, model, refusal, reach[refusal.module]):
                    return graph
                graph = solve()
        except MaskSparsityError:
            break
    return graph


def _free(graph: ChannelGraph) -> int:
    return sum(group.size for group in graph.prunable)


def _some(graph: ChannelGraph) -> KeepMask:
    """About a third of every group goes, another number in each."""
    generator = torch.Generator().manual_seed(0)
    keep = {}
    for group in graph.prunable:
        values = torch.rand(group.size, generator=generator)
        share = 0.2 + 0.3 * float(torch.rand((), generator=generator))
        keep[group.name] = (values >= share) | (values == values.max())
    return KeepMask(graph, keep).repaired()


def _protect(tracer: Tracer, model: nn.Module, refusal: Refusal, reach: int) -> bool:
    """Protect what was refused; if that was not enough, what its module reads, then all in it,
    then all in the module around it, and so on. False if there is nothing more to protect."""
    modules = dict(model.named_modules())
    why = f"code that does not follow other widths: {refusal.why}"[:160]
    reason = Reason(why, refusal.operation or "forward", refusal.module)
    kind = type(modules.get(refusal.module))
    alike = {refusal.module}
    if not kind.__module__.startswith("torch.nn"):
        alike |= {name for name, module in modules.items() if type(module) is kind and name}
    if reach == 1 and refusal.record is not None:
        parts = list(tracer.records[refusal.record].ids)
    elif reach <= 2:  # what is written in one module is written in all of its kind
        parts = [c.whole for c in tracer.cuts if c.module in alike]
        parts += [i for r in tracer.records if r.module in alike for i in r.ids]
    else:
        around = refusal.module
        for _ in range(reach - 3):
            around = around.rpartition(".")[0]
        inside = f"{around}." if around else ""
        parts = [i for r in tracer.records if f"{r.module}.".startswith(inside) for i in r.ids]
        parts += [c.whole for c in tracer.cuts if f"{c.module}.".startswith(inside)]
        if reach - 3 > refusal.module.count(".") + 1:
            return False
    tracer.pins += [(part, reason) for part in parts]
    return True
