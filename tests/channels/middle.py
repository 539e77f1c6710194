"""An operation between two layers, and what is asked of it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import masksparsity as ms

from .networks import calibrated, random_mask
from .test_exact import TOLERANCE, _distance, attempt


class Middle(nn.Module):
    """conv -> an operation with modules and parameters of its own -> conv."""

    def __init__(self, operation, **own):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 4, 1)
        for name, value in own.items():
            setattr(self, name, nn.Parameter(value) if isinstance(value, Tensor) else value)
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.operation(self, self.a(x))).mean((2, 3))


def row(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def exact(
    model: nn.Module, x: Tensor, graph: ms.ChannelGraph, seeds: int = 3, counted: bool = True
) -> None:
    """For random masks, the masked and the slim network say the same, and something; and the slim
    one costs what was told, as PyTorch's own counter has it."""
    for seed in range(seeds):
        keep = random_mask(graph, seed)
        with torch.no_grad():
            masked, slim = ms.apply_mask(model, graph, keep), ms.prune(model, graph, keep)
            assert masked(x).abs().max() > 0
            assert _distance(masked(x), slim(x)) <= TOLERANCE
        cost = graph.cost(keep)
        assert cost == ms.trace(slim, x).cost()
        assert cost.params == sum(p.numel() for p in slim.parameters())
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            slim(x)
        flops = counter.get_total_flops()
        assert not counted or flops == pytest.approx(2 * len(x) * cost.macs, abs=2 * len(x))


def traced(build: Callable[[], nn.Module]) -> tuple[nn.Module, Tensor, ms.ChannelGraph]:
    """What it builds, in double precision, with statistics; an input; the graph."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6, dtype=torch.double)
    model = calibrated(build(), x)
    return model, x, ms.trace(model, x)


def free_and_exact(operation, **own) -> None:
    """All eight channels that enter the operation may go."""
    model, x, graph = traced(lambda: Middle(operation, **own))
    assert [g.size for g in graph.prunable] == [8], graph
    exact(model, x, graph)


def bound_and_exact(operation) -> None:
    """Some may not, or only where they are read as zero; and no mask is accepted that is wrong."""
    for seed in range(4):
        torch.manual_seed(seed)
        outcome, distance = attempt(Middle(operation, memory=None), seed, empty=0.0)
        assert outcome != "wrong", distance
    x = torch.randn(2, 3, 6, 6)
    graph = ms.trace(Middle(operation, memory=None), x)
    assert sum(g.size for g in graph.prunable) < 8 or ("b.weight", 1) in graph.exposed
