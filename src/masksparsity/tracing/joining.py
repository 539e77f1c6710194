"""Several tensors become one: concatenated, stacked, padded."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .findings import lengths
from .labels import ANONYMOUS, Labels
from .movement import unsqueeze
from .tracer import Rule, Tracer


def cat(t: Tracer, op: str, args: Any, kwargs: Any, out: Tensor, inplace: bool) -> None:
    """Along channels they stand side by side; along space they lie over one another."""
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.ndim
    # Torch lets a 1-D empty placeholder stand among the parts; it holds nothing.
    parts = [x for x in args[0] if x.ndim == out.ndim]
    found = [t.labels(x) for x in parts]
    along = {m.axes for ms in found for m in ms}
    if along == {frozenset({dim})} or (not along and dim == 1 and out.ndim > 2):
        zeros = [() if ms else t.zeros_of(x, dim) for x, ms in zip(parts, found, strict=True)]
        found = [(z,) if z else ms for z, ms in zip(zeros, found, strict=True)]
    _join(t, out, dim, parts, [x.shape for x in parts], found)


def stack(t: Tracer, op: str, args: Any, kwargs: Any, out: Tensor, inplace: bool) -> None:
    """`cat` along an axis that is new."""
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.ndim
    shape = torch.Size(1 if a == dim else n for a, n in enumerate(out.shape))
    found = [tuple(unsqueeze(x, m, dim) for m in t.labels(x)) for x in args[0]]
    _join(t, out, dim, args[0], [shape] * len(found), found)


def _join(
    t: Tracer,
    out: Tensor,
    dim: int,
    parts: Sequence[Tensor],
    shapes: list[torch.Size],
    found: list[tuple[Labels, ...]],
) -> None:
    labels = [m for ms in found for m in ms]
    if not labels:
        t.record((), [n for x in parts for n in lengths(x)])
        t.set(out, ())
        return
    t.record(labels)
    several = [ms for ms in found if len(ms) > 1]
    if several:  # such as a factor of a part, picked from a list of them
        t.pin([m for ms in several for m in ms if not m.axes], "one channel meets several")
        found = [tuple(m for m in ms if m.axes) if len(ms) > 1 else ms for ms in found]
        labels = [m for ms in found for m in ms]
    if any(len(ms) > 1 for ms in found):
        t.pin(labels, "two channels meet on one element")
        t.set(out, ())
        return
    axes = frozenset().union(*(m.axes for m in labels))
    sources = frozenset().union(*(m.sources for m in labels))
    clean = all(m.clean for m in labels)
    whole = []
    for shape, ms in zip(shapes, found, strict=True):
        ids = ms[0].ids if ms else torch.full([1] * len(shape), ANONYMOUS)
        if not ms or ms[0].axes != axes:
            ids = ids.expand([n if a in axes else 1 for a, n in enumerate(shape)])
        whole.append(ids)
    if dim in axes:
        ids = torch.cat(whole, dim)
    else:  # along space: the parts lie over one another, so their channels are one
        alike = [not ms and t.memory.is_blank(x) for x, ms in zip(parts, found, strict=True)]
        ids, *others = [ids for ids, blank in zip(whole, alike, strict=True) if not blank]
        for other in others:
            t.unite(ids, other)
        clean = clean and all(
            t.memory.is_zero(x, ids) for x, b in zip(parts, alike, strict=True) if b
        )
    t.set(out, [Labels(ids, axes, clean, sources, all(m.finite for m in labels))])


def pad(t: Tracer, op: str, args: Any, kwargs: Any, out: Tensor, inplace: bool) -> None:
    """By a constant. Over space it passes channels; over channels zeros become channels of their
    own, as in shortcuts to wider layers, and anything else protects them."""
    x, widths, value = (*args, 0)[:3]
    padded = {x.ndim - 1 - k // 2 for k, width in enumerate(widths) if width}
    found = t.labels(x)
    over = frozenset().union(*(m.axes for m in found)) & padded
    beside = [w for k, w in enumerate(widths) if x.ndim - 1 - k // 2 not in over]
    t.record(found, beside if found else [*lengths(x), *widths])
    result = []
    for m in found:
        m = m._replace(clean=m.clean and value == 0)
        if m.axes.isdisjoint(padded):
            result.append(m)
        elif m.axes == over and len(over) == 1 and m.clean and min(widths) >= 0:
            result.append(_widened(t, m, widths, *over))
        else:
            t.expose([m])
            t.pin(m.ids, "channels are padded by a constant width")
    t.set(out, result)


def _widened(t: Tracer, m: Labels, widths: Sequence[int], axis: int) -> Labels:
    ndim = m.ids.ndim
    k = 2 * (ndim - 1 - axis)
    ids = t.flat(m.ids, axis)
    before, after = map(t.fresh_zeros, widths[k : k + 2])
    whole = torch.cat([before, ids, after])
    for module in t.around():
        t.cut(whole[None], (before[None], after[None]), widths[: k + 2], module)
    return m._replace(ids=t.along(whole, axis, ndim))


RULES: dict[str, Rule] = {"cat": cat, "stack": stack, "constant_pad_nd": pad}
