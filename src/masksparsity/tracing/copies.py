"""Copies of a user's network."""

import contextlib
import copy
import functools
import operator
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from ..errors import MaskSparsityError
from .findings import extents
from .network import named_tensors, of_users
from .state import kept_by, undisturbed


def duplicate(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy, also of a model that keeps tensors with a history, such as caches. Hooks and
    functions in it that hold the model hold the copy there."""
    apart, memo = memo is None, dict(memo or {})
    for tensor in (*kept_by(model.modules()), *model.buffers()):
        if not tensor.is_leaf:
            memo.setdefault(id(tensor), tensor.detach().clone())
    values = [v for m in model.modules() for v in vars(m).values()]
    memo |= {id(v): v for v in values if isinstance(v, torch.jit.ScriptFunction)}
    # Every module has a dozen empty tables: to copy them one by one would take most of the time.
    memo |= {id(v): type(v)() for v in values if type(v) in _TABLES and not v}
    for buffer in model.buffers():
        if extents(buffer) != [*buffer.shape]:  # expanded: one value cannot become zero alone
            memo.setdefault(id(buffer), buffer.clone(memory_format=torch.contiguous_format))
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise MaskSparsityError(
            f"the model cannot be copied, as pruning has to: {type(error).__name__}: {error}"
            f" (in {_uncopied(model, memo)})"
        ) from error
    own = {id(tensor) for _, tensor in named_tensors(model)} if apart else ()
    if shared := next((name for name, x in named_tensors(copied) if id(x) in own), None):
        raise MaskSparsityError(
            f"the model cannot be copied, as pruning has to: a copy has the same {shared}"
        )
    for module in copied.modules():
        if hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable"):
            del module.forward  # compiled for the model
            if compiled := module._modules.get("_orig_mod"):
                module.forward = functools.partial(operator.call, compiled)
        tables: tuple[Any, ...] = (vars(module), module._forward_hooks, module._forward_pre_hooks)
        for held in tables:
            held.update({k: _rebound(v, memo) for k, v in held.items() if type(v) is FunctionType})
    return copied


_TABLES = frozenset({dict, OrderedDict, set})


def _uncopied(model: nn.Module, memo: Mapping[int, Any]) -> str:
    """The attribute, of the innermost module, that cannot be copied by itself."""
    for name, module in reversed([*model.named_modules()]):
        for attribute, value in vars(module).items():
            try:
                copy.deepcopy(value, dict(memo))
            except Exception:
                return f"{name}.{attribute}" if name else attribute
    return "the model itself"


def _rebound(held: Any, memo: Mapping[int, Any]) -> Any:
    """What a copied function has to hold: the copy of what the function held, if there is one."""
    if id(held) in memo:
        return memo[id(held)]
    if type(held) is MethodType and id(held.__self__) in memo:
        return MethodType(held.__func__, memo[id(held.__self__)])
    if type(held) is not FunctionType:
        return held
    try:
        closed = [cell.cell_contents for cell in held.__closure__ or ()]
    except ValueError:  # one is empty
        return held
    before = [*closed, *(held.__defaults__ or ())]
    now = [x if x is held else _rebound(x, memo) for x in before]
    if all(map(operator.is_, before, now)):
        return held
    cells, defaults = tuple(map(CellType, now[: len(closed)])), tuple(now[len(closed) :])
    rebound = FunctionType(held.__code__, held.__globals__, held.__name__, defaults, cells)
    rebound.__kwdefaults__ = held.__kwdefaults__
    return functools.update_wrapper(rebound, held)


@contextlib.contextmanager
def shadow(model: nn.Module, theirs: bool | None = None) -> Iterator[nn.Module]:
    """A copy that shares parameters and buffers, for users' code to run on: what it keeps in
    objects, generators and arrays is left alone. Of libraries' code, which keeps little, and of
    what cannot be copied, the model itself. `theirs`: `of_users`, if that has been asked."""
    if not (of_users(model) if theirs is None else theirs):
        yield model
        return
    try:
        copied = duplicate(model, {id(tensor): tensor for _, tensor in named_tensors(model)})
    except Exception:
        copied = model
    with undisturbed(model):
        yield copied
