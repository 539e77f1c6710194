"""One map for all channels, expanded to as many, and what is made of it: channels pass by it, until
something makes its channels differ."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .middle import free_and_exact
from .test_exact import attempt

GRID = torch.linspace(-1.2, 1, 72).view(1, 6, 6, 2)


def gate(s: nn.Module, x: Tensor) -> Tensor:
    return s.m(x).sigmoid().expand_as(x)


def warped(s: nn.Module, x: Tensor) -> Tensor:
    ones, grid = x.new_ones(x.size()), GRID.to(x).expand(len(x), -1, -1, -1)
    return x * F.grid_sample(ones, grid, align_corners=False)


ALIKE = {
    "made whole": lambda s, x: x * gate(s, x).contiguous(),
    "cloned": lambda s, x: x * gate(s, x).clone(),
    "beside a number": lambda s, x: x * (1 + gate(s, x)),
    "of another type": lambda s, x: x * gate(s, x).float().double(),
    "repeated": lambda s, x: x * s.m(x).sigmoid().repeat(1, x.shape[1], 1, 1),
    "tiled": lambda s, x: x * s.m(x).sigmoid().tile(1, x.shape[1], 1, 1),
    "on zeros": lambda s, x: x * (torch.zeros_like(x) + s.m(x).sigmoid()),
    "times ones": lambda s, x: x * (torch.ones_like(x) * s.m.bias),
    "a ramp": lambda s, x: x + 2 * torch.linspace(0, 1, 6).to(x).view(1, 1, 1, -1).expand_as(x),
    "pooled ones": lambda s, x: x * F.avg_pool2d(torch.ones_like(x), 3, 1, 1),
    "pooled map": lambda s, x: x * F.max_pool2d(gate(s, x).clone(), 3, 1, 1),
    "warped ones": warped,
    "as many as values choose": lambda s, x: (
        x * torch.arange(6).nonzero().repeat(1, 3).to(x).mean()
    ),
}


def by_place(x: Tensor) -> Tensor:
    """Another number for each channel that is left."""
    return torch.arange(8.0)[: x.shape[1]].to(x).view(1, -1, 1, 1)


FIRST = torch.tensor([0, 1])
WRITTEN = {
    "a slice": lambda e, x: e[:, :2].fill_(3),
    "places": lambda e, x: e.__setitem__((slice(None), FIRST), 3.0),
    "index fill": lambda e, x: e.index_fill_(1, FIRST, 3.0),
    "narrow": lambda e, x: e.narrow(1, 0, 2).zero_(),
    "copy": lambda e, x: e.copy_(by_place(x).expand_as(x)),
    "added": lambda e, x: e.add_(by_place(x)),
    "out=": lambda e, x: torch.mul(e, by_place(x), out=e),
    "flat": lambda e, x: e.view(-1)[:40].fill_(3),
    "NumPy": lambda e, x: e.data.numpy()[:, :2].fill(3),
    "scattered": lambda e, x: e.scatter_(1, torch.zeros_like(e[:, :1]).long(), 0.0),
}
MADE = {
    "added up": lambda e, x: e.cumsum(1),
    "summed": lambda e, x: e.sum(1, keepdim=True),
    "softmax": lambda e, x: e.softmax(1),
    "normalised": lambda e, x: F.layer_norm(e, e.shape[1:]),
    "padded": lambda e, x: F.pad(e, (0, 0, 0, 0, 1, 0))[:, :-1],
    "triangle": lambda e, x: e.transpose(1, 3).triu().transpose(1, 3),
    "cut": lambda e, x: torch.cat([e[:, :2], 2 * e[:, 2:]], 1),
}


@pytest.mark.parametrize("name", ALIKE)
def test_channels_pass_by_what_is_alike_for_all(name):
    free_and_exact(ALIKE[name], m=nn.Conv2d(8, 1, 1))


class Changed(nn.Module):
    def __init__(self, name: str):
        super().__init__()
        self.a, self.m, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 1, 1), nn.Conv2d(8, 4, 1)
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        e = gate(self, x).clone()
        if self.name in WRITTEN:
            WRITTEN[self.name](e, x)
        else:
            e = MADE[self.name](e, x)
        return self.b(x * e).mean((2, 3))


@pytest.mark.parametrize("name", [*WRITTEN, *MADE])
def test_what_makes_them_differ_is_never_wrong(name):
    for seed in range(4):
        torch.manual_seed(seed)
        outcome, distance = attempt(Changed(name), seed, empty=0.0)
        assert outcome != "wrong", distance
