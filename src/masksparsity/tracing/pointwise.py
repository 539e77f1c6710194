"""Elementwise operations: the channels that meet are one.

What decides whether a channel may go is whether zero stays zero.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .findings import aside
from .labels import NOTHING, Labels
from .tracer import UNKNOWN, Rule, Tracer


def pointwise(zero: Callable[[list[bool], Any], bool]) -> Rule:
    """`zero(flags, args)`: is the result zero, given which of the arguments are zero?"""

    def apply(t: Tracer, op: str, args: Any, kwargs: Any, out: Tensor, inplace: bool) -> None:
        tensors = [a for a in args if isinstance(a, Tensor)]
        found = [t.labels(x) for x in tensors]
        labels = [m for ms in found for m in ms]
        out = out[0] if isinstance(out, tuple) else out
        if not labels:
            if inplace:
                t.set(out, ())
            t.memory.made_of(tensors, out)
            return
        t.record(labels, aside(out, labels))
        if op in _POLES:
            pole = _POLES[op](args)
            zeros = [m for m in t.labels(pole) if m.clean] if isinstance(pole, Tensor) else []
            if len(tensors) > 1 and all(m.sources for m in zeros):
                # A divisor of the model's own need not become zero.
                t.spoil(zeros, "something is divided by it")
                found = [_divisor(ms) if x is pole else ms
                         for x, ms in zip(tensors, found, strict=True)]  # fmt: skip
            else:  # whatever is made of it: 0 times infinity is not zero
                t.pin(zeros, "infinite at zero")
        t.expose(m for ms in found for m in ms)
        if len(tensors) == 1:
            result = [Labels(m.ids, m.axes, zero([m.clean], args)) for m in labels]
        elif len(args) == 2 and _elementwise(found):
            (a,), (b,) = found
            t.unite(b.ids, a.ids)
            result = [Labels(a.ids, a.axes, zero([a.clean, b.clean], args))]
        else:
            result = _merge(t, tensors, found, out, lambda flags: zero(flags, args), args)
        finite = all(m.finite for m in labels)
        if op in _POLES:
            finite &= all(m.clean for m in t.labels(_POLES[op](args)))
        if op in _FACTORS and not t.given and result and _unbounded(t, op, args, kwargs):
            result = [m._replace(clean=False) for m in result]
            finite = False
        if not finite:
            result = [m._replace(finite=m.clean) for m in result]
        t.set(out, result, inplace)

    return apply


def _divisor(found: tuple[Labels, ...]) -> tuple[Labels, ...]:
    return tuple(m._replace(clean=False, sources=NOTHING) for m in found)


def _elementwise(found: list[tuple[Labels, ...]]) -> bool:
    """Whether two tensors hold one channel per element, along the same axes. Nearly all do."""
    a, b = found
    if len(a) != 1 or len(b) != 1 or a[0].axes != b[0].axes:
        return False
    return a[0].ids.shape == b[0].ids.shape


def _unbounded(t: Tracer, op: str, args: Sequence[Any], kwargs: Any) -> bool:
    """Whether a factor is infinite, or a divisor of no channels zero. What is clean need not be
    asked, unless it is a parameter."""
    pole: Any = _POLES[op](args) if op in _POLES else None
    for x in (*args, *kwargs.values()):
        if not isinstance(x, Tensor):
            if (isinstance(x, float) and not math.isfinite(x)) or (x is pole and x == 0):
                return True
            continue
        found = t.labels(x)
        own = any(m.sources for m in found)
        if found and not own and all(m.clean for m in found):
            continue
        t.mattered |= x is pole and id(x) not in t.names
        if x.layout != torch.strided or not bool(x.isfinite().all()):
            t.mattered = True
            return True
        if x is pole and (own or not found) and not bool(x.all()):
            return True
    return False


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
                    zeros = {**clean, index: m.clean}
                    lone, several = sorted((ids, other), key=torch.numel)
                    if axes == other_axes and lone.numel() < several.numel():
                        # A channel by itself, such as a gate: the others may go without it.
                        t.pin(lone, "one channel meets several")
                        zeros |= dict.fromkeys([index] if lone is ids else clean, False)
                        other = several
                    else:
                        t.unite(ids, other)
                        other = (
                            other if axes == other_axes else torch.broadcast_tensors(ids, other)[1]
                        )
                    merged[k] = (other, axes | other_axes, zeros)
                    break
            else:
                merged.append((ids, axes, {index: m.clean}))
    result = []
    for ids, axes, clean in merged:
        if len(clean) < len(tensors) and any(
            index not in clean and any(t.memory.varies(x, a - out.ndim + x.ndim) for a in axes)
            for index, x in enumerate(tensors)
        ):
            t.pin(ids, UNKNOWN)
            continue
        flags, index = [], 0
        for a in args:
            if isinstance(a, Tensor):
                flags.append(
                    clean[index] if index in clean else t.memory.is_zero(tensors[index], ids)
                )
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


def _comparison(false: Callable[[float], bool]) -> Rule:
    """`false(number)`: zero compares false with it."""
    return pointwise(lambda f, args: f[0] and isinstance(args[1], (int, float)) and false(args[1]))


def _power(flags: list[bool], args: Any) -> bool:
    return flags[0] and isinstance(args[1], (int, float)) and args[1] > 0


def _threshold(flags: list[bool], args: Any) -> bool:
    return flags[0] and (args[1] < 0 or args[2] == 0)


def _clamp_max(flags: list[bool], args: Any) -> bool:
    return _clamp(flags, (args[0], None, args[1]))


def _choice(flags: list[bool], args: Any) -> bool:
    return len(flags) == 3 and flags[1] and flags[2]


def _filling(flags: list[bool], args: Any) -> bool:
    return len(flags) == 3 and flags[0] and flags[2]


def _plus_product(flags: list[bool], args: Any) -> bool:
    return len(flags) == 3 and flags[0] and (flags[1] or flags[2])


def _plus_quotient(flags: list[bool], args: Any) -> bool:
    return len(flags) == 3 and flags[0] and flags[1] and not flags[2]


def _between(flags: list[bool], args: Any) -> bool:
    return len(flags) > 1 and flags[0] and flags[1]


def _of_power(args: Any) -> Any:
    power = args[1]
    if isinstance(power, Tensor):
        negative = not power.is_complex() and bool((power < 0).any())
    else:
        negative = isinstance(power, (int, float)) and power < 0
    return args[0] if negative else None


def _divide(flags: list[bool], args: Any) -> bool:
    return isinstance(args[0], Tensor) and flags[0] and not any(flags[1:])  # 0 / 0 is not zero


ZERO_AT_ZERO = """relu relu6 silu gelu mish tanh hardswish leaky_relu elu selu celu hardshrink
softshrink abs neg positive sign sqrt square erf floor round ceil trunc expm1 log1p asin atan sin
sinh asinh tan frac sgn nan_to_num native_dropout dropout _prelu_kernel prelu
rrelu_with_noise conj_physical polar isnan isinf tril triu"""
NOT_ZERO_AT_ZERO = """sigmoid hardsigmoid softplus log_sigmoid log_sigmoid_forward exp exp2 angle
cos cosh acos rsub eq ge le logical_not isfinite bitwise_and bitwise_or bitwise_not atan2
logaddexp logaddexp2 erfc sinc"""
_FACTORS = ("mul", "div", "remainder", "fmod", "addcmul", "addcdiv", "lerp")
INFINITE_AT_ZERO = ("log", "log2", "log10", "rsqrt", "reciprocal", "lgamma", "digamma")

_POLES: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("div", "remainder", "fmod"), lambda args: args[1]),
    **dict.fromkeys(INFINITE_AT_ZERO, lambda args: args[0]),
    "addcdiv": lambda args: args[2],
    "pow": _of_power,
}
"""The operand at whose zero the operation is infinite or undefined."""

RULES: dict[str, Rule] = {}
RULES.update(dict.fromkeys(ZERO_AT_ZERO.split(), pointwise(_first)))
RULES.update(dict.fromkeys([*NOT_ZERO_AT_ZERO.split(), *INFINITE_AT_ZERO], pointwise(_never)))
RULES.update(dict.fromkeys(
    ("add", "sub", "maximum", "minimum", "complex", "hypot", "heaviside"), pointwise(_all)
))  # fmt: skip
RULES.update(dict.fromkeys(("clamp", "hardtanh", "clamp_min"), pointwise(_clamp)))
RULES["mul"] = pointwise(lambda flags, args: any(flags))
RULES.update(dict.fromkeys(("div", "remainder", "fmod"), pointwise(_divide)))
RULES["gt"] = _comparison(lambda number: number >= 0)
RULES["lt"] = _comparison(lambda number: number <= 0)
RULES["ne"] = _comparison(lambda number: number == 0)
RULES["pow"] = pointwise(_power)
RULES["threshold"] = pointwise(_threshold)
RULES["clamp_max"] = pointwise(_clamp_max)
RULES["where"] = pointwise(_choice)
RULES["masked_fill"] = pointwise(_filling)
RULES["addcmul"] = pointwise(_plus_product)
RULES["addcdiv"] = pointwise(_plus_quotient)
RULES["lerp"] = pointwise(_between)
RULES["copy"] = pointwise(lambda flags, args: flags[1])
