"""Pooling, resizing, reductions: each channel by itself, as long as they are not over channels."""

from typing import Any

from torch import Tensor

from .findings import aside, lengths
from .labels import NOTHING, Labels
from .products import first_of
from .tracer import Rule, Tracer

RULES: dict[str, Rule] = {}


def spatial(t: Tracer, op: str, args: Any, kwargs: Any, out: Any, inplace: bool) -> None:
    """Zero stays zero; all axes before the last one, two or three belong to channels and batch."""
    x, result = args[0], out[0] if isinstance(out, tuple) else out
    dims = next((k for k in (1, 2, 3) if f"{k}d" in op), 2)
    found = t.labels(x)
    sizes = aside(x, found) if found else lengths(x, range(x.ndim - dims, x.ndim))
    t.record(found, [*(a for a in args[1:] if not isinstance(a, Tensor)), *sizes])
    t.expose(found)
    if not found:
        before = range(-x.ndim, -dims)
        t.memory.blank(result, frozenset(a for a in before if not t.memory.varies(x, a + x.ndim)))
    passing = []
    for m in found:
        moving = [a for a in m.axes if a >= x.ndim - dims]
        if moving:  # a pixel shuffle, or channels that lie along space
            _unite_along(t, m, moving)
        if len(moving) == len(m.axes):
            t.pin(m.ids, "channels lie along another axis")
        else:
            ids = m.ids
            for a in moving:
                ids = ids.narrow(a, 0, 1)
            axes = m.axes.difference(moving)
            passing.append(m._replace(ids=ids, axes=axes, sources=NOTHING))
    t.set(result, passing)
    if isinstance(out, tuple):  # where the maxima are
        t.set(out[1], [m._replace(clean=False) for m in passing])


def _unite_along(t: Tracer, m: Labels, axes: Any) -> None:
    first = m.ids
    for a in axes:
        first = first.narrow(a, 0, 1)
    t.unite(m.ids, first)


SPATIAL = """max_pool2d_with_indices max_pool3d_with_indices max_pool1d max_pool2d max_pool3d
avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d
adaptive_max_pool2d adaptive_max_pool3d mkldnn_max_pool2d upsample_nearest1d upsample_nearest2d
upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d
upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d
_upsample_bilinear2d_aa _upsample_bicubic2d_aa reflection_pad1d reflection_pad2d reflection_pad3d
replication_pad1d replication_pad2d replication_pad3d"""
RULES.update(dict.fromkeys(SPATIAL.split(), spatial))


def _reduction(sums: bool, clean: bool = True) -> Rule:
    """`sums`: channels that are zero add nothing, so that one may reduce over them."""

    def apply(t: Tracer, op: str, args: Any, kwargs: Any, out: Any, inplace: bool) -> None:
        x, *rest = args
        adds = sums
        if op in ("linalg_vector_norm", "norm"):
            adds = (
                not rest or rest[0] is None or rest[0] >= 0
            )  # with a negative order, what is zero decides alone
            rest = rest[1:]
        dims = rest[0] if rest else kwargs.get("dim")
        dims = [dims] if isinstance(dims, int) else dims or range(x.ndim)
        keepdim = kwargs.get("keepdim", rest[1] if len(rest) > 1 else False)
        reduced = {d % x.ndim for d in dims}
        found = t.labels(x)
        t.record(found, [*sorted(reduced), *aside(x, found)] if found else
                 lengths(x, sorted(reduced)))  # fmt: skip
        t.expose(found)
        result = []
        for m in found:
            ids, over = m.ids, m.axes & reduced
            if over == m.axes:
                if adds:
                    t.swallow(m)
                else:
                    t.pin(ids, "reduced over channels")
                continue
            if over:  # a sum of several paths: what is added up is one channel
                _unite_along(t, m, over)
                for a in over:
                    ids = ids.narrow(a, 0, 1)
            axes = m.axes - over
            if not keepdim:
                ids = ids.squeeze(tuple(reduced))
                axes = frozenset(a - sum(d < a for d in reduced) for a in axes)
            clean_still = m.clean and clean
            result.append(m._replace(ids=ids, axes=axes, clean=clean_still, sources=NOTHING))
        if not isinstance(out, tuple):
            t.set(out, result)
            return
        for tensor in out:
            places = not tensor.is_floating_point()  # of zeros, any
            t.set(tensor, [m._replace(clean=False) for m in result] if places else result)

    return apply


RULES.update(
    dict.fromkeys(
        ["mean", "amax", "amin", "std", "var", "std_mean", "var_mean", "median"], _reduction(False)
    )
)
RULES.update(
    dict.fromkeys(["sum", "linalg_vector_norm", "norm", "any", "count_nonzero"], _reduction(True))
)
RULES.update(
    dict.fromkeys(["argmax", "argmin", "logsumexp", "prod", "all"], _reduction(False, False))
)


