"""Data movement: the same call, on the labels.

Labels are broadcast, so a move along an axis where they do not vary leaves them as they are.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .trace import ANONYMOUS, Labels, Rule, Tracer

RULES: dict[str, Rule] = {}


def _same(x: Tensor, m: Labels, args: Any) -> Labels:
    return m


def _view(x: Tensor, m: Labels, new: Sequence[int]) -> Labels:
    """Split and merge axes. Axes that only keep their neighbours' company stay broadcast."""
    shape: list[int] = []
    expand: list[int] = []
    axes: set[int] = set()
    for olds, news in _runs(tuple(x.shape), tuple(new)):
        if m.axes.isdisjoint(olds):
            expand += [1] * len(olds)
            shape += [1] * len(news)
        else:
            expand += [x.shape[a] for a in olds]
            shape += [new[a] for a in news]
            # A lone channel has no axis longer than 1 to be recognised by.
            axes |= {a for a in news if new[a] > 1} or {news[0]}
    return m._replace(ids=m.ids.expand(expand).reshape(shape), axes=frozenset(axes))


def _runs(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """The shortest runs of old and new axes that hold the same number of elements."""
    runs: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) and j < len(new):
        olds, news, a, b = [i], [j], old[i], new[j]
        while a != b:
            if a < b:
                i += 1
                olds.append(i)
                a *= old[i]
            else:
                j += 1
                news.append(j)
                b *= new[j]
        runs.append((olds, news))
        i, j = i + 1, j + 1
    if runs:
        runs[-1][0].extend(range(i, len(old)))
        runs[-1][1].extend(range(j, len(new)))
    return runs


def _permute(x: Tensor, m: Labels, dims: Sequence[int]) -> Labels:
    order = [d % x.ndim for d in dims]
    axes = frozenset(order.index(a) for a in m.axes)
    return m._replace(ids=m.ids.permute(order), axes=axes)


def _transpose(x: Tensor, m: Labels, a: int, b: int) -> Labels:
    order = list(range(x.ndim))
    order[a], order[b] = order[b], order[a]
    return _permute(x, m, order)


def _unsqueeze(x: Tensor, m: Labels, dim: int) -> Labels:
    dim %= x.ndim + 1
    return m._replace(ids=m.ids.unsqueeze(dim), axes=frozenset(a + (a >= dim) for a in m.axes))


def _squeeze(x: Tensor, m: Labels, *dims: Any) -> Labels:
    chosen = [dims[0]] if dims and isinstance(dims[0], int) else dims[0] if dims else range(x.ndim)
    gone = {d % x.ndim for d in chosen if x.shape[d] == 1}
    axes = frozenset(a - sum(d < a for d in gone) for a in m.axes - gone)
    return m._replace(ids=m.ids.squeeze(tuple(gone)), axes=axes)


def _slice(x: Tensor, m: Labels, dim: int = 0, *bounds: Any) -> Labels:
    if dim % x.ndim not in m.axes:
        return m
    return m._replace(ids=torch.ops.aten.slice(m.ids, dim, *bounds))


def _select(x: Tensor, m: Labels, dim: int, index: int) -> Labels:
    dim %= x.ndim
    ids = m.ids.select(dim, index if dim in m.axes else 0)
    return m._replace(ids=ids, axes=frozenset(a - (a > dim) for a in m.axes if a != dim))


