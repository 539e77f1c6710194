"""Recurrent layers: channels enter them, and their own units stay."""

from typing import Any

import torch
from torch import Tensor, nn

from .labels import Product, Reason
from .tracer import Rule, Tracer

RULES: dict[str, Rule] = {}

_WHY = "units of a recurrent layer"


def layer(t: Tracer, op: str, args: Any, kwargs: Any, out: Any, inplace: bool) -> None:
    """One layer in one direction; channels lie along the last axis."""
    x, weight, *others = args
    ids, seen = t.consume(x, -1, weight, 1, "channels lie along another axis")
    t.record([seen] if seen else [])
    t.meet(weight, 1, ids)
    t.consumers |= t.in_slots(weight, 1)
    kept = [m for m in t.labels(weight) if 1 not in m.axes]
    kept += [m for other in others if isinstance(other, Tensor) for m in t.labels(other)]
    t.expose(kept)
    t.pin(kept, _WHY)
    for tensor in out:
        t.set(tensor, ())
    steps, hidden = out[0].numel() / out[0].shape[-1], others[0]
    gates, units = (torch.zeros(n, dtype=torch.int64) for n in hidden.shape)
    t.products += [Product(t.module, steps, gates, read) for read in (ids, units)]


RULES["mkldnn_rnn_layer"] = layer


def protect_units(tracer: Tracer) -> None:
    """Where a layer runs as the operations that it is made of, these would let its units go."""
    for name, module in tracer.modules.items():
        if not isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            continue
        for parameter, tensor in module.named_parameters(name, recurse=False):
            reads = "weight_ih" in parameter
            axes = [axis for axis in range(tensor.ndim) if not (reads and axis == 1)]
            found = [tracer.slots[parameter, a] for a in axes if (parameter, a) in tracer.slots]
            reason = Reason(_WHY, type(module).__name__, name)
            tracer.pins += [(ids, reason) for ids in found]
