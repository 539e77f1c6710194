"""Products: what comes in meets the weight's input axis, its output axis goes out."""

import math
from typing import Any

import torch
from torch import Tensor

from .labels import Labels, Product, Slot
from .tracer import UNKNOWN, Rule, Tracer

ELSEWHERE = "channels lie along another axis"
_SECOND = frozenset({1})


def convolution(t: Tracer, op: str, args: Any, kwargs: Any, out: Tensor, inplace: bool) -> None:
    """Plain, grouped, depthwise and transposed, of any number of dimensions."""
    x, weight, bias, *_, transposed, _, groups = args
    into, outof = (0, 1) if transposed else (1, 0)
    shape = weight.shape
    name = t.names.get(id(weight))
    if transposed and groups == shape[0] > shape[1] == 1 and name and not t.given:
        t.depthwise.add(name)
    alone = name in t.depthwise if transposed else groups > 1 and shape[1] == 1
    if alone and name:  # depthwise: an input channel is zero behind its own filter
        ids, seen = t.read(x, 1, ELSEWHERE)
        t.expose([seen] if seen else [])
        t.pin([seen] if seen and not seen.finite else [], "infinite at zero")
    else:
        ids, seen = t.consume(x, 1, weight, into, ELSEWHERE)
    how = str(args[3:8])  # lists have no hash
    t.record((seen,) if seen else (), (how, *out.shape[2:], *(() if seen else x.shape[1:2])))
    inputs = ids  # of one group
    if groups > 1:
        inputs = ids.view(groups, -1)[0] if groups < len(ids) else torch.zeros(1, dtype=torch.int64)
        t.cut(t.along(ids, 1, 2), ())
    if transposed and name in t.depthwise:
        outputs, sources, clean = t.out_ids(weight, 0)
        t.unite(outputs, ids)
        into = 1
    elif transposed:
        t.meet(weight, into, ids)  # [I, O/g, ...]: each index of the input axis is one channel
        per_group, sources, clean = t.out_ids(weight, outof)
        outputs = per_group.repeat(groups)
        if groups > 1:
            _tie_groups(t, groups, ids)
    else:
        outputs, sources, clean = t.out_ids(weight, outof)
        if alone:  # an input owns its outputs
            if seen is not None and _one_filter(t, weight):
                outputs, clean = ids.repeat_interleave(shape[0] // groups), seen.clean
            t.unite(outputs.view(groups, -1), ids.view(groups, 1))
        else:
            t.meet(weight, into, inputs)
            if groups > 1:
                _tie_groups(t, groups, ids, outputs)
    _read_by(t, weight, into, ids)
    known = sources or outputs.any()
    sources, clean = biased(t, bias, outputs, sources, clean)
    counted = x if transposed else out  # every input position is spread over the kernel, or read
    positions = counted.numel() / counted.shape[1] * math.prod(shape[2:])
    t.products.append(Product(t.module, positions, outputs, inputs))
    # A lone or unknown channel is no channel: it may be broadcast over others.
    t.set(out, [channels_of(t, outputs, out.ndim, clean, sources)] if known else ())


def biased(
    t: Tracer, bias: Tensor | None, ids: Tensor, sources: frozenset[Slot], clean: bool
) -> tuple[frozenset[Slot], bool]:
    """The sources of what a bias is added to, and whether it is clean still."""
    t.meet(bias, 0, ids)
    sources |= t.in_slots(bias, 0)
    t.producers |= sources
    return sources, clean and t.is_clean(bias, 0)


def _one_filter(t: Tracer, weight: Tensor) -> bool:
    """Whether it is one filter, as a blur has it, made as often as there are channels."""
    if id(weight) in t.names or t.labels(weight):
        return False
    t.mattered = True
    return bool((weight == weight[:1]).all())


def _read_by(t: Tracer, weight: Tensor, into: int, ids: Tensor) -> None:
    """A weight sums over channels. One that is computed has no slot that could tell so."""
    slots = t.in_slots(weight, into)
    t.consumers |= slots
    if not slots and any(into in m.axes for m in t.labels(weight)):
        t.swallowed.append(ids)


def _tie_groups(t: Tracer, groups: int, *arrays: Tensor) -> None:
    """Groups stay equal: position j of every group lives and dies together."""
    for ids in arrays:
        rows = ids.view(groups, -1)
        t.unite(rows, rows[:1])


def deformable(t: Tracer, op: str, args: Any, kwargs: Any, out: Tensor, inplace: bool) -> None:
    """A convolution that reads where its offsets point."""
    x, weight, offset, mask, bias, *steps, groups, offset_groups, _ = args
    if offset_groups > 1:  # each moves channels of its own
        t.unknown(args, kwargs, out)
        return
    t.pin([*t.labels(offset), *t.labels(mask)], "values become positions")
    # For no bias the library makes zeros.
    made = id(bias) not in t.names and not t.labels(bias) and not bias.any()
    convolution(
        t, op, (x, weight, None if made else bias, steps, 0, 0, False, 0, groups), {}, out, False
    )


def addmm(t: Tracer, op: str, args: Any, kwargs: Any, out: Tensor, inplace: bool) -> None:
    """A product with a bias, as of linear layers."""
    bias, a, b = args[:3]
    _matmul(t, a, b, bias if bias.ndim == 1 else None, out)
    if bias.ndim != 1:
        t.pin(t.labels(bias), "a matrix is added to a product")


def mm(t: Tracer, op: str, args: Any, kwargs: Any, out: Tensor, inplace: bool) -> None:
    """Matrix products, one or a batch."""
    _matmul(t, args[0], args[1], None, out)


def baddbmm(t: Tracer, op: str, args: Any, kwargs: Any, out: Tensor, inplace: bool) -> None:
    """`bmm`, as long as what would be added is left out."""
    if kwargs.get("beta", 1) == 0 and not inplace:
        _matmul(t, args[1], args[2], None, out)
    else:
        t.unknown(args, kwargs, out)


def linear(t: Tracer, op: str, args: Any, kwargs: Any, out: Tensor, inplace: bool) -> None:
    """The weight lies transposed: [outputs, inputs]."""
    x, weight, bias = (*args, None)[:3]
    _matmul(t, x, weight, bias, out, into=1)


def _matmul(
    t: Tracer, a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor, into: int = -2
) -> None:
    """`a` [..., n, k] times `b` [..., k, m] ([m, k] for linear, where `into` is 1)."""
    into, outof = into % b.ndim, (b.ndim - 1 if into == -2 else 0)
    # A term is zero if either factor is; the weights of a removed input are not.
    partner = [m for m in t.labels(b) if into in m.axes and m.clean and m.sources <= t.producers]
    ids, seen = t.read(a, -1) if len(partner) == 1 else t.consume(a, -1, b, into)
    if seen is not None and len(partner) == 1:
        t.swallow(seen if seen.clean else partner[0])
    rows = [m for m in t.labels(a) if a.ndim - 1 not in m.axes]
    batch = [m for m in t.labels(b) if not m.axes & {into, outof}] if b.ndim > 2 else []
    t.record([*([seen] if seen else []), *rows, *batch], [] if seen else [a.shape[-1]])
    t.meet(b, into, ids)
    t.expose([*rows, *batch])
    t.exposed |= frozenset().union(*(m.sources for m in t.labels(b) if into in m.axes))
    _read_by(t, b, into, ids)
    outputs, sources, clean = t.out_ids(b, outof)
    sources, clean = biased(t, bias, outputs, sources, clean)
    if bias is not None:
        t.pin(rows, "a bias is added to every row")
    t.producers |= frozenset().union(*(m.sources for m in rows))
    last = out.ndim - 1
    columns = Labels(t.along(outputs, last, out.ndim), frozenset({last}), clean, sources)
    for m in batch:
        for k, other in enumerate(rows):
            if other.axes & m.axes:
                t.unite(m.ids, other.ids)
                rows[k] = other._replace(clean=other.clean or m.clean)
                break
        else:
            rows.append(m._replace(sources=frozenset()))
    beside = tuple([m.ids for m in rows])
    count = out.numel() / out.shape[-1] / math.prod(x.numel() for x in beside)
    t.products.append(Product(t.module, count, outputs, ids, beside))
    t.set(out, [*rows, columns] if outputs.any() else rows)


def attention(t: Tracer, op: str, args: Any, kwargs: Any, out: Any, inplace: bool) -> None:
    """Queries, keys and values [batch, heads, tokens, width]."""
    scale, last = kwargs.get("scale"), 3
    found = [t.labels(x) for x in args[:3]]
    everything = [m for ms in found for m in ms]
    t.record(everything, [scale, args[0].shape[1]])
    t.expose(everything)
    masks = [m for a in (*args[3:], *kwargs.values()) if isinstance(a, Tensor) for m in t.labels(a)]
    odd = [m for m in everything if last not in m.axes or 2 in m.axes]
    t.pin([*odd, *masks], "no channels of attention")
    queries, keys, values = ([m for m in ms if last in m.axes] for ms in found)
    if len(queries) != 1 or len(keys) != 1 or args[0].shape[1] != args[1].shape[1]:
        t.pin([*queries, *keys], UNKNOWN)
    else:
        t.unite(queries[0].ids, keys[0].ids)
        t.swallow(queries[0] if queries[0].clean else keys[0])
        if scale is None:
            t.pin(queries, "attention divides by the width")
    _count_attention(t, args[:3], queries, values)
    t.set(first_of(out), [m._replace(sources=frozenset()) for m in values])


def _count_attention(t: Tracer, qkv: Any, queries: list[Labels], values: list[Labels]) -> None:
    q, k, v = qkv
    tokens, rows = torch.zeros(k.shape[2], dtype=torch.int64), q.numel() / q.shape[3]
    for x, found in ((q, queries), (v, values)):
        ids = found[0].ids.reshape(-1) if found else torch.zeros(x.shape[3], dtype=torch.int64)
        factor = rows * x.shape[3] / len(ids)  # ids of all heads may be told apart
        ends = (tokens, ids) if x is q else (ids, tokens)
        t.products.append(Product(t.module, factor, *ends))


def first_of(out: Any) -> Tensor:
    """The result proper of an operation that may return statistics beside it."""
    return out[0] if isinstance(out, tuple) else out


def channels_of(t: Tracer, ids: Tensor, ndim: int, clean: bool, sources: frozenset) -> Labels:
    """Labels along axis 1, where images have their channels."""
    return Labels(t.along(ids, 1, ndim), _SECOND, clean, sources)


RULES: dict[str, Rule] = {
    "convolution": convolution,
    "torchvision::deform_conv2d": deformable,
    "addmm": addmm,
    **dict.fromkeys(("mm", "bmm"), mm),
    "baddbmm": baddbmm,
    "linear": linear,
    **dict.fromkeys(
        (
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_cudnn_attention",
            "_scaled_dot_product_fused_attention_overrideable",
        ),
        attention,
    ),
}
