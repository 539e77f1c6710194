"""Numbers, words and places that follow from a width: exact, protected or refused, never wrong."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import masksparsity as ms

from .middle import Middle, row
from .test_exact import _distance, attempt
from .test_writing import written

SQUARE, LINE = row(8, 8, 3, 3), row(8, 8)
GRID = torch.arange(64.0).view(8, 8)


def width(x: Tensor, *pair):
    """Of two, one while no channel is gone."""
    return pair[x.shape[1] < 8]


def filled(x: Tensor, tensor: Tensor, memory: np.ndarray) -> Tensor:
    """Times the width, which comes in where no operation sees it."""
    memory[...] = x.shape[1]
    return x * tensor


def shown(x: Tensor) -> Tensor:
    return filled(x, t := torch.zeros(1, dtype=x.dtype), t.numpy())


def held(x: Tensor) -> Tensor:
    return filled(x, torch.from_numpy(memory := np.zeros(1)), memory)


def shared(x: Tensor) -> Tensor:
    return filled(x, torch.as_tensor(memory := np.zeros(1)), memory)


def beside(x: Tensor) -> Tensor:
    chosen = torch.arange(6).nonzero()
    both = torch.cat([chosen.to(x), x[0].flatten(1)[:, :5].mT], 1)
    return x * chosen.expand(-1, both.shape[1]).sum(1).max()


def copies(x: Tensor) -> Tensor:
    """As many as it has channels, by the dense order of axes."""
    return x[None].repeat(x.shape[-3], *[1] * x.ndim)


NUMBERS = {
    "in memory that is shown": shown,
    "in memory that is held": held,
    "in memory that is shared": shared,
    "in bytes": lambda x: x * torch.frombuffer(bytearray([x.shape[1]]), dtype=torch.uint8),
    "by a package": lambda x: x * torch.from_dlpack(np.array([float(x.shape[1])])),
    "by a function": lambda x: x * x.new_zeros(1).apply_(lambda _: x.shape[1]),
    "copies in front": lambda x: x[None].expand(x.shape[1], -1, -1, -1, -1).sum(0),
    "softmax over copies": lambda x: copies(x).softmax(0)[0] * x,
    "sum of copies": lambda x: copies(x).cumsum(0)[-1] + x,
    "spectrum of copies": lambda x: torch.fft.fft(copies(x), dim=0)[0].real + x,
    "product of copies": lambda x: copies(x).relu().prod(0) + x,
    "copies added": lambda x: x.new_zeros(1, *x.shape[1:]).index_add(
        0, torch.zeros(x.shape[1], dtype=torch.long), copies(x[0])
    ) + x,
    "copies scattered": lambda x: torch.zeros_like(x[:1]).scatter_add(
        0, torch.zeros_like(copies(x[0])).long(), copies(x[0])
    ) + x,
    "mean of rows": lambda x: F.batch_norm(
        torch.cat([x, x.new_zeros(x.shape[1], *x.shape[1:])]), None, None, training=True
    )[: len(x)],
    "average of copies": lambda x: x * F.avg_pool1d(
        copies(x).movedim(0, -1).flatten(0, 3)[:, None], x.shape[1]
    ).view(x.shape) / x.shape[1],
    "as many as there are": lambda x: x[:, :, torch.ones(x.shape[1]).nonzero().flatten() * 0],
    "copies of what is chosen": lambda x: x * torch.ones(3).nonzero()[None].expand(
        x.shape[1], -1, -1
    ).add(1).sum(),
    "what is chosen, times": lambda x: x * (torch.ones(3).nonzero() * x.shape[1]).sum(),
    "as wide as what stands beside it": lambda x: beside(x),
    "rows of zeros": lambda x: torch.cat([x, x.new_zeros(x.shape[1], *x.shape[1:])]).std(0) + x,
    "alpha of add": lambda x: torch.add(x, x.relu(), alpha=x.shape[1]),
    "alpha of sub": lambda x: torch.sub(x, x.relu(), alpha=1 / x.shape[1]),
    "alpha of addmm": lambda x: torch.addmm(
        row(8)[: x.shape[1]].to(x), x.flatten(2).mT[:, 0], LINE[: x.shape[1], : x.shape[1]].to(x),
        alpha=x.shape[1],
    )[..., None, None].expand_as(x),
    "value of addcmul": lambda x: torch.addcmul(x, x, x.relu(), value=x.shape[1]),
    "value of addcdiv": lambda x: torch.addcdiv(x, x, x.abs() + 1, value=x.shape[1]),
    "correction": lambda x: x * x.std((2, 3), correction=x.shape[1] // 4, keepdim=True),
    "order of a norm": lambda x: x * torch.linalg.vector_norm(
        x, ord=x.shape[1], dim=(2, 3), keepdim=True
    ),
    "decimals": lambda x: torch.round(x, decimals=x.shape[1] // 4),
    "approximation": lambda x: F.gelu(x, approximate=width(x, "tanh", "none")),
    "rounding": lambda x: torch.div(x, 0.1, rounding_mode=width(x, "floor", "trunc")),
    "epsilon": lambda x: F.layer_norm(x, x.shape[2:], eps=x.shape[1]),
    "padding": lambda x: F.batch_norm(
        F.pad(x, (1, 1), value=x.shape[1]), *torch.eye(2)[:, :1].to(x).expand(2, x.shape[1])
    ),
    "flip": lambda x: x.flip(width(x, 2, 3)),
    "transpose": lambda x: x.mT if x.shape[1] == 8 else x,
    "permute": lambda x: x.permute(width(x, (0, 1, 3, 2), (0, 1, 2, 3))),
    "roll": lambda x: x.roll(x.shape[1] // 4, 2),
    "windows": lambda x: x.unfold(2, 2, max(1, x.shape[1] // 4)).mean(-1),
    "a row": lambda x: x.select(2, x.shape[1] - 4)[:, :, None],
    "last rows": lambda x: x[:, :, x.shape[1] - 4 :],
    "first rows": lambda x: x[:, :, : x.shape[1] - 3],
    "pieces": lambda x: x.split([x.shape[1] // 2, 8 - x.shape[1] // 2], 2)[0],
    "repeated": lambda x: x.repeat(1, 1, x.shape[1] // 4, 1),
    "expanded": lambda x: x[:, :, :1].expand(-1, -1, x.shape[1], -1),
    "viewed": lambda x: x.view(*x.shape[:2], -1, width(x, 8, 4)),
    "stacked": lambda x: torch.cat([x, x.relu()], width(x, 2, 3)),
    "axis of a maximum": lambda x: x * GRID.amax(width(x, 0, 1))[3],
    "axes of a mean": lambda x: x * GRID.mean((width(x, 0, 1),))[3],
    "axis of a norm": lambda x: x * torch.linalg.vector_norm(GRID, dim=width(x, 0, 1))[3],
    "turned": lambda x: x * torch.rot90(GRID, 1, width(x, (0, 1), (1, 0)))[2, 3],
    "seed": lambda x: x * torch.rand(1, generator=torch.Generator().manual_seed(x.shape[1])),
    "offset": lambda x: x * GRID.as_strided((1,), (1,), x.shape[1]),
    "softmax": lambda x: x.softmax(width(x, 2, 3)) * x,
    "pooled zeros": lambda x: F.adaptive_avg_pool2d(
        torch.cat([x, x.new_zeros(*x.shape[:2], x.shape[1], 8)], 2), 6
    ),
    "as many rows": lambda x: x[:, :, torch.zeros(x.shape[1], dtype=torch.long)],
    "of which axis": lambda x: x.index_select(width(x, 2, 3), torch.arange(8).flip(0)),
    "unbound": lambda x: torch.stack(x.unbind(width(x, 2, 3)), 3),
    "picked": lambda x: x[:, :, [2, 1, 0]] if x.shape[1] == 8 else x[..., [2, 1, 0]].mT,
    "normalised": lambda x: x * F.layer_norm(x, width(x, x.shape[2:], x.shape[3:])),
    "a blank row": lambda x: x * written(x.new_ones(8), (x.shape[1] // 4, 0)),
    "written": lambda x: _written(x, x.shape[1] // 4),
    "chosen": lambda x: x.index_select(width(x, 2, 3), torch.arange(3)),
}  # fmt: skip


def _written(x: Tensor, row: int) -> Tensor:
    out = torch.zeros_like(x)
    out[:, :, row:] = x[:, :, row:]
    return out


class Placed(nn.Module):
    """Where a value lies counts in the output."""

    def __init__(self, operation):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 4, 1)
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.operation(self.a(x)))
        places = torch.arange(y[0, 0].numel(), dtype=x.dtype).view(y.shape[2:])
        return (y * places).sum((2, 3))


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_follows_from_a_width_is_never_wrong(name):
    for seed in range(4):
        torch.manual_seed(seed)
        outcome, distance = attempt(Placed(NUMBERS[name]), seed, empty=0.0)
        assert outcome != "wrong", distance


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("inner", [0, 1, 4])
def test_one_channel_left_before_a_gate(inner, layout):
    def gated(s: nn.Module, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=layout)  # of one channel both are the same
        return x * s.g(F.adaptive_avg_pool2d(x, 1)).sigmoid()

    gate = nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1))
    model = Middle(gated, g=gate).eval()
    x = torch.randn(2, 3, 6, 6)
    graph = ms.trace(model, x)
    keep = ms.KeepMask(graph, {"a": torch.arange(8) == 5, "g.0": torch.arange(4) < inner})
    with torch.no_grad():
        masked, slim = ms.apply_mask(model, graph, keep), ms.prune(model, graph, keep)
        assert _distance(masked(x), slim(x)) <= 1e-6
