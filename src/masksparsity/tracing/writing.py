"""Tensors that forward makes from sizes and numbers, and fills in place: `out[:, :8] = a`.

A tensor made from sizes alone is a canvas. As long as copies into slices of it are all that it
gets, and nobody holds a view of it, it is known which channel every element came from.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import pointwise
from .findings import numbers, rounded
from .labels import ANONYMOUS, Labels
from .memory import Canvas, is_viewed, root
from .tracer import Rule, Tracer

_EMPTY = -1  # no channel was written here


class _Place(NamedTuple):
    """Where in a tensor a slice of it lies."""

    axes: tuple[int | None, ...]
    """Of each axis of the slice, that of the tensor; None for one of length 1 that may be any."""
    region: tuple[slice, ...]


def _place(whole: Tensor, view: Tensor) -> _Place | None:
    """None for what is no slice, or has its axes in another order."""
    long = [j for j, n in enumerate(whole.shape) if n > 1]
    offset, starts = int(view.storage_offset() - whole.storage_offset()), [0] * whole.ndim
    if any(not whole.stride(j) for j in long):
        return None
    long.sort(key=whole.stride, reverse=True)
    for j in long:
        starts[j], offset = divmod(offset, whole.stride(j))
    region, axes = [slice(k, k + 1) for k in starts], list[int | None]()
    for n, stride in zip(view.shape, view.stride(), strict=True):
        axes.append(next((j for j in long if n > 1 and whole.stride(j) <= stride), None))
        if n == 1:
            continue
        if (axis := axes[-1]) is None or stride % whole.stride(axis):
            return None
        step = stride // whole.stride(axis)
        region[axis] = slice(starts[axis], starts[axis] + step * (n - 1) + 1, step)
        if region[axis].stop > whole.shape[axis]:
            return None
    if view.ndim == whole.ndim and all(j in (None, k) for k, j in enumerate(axes)):
        axes = [*range(view.ndim)]  # none is gone: a lone channel lies where its companions lay
    found = [j for j in axes if j is not None]
    fits = found == sorted(set(found)) and not offset and view.dtype == whole.dtype
    return _Place((*axes,), (*region,)) if fits else None


class _Copy(NamedTuple):
    """A copy into a slice of a canvas."""

    labels: Labels
    axes: frozenset[int]
    """Of the canvas, along which the channels lie."""
    place: _Place
    origin: _Place | None
    """Where in the same canvas it comes from."""


def copy(t: Tracer, op: str, args: Any, kwargs: Any, out: Any, inplace: bool) -> None:
    """Elementwise; into a slice of a canvas, it puts channels there."""
    target, source = args[:2]
    canvas = t.memory.canvases.get(root(target))
    known = _understood(t, canvas, target, source) if canvas is not None else None
    if known is None:
        t.memory.overwrite(target)
        pointwise.RULES["copy"](t, op, args, kwargs, out, inplace)
    else:
        _write(t, canvas, target, source.ndim, known)


def _understood(t: Tracer, canvas: Canvas, target: Tensor, source: Tensor) -> _Copy | None:
    """None for more than channels side by side, and where others see what is written."""
    whole, found = root(target), t.labels(source)
    place, own = _place(whole, target), root(source) is whole
    origin = _place(whole, source) if own else None
    held = {id(view()) for view in canvas.views} - {id(None), id(target), id(source)}
    unclear = own and (origin is None or source.shape != target.shape)
    if len(found) != 1 or place is None or held or unclear:
        return None
    (m,), shift = found, target.ndim - source.ndim
    axes = frozenset(j for a in m.axes if (j := place.axes[a + shift]) is not None)
    spread = any(source.shape[a] != target.shape[a + shift] for a in m.axes)
    across = canvas.ids is not None and canvas.axes != axes
    return None if len(axes) < len(m.axes) or spread or across else _Copy(m, axes, place, origin)


def _write(t: Tracer, canvas: Canvas, target: Tensor, ndim: int, known: _Copy) -> None:
    """ndim: of the source"""
    whole, (m, axes, place, origin) = root(target), known
    if canvas.ids is None:
        sizes = [n if a in axes else 1 for a, n in enumerate(whole.shape)]
        canvas.ids, canvas.axes = torch.full(sizes, _EMPTY), axes
    others = [r for a, r in enumerate(place.region) if a not in axes]
    t.record([m], [(r.start, r.stop, r.step) for r in others])
    t.expose([m])
    region = tuple(r if a in axes else slice(None) for a, r in enumerate(place.region))
    here = canvas.ids[region]
    new = m.ids.reshape(here.shape)
    kept = torch.where(here == _EMPTY, new, here)
    t.unite(kept, new)  # one over the other, or side by side in space: one channel
    canvas.ids = canvas.ids.clone()
    canvas.ids[region] = kept
    canvas.clean &= m.clean or origin is not None
    if not canvas.zero:
        _cover(canvas, whole, place, origin)
    clean = canvas.clean and (canvas.covered is None or bool(canvas.covered.all()))
    t.set(whole, [Labels(canvas.ids.clamp(min=ANONYMOUS), axes, clean)])
    if target is not whole:
        shift = target.ndim - ndim
        ids, along = m.ids.view([1] * shift + [*m.ids.shape]), frozenset(a + shift for a in m.axes)
        t.set(target, [Labels(ids, along, m.clean and origin is None)])


def _cover(canvas: Canvas, whole: Tensor, place: _Place, origin: _Place | None) -> None:
    """Something known is written there; or, from elsewhere in the canvas, what is known of that."""
    if canvas.covered is None:
        canvas.covered = torch.zeros(whole.shape, dtype=torch.bool)
    known = canvas.covered[origin.region].clone() if origin else torch.tensor(True)
    part = canvas.covered[place.region]
    canvas.covered[place.region] = known.view(part.shape) if origin else known


_FEW = 64  # values of a tensor made in forward that are compared one by one


def values_of(x: Tensor) -> list[Any]:
    """The values of a tensor, or of a long one their sum, and one that tells their order."""
    flat = x.flatten()
    if len(flat) > _FEW and not x.is_complex():
        flat = flat.double()
        flat = torch.stack([flat.sum(), flat @ torch.arange(1, len(flat) + 1).to(flat)])
    return [rounded(value.item()) for value in flat]


def lift(t: Tracer, op: str, args: Any, kwargs: Any, out: Tensor, inplace: bool) -> None:
    """`torch.tensor(...)` in forward: its values may follow from a width."""
    values = values_of(out)
    t.record((), values)
    if not out.ndim:
        t.memory.make(out, values == [0] and not t.decided)


def blank(t: Tracer, op: str, args: Any, kwargs: Any, out: Any, inplace: bool) -> None:
    """Made from nothing but sizes and a number; noise of a generator of its own may be the same
    each time, and each channel's another."""
    if kwargs.get("generator") is not None:
        t.unknown(args, kwargs, out)
        return
    t.memory.make(out, "zeros" in op or (0 in numbers(args) and not t.decided))


def filled(t: Tracer, op: str, args: Any, kwargs: Any, out: Any, inplace: bool) -> None:
    """Noise or one value, written over what was there."""
    zero = op == "zero" or (op == "fill" and t.memory.is_zero(args[1]))
    found = t.labels(out)
    by = [m for a in args[1:] if isinstance(a, Tensor) for m in t.labels(a)]
    if inplace and zero and found and id(out) not in t.names:  # its zeros stay zero
        t.record(found)
        t.expose(found)
    elif inplace and not found and not by and not is_viewed(out):
        t.memory.make(out, zero)
    else:
        t.unknown(args, kwargs, out)


BLANK = """empty empty_like new_empty empty_strided zeros zeros_like new_zeros ones ones_like
new_ones full full_like new_full scalar_tensor rand rand_like randn randn_like"""
FILLED = ("bernoulli", "uniform", "normal", "exponential", "zero", "fill")

RULES: dict[str, Rule] = {
    **dict.fromkeys(BLANK.split(), blank),
    **dict.fromkeys(FILLED, filled),
    "copy": copy,
    "lift_fresh": lift,
}