def _split(x: Tensor, m: Labels, sizes: Any, dim: int = 0) -> list[Labels]:
    if dim % x.ndim in m.axes:
        return [m._replace(ids=part) for part in m.ids.split(sizes, dim)]
    count = len(sizes) if isinstance(sizes, list) else -(-x.shape[dim] // sizes)
    return [m] * count


def _unbind(x: Tensor, m: Labels, dim: int = 0) -> list[Labels]:
    return [_select(x, m, dim, i) for i in range(x.shape[dim])]


def _expand(x: Tensor, m: Labels, size: Sequence[int], **_: Any) -> Labels:
    shift = len(size) - x.ndim
    return m._replace(
        ids=m.ids.view([1] * shift + list(m.ids.shape)), axes=frozenset(a + shift for a in m.axes)
    )


def _flip(x: Tensor, m: Labels, dims: Sequence[int]) -> Labels:
    return m._replace(ids=m.ids.flip(list(dims)))


def _index_select(x: Tensor, m: Labels, dim: int, index: Tensor) -> Labels:
    if dim % x.ndim not in m.axes:
        return m
    return m._replace(ids=m.ids.index_select(dim, index.to(m.ids.device)))


def _shuffle(x: Tensor, m: Labels, groups: int) -> Labels:
    return m._replace(ids=torch.channel_shuffle(m.ids, groups) if m.ids.shape[1] > 1 else m.ids)


def _movement(move: Callable[..., Any], alias: bool) -> Rule:
    def apply(t: Tracer, op: str, args: Any, kwargs: Any, out: Any, inplace: bool) -> None:
        x, *rest = args
        if alias:
            t.viewed(x)
        found = t.labels(x)
        if not found and not hasattr(out, "_masksparsity_labels"):
            return
        named = {k: v for k, v in kwargs.items() if k in ("dim", "start", "end", "step", "index")}
        moved = [move(x, m, *rest, **named) if move is not _same else m for m in found]
        for k, result in enumerate(out if isinstance(out, (tuple, list)) else [out]):
            t.set(result, [m[k] if isinstance(m, list) else m for m in moved])

    return apply


def _reshape(t: Tracer, op: str, args: Any, kwargs: Any, out: Tensor, inplace: bool) -> None:
    x = args[0]
    t.viewed(x)
    t.set(out, [_view(x, m, tuple(out.shape)) for m in t.labels(x)])


RULES.update(
    dict.fromkeys(["view", "_unsafe_view", "reshape", "_reshape_alias", "flatten"], _reshape)
)
RULES.update(
    dict.fromkeys(["clone", "contiguous", "_to_copy", "to", "lift_fresh"], _movement(_same, False))
)
RULES.update(dict.fromkeys(("detach", "alias"), _movement(_same, True)))
RULES["permute"] = _movement(_permute, True)
RULES["transpose"] = _movement(_transpose, True)
RULES["t"] = _movement(lambda x, m: _transpose(x, m, 0, 1) if x.ndim == 2 else m, True)
RULES["unsqueeze"] = _movement(_unsqueeze, True)
RULES["squeeze"] = _movement(_squeeze, True)
RULES["slice"] = _movement(_slice, True)
RULES["select"] = _movement(_select, True)
RULES["split"] = RULES["split_with_sizes"] = _movement(_split, True)
RULES["unbind"] = _movement(_unbind, True)
RULES["expand"] = _movement(_expand, True)
RULES["flip"] = _movement(_flip, False)
RULES["index_select"] = _movement(_index_select, False)
RULES["channel_shuffle"] = RULES["native_channel_shuffle"] = _movement(_shuffle, False)


def cat(t: Tracer, op: str, args: Any, kwargs: Any, out: Tensor, inplace: bool) -> None:
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.ndim
    # Torch lets a 1-D empty placeholder stand among the parts; it holds nothing.
    parts = [x for x in args[0] if x.ndim == out.ndim]
    found = [t.labels(x) for x in parts]
    labels = [m for ms in found for m in ms]
    if not labels:
        t.set(out, ())
        return
    t.record(labels)
    if any(len(ms) > 1 for ms in found):
        t.pin(labels, "two channels meet on one element")
        t.set(out, ())
        return
    axes = frozenset().union(*(m.axes for m in labels))
    sources = frozenset().union(*(m.sources for m in labels))
    clean = all(m.clean for m in labels)
    whole = []
    for x, ms in zip(parts, found, strict=True):
        ids = ms[0].ids if ms else torch.full([1] * x.ndim, ANONYMOUS)
        whole.append(ids.expand([n if a in axes else 1 for a, n in enumerate(x.shape)]))
    if dim in axes:
        ids = torch.cat(whole, dim)
    else:  # along space: the parts lie over one another, so their channels are one
        ids = whole[0]
        for other in whole[1:]:
            t.unite(ids, other)
    t.set(out, [Labels(ids, axes, clean, sources)])


def pad(t: Tracer, op: str, args: Any, kwargs: Any, out: Tensor, inplace: bool) -> None:
    x, widths, value = (*args, 0)[:3]
    padded = {x.ndim - 1 - k // 2 for k, width in enumerate(widths) if width}
    found = t.labels(x)
    t.record(found, widths)
    result = []
    for m in found:
        if m.axes & padded:
            t.expose([m])
            t.pin(m.ids, "channels are padded by a constant width")
        else:
            result.append(m._replace(clean=m.clean and value == 0))
    t.set(out, result)


RULES["cat"] = cat
RULES["constant_pad_nd"] = pad
