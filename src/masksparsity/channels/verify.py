"""The proof: the slim model reads, everywhere, the channels that the dense one read, less the
removed ones.

The slim model replays the user's Python with other sizes. A strided slice, a shuffle, a chunk or a
literal size may then pick other channels without any error of shape. So it is traced again with the
original channel numbers as labels, and every operation that consumes channels is compared: the
channels, its numbers, and how its tensors were made.
"""

import math
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..errors import MaskSparsityError
from ..tracing.copies import shadow
from ..tracing.forward import run, run_training
from ..tracing.labels import Reason, Record
from ..tracing.network import like, of_users
from ..tracing.rules import RULES
from ..tracing.tracer import Tracer
from .groups import ChannelGraph
from .mask import KeepMask
from .silence import silent_modules

ALONE = "a channel that is left alone cannot be told from none: keep two there (min_keep=2)"


class Refusal(MaskSparsityError):
    """The proof has failed, here."""

    def __init__(
        self,
        why: str,
        operation: str,
        module: str,
        remedy: str,
        read: tuple[Tensor, ...] = (),
        entered: Tensor | None = None,
    ):
        place = f"{operation} in {module or 'the model itself'}" if operation else module
        super().__init__(f"refused: {why} ({place}). {remedy}")
        self.why, self.operation, self.module = why, operation, module
        self.read = read
        """Labels that the operation read in the dense model; where the slim one does not run, those
        of the last one that did."""
        self.entered = torch.zeros(0, dtype=torch.int64) if entered is None else entered
        """Units that flowed into the operation that raised."""


def records_now(model: nn.Module, graph: ChannelGraph) -> tuple[Record, ...]:
    """The records of a run of the dense model, with the labels that it was traced with.

    Raises:
        MaskSparsityError: it reads parameters of another model in place of its own.
    """
    tracer = Tracer(model, {**RULES, **graph.rules}, dict(graph.labels))
    _replay(tracer, model, graph)
    unread = sorted({*tracer.untouched()} - {*graph.unused})
    if unread and tracer.foreign:
        module, _, name = unread[0].rpartition(".")
        raise Refusal(
            f"a copy of the model does not read its own {name}",
            "",
            module or "the model itself",
            "Where forward was put into an object as a function that holds the model, write it as "
            "a method",
        )
    _stays(tracer.pins, tracer, graph)
    return tuple(tracer.records)


def _replay(tracer: Tracer, model: nn.Module, graph: ChannelGraph) -> None:
    args, kwargs = like(graph.example, model)
    tracer.depthwise |= graph.depthwise
    run(tracer, model, args, kwargs)
    if graph.training:
        tracer.doubled = graph.doubled
        run_training(tracer, model, args, kwargs, graph.training)


def prove(slim: nn.Module, graph: ChannelGraph, keep: KeepMask, made_up: bool = False) -> None:
    """Raises MaskSparsityError, naming the module, unless every consumer of `slim` reads the
    channels that `keep` leaves of what it read in the traced model, in the same order.

    made_up: no convolution is computed."""
    units = torch.cat([keep.units, torch.ones(1, dtype=torch.bool)])  # -1: of no group
    stays = units[graph.unit_of]
    given = {slot: labels[stays[labels]] for slot, labels in graph.labels.items()}
    failure = None
    theirs = of_users(slim)
    with shadow(slim, theirs) as net:
        tracer = Tracer(net, {**RULES, **graph.rules}, given, made_up, theirs)
        for layer in map(net.get_submodule, silent_modules(net)):
            slot = (tracer.names.get(id(layer.weight), ""), 0)
            lost = slot in given and not len(given[slot])
            tracer.silent[id(layer)] = graph.labels[slot][:1] if lost else None
        try:
            _replay(tracer, net, graph)
        except Exception as error:
            failure = error
    _compare(slim, tracer, graph, stays, ran=failure is None)
    _stays(tracer.left, tracer, graph)
    if failure is not None:
        raised, flowing = tracer.fault
        entered = [graph.unit_of[ids.reshape(-1)] for ids in flowing if raised is failure]
        raise Refusal(
            f"the slim model does not run: {str(failure) or type(failure).__name__}",
            "",
            tracer.failed or "",
            "A size that is written down in forward, or in an operation that is not traced, has to "
            "follow the tensors; or protect the channels with trace(..., protect=...)",
            _last_read(graph, tracer),
            torch.cat(entered) if entered else None,
        ) from failure


