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
    """The shortest runs of old and new axes that hold the same number of elements. Where an axis of
    size 1 could go with either neighbour, trailing axes that stay as they are stay alone: so a lone
    channel goes with the batch in (b, 1, h, w) -> (1, b, h, w), and with space in a flatten."""
    same = 0
    while same + 1 < min(len(old), len(new)) and 1 < old[-1 - same] == new[-1 - same]:
        same += 1
    runs, kept = _leading(old[: len(old) - same], new[: len(new) - same]), range(-same, 0)
    return runs + [([len(old) + k], [len(new) + k]) for k in kept]


def _leading(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
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


def _repeat(x: Tensor, m: Labels, times: Sequence[int]) -> Labels:
    m = _expand(x, m, [1] * (len(times) - x.ndim) + list(x.shape))
    return m._replace(ids=m.ids.repeat([n if a in m.axes else 1 for a, n in enumerate(times)]))


def _roll(x: Tensor, m: Labels, shifts: Any, dims: Any = ()) -> Labels:
    if not dims:  # over the flattened tensor
        full = m.ids.expand(x.shape)
        return m._replace(ids=torch.roll(full, shifts), axes=frozenset(range(x.ndim)))
    return m._replace(ids=torch.roll(m.ids, shifts, dims))


def _windows(x: Tensor, m: Labels, dim: int, size: int, step: int) -> Labels:
    if dim % x.ndim in m.axes:
        return m._replace(ids=m.ids.unfold(dim, size, step), axes=m.axes | {x.ndim})
    return m._replace(ids=m.ids.unsqueeze(-1))


def _pixel_shuffle(x: Tensor, m: Labels, factor: int) -> Labels:
    axes = frozenset({x.ndim - 3, x.ndim - 2, x.ndim - 1})
    if m.axes.isdisjoint(axes):
        return m
    full = m.ids.expand(*m.ids.shape[:-3], *x.shape[-3:])
    return m._replace(ids=torch.pixel_shuffle(full, factor), axes=m.axes | axes)


def _pixel_unshuffle(x: Tensor, m: Labels, factor: int) -> Labels:
    if m.axes.isdisjoint({x.ndim - 2, x.ndim - 1}):
        ids = m.ids.expand(*m.ids.shape[:-3], x.shape[-3], 1, 1) if x.ndim - 3 in m.axes else m.ids
        channels = x.ndim - 3 in m.axes
        return m._replace(ids=ids.repeat_interleave(factor**2, -3) if channels else ids)
    full = m.ids.expand(*m.ids.shape[:-3], *x.shape[-3:])
    axes = m.axes | {x.ndim - 3, x.ndim - 2, x.ndim - 1}
    return m._replace(ids=torch.pixel_unshuffle(full, factor), axes=axes)


def _movement(move: Callable[..., Any], alias: bool) -> Rule:
    def apply(t: Tracer, op: str, args: Any, kwargs: Any, out: Any, inplace: bool) -> None:
        x, *rest = args
        if alias:
            t.viewed(x)
            if move is _same:  # `detach` and `.data` do not say that they are views
                t.viewed(out)
            if op.startswith("unsafe_"):  # nor do these
                for part in out:
                    t.viewed(part)
        found = t.labels(x)
        if not found and not hasattr(out, "_masksparsity_labels"):
            return
        named = {k: v for k, v in kwargs.items() if k in ("dim", "start", "end", "step", "index")}
        if move in _CUTS and not t.given:
            for m in found:
                _CUTS[move](t, x, m, *rest, **named)
        moved = [move(x, m, *rest, **named) if move is not _same else m for m in found]
        for k, result in enumerate(out if isinstance(out, (tuple, list)) else [out]):
            t.set(result, [m[k] if isinstance(m, list) else m for m in moved])

    return apply


def _reshape(t: Tracer, op: str, args: Any, kwargs: Any, out: Tensor, inplace: bool) -> None:
    x = args[0]
    t.viewed(x)
    found = t.labels(x)
    if found or hasattr(out, "_masksparsity_labels"):
        new = tuple(out.shape)
        for m in found:
            _unflatten(t, x, m, new)
        moved = [_view(x, m, new) for m in found]
        t.set(out, moved)
        if tuple(x.shape) != new and not t.given:
            for m in moved:
                if len(m.axes) == 1:  # its length may be written down
                    t.cut(_rows(m.ids, *m.axes), ())


# What Python has to do right with other widths than the traced ones. Where code takes pieces of an
# axis, their lengths come from somewhere; where it puts positions of several pieces side by side,
# these positions live and die together.


def _rows(ids: Tensor, axis: int) -> Tensor:
    length = ids.shape[axis]
    return ids.movedim(axis, -1).reshape(ids.numel() // max(1, length), length)


def _cut_split(t: Tracer, x: Tensor, m: Labels, sizes: Any, dim: int = 0) -> None:
    if dim % x.ndim in m.axes:
        rows = _rows(m.ids, dim)
        listed = isinstance(sizes, (list, tuple))
        t.cut(rows, rows.split(sizes, 1), sizes if listed else ())


def _cut_slice(
    t: Tracer, x: Tensor, m: Labels, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> None:
    if dim % x.ndim not in m.axes or step != 1:
        return
    length = x.shape[dim]
    start, end, _ = slice(start, end).indices(length)
    if end - start < length:
        rows = _rows(m.ids, dim)
        t.cut(rows, rows.split([start, end - start, length - end], 1), (start, end))


def glu(t: Tracer, op: str, args: Any, kwargs: Any, out: Tensor, inplace: bool) -> None:
    """The first half of an axis, gated by the second."""
    x, dim = (*args, -1)[:2]
    found = t.labels(x)
    t.record(found)
    t.expose(found)
    result = []
    for m in found:
        ids = m.ids
        if dim % x.ndim in m.axes:
            ids, gate = ids.chunk(2, dim)
            t.unite(ids, gate)
        result.append(m._replace(ids=ids, sources=frozenset()))
    t.set(out, result)


RULES["glu"] = glu


def _align(t: Tracer, x: Tensor, m: Labels, dims: Sequence[int]) -> None:
    """Axes that change places: read in the new order, the pieces stand side by side."""
    order = [d % x.ndim for d in dims if d % x.ndim in m.axes]
    if order != sorted(order):
        t.unite(m.ids, m.ids.narrow(min(order), 0, 1))


def _align_two(t: Tracer, x: Tensor, m: Labels, a: int, b: int) -> None:
    order = list(range(x.ndim))
    order[a], order[b] = order[b], order[a]
    _align(t, x, m, order)


def _unflatten(t: Tracer, x: Tensor, m: Labels, new: tuple[int, ...]) -> None:
    if t.given or tuple(x.shape) == new:
        return
    for olds, news in _runs(tuple(x.shape), new):
        long = [a for a in news if new[a] > 1]
        if len(long) > 1 and len([a for a in olds if x.shape[a] > 1]) == 1 and olds[0] in m.axes:
            rows = _rows(m.ids, olds[0])
            t.cut(rows, [rows.reshape(-1, new[long[-1]])], tuple(new[a] for a in long))


_CUTS: dict[Any, Callable[..., None]] = {
    _split: _cut_split,
    _slice: _cut_slice,
    _permute: _align,
    _transpose: _align_two,
}


def shuffle(t: Tracer, op: str, args: Any, kwargs: Any, out: Tensor, inplace: bool) -> None:
    """Channels in `groups` rows, read column by column."""
    x, groups = args
    result = []
    for m in t.labels(x):
        if 1 in m.axes:
            rows = m.ids.movedim(1, 0).unflatten(0, (groups, -1))
            t.unite(rows, rows[:1])
            m = m._replace(ids=torch.channel_shuffle(m.ids, groups))
        result.append(m)
    t.set(out, result)


RULES["channel_shuffle"] = RULES["native_channel_shuffle"] = shuffle


RULES.update(
    dict.fromkeys(["view", "_unsafe_view", "reshape", "_reshape_alias", "flatten"], _reshape)
)
RULES.update(dict.fromkeys(["clone", "contiguous", "_to_copy", "to"], _movement(_same, False)))
RULES.update(dict.fromkeys(("detach", "alias"), _movement(_same, True)))
RULES["permute"] = _movement(_permute, True)
RULES["transpose"] = _movement(_transpose, True)
RULES["t"] = _movement(lambda x, m: _transpose(x, m, 0, 1) if x.ndim == 2 else m, True)
RULES["unsqueeze"] = _movement(_unsqueeze, True)
RULES["squeeze"] = _movement(_squeeze, True)
RULES["slice"] = _movement(_slice, True)
RULES["select"] = _movement(_select, True)
RULES["split"] = RULES["split_with_sizes"] = _movement(_split, True)
RULES["unsafe_split"] = RULES["unsafe_split_with_sizes"] = RULES["split"]
RULES["unbind"] = _movement(_unbind, True)
RULES["expand"] = _movement(_expand, True)
RULES["flip"] = _movement(_flip, False)
RULES["index_select"] = _movement(_index_select, False)
RULES["repeat"] = _movement(_repeat, False)
RULES["roll"] = _movement(_roll, False)
RULES["unfold"] = _movement(_windows, True)
RULES["pixel_shuffle"] = _movement(_pixel_shuffle, False)
RULES["pixel_unshuffle"] = _movement(_pixel_unshuffle, False)


def cat(t: Tracer, op: str, args: Any, kwargs: Any, out: Tensor, inplace: bool) -> None:
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.ndim
    # Torch lets a 1-D empty placeholder stand among the parts; it holds nothing.
    parts = [x for x in args[0] if x.ndim == out.ndim]
    _join(t, out, dim, [x.shape for x in parts], [t.labels(x) for x in parts])


def stack(t: Tracer, op: str, args: Any, kwargs: Any, out: Tensor, inplace: bool) -> None:
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.ndim
    shape = torch.Size(1 if a == dim else n for a, n in enumerate(out.shape))
    found = [tuple(_unsqueeze(x, m, dim) for m in t.labels(x)) for x in args[0]]
    _join(t, out, dim, [shape] * len(found), found)


def index(t: Tracer, op: str, args: Any, kwargs: Any, out: Tensor, inplace: bool) -> None:
    """`x[:, i, j]` with integer tensors, along axes that hold no channels."""
    x, indices = args[:2]
    places = [k for k, i in enumerate(indices) if i is not None]
    found = t.labels(x)
    chosen = [m for i in indices if i is not None for m in t.labels(i)]
    if not found and not chosen:
        t.set(out, ())
        return
    whole = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)
    if whole or chosen or places != list(range(places[0], places[-1] + 1)):
        t.unknown(args, kwargs, out)
        return
    lost = [m for m in found if not m.axes.isdisjoint(places)]
    t.expose(lost)
    t.pin(lost, "channels are picked by an index")
    first, more = places[0], out.ndim - x.ndim
    result = []
    for m in found:
        if m.axes.isdisjoint(places):
            ids = m.ids.flatten(first, places[-1]) if len(places) > 1 else m.ids
            ids = ids.view(*ids.shape[:first], *[1] * (len(places) + more), *ids.shape[first + 1 :])
            axes = frozenset(a + more if a > first else a for a in m.axes)
            result.append(m._replace(ids=ids, axes=axes))
    t.set(out, result)


def embedding(t: Tracer, op: str, args: Any, kwargs: Any, out: Tensor, inplace: bool) -> None:
    """Rows of a table."""
    table, places = args[:2]
    found = t.labels(table)
    lost = [*t.labels(places), *(m for m in found if 0 in m.axes)]
    t.expose(lost)
    t.pin(lost, "channels are picked by an index")
    last, before = frozenset({places.ndim}), [1] * places.ndim
    passing = [m for m in found if m.axes == {1}]
    t.set(out, [m._replace(ids=m.ids.reshape([*before, -1]), axes=last) for m in passing])


def _join(
    t: Tracer, out: Tensor, dim: int, shapes: list[torch.Size], found: list[tuple[Labels, ...]]
) -> None:
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
    for shape, ms in zip(shapes, found, strict=True):
        ids = ms[0].ids if ms else torch.full([1] * len(shape), ANONYMOUS)
        if not ms or ms[0].axes != axes:
            ids = ids.expand([n if a in axes else 1 for a, n in enumerate(shape)])
        whole.append(ids)
    if dim in axes:
        ids = torch.cat(whole, dim)
    else:  # along space: the parts lie over one another, so their channels are one
        ids = whole[0]
        for other in whole[1:]:
            t.unite(ids, other)
    t.set(out, [Labels(ids, axes, clean, sources)])


def pad(t: Tracer, op: str, args: Any, kwargs: Any, out: Tensor, inplace: bool) -> None:
    """By a constant: over space it passes channels, over channels it protects them."""
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


RULES["cat"], RULES["stack"], RULES["index"] = cat, stack, index
RULES["constant_pad_nd"], RULES["embedding"] = pad, embedding


_FEW = 64  # values of a tensor made in forward that are compared


def lift(t: Tracer, op: str, args: Any, kwargs: Any, out: Tensor, inplace: bool) -> None:
    """`torch.tensor(...)` in forward: its values may follow from a width."""
    t.record((), out.flatten().tolist() if out.numel() <= _FEW else ())


def restride(t: Tracer, op: str, args: Any, kwargs: Any, out: Tensor, inplace: bool) -> None:
    """Only where all but batch and channels is of size 1, as pooling to 1x1 in channels_last does:
    then the shape says it all."""
    x, size, stride = args[:3]
    if list(x.shape) == list(size) == [*size[:2], *[1] * (len(size) - 2)] and stride[1] == 1:
        t.viewed(x)
        t.set(out, t.labels(x))
    else:
        t.unknown(args, kwargs, out)


RULES["lift_fresh"], RULES["as_strided"] = lift, restride
