"""The table: ATen operation -> what it does to channel labels.

A rule is called after the operation ran: `rule(tracer, operation, args, kwargs, out, inplace)`.
In-place forms share the rule of the plain one (`relu_` is looked up as `relu`). What is not here is
protected. Users add rows through `trace(..., rules={"my_op": rule})`.
"""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from . import movement, pointwise
from .trace import Labels, Norm, Product, Rule, Tracer

RULES: dict[str, Rule] = {**movement.RULES, **pointwise.RULES}


def rule(*operations: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(operations, function))
        return function

    return register


# Products: what comes in meets the weight's input axis, its output axis goes out ------------------


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
    # A lone or unknown channel is no channel: it may be broadcast over others.
    labels = [_channel_axis(outputs, out.ndim, True, sources)] if outputs.any() else []
    t.set(out, labels)


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
    _matmul(t, args[0], args[1], None, out)


@rule("linear")
def linear(t: Tracer, op: str, args: Any, kwargs: Any, out: Tensor, inplace: bool) -> None:
    x, weight, bias = (*args, None)[:3]
    _matmul(t, x, weight, bias, out, into=1)


def _matmul(
    t: Tracer, a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor, into: int = -2
) -> None:
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


# Norms --------------------------------------------------------------------------------------------


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
    makers = [n for n, _ in seen.sources if (n, 1) in t.consumers]
    if len(makers) == 1 and statistics[0] is not None and id(statistics[0]) in t.names:
        t.behind[makers[0]] = t.names[id(statistics[0])]
    t.set(out[0], [_channel_axis(ids, x.ndim, weight is not None, sources)])


# Space: channels pass through ---------------------------------------------------------------------


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


SPATIAL = """max_pool2d_with_indices max_pool3d_with_indices max_pool2d max_pool1d avg_pool1d avg_pool2d
avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d adaptive_max_pool2d
upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d
_upsample_nearest_exact2d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d
_upsample_bilinear2d_aa _upsample_bicubic2d_aa mkldnn_max_pool2d"""
RULES.update(dict.fromkeys(SPATIAL.split(), _spatial))


@rule("mean", "sum", "amax", "amin")
def reduce(t: Tracer, op: str, args: Any, kwargs: Any, out: Tensor, inplace: bool) -> None:
    x, dims, keepdim = (*args, *([None, False][len(args) - 1 :]))[:3]
    dims = kwargs.get("dim", dims)
    dims = (
        range(x.ndim) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    )
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


# Neither read nor write values: nothing to say about channels
def _nothing(t: Tracer, op: str, args: Any, kwargs: Any, out: Any, inplace: bool) -> None:
    pass


_BLANK = """empty empty_like new_empty empty_strided zeros_like ones_like full_like new_zeros new_full
new_ones rand_like randn_like"""
RULES.update(dict.fromkeys(_BLANK.split(), _nothing))
