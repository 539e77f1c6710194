"""Take channels out, and prove that what is left computes the same."""

import warnings
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import MaskSparsityError
from ..tracing.copies import duplicate
from ..tracing.network import like, named_tensors, noisy, of_users, tensors_in, unwrap
from ..tracing.state import evaluating, made_anew, undisturbed, untouched
from . import constraints as limits
from .absorb import absorb as hand_over
from .absorb import filters_and_scales
from .groups import ChannelGraph, expect_graph
from .mask import KeepMask
from .optimizer import carry_over
from .rebuild import kept_part, rebuild
from .verify import Refusal, prove, records_now


@torch.inference_mode(False)  # whose tensors cannot be trained
def apply_mask(model: nn.Module, graph: ChannelGraph, keep: KeepMask) -> nn.Module:
    """A copy of `model` in which the removed channels are zero wherever they are produced: in
    filters, biases, scales and shifts; and, where zero does not stay zero on the way, as behind a
    sigmoid, wherever they are read. It computes what the slim model computes."""
    expect_graph(graph)
    graph.check_mask(keep)
    graph.check(model)
    masked = duplicate(unwrap(model))
    tensors = dict(named_tensors(masked))
    with torch.no_grad():
        for name, axis in graph.producers | graph.exposed:
            gone = (~keep.slot(name, axis)).nonzero().squeeze(1)
            if len(gone):
                tensors[name].index_fill_(axis, gone.to(tensors[name].device), 0)
    return made_anew(masked)


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

    Warns if the removed channels are not zero in `model` (with `absorb`: their scales, and filters
    without a norm): removal changes what it computes then.

    Raises:
        MaskSparsityError: if the mask leaves a group without channels, if optimizer state has a
            shape that is not its parameter's, if the optimizer wraps one that has parameter groups
            of its own, or if the slim model cannot be proved to read the same channels as before.
            Nothing has changed then.
    """
    slim = remove(model, graph, keep, optimizer, absorb)
    if lost := what_is_lost(model, graph, keep, absorb is not None):
        warnings.warn(lost, stacklevel=2)
    return slim


# The same words each time, so that a script is told once.
_REMEDY = (
    "Drive them to zero first, as ScheduledDecay does in the steps that it is given, or finetune"
)
_NOT_ZERO = (
    "the removed channels are not zero: the slim network computes what apply_mask(model, graph, "
    f"keep) does, which need not be what model does. {_REMEDY}"
)
_CONSTANT = (
    "the removed channels are not zero: they still say a constant, as shifts do without scales, "
    "which is dropped; absorb='exact' (--prune.absorb exact) keeps it"
)
_NOT_CONSTANT = (
    "the scales of the removed channels, or filters without a norm, are not zero, and absorb keeps "
    f"what shifts say alone: the slim network does not compute what model does. {_REMEDY}"
)
_ZERO = 1e-6


def what_is_lost(
    model: nn.Module, graph: ChannelGraph, keep: KeepMask, absorbing: bool
) -> str | None:
    """A warning if removal may change what `model` computes."""
    if already_zero(model, graph, keep, absorbing):
        return None
    if absorbing:
        return _NOT_CONSTANT
    return _CONSTANT if already_zero(model, graph, keep, absorbing=True) else _NOT_ZERO


def already_zero(
    model: nn.Module, graph: ChannelGraph, keep: KeepMask, absorbing: bool = False
) -> bool:
    """Whether all that makes the removed channels is zero, so that removal changes nothing; if
    it is `absorbing` constants, all but their shifts."""
    tensors = dict(named_tensors(unwrap(model)))
    read = graph.exposed & filters_and_scales(graph) if absorbing else graph.exposed
    found = []
    for name, axis in read:
        gone = (~keep.slot(name, axis)).nonzero().squeeze(1)
        values = tensors[name].detach()
        values = values.index_select(axis, gone.to(values.device))
        found += [values.abs().max().float()] if values.numel() and not values.is_meta else []
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
    expect_graph(graph)
    graph.check_mask(keep)
    graph.check(model)
    made_up = made_up or (graph.made_up and not of_users(model))
    model = unwrap(model)
    for group, missed in zip(graph.groups, graph.branches.missed(keep.kept), strict=True):
        if missed:
            raise MaskSparsityError(
                f"the mask removes all {group.size} channels of {group.name}, which the network "
                "cannot do without; keep.repaired() lets one back in"
            )
    limits.check(graph.constraints, keep.units)
    pairs = zip(graph.groups, keep.kept, strict=True)
    if first := {g.name: torch.arange(g.size) < 1 for g, left in pairs if not left}:
        # Around layers that fall silent the proof sees less: it sees all with one channel there,
        # which is what code between them sees, too.
        remove(model, graph, KeepMask(graph, {**keep, **first}), made_up=made_up)
    tensors = dict(named_tensors(model))
    if absorb is not None:
        model, keep = hand_over(model, graph, keep, absorb)
    kept_of: dict[str, list[tuple[int, Tensor]]] = {}
    for name, axis in graph.slots:
        kept = keep.slot(name, axis)
        if not kept.all():
            kept_of.setdefault(name, []).append((axis, kept.nonzero().squeeze(1)))
    now = dict(named_tensors(model))
    parts = {n: kept_part(now[n].detach(), axes) for n, axes in kept_of.items()}
    slim = made_anew(rebuild(model, parts))
    with undisturbed(model):
        _settle(model, slim, graph, keep, made_up)
    if optimizer is not None:
        carry_over(optimizer, tensors, dict(named_tensors(slim)), kept_of)
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
            limits.check(graph.constraints, keep.units, refused=True)
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
    args, kwargs = noisy(like(graph.example, net))
    with untouched(net), evaluating(net.modules()), torch.no_grad():
        return list(tensors_in(net(*args, **kwargs)))
