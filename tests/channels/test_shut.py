"""Channels that are not zero with their producers: what reads them becomes zero, too."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import masksparsity as ms

from .middle import Middle, bound_and_exact, exact, free_and_exact, row, traced
from .networks import random_mask

X = torch.randn(2, 3, 6, 6)

NOT_ZERO = {
    "sigmoid": lambda s, x: torch.sigmoid(x),
    "softplus": lambda s, x: F.softplus(x) + 1,
    "a scalar added": lambda s, x: s.scale * F.relu(x) ** 2 + s.bias,
    "statistics without a scale": lambda s, x: s.norm(x),
    "depthwise": lambda s, x: s.depthwise(torch.sigmoid(x)),
    "depthwise, transposed": lambda s, x: s.turned(torch.sigmoid(x)),
    "grouped": lambda s, x: s.grouped(torch.sigmoid(x)).relu(),
    "transposed": lambda s, x: s.transposed(torch.sigmoid(x)).relu(),
    "linear": lambda s, x: s.linear(torch.sigmoid(x).movedim(1, -1)).movedim(-1, 1),
    "by exp": lambda s, x: x / (1 + torch.exp(-x)) + torch.exp(x),
}


def middle(name: str) -> nn.Module:
    torch.manual_seed(0)
    own = {
        "norm": nn.BatchNorm2d(8, affine=False),
        "depthwise": nn.Conv2d(8, 8, 3, padding=1, groups=8),
        "turned": nn.ConvTranspose2d(8, 8, 3, padding=1, groups=8),
        "grouped": nn.Conv2d(8, 8, 1, groups=2),
        "transposed": nn.ConvTranspose2d(8, 8, 3, padding=1),
        "linear": nn.Linear(8, 8),
    }
    return Middle(NOT_ZERO[name], scale=row(1), bias=row(1), **own)


@pytest.mark.parametrize("name", NOT_ZERO)
def test_what_reads_them_is_zero_in_the_masked_network(name):
    model, x, graph = traced(lambda: middle(name))
    assert [g.reason.why for g in graph.protected] == ["model output"], graph
    exact(model, x, graph)


@pytest.mark.parametrize("name", ["sigmoid", "a scalar added", "depthwise", "linear"])
def test_decay_makes_their_removal_exact(name):
    model, x, graph = traced(lambda: middle(name))
    keep = random_mask(graph, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    ms.ScheduledDecay(model, graph, keep, steps=4).attach(optimizer)
    for _ in range(4):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    before = model(x)
    slim = ms.prune(model, graph, keep, optimizer=optimizer)  # without a warning
    torch.testing.assert_close(slim(x), before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("absorb", ["exact", "bias"])
def test_their_constants_can_be_absorbed_instead(absorb):
    model, x, graph = traced(lambda: middle("sigmoid"))
    keep = random_mask(graph, 2)
    silent = ms.apply_mask(model, graph, keep)
    silent.b.weight.data.copy_(model.b.weight)  # what it said, it still says
    slim = ms.prune(silent, graph, keep, absorb=absorb)
    torch.testing.assert_close(slim(x), silent(x), rtol=0, atol=1e-12)
    with pytest.warns(UserWarning, match="not zero"):
        ms.prune(silent, graph, keep)


def test_a_depthwise_filter_between_them_and_a_norm_may_stay():
    torch.manual_seed(0)
    layers = nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)
    graph = ms.trace(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Sigmoid(), *layers), X)
    assert [g.size for g in graph.prunable] == [8]
    assert ("3.weight", 0) in graph.exposed
    assert ("2.weight", 0) not in graph.exposed


INFINITE = {
    "log": lambda s, x: torch.log(torch.sigmoid(x) - 0.5),
    "inverse": lambda s, x: 1 / (torch.sigmoid(x) - 0.5),
    "behind a filter of its own": lambda s, x: s.d(1 / (x.exp() - 1)),
    "scaled to zero": lambda s, x: F.batch_norm(
        1 / (x.exp() - 1), None, None, s.n.weight, None, True
    ),
}


@pytest.mark.parametrize("name", INFINITE)
def test_infinities_are_not_multiplied_by_zero(name):
    *_, graph = traced(
        lambda: Middle(INFINITE[name], n=nn.BatchNorm2d(8), d=nn.Conv2d(8, 8, 1, groups=8))
    )
    assert not graph.by_name["a"].prunable


def test_what_sums_without_weights_protects_them():
    bound_and_exact(lambda s, x: x * torch.sigmoid(x).sum(1, keepdim=True))
    free_and_exact(lambda s, x: x * x.relu().sum(1, keepdim=True))
