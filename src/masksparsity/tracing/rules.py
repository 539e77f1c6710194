"""The table: ATen operation -> what it does to channel labels.

A rule is called after the operation ran: `rule(tracer, operation, args, kwargs, out, inplace)`.
In-place forms share the rule of the plain one (`relu_` is looked up as `relu`). What is not here is
protected. Users add rows through `trace(..., rules={"my_op": rule})`.
"""

from typing import Any

from torch import Tensor

from . import (
    cuts,
    joining,
    movement,
    norms,
    places,
    pointwise,
    products,
    recurrent,
    reshape,
    space,
    writing,
)
from .tracer import Rule, Tracer


def extremum(t: Tracer, op: str, args: Any, kwargs: Any, out: Any, inplace: bool) -> None:
    """Of two tensors, or of one along some axis."""
    two = len(args) > 1 and isinstance(args[1], Tensor)
    RULES["maximum" if two else "amax"](t, op, args, kwargs, out, inplace)


RULES: dict[str, Rule] = {
    **products.RULES,
    **norms.RULES,
    **movement.RULES,
    **reshape.RULES,
    **cuts.RULES,
    **joining.RULES,
    **pointwise.RULES,
    **space.RULES,
    **writing.RULES,
    **places.RULES,
    **recurrent.RULES,
    **dict.fromkeys(("max", "min"), extremum),
}

SIZED = frozenset({*movement.RULES, *reshape.RULES, "convolution", "native_group_norm"})
"""Operations among whose numbers there are widths, or places along channels."""
