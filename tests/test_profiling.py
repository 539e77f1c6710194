"""What a model costs, counted and measured."""

import pytest
import torch
from torch import nn

import masksparsity as ms

X = torch.randn(2, 3, 8, 8)


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))


def test_counts_are_those_of_the_graph_and_the_model_is_left_as_it_was():
    model = network().train()
    found = ms.profile(model, X, runs=2)
    assert (found.macs, found.params) == ms.trace(model, X).cost()
    assert dict(found.layers) == {"0": 8 * 3 * 9 * 36, "3": 4 * 8 * 36}
    low, high = found.latency_spread_ms
    assert 0 < low <= found.latency_ms <= high
    assert model.training
    assert int(model[1].num_batches_tracked) == 0


def test_memory_is_the_models_own_whatever_ran_before():
    wide = nn.Sequential(nn.Conv2d(3, 64, 1), nn.ReLU(inplace=True), nn.Conv2d(64, 4, 1))
    held = [3 * 64 + 64 + 64 * 4 + 4, X.numel(), 2 * 64 * 64, 2 * 4 * 64]
    assert ms.profile(wide, X, runs=2).memory_mib == 4 * sum(held) / 2**20
    assert ms.profile(network(), X, runs=2).memory_mib < 0.1


class Remembers(nn.Module):
    """Keeps a grid, counts calls, and writes to its input."""

    def __init__(self):
        super().__init__()
        self.conv, self.grid, self.seen = nn.Conv2d(3, 8, 1), None, []
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        if self.grid is None:
            self.grid = torch.linspace(0, 1, x.shape[-1])
        self.calls += 1
        self.seen.append(x.shape)
        return self.conv(x.mul_(2)) * self.grid


def test_a_profile_leaves_nothing_behind():
    model, x = Remembers(), X.clone()
    ms.profile(model, x, runs=2)
    assert (model.grid, model.seen, float(model.calls)) == (None, [], 0)
    assert torch.equal(x, X)
    model(x).sum().backward()  # no tensor of inference mode is in the way


def test_one_run_has_no_spread():
    with pytest.raises(ms.MaskSparsityError, match="runs=1: at least 2"):
        ms.profile(network(), X, runs=1)
