"""Optimizer state, carried over to the slices of parameters that stay."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..errors import MaskSparsityError
from .penalty import release
from .rebuild import kept_part


def carry_over(
    optimizer: torch.optim.Optimizer,
    old: Mapping[str, Tensor],
    new: Mapping[str, Tensor],
    kept_of: Mapping[str, list[tuple[int, Tensor]]],
) -> None:
    """Let an optimizer, and those that it wraps, go on with the `new` parameters: their state is
    sliced as they are, and penalties on the old ones are detached.

    Args:
        kept_of: name -> axes, and the indices that stay along each.

    Raises:
        MaskSparsityError: it cannot follow. Nothing has changed then.
    """
    if not hasattr(optimizer, "param_groups"):
        raise MaskSparsityError(f"expected an optimizer, got a {type(optimizer).__name__}")
    names = {id(tensor): name for name, tensor in old.items()}
    lists = [group["params"] for group in optimizer.param_groups]
    if any(id(p) not in names for params in lists for p in params):
        raise MaskSparsityError("the optimizer holds parameters of another model")
    optimizers = _with_inner(optimizer, names)
    states = {id(o.state): o.state for o in optimizers}
    changed = []
    for state in states.values():
        entries = {}
        for p, values in state.items():
            name = names.get(id(p))
            if name is not None:
                p, values = new[name], _cut_state(values, name, p, kept_of.get(name, []))
            entries[p] = values
        changed.append((state, entries))
    for params in lists:  # in place: LBFGS keeps the list
        params[:] = [new[names[id(p)]] for p in params]
    for state, entries in changed:
        state.clear()
        state.update(entries)
    for each in optimizers:
        release(each)


def _with_inner(
    optimizer: torch.optim.Optimizer, names: Mapping[int, str]
) -> list[torch.optim.Optimizer]:
    """The optimizer and those that it wraps, which have to share its lists of parameters."""
    found, shared = [optimizer], {id(group["params"]) for group in optimizer.param_groups}
    for outer in found:
        for inner in vars(outer).values():
            if not isinstance(inner, torch.optim.Optimizer) or inner in found:
                continue
            found.append(inner)
            apart = [g["params"] for g in inner.param_groups if id(g["params"]) not in shared]
            if any(id(p) in names for params in apart for p in params):
                raise MaskSparsityError(
                    f"{type(outer).__name__} wraps an optimizer, {type(inner).__name__}, with "
                    "parameter groups of its own, which would keep the dense parameters: prune "
                    "without optimizer=, and make a new one for the slim model"
                )
    return found


def _cut_state(
    values: Mapping[str, Any], name: str, p: Tensor, axes: list[tuple[int, Tensor]]
) -> dict[str, Any]:
    def sliced(key: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0:
            return value
        if value.shape != p.shape:
            raise MaskSparsityError(
                f"optimizer state {key!r} of {name} has shape {tuple(value.shape)}, the parameter "
                f"{tuple(p.shape)}: it cannot be sliced; start a new optimizer"
            )
        return kept_part(value, axes)

    return {key: tree_map(partial(sliced, key), value) for key, value in values.items()}
