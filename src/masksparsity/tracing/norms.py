"""Norms: each channel by itself, whole groups of them, or all, which then stay."""

from typing import Any

from torch import Tensor, nn

from .findings import aside
from .labels import Labels, Norm
from .products import ELSEWHERE, biased, channels_of, first_of
from .tracer import FOLD, WRITTEN_TO, Rule, Tracer


def batch_norm(t: Tracer, op: str, args: Any, kwargs: Any, out: Any, inplace: bool) -> None:
    """Each channel by itself; with a scale, zero where scale and shift are."""
    x, weight, bias, *statistics = args[:5]
    ids, seen = t.read(x, 1, "normalised over channels")
    counts = aside(x, [seen]) if seen and args[5] else ()  # its own statistics depend on these
    t.record((seen,) if seen else (), counts)
    if seen and not seen.finite:  # a scale of zero does not help
        t.pin(ids, "infinite at zero")
    for tensor in (weight, *statistics):
        if isinstance(tensor, Tensor):
            t.meet(tensor, 0, ids)
    if seen is None:
        t.meet(bias, 0, ids)
        t.set(out[0], ())
        return
    if weight is not None:
        sources, clean = t.in_slots(weight, 0), t.is_clean(weight, 0)
    else:  # with its own statistics, what is zero everywhere stays zero
        sources, clean = seen.sources, seen.clean and statistics[0] is None
        t.expose([seen])
    sources, clean = biased(t, bias, ids, sources, clean)
    name = t.names.get(id(weight))
    if name is not None and name not in t.norms:
        t.norms[name] = Norm(t.module, name, t.names.get(id(bias)))
    if args[5] and not seen.clean:  # while training it writes statistics of what does not vanish
        for tensor in statistics:
            if isinstance(tensor, Tensor):
                found = t.labels(tensor)
                t.spoil(found, WRITTEN_TO)
                if id(tensor) not in t.names:
                    t.set(tensor, [m._replace(clean=False) for m in found])
    makers = [n for n, _ in seen.sources if (n, 1) in t.consumers]
    if len(makers) == 1 and statistics[0] is not None and id(statistics[0]) in t.names:
        t.behind[makers[0]] = t.names[id(statistics[0])]
    t.set(out[0], [channels_of(t, ids, x.ndim, clean, sources)])


def group_norm(t: Tracer, op: str, args: Any, kwargs: Any, out: Any, inplace: bool) -> None:
    """Whole groups go: each has its own statistics."""
    x, weight, bias, *_, groups, eps = args
    ids, seen = t.read(x, 1, ELSEWHERE)
    t.record([seen] if seen else [], [x.shape[1] // groups, eps])
    for tensor in (weight, bias):
        t.meet(tensor, 0, ids)
    if seen is None:
        t.set(out[0], ())
        return
    t.expose([seen])
    rows = ids.view(groups, -1)
    if groups == 1:
        t.pin(ids, "normalised over channels")
    elif weight is None and type(t.modules.get(t.module)) is nn.GroupNorm:
        t.pin(ids, "a GroupNorm without scales says its width in numbers")
    t.unite(rows, rows[:, :1])
    sources, clean = seen.sources, seen.clean
    if weight is not None:
        sources, clean = t.in_slots(weight, 0), t.is_clean(weight, 0)
    sources, clean = biased(t, bias, ids, sources, clean)
    t.set(out[0], [channels_of(t, ids, x.ndim, clean, sources)])


def layer_norm(t: Tracer, op: str, args: Any, kwargs: Any, out: Any, inplace: bool) -> None:
    """Channels that it normalises over are protected; others pass, each by itself."""
    x, shape, weight, bias = (*args, None, None)[:4]
    bias = bias if isinstance(bias, Tensor) else None
    first = x.ndim - len(shape)
    found = t.labels(x)
    t.record(found, [first, *aside(x, found)])
    t.expose(found)
    result = []
    for m in found:
        if all(a < first for a in m.axes):
            result.append(m._replace(clean=m.clean and bias is None, sources=frozenset()))
            continue
        t.pin(m.ids, "normalised over channels")
        result.append(m._replace(clean=False, sources=frozenset()))
        for tensor in (weight, bias):
            if tensor is not None and m.axes == {x.ndim - 1} and tensor.ndim == 1:
                t.meet(tensor, 0, m.ids.reshape(-1))
    t.set(first_of(out), result)


def weight_norm(t: Tracer, op: str, args: Any, kwargs: Any, out: Any, inplace: bool) -> None:
    """Each filter is scaled to a length of its own: what it reads counts into that length."""
    direction, length, axis = (*args, 0)[:3]
    found = t.labels(direction)
    t.record([*found, *t.labels(length)])
    why = f"counts into the length of a filter: {FOLD}"
    t.pin([m for m in found if m.axes != {axis}], why)
    ids = t.read(direction, axis)[0]
    t.meet(length, axis, ids)
    sources = t.in_slots(length, axis)
    along = [-1 if a == axis else 1 for a in range(direction.ndim)]
    passing = [m._replace(clean=False) for m in found if m.axes != {axis}]
    t.set(out[0], [*passing, Labels(ids.view(along), frozenset({axis}), True, sources)])


RULES: dict[str, Rule] = {
    **dict.fromkeys(
        (
            "native_batch_norm",
            "_native_batch_norm_legit",
            "_native_batch_norm_legit_no_training",
            "_batch_norm_with_update",
            "_batch_norm_no_update",
            "cudnn_batch_norm",
            "miopen_batch_norm",
        ),
        batch_norm,
    ),
    "native_group_norm": group_norm,
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm"), layer_norm),
    "_weight_norm_interface": weight_norm,
}
