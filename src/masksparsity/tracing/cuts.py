"""Pieces of an axis: what Python has to do right with other widths than the traced ones.

Where code takes pieces of an axis, their lengths come from somewhere; where it puts positions of
several pieces side by side, these positions live and die together.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .labels import Labels
from .tracer import Rule, Tracer


def rows(ids: Tensor, axis: int) -> Tensor:
    """[others, length of `axis`]: the labels along an axis, a row for every place on the others."""
    length = ids.shape[axis]
    return ids.movedim(axis, -1).reshape(ids.numel() // max(1, length), length)


def split(t: Tracer, x: Tensor, m: Labels, sizes: Any, dim: int = 0) -> None:
    """The pieces of a split or a chunk; lengths that are listed may be written down."""
    if dim % x.ndim in m.axes:
        whole = rows(m.ids, dim)
        listed, pieces = isinstance(sizes, (list, tuple)), whole.split(sizes, 1)
        t.cut(whole, pieces, sizes if listed else ())
        if not listed and pieces[-1].shape != pieces[0].shape:
            t.pin(whole, "taken apart into pieces of unequal length")


def slices(
    t: Tracer, x: Tensor, m: Labels, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> None:
    """Three pieces: a slice, and the rest on both sides. A strided one is left to the proof."""
    if dim % x.ndim not in m.axes or step != 1:
        return
    length = x.shape[dim]
    start, end, _ = slice(start, end).indices(length)
    if end - start < length:
        whole = rows(m.ids, dim)
        t.cut(whole, whole.split([start, end - start, length - end], 1), (start, end))


def permute(t: Tracer, x: Tensor, m: Labels, dims: Sequence[int]) -> None:
    """Axes that change places: read in the new order, the pieces stand side by side."""
    order = [d % x.ndim for d in dims if d % x.ndim in m.axes]
    if order != sorted(order):
        t.unite(m.ids, m.ids.narrow(min(order), 0, 1))


def transpose(t: Tracer, x: Tensor, m: Labels, a: int, b: int) -> None:
    """Two axes that change places."""
    permute(t, x, m, swapped(x.ndim, a, b))


def swapped(ndim: int, a: int, b: int) -> list[int]:
    """The order of axes when two have changed places."""
    order = list(range(ndim))
    order[a], order[b] = order[b], order[a]
    return order


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


def shuffle(t: Tracer, op: str, args: Any, kwargs: Any, out: Tensor, inplace: bool) -> None:
    """Channels in `groups` rows, read column by column."""
    x, groups = args
    result = []
    for m in t.labels(x):
        if 1 in m.axes:
            table = m.ids.movedim(1, 0).unflatten(0, (groups, -1))
            t.unite(table, table[:1])
            m = m._replace(ids=torch.channel_shuffle(m.ids, groups))
        result.append(m)
    t.set(out, result)


RULES: dict[str, Rule] = {
    "glu": glu,
    "channel_shuffle": shuffle,
    "native_channel_shuffle": shuffle,
}
