"""Take channels out: slice every parameter, buffer and optimizer state, and fix the modules."""

import warnings
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._pytree import tree_map

from ..errors import MaskSparsityError
from ..tracing.network import (
    duplicate,
    evaluating,
    like,
    made_up_will_do,
    named_tensors,
    tensors_in,
    undisturbed,
    unwrap,
)
from . import constraints as limits
from .absorb import absorb as hand_over
from .groups import ChannelGraph
from .mask import KeepMask
from .silence import silence
from .verify import Refusal, prove, records_now


@torch.inference_mode(False)  # whose tensors cannot be trained
def apply_mask(model: nn.Module, graph: ChannelGraph, keep: KeepMask) -> nn.Module:
    """A copy of `model` in which the removed channels are zero wherever they are produced: in
    filters, biases, scales and shifts. It computes what the slim model computes."""
    graph.check(model, keep)
    masked = duplicate(unwrap(model))
    tensors = dict(named_tensors(masked))
    with torch.no_grad():
        for name, axis in graph.producers:
            gone = (~keep.slot(name, axis)).nonzero().squeeze(1)
            if len(gone):
                tensors[name].index_fill_(axis, gone.to(tensors[name].device), 0)
    return masked


def prune(
    model: nn.Module,
    graph: ChannelGraph,
    keep: KeepMask,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    absorb: Literal["exact", "bias"] | None = None,
) -> nn.Module:
    """A new, physically smaller model that computes what `apply_mask` computes, proved. It is bare:
    a model that was in DistributedDataParallel or `torch.compile` has to be wrapped again.

    Args:
        optimizer: changed in place to hold the slim model's parameters; its state (momentum,
            moments) is sliced like the parameters it belongs to.
        absorb: what to do about the constants that removed channels still say when their scales
            are zero and their shifts are not, see `masksparsity.channels.absorb`. None drops them.

    Warns, without `absorb`, if the removed channels are not zero in `model`: removal changes what
    it computes then.

    Raises:
        MaskSparsityError: if the mask leaves a group without channels, if optimizer state has a
            shape that is not its parameter's, if the optimizer wraps one that has parameter groups
            of its own, or if the slim model cannot be proved to read the same channels as before.
            Nothing has changed then.
    """
    slim = remove(model, graph, keep, optimizer, absorb)
    if absorb is None and not is_silent(model, graph, keep):
        warnings.warn(NOT_ZERO, stacklevel=2)
    return slim


NOT_ZERO = (  # the same words each time, so that a script is told once
    "the removed channels are not zero: the slim network computes what apply_mask(model, graph, "
    "keep) does, not what model does. Drive them to zero first, as ScheduledDecay does in the "
    "steps that it is given, or finetune"
)
_ZERO = 1e-6


def is_silent(model: nn.Module, graph: ChannelGraph, keep: KeepMask) -> bool:
    """Is all that makes the removed channels zero, so that removal changes nothing?"""
    tensors = dict(named_tensors(unwrap(model)))
    found = []
    for name, axis in graph.exposed:
        gone = (~keep.slot(name, axis)).nonzero().squeeze(1)
        values = tensors[name].detach()
        values = values.index_select(axis, gone.to(values.device))
        found += [values.abs().max().float()] if values.numel() else []
    return not found or float(torch.stack(found).max()) <= _ZERO


@torch.inference_mode(False)
def remove(
    model: nn.Module,
    graph: ChannelGraph,
    keep: KeepMask,
    optimizer: torch.optim.Optimizer | None = None,
    absorb: Literal["exact", "bias"] | None = None,
    made_up: bool = False,
) -> nn.Module:
    """`prune` without a word; with `made_up`, the first proof computes no convolution, wherever
    the model is from."""
    graph.check(model, keep)
    made_up = made_up or (graph.made_up and made_up_will_do(model))
    model = unwrap(model)
    for group, missed in zip(graph.groups, graph.branches.missed(keep.kept), strict=True):
        if missed:
            raise MaskSparsityError(
                f"the mask removes all {group.size} channels of {group.name}, which the network "
                "cannot do without; keep.repaired() lets one back in"
            )
    limits.check(graph.constraints, keep.units)
    tensors = dict(named_tensors(model))
    if absorb is not None:
        model, keep = hand_over(model, graph, keep, absorb)
    kept_of: dict[str, list[tuple[int, Tensor]]] = {}
    for name, axis in graph.slots:
        kept = keep.slot(name, axis)
        if not kept.all():
            kept_of.setdefault(name, []).append((axis, kept.nonzero().squeeze(1)))
    now = dict(named_tensors(model))
    slim = rebuild(model, {n: cut(now[n].detach(), axes) for n, axes in kept_of.items()})
    with undisturbed(model):
        _settle(model, slim, graph, keep, made_up)
    if optimizer is not None:
        _carry_over(optimizer, tensors, dict(named_tensors(slim)), kept_of)
    return slim