def _compare(
    slim: nn.Module, tracer: Tracer, graph: ChannelGraph, stays: Tensor, ran: bool
) -> None:
    """The records of the slim model's run, complete or not, with those of the dense one's.

    stays: bool, one per label.
    """
    remedy = (
        "Choose equal counts in the pieces that meet there, or protect the channels with "
        "trace(..., protect=...)"
    )
    expected: dict[int, Tensor] = {}
    agreed: set[tuple[int, int]] = set()
    records, replayed = [*graph.records], tracer.records
    if silent := silent_modules(slim):
        between = {r.module for r in records if _gone(r, stays)}  # sees other widths now

        def tells(r: Record) -> bool:
            return r.module not in silent and (bool(r.ids) or r.module not in between)

        records, replayed = (
            [r for r in found if tells(r) and not _gone(r, stays)] for found in (records, replayed)
        )
    for k, dense in enumerate(records):

        def refuse(why: str, dense: Record = dense) -> NoReturn:
            raise Refusal(why, dense.operation, dense.module, remedy, dense.ids)

        if k >= len(replayed):
            if ran:
                refuse("the slim model takes another way here")
            return
        now = replayed[k]
        if (now.operation, len(now.ids)) != (dense.operation, len(dense.ids)):
            lone = any(_lone(i, graph, stays) for i in dense.ids)
            refuse(ALONE if lone else "the slim model takes another way here")
        for before, after in zip(dense.ids, now.ids, strict=True):
            if (id(before), id(after)) in agreed:
                continue
            if id(before) not in expected:
                flat = before.reshape(-1)
                expected[id(before)] = flat[stays[flat]]
            if not torch.equal(expected[id(before)], after.reshape(-1)):
                lone = _lone(before, graph, stays)
                refuse(ALONE if lone else "it would read other channels than before")
            agreed.add((id(before), id(after)))
        for before, shape, after in zip(dense.ids, dense.shapes, now.ids, strict=True):
            if shape is not None and not _aligned(stays[before].view(shape), after.shape):
                refuse("it would put channels into other places")
        if now.scalars != dense.scalars:
            refuse(f"a number changes with the width: {dense.scalars} -> {now.scalars}")
        if not silent and _others(dense.origins, now.origins):
            refuse("it would read another tensor than before")
    if len(replayed) > len(records):
        extra = replayed[len(records)]
        why = "the slim model takes another way here"
        raise Refusal(why, extra.operation, extra.module, remedy, records[-1].ids)


def _stays(found: list[tuple[Tensor, Reason]], tracer: Tracer, graph: ChannelGraph) -> None:
    """Nothing is found to protect that may go by the graph: no values that leave PyTorch on a way
    that the trace did not watch, no operations that the model has had only since then."""
    free = torch.zeros(graph.units + 1, dtype=torch.bool)
    for group in graph.prunable:
        free[group.start : group.start + group.size] = True
    for ids, reason in found:
        units = graph.unit_of[ids.reshape(-1)]
        if free[units].any():
            remedy = "Protect these channels with trace(..., protect=...)"
            raise Refusal(*reason, remedy, _last_read(graph, tracer), units)


def _last_read(graph: ChannelGraph, tracer: Tracer) -> tuple[Tensor, ...]:
    """By the operation of the dense model that is as far as `tracer` has come."""
    return next((r.ids for r in graph.records[: len(tracer.records)][::-1]), ())


def _others(before: tuple[Any, ...], now: tuple[Any, ...]) -> bool:
    """Whether tensors come from elsewhere. Where that is not known, they need not."""
    if before == now:
        return False
    return len(before) != len(now) or any(
        a != b and None not in (a, b) for a, b in zip(before, now, strict=True)
    )


def _gone(record: Record, stays: Tensor) -> bool:
    """Whether an operation read a group of which nothing stays."""
    return any(ids.numel() and not stays[ids].any() for ids in record.ids)


def _lone(ids: Tensor, graph: ChannelGraph, stays: Tensor) -> bool:
    """Whether one channel of several stays."""
    units = graph.unit_of[ids]
    return len(units[stays[ids]].unique()) == 1 < len(units.unique())


def _aligned(kept: Tensor, shape: torch.Size) -> bool:
    """Whether the kept elements of an array of channels fill one of this shape, row by row."""
    if len(shape) != kept.ndim:
        return False
    last = max(range(kept.ndim), key=lambda axis: (kept.shape[axis] > 1, axis))
    rows = kept.movedim(last, -1)
    counts = rows.sum(-1)
    full = counts > 0
    lengths = [int(full.movedim(a, 0).flatten(1).any(1).sum()) if full.ndim > 1 else int(full.sum())
               for a in range(full.ndim)]  # fmt: skip
    new = [*shape[:last], *shape[last + 1 :]]
    return (
        lengths == new
        and int(full.sum()) == math.prod(lengths)
        and bool((counts[full] == shape[last]).all())
    )