def softmax(t: Tracer, op: str, args: Any, kwargs: Any, out: Tensor, inplace: bool) -> None:
    """Along channels it protects them: each value depends on all. Along other axes they pass."""
    x, axis = args[0], args[1] % args[0].ndim
    found = t.labels(x)
    t.record(found, aside(x, found) if found else lengths(x, [axis]))
    t.expose(found)
    result = []
    for m in found:
        if m.axes == {axis}:
            t.pin(m.ids, "softmax over channels")
            continue
        if axis in m.axes:  # over paths or radixes, channel by channel
            _unite_along(t, m, [axis])
        result.append(m._replace(clean=False, sources=frozenset()))
    t.set(out, result)


RULES["_softmax"] = RULES["_log_softmax"] = softmax


def unfold(t: Tracer, op: str, args: Any, kwargs: Any, out: Tensor, inplace: bool) -> None:
    """Patches: a channel of the input owns a row for every position of the window."""
    x, window = args[0], args[1]
    found = t.labels(x)
    t.record(found, args[1:])
    t.expose(found)
    result = []
    for m in found:
        if m.axes != {x.ndim - 3}:
            t.pin(m.ids, "channels lie along another axis")
            continue
        ids = m.ids.reshape(-1).repeat_interleave(window[0] * window[1])
        ids = ids.view([1] * (x.ndim - 3) + [-1, 1])
        result.append(m._replace(ids=ids, sources=NOTHING))
    t.set(out, result)


def fold(t: Tracer, op: str, args: Any, kwargs: Any, out: Tensor, inplace: bool) -> None:
    """The way back: the rows of one channel are added up."""
    x, _, window = args[:3]
    found = t.labels(x)
    t.record(found, args[1:])
    t.expose(found)
    result = []
    for m in found:
        if m.axes != {x.ndim - 2}:
            t.pin(m.ids, "channels lie along another axis")
            continue
        rows = m.ids.reshape(-1, window[0] * window[1])
        t.unite(rows, rows[:, :1])
        ids = rows[:, 0].view([1] * (x.ndim - 2) + [-1, 1, 1])
        result.append(m._replace(ids=ids, sources=NOTHING))
    t.set(out, result)


RULES["im2col"], RULES["col2im"] = unfold, fold


def roi_align(t: Tracer, op: str, args: Any, kwargs: Any, out: Tensor, inplace: bool) -> None:
    """Boxes cut out of a feature map, channel by channel."""
    x, boxes = args[:2]
    out = first_of(out)
    t.pin(t.labels(boxes), "values become positions")
    found = t.labels(x)
    t.record(found, args[2:])
    t.expose(found)
    t.pin([m for m in found if m.axes != {1}], "channels lie along another axis")
    t.set(out, [m._replace(sources=frozenset()) for m in found if m.axes == {1}])
    if not found and not t.memory.varies(x, 1):
        t.memory.blank(out, frozenset({1 - out.ndim}))


def unpool(t: Tracer, op: str, args: Any, kwargs: Any, out: Tensor, inplace: bool) -> None:
    """Values go back to where their channel's maxima were."""
    found, places = t.labels(args[0]), t.labels(args[1])
    t.record([*found, *places], [args[2:]])
    t.expose([*found, *places])
    if len(found) == len(places) == 1 and found[0].axes == places[0].axes == {1}:
        t.unite(found[0].ids, places[0].ids)
        t.set(out, [found[0]._replace(sources=frozenset())])
    else:
        t.pin([*found, *places], "channels lie along another axis")
        t.set(out, ())


def order(t: Tracer, op: str, args: Any, kwargs: Any, out: Any, inplace: bool) -> None:
    """Values in order, or added up, along an axis: what else they are labelled by passes."""
    x, place = args[0], 2 if op == "topk" else 1
    dim = (args[place] if len(args) > place else kwargs.get("dim", -1)) % x.ndim
    found = t.labels(x)
    t.record(found, [dim, *(aside(x, found) if found else lengths(x, [dim]))])
    t.expose(found)
    t.pin([m for m in found if dim in m.axes], "in order over channels")
    passing = [m._replace(sources=frozenset()) for m in found if dim not in m.axes]
    values, *places = out if isinstance(out, tuple) else (out,)
    t.set(values, passing, inplace)
    for tensor in places:
        t.set(tensor, [m._replace(clean=False) for m in passing])


def fourier(t: Tracer, op: str, args: Any, kwargs: Any, out: Tensor, inplace: bool) -> None:
    """Transforms along some axes: what others are labelled by passes."""
    x, dims = args[:2]
    found, over = t.labels(x), {d % x.ndim for d in dims}
    sizes = aside(x, found) if found else lengths(x, sorted(over))
    t.record(found, [*sorted(over), *sizes])
    t.expose(found)
    t.pin([m for m in found if m.axes & over], "transformed over channels")
    t.set(out, [m._replace(sources=frozenset()) for m in found if not m.axes & over], inplace)


RULES.update(dict.fromkeys(["_fft_r2c", "_fft_c2r", "_fft_c2c"], fourier))
RULES.update(dict.fromkeys(["topk", "sort", "cumsum", "cummax", "cummin"], order))
RULES["max_unpool2d"] = unpool
RULES["grid_sampler_2d"] = RULES["grid_sampler_3d"] = RULES["cudnn_grid_sampler"] = roi_align
RULES["torchvision::roi_align"] = RULES["torchvision::roi_pool"] = roi_align
