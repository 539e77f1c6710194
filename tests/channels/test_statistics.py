"""Norms that people write by hand: what they keep of the batches goes with the channels."""

import pytest
import torch
from torch import Tensor, nn

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


@pytest.mark.parametrize("keep", [decayed, interpolated, copied, assigned, shifted])
def test_statistics_go_with_their_channels(keep):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), HandWritten(keep), nn.ReLU(), nn.Conv2d(8, 6, 3),
        HandWritten(keep, 6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2),
    )  # fmt: skip
    x = torch.randn(4, 3, 8, 8, dtype=torch.double)
    model = calibrated(model, x)
    graph = ms.trace(model, x)
    assert len(graph.prunable) == (0 if keep is shifted else 2)
    for seed in range(3):
        mask = random_mask(graph, seed)
        masked, slim = ms.apply_mask(model, graph, mask), ms.prune(model, graph, mask)
        for training in (False, True, False):  # the last one reads what the one before kept
            masked.train(training), slim.train(training)
            with torch.no_grad():
                assert _distance(masked(x), slim(x)) <= TOLERANCE
