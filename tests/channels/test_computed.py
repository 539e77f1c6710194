"""Weights, biases and keys that forward computes: what need not vanish, and another order."""

import contextlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import masksparsity as ms

from .middle import Middle, exact, row, traced
from .networks import random_mask
from .test_exact import TOLERANCE, _distance

COMPUTED = {
    "scale of a norm": lambda: Middle(
        lambda s, x: F.batch_norm(x, s.n.running_mean, s.n.running_var, 1 + s.p, s.q),
        n=nn.BatchNorm2d(8, affine=False), p=row(8), q=row(8),
    ),
    "shift of a norm": lambda: Middle(
        lambda s, x: F.batch_norm(x, None, None, s.p, s.q.exp(), True), p=row(8), q=row(8)
    ),
    "scale of groups": lambda: Middle(lambda s, x: F.group_norm(x, 4, s.p, s.p + 1), p=row(8)),
    "bias": lambda: Middle(lambda s, x: F.conv2d(x, s.w, s.p.exp()), w=row(8, 8, 1, 1), p=row(8)),
    "bias of a product": lambda: Middle(
        lambda s, x: F.linear(x.permute(0, 2, 3, 1).flatten(0, 2), s.w, s.p.exp())
        .view(len(x), *x.shape[2:], -1)
        .permute(0, 3, 1, 2),
        w=row(8, 8), p=row(8),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPUTED)
def test_what_is_computed_beside_a_weight_may_not_vanish(name):
    x = torch.randn(2, 3, 6, 6, dtype=torch.double)
    model = COMPUTED[name]().double().eval()
    graph = ms.trace(model, x)
    (read,) = (g for g in graph.groups if ("b.weight", 1) in g.slots)
    assert read.prunable == (name != "scale of groups")  # whose number is written down
    assert ("b.weight", 1) in graph.exposed
    exact(model, x, graph)


TURNED = {
    "weight": lambda: Middle(lambda s, x: F.conv2d(x, s.p.roll(1, 1)), p=row(8, 8, 1, 1)),
    "weight of a transposed one": lambda: Middle(
        lambda s, x: F.conv_transpose2d(x, s.p.roll(1, 0)), p=row(8, 8, 1, 1)
    ),
    "weight in other rows": lambda: Middle(
        lambda s, x: F.conv2d(x, s.p.view(8, -1, 2, 1, 1).transpose(1, 2).reshape(8, -1, 1, 1)),
        p=row(8, 8, 1, 1),
    ),
    "bias": lambda: Middle(lambda s, x: F.conv2d(x, s.p, s.q.roll(1)), p=row(8, 8, 1, 1), q=row(8)),
    "shift of a norm": lambda: Middle(
        lambda s, x: F.batch_norm(x, None, None, None, s.q.roll(1), True), q=row(8)
    ),
    "weight of a product": lambda: Middle(
        lambda s, x: F.linear(x.movedim(1, 3), s.p.roll(1, 1)).movedim(3, 1), p=row(8, 8)
    ),
    "keys": lambda: Middle(
        lambda s, x: x * (x.flatten(2).mT @ x.roll(1, 1).flatten(2)).mean((1, 2), True).unsqueeze(3)
    ),
}


@pytest.mark.parametrize("name", TURNED)
def test_what_lies_in_another_order_meets_the_same_channels_or_is_refused(name):
    model, x, graph = traced(TURNED[name])
    for seed in range(8):
        keep = random_mask(graph, seed)
        with contextlib.suppress(ms.MaskSparsityError), torch.no_grad():
            slim = ms.prune(model, graph, keep)
            assert _distance(ms.apply_mask(model, graph, keep)(x), slim(x)) <= TOLERANCE


def test_what_an_orthogonal_weight_is_made_of_goes_or_stays_whole():
    orthogonal = nn.utils.parametrizations.orthogonal(nn.Conv2d(3, 12, 3))
    model = nn.Sequential(orthogonal, nn.ReLU(), nn.Conv2d(12, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    model, x = model.double(), torch.randn(1, 3, 8, 8).double()
    exact(model, x, ms.trace(model, x))


class ThirdAxis(nn.Module):
    """Kernels of several experts in one parameter, whose third axis reads channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.kernels = nn.Conv2d(3, 8, 1), nn.Parameter(torch.randn(2, 6, 8, 3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(self.stem(x), self.kernels[0])


def test_what_meets_the_unknown_says_where():
    graph = ms.trace(ThirdAxis(), torch.randn(2, 3, 8, 8))
    reason = "meets a tensor whose channels are unknown (convolution)"
    assert str(graph.by_name["stem"].reason) == reason
