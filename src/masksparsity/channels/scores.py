"""Importance of every unit: group name -> float [size]. Higher stays longer.

A score of a unit is a reduction over what the unit owns, `reduce` ("max", "mean", "sum" or "min"):
by "max", a channel of a residual stream is as important as it is to the most interested of its
norms. Groups that own nothing to be scored by are left out, and selectors keep them whole.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..errors import MaskSparsityError
from ..tracing.network import named_tensors, require_values, unwrap
from ..tracing.state import untouched
from .groups import ChannelGraph, expect_graph

Scores = dict[str, Tensor]

_REDUCE = {"max": "amax", "mean": "mean", "sum": "sum", "min": "amin"}


def scale(model: nn.Module, graph: ChannelGraph, reduce: str = "max") -> Scores:
    """|gamma| of the BatchNorm scales (network slimming, arXiv 1708.06519). In a network that was
    never trained all are alike, and say nothing.

    Raises:
        MaskSparsityError: there are none.
    """
    tensors = _tensors(model, graph)
    if not graph.norms:
        raise MaskSparsityError("scores.scale: this model has no BatchNorm scale; use scores.norm")
    parts = {(n.weight, 0): tensors[n.weight].detach().abs() for n in graph.norms}
    return _collect(graph, parts, reduce)


def norm(model: nn.Module, graph: ChannelGraph, p: float = 1, reduce: str = "mean") -> Scores:
    """L_p norm of the filters that produce a channel (arXiv 1608.08710), divided by its mean over
    the layer, so that coupled layers of different size count alike."""
    tensors = _tensors(model, graph)
    parts = {}
    for name, axis in sorted(graph.producers):
        weight = tensors[name]
        if isinstance(weight, nn.Parameter) and weight.ndim > 1:
            size = weight.detach().movedim(axis, 0).flatten(1).float().norm(p=p, dim=1)
            parts[name, axis] = size / size.mean().clamp_min(torch.finfo(torch.float32).tiny)
    return _collect(graph, parts, reduce)


@torch.inference_mode(False)
def taylor(
    model: nn.Module,
    graph: ChannelGraph,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
    reduce: str = "sum",
) -> Scores:
    """First-order change of the loss when a channel's scale goes to zero: (gamma dL/dgamma)^2,
    summed over batches of (images, labels) (arXiv 1906.10771). Leaves the model's gradients,
    mode and buffers as they were.

    Raises:
        MaskSparsityError: without batches, or scales that take gradients.
    """
    tensors = _tensors(model, graph)
    scales = {n.weight: tensors[n.weight] for n in graph.norms if tensors[n.weight].requires_grad}
    if not scales:
        raise MaskSparsityError(
            "scores.taylor: no BatchNorm scale of this model takes gradients; use scores.norm"
        )
    measured = False
    total = {name: torch.zeros_like(scale) for name, scale in scales.items()}
    with untouched(model):
        for batch in batches:
            if not isinstance(batch, (tuple, list)) or len(batch) != 2:
                raise MaskSparsityError("scores.taylor takes batches of (images, labels)")
            images, labels = batch
            measured = True
            with torch.enable_grad():
                value = loss(model(images), labels)
            if value.numel() != 1:
                raise MaskSparsityError(
                    f"scores.taylor: the loss is {[*value.shape]}, not a number"
                )
            gradients = torch.autograd.grad(value, list(scales.values()), allow_unused=True)
            for (name, gamma), gradient in zip(scales.items(), gradients, strict=True):
                if gradient is not None:
                    total[name] += (gamma.detach() * gradient) ** 2
    if not measured:
        raise MaskSparsityError("scores.taylor: no batches to measure on")
    return _collect(graph, {(name, 0): value for name, value in total.items()}, reduce)


def _collect(graph: ChannelGraph, parts: dict[tuple[str, int], Tensor], reduce: str) -> Scores:
    if reduce not in _REDUCE:
        raise MaskSparsityError(f"reduce={reduce!r}: use one of {', '.join(_REDUCE)}")
    score = torch.zeros(graph.units, dtype=torch.float32)
    seen = torch.zeros(graph.units, dtype=torch.bool)
    found = [(graph.slots[slot], value) for slot, value in parts.items() if slot in graph.slots]
    if found:
        units = torch.cat([units for units, _ in found])
        values = torch.cat([value.detach().cpu().float() for _, value in found])
        units, values = units[units >= 0], values[units >= 0]
        score.scatter_reduce_(0, units, values, _REDUCE[reduce], include_self=False)
        seen[units] = True
    spans = {g.name: slice(g.start, g.start + g.size) for g in graph.prunable}
    return {name: score[span].clone() for name, span in spans.items() if seen[span].all()}


def _tensors(model: nn.Module, graph: ChannelGraph) -> dict[str, Tensor]:
    expect_graph(graph)
    graph.check(model)
    require_values(model)
    return dict(named_tensors(unwrap(model)))