def _settle(
    model: nn.Module, slim: nn.Module, graph: ChannelGraph, keep: KeepMask, made_up: bool
) -> None:
    """Prove that `slim` is right; if it is not, let the lengths that are written down in its
    modules' attributes follow, and prove again."""
    try:
        prove(slim, graph, keep, made_up)
        return
    except Refusal:
        # What the model cached since it was traced has no labels, and what it does may depend on
        # values: trace it as it is now, and with the values that the slim model has, to more
        # digits than rounding could turn.
        masked = apply_mask(model, graph, keep)
    as_proved: Callable[[nn.Module], nn.Module] = _double
    try:
        records = records_now(_double(masked), graph)
    except RuntimeError:  # code that insists on its own precision
        records, as_proved = records_now(masked, graph), _as_it_is
    graph = replace(graph, records=records)
    try:
        prove(as_proved(slim), graph, keep)
    except Refusal:
        changed = limits.follow(slim, graph.cuts, keep.units)
        if not changed:
            raise
        prove(as_proved(slim), graph, keep)
        _leave_the_needless(model, slim, changed, lambda: prove(as_proved(slim), graph, keep))
        _compare(masked, slim, graph)
        known = getattr(slim, WRITTEN_DOWN, {})
        names = {*known, *changed}
        merged = {name: {**known.get(name, {}), **changed.get(name, {})} for name in names}
        setattr(slim, WRITTEN_DOWN, merged)


def _leave_the_needless(
    model: nn.Module,
    slim: nn.Module,
    changed: dict[str, dict[str, Any]],
    proved: Callable[[], None],
) -> None:
    """An attribute may have had a length by chance: those that need not follow are as they were."""
    alike: dict[tuple[type, str], list[str]] = {}
    for name, values in changed.items():
        for attribute in values:
            alike.setdefault((type(slim.get_submodule(name)), attribute), []).append(name)
    if len(alike) == 1:
        return
    for (_, attribute), names in alike.items():
        modules = [(slim.get_submodule(name), model.get_submodule(name)) for name in names]
        followed = [getattr(module, attribute) for module, _ in modules]
        for module, before in modules:
            setattr(module, attribute, copy(getattr(before, attribute)))
        try:
            proved()
        except Refusal:
            for (module, _), value in zip(modules, followed, strict=True):
                setattr(module, attribute, value)
        else:
            for name in names:
                del changed[name][attribute]


def _as_it_is(net: nn.Module) -> nn.Module:
    return net


def _double(net: nn.Module) -> nn.Module:
    with warnings.catch_warnings():  # of gradients that copies of scripted modules do not have
        warnings.simplefilter("ignore", UserWarning)
        return duplicate(net).double()


WRITTEN_DOWN = "_masksparsity_attributes"
"""Attribute of a slim model: module -> attribute -> value that had to follow the widths."""


def _compare(masked: nn.Module, slim: nn.Module, graph: ChannelGraph) -> None:
    """An attribute may have been more than a length: on the traced inputs, too, nothing changes."""
    try:
        expected, actual = (_outputs(_double(m), graph) for m in (masked, slim))
        tolerance = 1e-7
    except RuntimeError:  # code that insists on its own precision
        expected, actual = (_outputs(m, graph) for m in (masked, slim))
        tolerance = 1e-3
    for a, b in zip(expected, actual, strict=True):
        bound = tolerance * float(a.abs().nan_to_num(0, 0, 0).amax()) if a.numel() else 0.0
        same = a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=bound, equal_nan=True)
        if not same:
            raise MaskSparsityError(
                "refused: with the lengths in its modules' attributes changed, the slim model "
                "computes something else; protect the channels with trace(..., protect=...)"
            )


