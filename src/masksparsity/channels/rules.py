"""The table: ATen operation -> what it does to channel labels.

A rule is called after the operation ran: `rule(tracer, operation, args, kwargs, out, inplace)`.
In-place forms share the rule of the plain one (`relu_` is looked up as `relu`). What is not here is
protected. Users add rows through `trace(..., rules={"my_op": rule})`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .trace import ANONYMOUS, Labels, Norm, Product, Tracer

Rule = Callable[[Tracer, str, Any, Any, Any, bool], None]
RULES: dict[str, Rule] = {}


def rule(*operations: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(operations, function))
        return function

    return register


# Products: what comes in meets the weight's input axis, its output axis goes out -------------------


@rule("convolution")
def convolution(t: Tracer, op: str, args: Any, kwargs: Any, out: Tensor, inplace: bool) -> None:
    x, weight, bias, *_, transposed, _, groups = args
    into, outof = (0, 1) if transposed else (1, 0)
    _only_along(t, x, 1)
    ids, seen = t.consume(x, 1)
    t.record([seen] if seen else [])
    if transposed:
        t.meet(weight, into, ids)  # [I, O/g, ...]: each index of the input axis is one channel
        per_group, sources = t.out_ids(weight, outof)
        outputs = per_group.repeat(groups)
        _tie_groups(t, ids, groups)
    else:
        outputs, sources = t.out_ids(weight, outof)
        if weight.shape[1] == 1 and groups > 1:  # depthwise: an input owns its outputs
            t.unite(outputs.view(groups, -1), ids.view(groups, 1))
        else:
            t.meet(weight, into, ids.view(groups, -1)[0])
            _tie_groups(t, ids, groups)
            _tie_groups(t, outputs, groups)
    t.consumers |= t.in_slots(weight, into)
    if bias is not None:
        t.meet(bias, 0, outputs)
        sources |= t.in_slots(bias, 0)
    t.producers |= sources
    positions = out.numel() / out.shape[1] * math.prod(weight.shape[2:])
    if transposed:  # counted from the input side: every input position is spread over the kernel
        positions = x.numel() / x.shape[1] * math.prod(weight.shape[2:])
    inputs = ids.view(groups, -1)[0] if weight.shape[1] > 1 or groups == 1 else ids[:1] * 0
    t.products.append(Product(t.module, positions, outputs, inputs))
    t.set(out, [_channel_axis(outputs, out.ndim, True, sources)])


def _only_along(t: Tracer, x: Tensor, axis: int) -> None:
    t.pin([m for m in t.labels(x) if axis not in m.axes], "channels lie along another axis")


def _tie_groups(t: Tracer, ids: Tensor, groups: int) -> None:
    """Groups stay equal: position j of every group lives and dies together."""
    if groups > 1:
        rows = ids.view(groups, -1)
        t.unite(rows, rows[:1])


@rule("addmm")
def addmm(t: Tracer, op: str, args: Any, kwargs: Any, out: Tensor, inplace: bool) -> None:
    bias, a, b = args[:3]
    _matmul(t, a, b, bias if bias.ndim == 1 else None, out)
    if bias.ndim != 1:
        t.pin(t.labels(bias), "a matrix is added to a product")


@rule("mm", "bmm")
def mm(t: Tracer, op: str, args: Any, kwargs: Any, out: Tensor, inplace: bool) -> None:
    _matmul(t, *args[:2], None, out)


@rule("linear")
def linear(t: Tracer, op: str, args: Any, kwargs: Any, out: Tensor, inplace: bool) -> None:
    x, weight, bias = (*args, None)[:3]
    _matmul(t, x, weight, bias, out, into=1)


def _matmul(t: Tracer, a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor, into: int = -2) -> None:
    """`a` [..., n, k] times `b` [..., k, m] ([m, k] for linear, where `into` is 1)."""
    ids, seen = t.consume(a, -1)
    rows = [m for m in t.labels(a) if a.ndim - 1 not in m.axes]
    t.record([seen, *rows] if seen else rows)
    into, outof = into % b.ndim, (b.ndim - 1 if into == -2 else 0)
    t.meet(b, into, ids)
    t.expose(m for m in t.labels(b) if into in m.axes)
    t.consumers |= t.in_slots(b, into)
    outputs, sources = t.out_ids(b, outof)
    if bias is not None:
        t.meet(bias, 0, outputs)
        sources |= t.in_slots(bias, 0)
        t.pin(rows, "a bias is added to every row")
    t.producers |= sources
    t.products.append(Product(t.module, out.numel() / out.shape[-1], outputs, ids))
    last = out.ndim - 1
    columns = Labels(outputs.view([1] * last + [-1]), frozenset({last}), True, sources)
    t.set(out, [*rows, columns] if outputs.any() else rows)


def _channel_axis(ids: Tensor, ndim: int, clean: bool, sources: frozenset) -> Labels:
    return Labels(ids.view([1, -1] + [1] * (ndim - 2)), frozenset({1}), clean, sources)


# Norms ---------------------------------------------------------------------------------------------


@rule(
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "_batch_norm_with_update",
    "_batch_norm_no_update",
    "cudnn_batch_norm",
    "miopen_batch_norm",
)
def batch_norm(t: Tracer, op: str, args: Any, kwargs: Any, out: Any, inplace: bool) -> None:
    x, weight, bias, *statistics = args[:5]
    _only_along(t, x, 1)
    ids, seen = t.read(x, 1)
    t.record([seen] if seen else [])
    for tensor in (weight, bias, *statistics):
        if isinstance(tensor, Tensor):
            t.meet(tensor, 0, ids)
    if seen is None:
        t.set(out[0], ())
        return
    sources = frozenset().union(*(t.in_slots(v, 0) for v in (weight, bias) if v is not None))
    t.producers |= sources
    name = t.names.get(id(weight))
    if name is not None:
        t.norms.setdefault(name, Norm(t.module, name, t.names.get(id(bias))))
    t.set(out[0], [_channel_axis(ids, x.ndim, weight is not None, sources)])


# Elementwise: the channels that meet are one -------------------------------------------------------


def pointwise(zero: Callable[[list[bool], Any], bool]) -> Rule:
    """`zero(flags, args)`: is the result zero, given which of the arguments are zero?"""

    def apply(t: Tracer, op: str, args: Any, kwargs: Any, out: Tensor, inplace: bool) -> None:
        tensors = [a for a in args if isinstance(a, Tensor)]
        found = [t.labels(x) for x in tensors]
        labels = [m for ms in found for m in ms]
        if not labels:
            if inplace:
                t.set(out, ())
            return
        t.record(labels, [a for a in args if isinstance(a, (int, float))])
        t.expose(labels)
        if len(tensors) == 1:
            result = [m._replace(clean=zero([m.clean], args), sources=frozenset()) for m in labels]
        else:
            result = _merge(t, tensors, found, out, lambda flags: zero(flags, args), args)
        for x, ms in zip(tensors, found, strict=True):
            if id(x) in t.names:
                t.producers |= frozenset().union(*(m.sources for m in ms))
        t.set(out, result, inplace)

    return apply


def _merge(
    t: Tracer,
    tensors: list[Tensor],
    found: list[tuple[Labels, ...]],
    out: Tensor,
    zero: Callable[[list[bool]], bool],
    args: Sequence[Any],
) -> list[Labels]:
    """Unite labels that vary along the same axes of the broadcast result."""
    merged: list[tuple[Tensor, frozenset[int], dict[int, bool]]] = []
    for index, (x, ms) in enumerate(zip(tensors, found, strict=True)):
        shift = out.ndim - x.ndim
        for m in ms:
            ids = m.ids.view([1] * shift + list(m.ids.shape)) if shift else m.ids
            axes = frozenset(a + shift for a in m.axes) if shift else m.axes
            for k, (other, other_axes, clean) in enumerate(merged):
                if axes & other_axes and index not in clean:
                    t.unite(ids, other)
                    if axes != other_axes:
                        other = torch.broadcast_tensors(ids, other)[0]
                    merged[k] = (other, axes | other_axes, {**clean, index: m.clean})
                    break
            else:
                merged.append((ids, axes, {index: m.clean}))
    result = []
    for ids, axes, clean in merged:
        for index, x in enumerate(tensors):
            shift = out.ndim - x.ndim
            if index not in clean and any(a >= shift and x.shape[a - shift] > 1 for a in axes):
                t.pin(ids, "meets a tensor whose channels are unknown")
        flags, index = [], 0
        for a in args:
            if isinstance(a, Tensor):
                flags.append(clean.get(index, False))
                index += 1
            elif isinstance(a, (int, float)):
                flags.append(a == 0)
        result.append(Labels(ids, axes, zero(flags)))
    return result


def _first(flags: list[bool], args: Any) -> bool:
    return flags[0]


def _never(flags: list[bool], args: Any) -> bool:
    return False


def _all(flags: list[bool], args: Any) -> bool:
    # With one tensor the other operand is a number: x + 0 stays zero, x + 1 does not.
    return all(flags) and all(a == 0 for a in args[1:2] if isinstance(a, (int, float)))


def _clamp(flags: list[bool], args: Any) -> bool:
    low, high = (*args[1:3], None, None)[:2]
    return (
        flags[0]
        and (low is None or (isinstance(low, (int, float)) and low <= 0))
        and (high is None or (isinstance(high, (int, float)) and high >= 0))
    )


def _power(flags: list[bool], args: Any) -> bool:
    return flags[0] and isinstance(args[1], (int, float)) and args[1] > 0


def _divide(flags: list[bool], args: Any) -> bool:
    return flags[0] and not any(flags[1:])  # 0 / 0 is not zero


ZERO_AT_ZERO = """relu relu6 silu gelu mish tanh hardswish leaky_relu elu selu celu hardshrink
softshrink abs neg positive sign sqrt square erf floor round ceil trunc expm1 log1p asin atan sin
sinh asinh tan nan_to_num native_dropout dropout _prelu_kernel prelu remainder fmod""".split()
NOT_ZERO_AT_ZERO = """sigmoid hardsigmoid softplus log_sigmoid exp exp2 cos cosh acos log log2 log10
rsqrt reciprocal rsub eq ne ge le gt lt logical_not""".split()

RULES.update(dict.fromkeys(ZERO_AT_ZERO, pointwise(_first)))
RULES.update(dict.fromkeys(NOT_ZERO_AT_ZERO, pointwise(_never)))
RULES.update(dict.fromkeys(("add", "sub", "maximum", "minimum"), pointwise(_all)))
RULES.update(dict.fromkeys(("clamp", "hardtanh", "clamp_min"), pointwise(_clamp)))
RULES["mul"] = pointwise(lambda flags, args: any(flags))
RULES["div"] = pointwise(_divide)
RULES["pow"] = pointwise(_power)
RULES["copy"] = pointwise(lambda flags, args: flags[1])


# Space: channels pass through ----------------------------------------------------------------------


def _spatial(t: Tracer, op: str, args: Any, kwargs: Any, out: Any, inplace: bool) -> None:
    """Pooling and resizing: each channel by itself, and zero stays zero."""
    x, result = args[0], out[0] if isinstance(out, tuple) else out
    _only_along(t, x, 1)
    ids, m = t.read(x, 1)
    if m is None:
        t.set(result, ())
        return
    t.record([m])
    t.expose([m])
    t.set(result, [_channel_axis(ids, result.ndim, m.clean, frozenset())])


SPATIAL = """max_pool2d_with_indices max_pool3d_with_indices max_pool2d max_pool1d avg_pool1d
avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d
adaptive_max_pool2d upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d
_upsample_nearest_exact2d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d
_upsample_bilinear2d_aa _upsample_bicubic2d_aa mkldnn_max_pool2d""".split()
RULES.update(dict.fromkeys(SPATIAL, _spatial))


@rule("mean", "sum", "amax", "amin")
def reduce(t: Tracer, op: str, args: Any, kwargs: Any, out: Tensor, inplace: bool) -> None:
    x, dims, keepdim = (*args, *([None, False][len(args) - 1 :]))[:3]
    dims = kwargs.get("dim", dims)
    dims = range(x.ndim) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    reduced = {d % x.ndim for d in dims}
    keepdim = kwargs.get("keepdim", keepdim)
    found = t.labels(x)
    t.record(found)
    t.expose(found)
    result = []
    for m in found:
        if m.axes & reduced:
            t.pin(m.ids, "reduced over channels")
        elif keepdim:
            result.append(m._replace(sources=frozenset()))
        else:
            axes = frozenset(a - sum(d < a for d in reduced) for a in m.axes)
            result.append(Labels(m.ids.squeeze(tuple(reduced)), axes, m.clean))
    t.set(out, result)


# Data movement: the same call, on the labels -------------------------------------------------------


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
    return m._replace(ids=m.ids.flip(dims))


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


RULES.update(dict.fromkeys("view _unsafe_view reshape _reshape_alias flatten".split(), _reshape))
RULES.update(
    dict.fromkeys("clone contiguous _to_copy to lift_fresh".split(), _movement(_same, False))
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


@rule("cat")
def cat(t: Tracer, op: str, args: Any, kwargs: Any, out: Tensor, inplace: bool) -> None:
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.ndim
    # A part that is empty in one model may be full in another; torch's 1-D empty placeholder is not.
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


@rule("constant_pad_nd")
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


# Neither read nor write values: nothing to say about channels
def _nothing(t: Tracer, op: str, args: Any, kwargs: Any, out: Any, inplace: bool) -> None:
    pass


_BLANK = """empty empty_like new_empty empty_strided zeros_like ones_like full_like new_zeros
new_full new_ones rand_like randn_like""".split()
RULES.update(dict.fromkeys(_BLANK, _nothing))
