"""The proof: the slim model reads, everywhere, the channels that the dense one read, less the
removed ones.

The slim model replays the user's Python with other sizes. A strided slice, a shuffle, a chunk or a
literal size may then pick other channels without any error of shape. So it is traced again with the
original channel numbers as labels, and every operation that consumes channels is compared.
"""

import torch
from torch import Tensor, nn

from .errors import MaskSparsityError
from .groups import ChannelGraph
from .mask import KeepMask
from .trace import Tracer, like


def prove(slim: nn.Module, graph: ChannelGraph, keep: KeepMask) -> None:
    """Raises MaskSparsityError, naming the module, unless every consumer of `slim` reads the
    channels that `keep` leaves of what it read in the traced model, in the same order."""
    units = torch.cat([keep.units, torch.ones(1, dtype=torch.bool)])  # -1: of no group
    given = {}
    for (name, axis), owned in graph.slots.items():
        given[name, axis] = owned[units[owned]] + 1
    tracer = Tracer(slim, graph.rules, given)
    args, kwargs = like(graph.example, slim)
    try:
        tracer.run(slim, args, kwargs)
    except Exception as error:
        raise MaskSparsityError(
            f"refused: the slim model does not run: {error} "
            f"(in {tracer.failed or 'the model itself'}). "
            "A size that is written down in forward, or in an operation that is not traced, has to "
            "follow the tensors; or protect the channels with trace(..., protect=...)"
        ) from error
    expected: dict[int, Tensor] = {}
    agreed: set[tuple[int, int]] = set()
    for k, dense in enumerate(graph.records):
        now = tracer.records[k] if k < len(tracer.records) else None
        if now is None or (now.operation, len(now.ids)) != (dense.operation, len(dense.ids)):
            _refuse(dense.operation, dense.module, "the slim model takes another way here")
        assert now is not None
        for before, after in zip(dense.ids, now.ids, strict=True):
            if (id(before), id(after)) in agreed:
                continue
            if id(before) not in expected:
                expected[id(before)] = before[units[before]] + 1
            if not torch.equal(expected[id(before)], after.reshape(-1)):
                _refuse(dense.operation, dense.module, "it would read other channels than before")
            agreed.add((id(before), id(after)))
        if now.scalars != dense.scalars:
            _refuse(
                dense.operation,
                dense.module,
                f"a number changes with the width: {dense.scalars} -> {now.scalars}",
            )
    if len(tracer.records) > len(graph.records):
        extra = tracer.records[len(graph.records)]
        _refuse(extra.operation, extra.module, "the slim model takes another way here")


def _refuse(operation: str, module: str, why: str) -> None:
    raise MaskSparsityError(
        f"refused: {why} ({operation} in {module or 'the model itself'}). Choose equal counts in "
        "the pieces that meet there, or protect the channels with trace(..., protect=...)"
    )