def _outputs(net: nn.Module, graph: ChannelGraph) -> list[Tensor]:
    """On the traced inputs and noise: what is constant would hide where it is read."""
    generator = torch.Generator().manual_seed(0)

    def noisy(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        return x + torch.randn(x.shape, generator=generator).to(x)

    args, kwargs = tree_map(noisy, like(graph.example, net))
    with evaluating(net.modules()), torch.no_grad():
        return list(tensors_in(net(*args, **kwargs)))


def cut(tensor: Tensor, axes: list[tuple[int, Tensor]]) -> Tensor:
    """The given indices of the given axes, in the tensor's own memory format."""
    out = tensor
    for axis, index in axes:
        out = out.index_select(axis, index.to(tensor.device))
    last = {4: torch.channels_last, 5: torch.channels_last_3d}
    if tensor.ndim in last and not tensor.is_contiguous():
        out = out.contiguous(memory_format=last[tensor.ndim])
    return out


def rebuild(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of `model` with some parameters and buffers of another size, attributes fixed."""
    memo: dict[int, Tensor] = {}
    for name, old in named_tensors(model):
        if name in tensors:
            new = tensors[name]
            if isinstance(old, nn.Parameter):
                new = nn.Parameter(new, requires_grad=old.requires_grad)
            new.__dict__.update(old.__dict__)
            memo[id(old)] = new
    slim = duplicate(model, memo)  # shared modules and tied weights stay shared and tied
    now = dict(named_tensors(slim))
    fixed = [name for name, new in tensors.items() if now[name].shape != new.shape]
    if fixed:
        raise MaskSparsityError(f"{fixed[0]} keeps its size in a copy of the model: protect it")
    pairs = [*zip(model.modules(), slim.modules(), strict=True)]
    # A weight that is read in train mode may take a step, as spectral_norm does.
    with evaluating([module for pair in pairs for module in pair]):
        for before, after in pairs:
            for hook in after._forward_pre_hooks.values():
                if isinstance(hook, WeightNorm):  # a weight computed before each forward
                    setattr(after, hook.name, hook.compute_weight(after).detach())
            fix = next((ATTRIBUTES[t] for t in type(after).__mro__ if t in ATTRIBUTES), None)
            if fix is not None:
                fix(before, after)
    return slim


def _conv(old: Any, new: Any) -> None:
    outputs, inputs = new.weight.shape[:2]
    if old.groups > 1 and old.weight.shape[1] == 1:  # depthwise: a group per input channel
        new.groups = outputs * old.groups // old.out_channels
        inputs = 1
    new.out_channels, new.in_channels = outputs, inputs * new.groups
    silence(new)


def _conv_transpose(old: Any, new: Any) -> None:
    if old.groups == old.in_channels == old.out_channels:  # depthwise
        new.groups = new.weight.shape[0]
    new.in_channels, new.out_channels = new.weight.shape[0], new.weight.shape[1] * new.groups


def _linear(old: Any, new: Any) -> None:
    new.out_features, new.in_features = new.weight.shape
    silence(new)


def _norm(old: Any, new: Any) -> None:
    tensor = new.weight if new.weight is not None else new.running_mean
    if tensor is not None:
        new.num_features = len(tensor)
    silence(new)


def _group_norm(old: Any, new: Any) -> None:
    if new.weight is not None:
        new.num_groups = old.num_groups * len(new.weight) // old.num_channels
        new.num_channels = len(new.weight)


def _recurrent(old: Any, new: Any) -> None:
    first = "weight_ih_l0" if isinstance(new, nn.RNNBase) else "weight_ih"
    new.input_size = getattr(new, first).shape[1]


def _prelu(old: Any, new: Any) -> None:
    new.num_parameters = len(new.weight)


ATTRIBUTES: dict[type, Callable[[Any, Any], None]] = {
    nn.modules.conv._ConvNd: _conv,
    nn.modules.conv._ConvTransposeNd: _conv_transpose,
    nn.Linear: _linear,
    nn.modules.batchnorm._NormBase: _norm,
    nn.GroupNorm: _group_norm,
    nn.PReLU: _prelu,
    nn.RNNBase: _recurrent,
    nn.RNNCellBase: _recurrent,
}
"""Module type -> fix(old, new), which sets the attributes that follow from the tensors' shapes."""


def _carry_over(
    optimizer: torch.optim.Optimizer,
    old: Mapping[str, Tensor],
    new: Mapping[str, Tensor],
    kept_of: Mapping[str, list[tuple[int, Tensor]]],
) -> None:
    names = {id(tensor): name for name, tensor in old.items()}
    lists = [group["params"] for group in optimizer.param_groups]
    if any(id(p) not in names for params in lists for p in params):
        raise MaskSparsityError("the optimizer holds parameters of another model")
    states = {id(o.state): o.state for o in _with_inner(optimizer, names)}
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
        return cut(value, axes)

    return {key: tree_map(partial(sliced, key), value) for key, value in values.items()}
