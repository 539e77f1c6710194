"""A choice by the width between tensors of the same channels: protected or refused, never wrong."""

import pytest
import torch
from torch import Tensor, nn

import masksparsity as ms

from .middle import Middle, free_and_exact, row
from .test_exact import attempt
from .test_numbers import width


class Pick(nn.Module):
    """The choice inside a module, which does nothing else."""

    def forward(self, *given: Tensor) -> Tensor:
        return width(given[0], *given)


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return width(x, x, 2 * x)


class Ends(nn.Module):
    """What is returned, and in which order."""

    def __init__(self, ends):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 4, 1)
        self.ends = ends

    def forward(self, x: Tensor) -> object:
        h = self.a(x).relu()
        return self.ends(x, h, self.b(h).mean((2, 3)))


def _written(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two copies, one of them doubled here and there."""
    copies = x.clone(), x.clone()
    copies[1][:, :, ::2].mul_(2)
    return copies


CHOICES = {
    "a piece": lambda s, x: width(x, *x.chunk(2, 3)),
    "a sum or a difference": lambda s, x: width(x, x + x.relu(), x - x.relu()),
    "in a module": lambda s, x: s.pick(x.relu(), x.abs()),
    "in a module of torch's": lambda s, x: s.within(x.relu()),
    "of a table": lambda s, x: x * width(x, *s.table),
    "sides of where": lambda s, x: torch.where(x > 0, *width(x, (x, 2 * x), (2 * x, x))),
    "sides of a subtraction": lambda s, x: torch.sub(*width(x, (x.relu(), x), (x, x.relu()))),
    "order of cat": lambda s, x: torch.cat(width(x, [x, x.relu()], [x.relu(), x]), 2)[:, :, ::2],
    "a dtype": lambda s, x: x.to(width(x, torch.float16, torch.double)).to(x.dtype),
    "written in place": lambda s, x: width(x, x.relu(), x.clone().mul_(2)),
    "written through a view": lambda s, x: width(x, *_written(x)),
    "multiples": lambda s, x: width(x, x * 2, x * 3),
    "slices": lambda s, x: width(x, x[:, :, :4], x[:, :, 4:]),
    "laid out": lambda s, x: width(x, x, x.mT),
    "before a layer that does nothing": lambda s, x: s.nothing(width(x, x.relu(), x.abs())),
    "values": lambda s, x: x * width(x, *map(torch.tensor, ([1.0, 2.0] * 4, [2.0, 1.0] * 4))),
    "many values": lambda s, x: x * torch.tensor(width(x, MANY, MANY[::-1])).view(-1, 8)[:8],
}
MANY = [float(n) for n in range(80)]
ENDS = {
    "order": lambda x, h, y: width(h, (y, y.relu()), (y.relu(), y)),
    "of inputs": lambda x, h, y: (y, width(h, x[:, :1], x[:, :1] * 2)),
    "in a dict": lambda x, h, y: {"y": width(h, y, y.relu())},
    "names": lambda x, h, y: dict(zip(width(h, "pq", "qp"), (y, y.relu()), strict=True)),
    "a number": lambda x, h, y: (y, torch.as_tensor(0.0) + width(h, 1, 2)),
}


def _net(name: str) -> nn.Module:
    if name in ENDS:
        return Ends(ENDS[name])
    table = [row(8), row(8).flip(0)]
    within = nn.Sequential(nn.Identity(), Twice())
    own = {"pick": Pick(), "within": within, "nothing": nn.Identity(), "table": table}
    return Middle(CHOICES[name], **own)


@pytest.mark.parametrize("name", [*CHOICES, *ENDS])
def test_a_choice_by_the_width_is_never_wrong(name: str) -> None:
    for seed in range(4):
        torch.manual_seed(seed)
        outcome, distance = attempt(_net(name), seed, empty=0.0)
        assert outcome != "wrong", distance
    net = _net(name)
    assert sum(g.size for g in ms.trace(net, torch.randn(2, 3, 8, 8)).prunable) < 8


@pytest.mark.parametrize(
    "operation",
    [
        lambda s, x: torch.cat([*x.chunk(2, 3)][::-1], 3),
        lambda s, x: torch.stack(x.unbind(2)[::-1], 2).contiguous().view(x.shape),
        lambda s, x: s.pick(x.relu(), x.abs()),
        lambda s, x: x * s.table[1],
        lambda s, x: x.to(torch.float32).to(x.dtype) if x.dtype == torch.float32 else x.relu_(),
    ],
)
def test_what_goes_the_same_way_for_all_widths_is_free(operation) -> None:
    first = nn.Identity()
    first.forward = lambda a, b: a  # type: ignore[method-assign]
    free_and_exact(operation, pick=first, table=[row(6), row(6)])
