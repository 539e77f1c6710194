"""Values picked and put by index: along axes that hold no channels, channels pass."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .findings import aside
from .labels import Labels
from .pointwise import RULES as POINTWISE
from .tracer import Rule, Tracer

_Part = tuple[Any, Sequence[Labels]]
"""A tensor, or a number, and its labels as they lie along the axes of what it is laid into."""


def _part(t: Tracer, value: Any) -> _Part:
    return value, t.labels(value) if isinstance(value, Tensor) else ()


class _Block(NamedTuple):
    """Where `x[:, i, j]` picks."""

    places: range
    """The axes of x that it picks along, side by side."""
    ndim: int
    """How many axes there are in place of them."""

    def back(self, axis: int) -> int | None:
        """The axis of x that one of the result is; None for those of the index."""
        if axis < self.places.start:
            return axis
        later = axis - self.ndim + len(self.places)
        return later if later >= self.places.stop else None


def _block(indices: list[Tensor | None]) -> _Block | None:
    """None if the axes are not side by side."""
    places, axis = list[int](), 0
    for i in indices:
        width = i.ndim if i is not None and i.dtype in (torch.bool, torch.uint8) else 1
        places += [] if i is None else range(axis, axis + width)
        axis += width
    if not places or places != [*range(places[0], places[-1] + 1)]:
        return None
    given = [i for i in indices if i is not None]
    axes = max(1 if i.dtype in (torch.bool, torch.uint8) else i.ndim for i in given)
    return _Block(range(places[0], places[-1] + 1), axes)


def index(t: Tracer, op: str, args: Any, kwargs: Any, out: Tensor, inplace: bool) -> None:
    """`x[:, i, j]`, or by a mask, along axes that hold no channels."""
    x, indices = args[:2]
    found, block = t.labels(x), _block(indices)
    given = [i for i in indices if i is not None]
    chosen = [m for i in given for m in t.labels(i)]
    if any(i.dtype in (torch.bool, torch.uint8) for i in given):  # as long as it is true
        t.mattered = True
    if not found and not chosen:
        t.set(out, ())
        return
    if chosen or block is None:
        t.unknown(args, kwargs, out)
        return
    lost = [m for m in found if not m.axes.isdisjoint(block.places)]
    t.expose(lost)
    t.pin(lost, "channels are picked by an index")
    result = []
    for m in found:
        if m.axes.isdisjoint(block.places):
            sizes = [
                m.ids.shape[a] if (a := block.back(k)) in m.axes else 1 for k in range(out.ndim)
            ]
            axes = frozenset(k for k in range(out.ndim) if block.back(k) in m.axes)
            result.append(m._replace(ids=m.ids.reshape(sizes), axes=axes))
    t.record(found, [*block.places, *aside(out, result)])
    t.set(out, result)


def index_put(t: Tracer, op: str, args: Any, kwargs: Any, out: Tensor, inplace: bool) -> None:
    """`x[:, i, j] = value`, and `x[x < 0] = 0`."""
    x, indices, value = args[:3]
    mask, block = indices[0], _block(indices)
    if len(indices) == 1 and mask.dtype == torch.bool and mask.shape == x.shape and not value.ndim:
        t.memory.overwrite(x)
        POINTWISE["masked_fill"](t, op, (x, mask, value), {}, out, inplace)
    elif (
        block is None
        or any(t.labels(i) for i in indices if i is not None)
        or not (t.labels(value) or value.numel() == 1 or t.memory.is_blank(value))
    ):
        t.unknown(args, kwargs, out)
    else:
        t.mattered = True
        shift = x.ndim - len(block.places) + block.ndim - value.ndim
        found = []
        for m in t.labels(value):
            where = {block.back(a + shift) for a in m.axes}
            axes = frozenset(a for a in where if a is not None)
            sizes = [x.shape[a] if a in axes else 1 for a in range(x.ndim)]
            fits = None not in where and all(
                value.shape[a] == x.shape[block.back(a + shift) or 0] for a in m.axes
            )
            if not fits:
                t.unknown(args, kwargs, out)
                return
            found.append(m._replace(ids=m.ids.reshape(sizes), axes=axes))
        _lay(t, args, kwargs, out, inplace, {*block.places}, (value, found))


def scatter(t: Tracer, op: str, args: Any, kwargs: Any, out: Tensor, inplace: bool) -> None:
    """`source` goes to where `places` says, along one axis."""
    x, dim, places, source = args[:4]
    if kwargs.get("reduce") not in (None, "add"):
        t.unknown(args, kwargs, out)
        return
    t.mattered = True
    over, by = {dim % x.ndim}, (places, t.labels(places))
    _lay(t, args, kwargs, out, inplace, over, _part(t, source), places=by)


def gather(t: Tracer, op: str, args: Any, kwargs: Any, out: Tensor, inplace: bool) -> None:
    """Values from where `places` says, along one axis."""
    x, dim, places = args[:3]
    t.mattered = True
    _lay(t, args, kwargs, out, inplace, {dim % x.ndim}, places=(places, t.labels(places)))


def index_add(t: Tracer, op: str, args: Any, kwargs: Any, out: Tensor, inplace: bool) -> None:
    """`source` goes to `places` of one axis, or one value does."""
    x, dim, places, source = args[:4]
    t.mattered = True
    if t.labels(places):
        t.unknown(args, kwargs, out)
        return
    _lay(t, args, kwargs, out, inplace, {dim % x.ndim}, _part(t, source))


def _lay(
    t: Tracer,
    args: Any,
    kwargs: Any,
    out: Tensor,
    inplace: bool,
    over: set[int],
    *parts: _Part,
    places: _Part | None = None,
) -> None:
    """Parts are laid into x = args[0] along `over`, what is of one channel to that channel;
    `places` too has a value for every element."""
    x = args[0]
    laid: list[_Part] = [(x, t.labels(x)), *parts]
    tensors = [*laid, places] if places else laid
    found = [m for _, ms in tensors for m in ms]
    axes = found[0].axes if found else frozenset[int]()
    sizes = torch.Size(n if a in axes else 1 for a, n in enumerate(out.shape))
    if (
        not axes
        or axes & over
        or any(m.axes != axes or m.ids.shape != sizes for m in found)
        or any(len(ms) > 1 or not (ms or _one_value(t, y, axes, out.ndim)) for y, ms in tensors)
        or (places and any(places[0].shape[a] != out.shape[a] for a in axes))
        or (inplace and not t.labels(x) and _is_seen(t, x))
    ):
        t.unknown(args, kwargs, out)
        return
    ids = found[0].ids
    shaped = [y for y in (out, *(y for y, _ in tensors)) if getattr(y, "ndim", -1) == out.ndim]
    t.record(found, [n for y in shaped for n in aside(y, found)])
    t.expose(found)
    for m in found[1:]:
        t.unite(m.ids, ids)
    clean = all(
        ms[0].clean if ms else t.memory.is_zero(y, ids, inplace and y is x) for y, ms in laid
    )
    if inplace:
        t.memory.overwrite(x)
    finite = all(m.finite for m in found)
    t.set(out, [Labels(ids, axes, clean, finite=finite)], inplace)


def _is_seen(t: Tracer, x: Tensor) -> bool:
    """Whether it is no tensor that forward has made and that nothing else shows."""
    canvas = t.memory.canvases.get(x)
    return canvas is None or any(view() is not None for view in canvas.views)


def _one_value(t: Tracer, y: Any, axes: frozenset[int], ndim: int) -> bool:
    """Whether it has one value for all channels."""
    return not isinstance(y, Tensor) or not any(t.memory.varies(y, a - ndim + y.ndim) for a in axes)


RULES: dict[str, Rule] = {
    "index": index,
    "index_put": index_put,
    "_index_put_impl": index_put,
    "gather": gather,
    **dict.fromkeys(("scatter", "scatter_add"), scatter),
    **dict.fromkeys(("index_add", "index_copy", "index_fill"), index_add),
}

PLACING = frozenset(RULES)
"""Operations whose rules see themselves what is known of the memory that they write to."""
