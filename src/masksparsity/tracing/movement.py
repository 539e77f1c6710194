"""Data movement: the same call, on the labels.

Labels are broadcast, so a move along an axis where they do not vary leaves them as they are.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from . import cuts
from .findings import extents, numbers
from .labels import Labels
from .memory import root
from .tracer import Rule, Tracer


def _same(x: Tensor, m: Labels, args: Any) -> Labels:
    return m


def _permute(x: Tensor, m: Labels, dims: Sequence[int]) -> Labels:
    order = [d % x.ndim for d in dims]
    axes = frozenset(order.index(a) for a in m.axes)
    return m._replace(ids=m.ids.permute(order), axes=axes)


def _transpose(x: Tensor, m: Labels, a: int, b: int) -> Labels:
    return _permute(x, m, cuts.swapped(x.ndim, a, b))


def unsqueeze(x: Tensor, m: Labels, dim: int) -> Labels:
    """A new axis of size 1 holds no channels."""
    dim %= x.ndim + 1
    return m._replace(ids=m.ids.unsqueeze(dim), axes=frozenset(a + (a >= dim) for a in m.axes))


def _as_real(x: Tensor, m: Labels) -> Labels:
    return unsqueeze(x, m, -1)


def _as_complex(x: Tensor, m: Labels) -> Labels:
    return _select(x, m, -1, 0)


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
    # One channel by itself, copied beside others, is labelled by no axis.
    axes = [a + shift for a in m.axes if x.shape[a] > 1 or size[a + shift] in (1, -1)]
    return m._replace(ids=m.ids.view([1] * shift + list(m.ids.shape)), axes=frozenset(axes))


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
            t.memory.share(x, out if isinstance(out, (tuple, list)) else [out])
            if move is _same:  # `detach` and `.data` do not say that they are views
                t.memory.share(out)
            if op.startswith("unsafe_"):  # nor do these
                for part in out:
                    t.memory.share(part)
        found = t.labels(x)
        if not found and not t.is_labelled(out):
            # Which of its values come where may follow from a width, unless all are alike.
            if t.memory.is_untouched(x):
                if move is _select:
                    t.record((), numbers(rest))
                if not alias:
                    t.memory.make(out, t.memory.canvases[root(x)].zero)
            elif move is _same and not alias:
                t.memory.made_of([x], out)
            elif move is not _same:
                how = [] if _repeats_values(t, move, x, rest) else numbers(tree_leaves(rest))
                t.record((), [*extents(x), *how])
                if move is _repeat:
                    t.memory.made_of([x], out)
            return
        named = {k: v for k, v in kwargs.items() if k in ("dim", "start", "end", "step", "index")}
        if move in _CUTS and not t.given:
            for m in found:
                _CUTS[move](t, x, m, *rest, **named)
        moved = [move(x, m, *rest, **named) if move is not _same else m for m in found]
        for k, result in enumerate(out if isinstance(out, (tuple, list)) else [out]):
            t.set(result, [m[k] if isinstance(m, list) else m for m in moved])
        channels = frozenset().union(*(m.axes for m in found))
        if move in _PLACES and (places := _PLACES[move](x, channels, *rest, **named)):
            t.record([m for m in found if bool(m.ids.all())], places)  # as far as they are known

    return apply


def _reordered(x: Tensor, channels: frozenset[int], order: Sequence[int]) -> Sequence[Any]:
    others = [d for d in order if d not in channels and x.shape[d] > 1]
    return [] if others == sorted(others) else others


def _flipped(x: Tensor, channels: frozenset[int], dims: Sequence[int]) -> Sequence[Any]:
    return [d % x.ndim for d in dims if d % x.ndim not in channels]


def _rolled(
    x: Tensor, channels: frozenset[int], shifts: Any, dims: Sequence[int] = ()
) -> Sequence[Any]:
    return [*shifts, *dims] if _flipped(x, channels, dims) else []


def _at(x: Tensor, channels: frozenset[int], dim: int = 0, *how: Any) -> Sequence[Any]:
    return [] if dim % x.ndim in channels else [dim % x.ndim, *numbers(how)]


def _sliced(
    x: Tensor,
    channels: frozenset[int],
    dim: int = 0,
    start: Any = None,
    end: Any = None,
    step: int = 1,
) -> Sequence[Any]:
    start, end, step = slice(start, end, step).indices(x.shape[dim])
    whole = end - start == x.shape[dim] and step == 1
    return [] if whole else _at(x, channels, dim, start, step)


_PLACES: dict[Any, Callable[..., Sequence[Any]]] = {
    _permute: lambda x, c, dims: _reordered(x, c, [d % x.ndim for d in dims]),
    _transpose: lambda x, c, a, b: _reordered(x, c, cuts.swapped(x.ndim, a, b)),
    _flip: _flipped,
    _roll: _rolled,
    _slice: _sliced,
    _select: _at,
    _windows: _at,
    _unbind: _at,
    _index_select: _at,
}
"""Where a movement goes along the axes of x without channels: that might follow from a width."""


def _repeats_values(t: Tracer, move: Callable[..., Any], x: Tensor, rest: Any) -> bool:
    """Whether it repeats single values only, as often as the shape of the result says."""
    if move is not _repeat:
        return move is _expand
    axes = enumerate(rest[0], x.ndim - len(rest[0]))
    return all(n == 1 or not t.memory.varies(x, axis) for axis, n in axes)


_CUTS: dict[Any, Callable[..., None]] = {
    _split: cuts.split,
    _slice: cuts.slices,
    _permute: cuts.permute,
    _transpose: cuts.transpose,
}

RULES: dict[str, Rule] = {}
RULES.update(dict.fromkeys(["clone", "contiguous", "_to_copy", "to"], _movement(_same, False)))
RULES.update(dict.fromkeys(("detach", "alias"), _movement(_same, True)))
RULES["permute"] = _movement(_permute, True)
RULES["transpose"] = _movement(_transpose, True)
RULES["t"] = _movement(lambda x, m: _transpose(x, m, 0, 1) if x.ndim == 2 else m, True)
RULES["unsqueeze"] = _movement(unsqueeze, True)
RULES["_conj"] = _movement(_same, True)
RULES["view_as_real"] = _movement(_as_real, True)
RULES["view_as_complex"] = _movement(_as_complex, True)
RULES["squeeze"] = _movement(_squeeze, True)
RULES["slice"] = _movement(_slice, True)
RULES["select"] = _movement(_select, True)
RULES["split"] = RULES["split_with_sizes"] = _movement(_split, True)
RULES["unsafe_split"] = RULES["unsafe_split_with_sizes"] = RULES["split"]
RULES["unbind"] = _movement(_unbind, True)
RULES["expand"] = _movement(_expand, True)
RULES["flip"] = _movement(_flip, False)
_SELECTION = _movement(_index_select, False)
RULES["repeat"] = _movement(_repeat, False)
RULES["roll"] = _movement(_roll, False)
RULES["unfold"] = _movement(_windows, True)
RULES["pixel_shuffle"] = _movement(_pixel_shuffle, False)
RULES["pixel_unshuffle"] = _movement(_pixel_unshuffle, False)


def index_select(t: Tracer, op: str, args: Any, kwargs: Any, out: Tensor, inplace: bool) -> None:
    """Places along one axis, in any order."""
    x, dim, places = args
    if t.labels(places):
        t.unknown(args, kwargs, out)
        return
    if id(places) not in t.names and any(dim % x.ndim in m.axes for m in t.labels(x)):
        t.mattered = True  # which channels they are may have been computed
    _SELECTION(t, op, args, kwargs, out, inplace)


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


def restride(t: Tracer, op: str, args: Any, kwargs: Any, out: Tensor, inplace: bool) -> None:
    """Only where all but batch and channels is of size 1, as pooling to 1x1 in channels_last does:
    then the shape says it all."""
    x, size, stride = args[:3]
    if list(x.shape) == list(size) == [*size[:2], *[1] * (len(size) - 2)] and stride[1] == 1:
        t.memory.share(x, [out])
        t.set(out, t.labels(x))
    else:
        t.numbers = (str(args[1:]),)
        t.unknown(args, kwargs, out)


RULES["embedding"], RULES["index_select"] = embedding, index_select
RULES["as_strided"] = restride
