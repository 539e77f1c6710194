"""Norms that people write by hand: what they keep of the batches goes with the channels."""

from collections import deque

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import remove_parametrizations

import masksparsity as ms

from .networks import calibrated, random_mask
from .test_exact import TOLERANCE, _distance


class HandWritten(nn.Module):
    """BatchNorm, its statistics updated in place by `keep`."""

    def __init__(self, keep, width: int = 8):
        super().__init__()
        self.keep = keep
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("var", torch.ones(width))
        self.register_buffer("batches", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.mean, self.var
        if self.training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
            with torch.no_grad():
                self.keep(self, mean, var)
                self.batches += 1
        row = (1, -1, 1, 1)
        x = (x - mean.view(row)) / (var.view(row) + 1e-5).sqrt()
        return x * self.weight.view(row) + self.bias.view(row)


def decayed(norm: HandWritten, mean: Tensor, var: Tensor) -> None:
    norm.mean.mul_(0.9).add_(mean, alpha=0.1)
    norm.var.mul_(0.9).add_(var, alpha=0.1)


def interpolated(norm: HandWritten, mean: Tensor, var: Tensor) -> None:
    norm.mean.lerp_(mean, 0.1)
    norm.var.lerp_(var, 0.1)


def copied(norm: HandWritten, mean: Tensor, var: Tensor) -> None:
    norm.mean.copy_(0.9 * norm.mean + 0.1 * mean.detach())
    norm.var.copy_(0.9 * norm.var + 0.1 * var.detach())


def assigned(norm: HandWritten, mean: Tensor, var: Tensor) -> None:
    norm.mean = 0.9 * norm.mean + 0.1 * mean
    norm.var = 0.9 * norm.var + 0.1 * var


def shifted(norm: HandWritten, mean: Tensor, var: Tensor) -> None:
    """Of a removed channel, something would stay."""
    norm.mean.add_(1)
    norm.var.mul_(0.9).add_(var, alpha=0.1)


def moved(norm: HandWritten, mean: Tensor, var: Tensor) -> None:
    norm.mean = norm.mean + mean.exp()


def rolled(norm: HandWritten, mean: Tensor, var: Tensor) -> None:
    norm.mean = norm.mean.roll(1)


FREE = {decayed: 14, interpolated: 14, copied: 14, assigned: 14, shifted: 0, moved: 0, rolled: 2}


@pytest.mark.parametrize("keep", FREE)
def test_statistics_go_with_their_channels(keep):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), HandWritten(keep), nn.ReLU(), nn.Conv2d(8, 6, 3),
        HandWritten(keep, 6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2),
    )  # fmt: skip
    x = torch.randn(4, 3, 8, 8, dtype=torch.double)
    model = calibrated(model, x)
    graph = ms.trace(model, x)
    assert sum(g.size for g in graph.prunable) == FREE[keep]
    for seed in range(3):
        mask = random_mask(graph, seed)
        masked, slim = ms.apply_mask(model, graph, mask), ms.prune(model, graph, mask)
        for training in (False, True, False):  # the last one reads what the one before kept
            masked.train(training), slim.train(training)
            with torch.no_grad():
                assert _distance(masked(x), slim(x)) <= TOLERANCE


class Reading(nn.Module):
    """The statistics of a norm behind a sigmoid are read as values, too."""

    def __init__(self, copies: bool) -> None:
        super().__init__()
        self.a, self.n, self.b = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)
        self.copies = copies

    def forward(self, x: Tensor) -> Tensor:
        x, n = self.a(x).sigmoid(), self.n
        if self.copies:
            mean, var = n.running_mean.clone(), n.running_var.clone()
            y = F.batch_norm(x, mean, var, n.weight, n.bias, self.training)
            if self.training:
                n.running_mean.copy_(mean)
        else:
            y = n(x)
        return self.b(y.relu() + n.running_mean.view(-1, 1, 1)).mean((2, 3))


@pytest.mark.parametrize("copies", [False, True])
def test_statistics_of_what_does_not_vanish_are_protected_where_they_are_read(copies):
    model, x = Reading(copies), torch.randn(4, 3, 8, 8)
    graph = ms.trace(model, x)
    (group,) = (g for g in graph.groups if ("a.weight", 0) in g.slots)
    assert "written in forward" in str(group.reason)


class Keeping(nn.Module):
    def __init__(self, keep) -> None:
        super().__init__()
        self.a, self.keep = nn.Conv2d(3, 8, 1), keep
        self.register_buffer("m", torch.ones(8))
        self.register_buffer("v", torch.ones(8))
        self.seen, self.log = deque([1], maxlen=3), {"steps": [[1]]}
        self.ring: list = [1]
        self.ring.append(self.ring)  # holds itself

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        self.keep(self, x)
        return x.mean((2, 3))


KEPT = {
    "many at once": lambda s, x: torch._foreach_mul_([s.m, s.v], 0.5),
    "by a norm": lambda s, x: F.batch_norm(x, s.m, s.v, training=True),
    "in a queue": lambda s, x: s.seen.append(2),
    "deep inside": lambda s, x: s.log["steps"][0].append(2),
}


@pytest.mark.parametrize("how", KEPT)
def test_what_forward_keeps_is_undone(how):
    model = Keeping(KEPT[how])
    ms.trace(model, torch.randn(4, 3, 8, 8))
    assert torch.equal(model.m, torch.ones(8))
    assert torch.equal(model.v, torch.ones(8))
    assert (model.seen, model.log) == (deque([1]), {"steps": [[1]]})


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_a_weight_that_takes_a_step_when_it_is_read_takes_none(norm):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.ReLU(), norm(nn.Conv2d(8, 8, 3, groups=8))
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(2, 3, 4, 4)
    graph = ms.trace(model, x)
    keep = random_mask(graph, 0)
    slim = ms.prune(model, graph, keep)
    assert slim[0].out_channels < 8
    for net in (model, slim):
        for name, value in net.state_dict().items():
            assert not name.startswith("3") or torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    ("norm", "fold"),
    [
        (nn.utils.spectral_norm, nn.utils.remove_spectral_norm),
        (parametrizations.spectral_norm, lambda m: remove_parametrizations(m, "weight")),
        (parametrizations.weight_norm, lambda m: remove_parametrizations(m, "weight")),
    ],
)
def test_a_computed_weight_says_what_to_do(norm, fold):
    net = nn.Sequential(*(norm(nn.Conv2d(n, m, 1)) for n, m in [(3, 8), (8, 6), (6, 4)])).eval()
    graph = ms.trace(net, torch.randn(2, 3, 4, 4))
    assert "fold it first" in str(graph.by_name["0"].reason)
    for layer in net:
        fold(layer)
    assert [g.size for g in ms.trace(net, torch.randn(2, 3, 4, 4)).prunable] == [8, 6]


def test_a_buffer_with_a_history_is_copied():
    """As where statistics are updated in forward without `no_grad`."""

    def keep(module: nn.Module, mean: Tensor, var: Tensor) -> None:
        with torch.enable_grad():
            module.var.copy_(0.9 * module.var.detach() + 0.1 * var)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), HandWritten(keep), nn.Conv2d(8, 4, 1))
    inputs = torch.randn(4, 3, 6, 6)
    model(inputs)
    assert model[1].var.grad_fn is not None
    model.eval()
    graph = ms.trace(model, inputs)
    keep_mask = random_mask(graph, 0)
    masked = ms.apply_mask(model, graph, keep_mask)
    torch.testing.assert_close(ms.prune(masked, graph, keep_mask)(inputs), masked(inputs))
