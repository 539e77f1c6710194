"""From a network to its channel graph."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import MaskSparsityError
from ..tracing.copies import shadow
from ..tracing.forward import run, run_training
from ..tracing.labels import Reason, Slot
from ..tracing.network import arguments, batch_size, named_tensors, of_users, unwrap
from ..tracing.recurrent import protect_units
from ..tracing.rules import RULES
from ..tracing.tracer import Rule, Tracer
from .groups import ChannelGraph
from .probe import protect_what_is_refused
from .solve import solve


@torch.inference_mode(False)  # where operations arrive undivided
def trace(
    model: nn.Module,
    example_inputs: Any,
    *,
    protect: str | tuple[str, ...] = (),
    tie: tuple[tuple[str, ...], ...] = (),
    rules: Mapping[str, Rule] | None = None,
) -> ChannelGraph:
    """Find the coupled channels of `model` by one forward on `example_inputs`.

    Args:
        example_inputs: a tensor, a tuple or list of inputs, or a dict of keyword inputs, on the
            model's device; costs are per example of its first axis.
        protect: names of modules or parameters whose channels stay, or prefixes of names; one alone
            may be a string.
        tie: names of layers, tuple by tuple, whose channels go together, index by index.
        rules: rows to add to the table of operations: ATen name without suffix -> function, as in
            `masksparsity.tracing.rules`.

    Raises:
        MaskSparsityError: if the model does not run on `example_inputs`, a name of `protect` or
            `tie` is not in it, or tied layers have different widths.

    Where all code in forward is that of libraries and nothing looks at values, no convolution is
    computed; code of yours sees real values, in train mode, too, and its lengths are tried on
    pruned copies, whose convolutions give ones.

    The model, its mode and the random state stay as they were; what hooks and code put into
    containers outside of it stays there. Inside DistributedDataParallel and `torch.compile` the
    bare network is traced. Ways that code takes only for other inputs, later in training, or where
    gradients are on are not seen: choose an example that takes them, or `protect`.
    """
    args, kwargs = arguments(example_inputs)
    protect = (protect,) if isinstance(protect, str) else tuple(protect)
    if any(isinstance(names, str) for names in (tie, *tie)):
        raise MaskSparsityError('tie: tuples of names of layers, such as (("a", "b"),)')
    model = unwrap(model)
    theirs = of_users(model)
    with shadow(model, theirs) as net:
        return _trace(net, theirs, args, kwargs, protect, tie, rules or {})


def _trace(
    model: nn.Module,
    theirs: bool,
    args: tuple,
    kwargs: dict,
    protect: tuple[str, ...],
    tie: tuple[tuple[str, ...], ...],
    rules: Mapping[str, Rule],
) -> ChannelGraph:
    table = {**RULES, **rules}
    tracer = Tracer(model, table, made_up=not rules and not theirs, theirs=theirs)
    try:
        _follow(tracer, model, args, kwargs, theirs)
        again = tracer.made_up and tracer.mattered
    except Exception:
        if not tracer.made_up:
            raise
        again = True
    if again:
        tracer = Tracer(model, table, theirs=theirs)
        _follow(tracer, model, args, kwargs, theirs)
    protect_units(tracer)
    _protect_scripts(tracer)
    spoilt = tracer.spoilt.keys() & tracer.producers & tracer.slots.keys()
    tracer.pins += [(tracer.slots[slot], tracer.spoilt[slot]) for slot in sorted(spoilt)]
    for name in protect:
        tracer.operation = "protect="
        for slot in _made_by(tracer, name):
            tracer.pin(tracer.slots[slot], "protected by the caller")
    for names in tie:
        _tie(tracer, names)
    graph = partial(solve, tracer, (args, kwargs), batch_size(args, kwargs), rules)
    written = any(type(module) is nn.Unflatten for module in tracer.modules.values())
    if theirs or written or tracer.zeros or any(cut.pieces for cut in tracer.cuts):
        return protect_what_is_refused(tracer, model, graph)
    return graph()


def _follow(tracer: Tracer, model: nn.Module, args: tuple, kwargs: dict, theirs: bool) -> None:
    try:
        run(tracer, model, args, kwargs)
    except Exception as error:
        raise MaskSparsityError(
            f"the model does not run on example_inputs: {error} (in {tracer.failed or 'the model'})"
        ) from error
    names = {name for name, _ in named_tensors(model)} if theirs else ()
    if made := sorted({*names} - tracer.shapes.keys()):
        raise MaskSparsityError(
            f"{made[0]} is made in the first forward: run the model once before it is traced"
        )
    if theirs or tracer.untouched():
        run_training(tracer, model, args, kwargs)


def _protect_scripts(tracer: Tracer) -> None:
    scripts = [n for n, m in tracer.modules.items() if isinstance(m, torch.jit.ScriptModule)]
    for (name, _), ids in tracer.slots.items() if scripts else ():
        if name.startswith(tuple(f"{script}." if script else "" for script in scripts)):
            why = "TorchScript fixes widths: prune first, then script"
            tracer.pins.append((ids, Reason(why, "", name.rpartition(".")[0])))


def _tie(tracer: Tracer, names: tuple[str, ...]) -> None:
    arrays = [tracer.slots[slot] for name in names for slot in _made_by(tracer, name)]
    if len({len(ids) for ids in arrays}) > 1:
        raise MaskSparsityError(f"tie: the layers {', '.join(names)} have different widths")
    for ids in arrays[1:]:
        tracer.unite(ids, arrays[0])


def _made_by(tracer: Tracer, name: str) -> list[Slot]:
    """The axes of channels that a layer, a parameter or all layers under a prefix make."""
    found = [s for s in tracer.producers if s[0] == name or s[0].startswith(f"{name}.")]
    if not found:
        raise MaskSparsityError(
            f"no layer named {name!r} makes channels in this model; print(graph) shows the names"
        )
    return sorted(found)
