"""Make convolutional networks smaller, by removal that changes nothing they compute.

import masksparsity as ms

graph = ms.trace(model, example_inputs)
keep = ms.select.budget(graph, ms.scores.scale(model, graph), pruned_macs=0.5)
ms.ScheduledDecay(model, graph, keep, steps=1000).attach(optimizer)  # then train on
slim = ms.prune(model, graph, keep)
"""

from . import models
from .channels import scores, select
from .channels.analysis import trace
from .channels.calibrate import recalibrate
from .channels.cost import Cost
from .channels.decay import ScheduledDecay
from .channels.groups import ChannelGraph, ChannelGroup
from .channels.mask import KeepMask
from .channels.penalty import MaskedL1, Proximal
from .channels.surgery import apply_mask, prune
from .errors import MaskSparsityError
from .exporting import export
from .files.archive import load, save
from .files.mask import from_original, load_mask, save_mask
from .profiling import Profile, latency, profile

KeepMask.save = save_mask
KeepMask.load = staticmethod(load_mask)  # type: ignore[assignment]
KeepMask.from_original = staticmethod(from_original)  # type: ignore[assignment]

__version__ = "0.1.0"

__all__ = [
    "ChannelGraph",
    "ChannelGroup",
    "Cost",
    "KeepMask",
    "MaskSparsityError",
    "MaskedL1",
    "Profile",
    "Proximal",
    "ScheduledDecay",
    "apply_mask",
    "export",
    "latency",
    "load",
    "models",
    "profile",
    "prune",
    "recalibrate",
    "save",
    "scores",
    "select",
    "trace",
]
