"""From a network to its channel graph."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from . import rules as table
from .errors import MaskSparsityError
from .groups import ChannelGraph
from .probe import protect_what_is_refused
from .solve import solve
from .trace import Rule, Tracer, arguments, batch_size, unwrap


def trace(
    model: nn.Module,
    example_inputs: Any,
    *,
    protect: tuple[str, ...] = (),
    rules: Mapping[str, Rule] | None = None,
) -> ChannelGraph:
    """Find the coupled channels of `model` by one forward on `example_inputs`.

    Args:
        example_inputs: a tensor, a tuple or list of inputs, or a dict of keyword inputs, on the
            model's device; costs are per example of its first axis.
        protect: names of modules or parameters whose channels stay, or prefixes of names.
        rules: rows to add to the table of operations: ATen name without suffix -> function, as in
            `masksparsity.channels.rules`.

    Raises:
        MaskSparsityError: if the model does not run on `example_inputs`, or a name of `protect` is
            not in it.

    The model, its mode and the random state stay as they were. Inside DistributedDataParallel and
    `torch.compile` the bare network is traced.
    """
    args, kwargs = arguments(example_inputs)
    model = unwrap(model)
    tracer = Tracer(model, {**table.RULES, **(rules or {})})
    try:
        tracer.run(model, args, kwargs)
    except RuntimeError as error:
        raise MaskSparsityError(
            f"the model does not run on example_inputs: {error} (in {tracer.failed or 'the model'})"
        ) from error
    if tracer.untouched():
        tracer.run_training(model, args, kwargs)
    for name in protect:
        _protect(tracer, name)
    graph = partial(solve, tracer, model, (args, kwargs), batch_size(args, kwargs))
    if not any(cut.pieces for cut in tracer.cuts):
        return graph()
    return protect_what_is_refused(tracer, model, graph)


def _protect(tracer: Tracer, name: str) -> None:
    slots = [s for s in tracer.producers if s[0] == name or s[0].startswith(f"{name}.")]
    if not slots:
        raise MaskSparsityError(
            f"protect: no layer named {name!r} in this model; print(graph) shows the names"
        )
    tracer.operation = "protect="
    for slot in slots:
        tracer.pin(tracer.slots[slot], "protected by the caller")
