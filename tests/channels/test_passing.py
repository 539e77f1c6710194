"""Operations that channels pass: what enters them may go, exactly, and costs what was told."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import deform_conv2d, roi_pool

import masksparsity as ms

from .middle import Middle, exact, row
from .networks import calibrated


def _norm() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))


def _deformable(s: nn.Module, x: Tensor) -> Tensor:
    return deform_conv2d(x, s.offset(x), s.w, padding=1)


WHOLE = {
    "expanded norm": lambda: Middle(lambda s, x: F.normalize(x, dim=1)),
    "computed weight": lambda: Middle(lambda s, x: F.conv2d(x, s.w * 0.5), w=row(8, 8, 1, 1)),
    "computed matrix": lambda: Middle(
        lambda s, x: F.linear(x.permute(0, 2, 3, 1), s.w * 0.5).permute(0, 3, 1, 2), w=row(8, 8)
    ),
    "pooled boxes": lambda: Middle(
        lambda s, x: roi_pool(x, torch.tensor([[0.0, 1, 1, 4, 4], [1.0, 0, 2, 5, 4]]).to(x), 3)
    ),
    "a row of ones": lambda: Middle(lambda s, x: x * x.new_ones(x.shape[1]).view(1, -1, 1, 1)),
    "topk": lambda: Middle(lambda s, x: x.flatten(2).topk(9)[0].view(len(x), -1, 3, 3)),
    "sort": lambda: Middle(lambda s, x: x.sort(dim=3, descending=True)[0]),
    "cumsum": lambda: Middle(lambda s, x: x.cumsum(2)),
    "median": lambda: Middle(lambda s, x: x.flatten(2).median(2)[0][:, :, None, None] * x),
    "places of medians": lambda: Middle(
        lambda s, x: x + x.flatten(2).median(2)[1][..., None, None]
    ),
    "a triangle": lambda: Middle(lambda s, x: x.triu(1) + x.tril()),
    "how many": lambda: Middle(lambda s, x: x * x.count_nonzero(1)[:, None]),
    "hypot": lambda: Middle(lambda s, x: torch.hypot(x, x.relu()) + torch.heaviside(x, 0 * x)),
    "never zero": lambda: Middle(lambda s, x: x.logaddexp(x) + x.erfc() + x.sinc()),
    "unpool": lambda: Middle(
        lambda s, x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), kernel_size=2)
    ),
    "grid": lambda: Middle(
        lambda s, x: F.grid_sample(x, s.g, align_corners=True),
        g=row(2, 5, 5, 2),
    ),
    "inference mode": lambda: Middle(
        torch.inference_mode()(lambda s, x: F.relu(s.n(x))), n=_norm()
    ),
    "a check": lambda: Middle(lambda s, x: x if not x.isnan().any() else x.nan_to_num()),
    "where it is": lambda: Middle(lambda s, x: x * (x > 0.1).any(1, keepdim=True)),
    "norm": lambda: Middle(lambda s, x: x * torch._VF.norm(x, 2, 1, True)),
    "attention": lambda: Middle(
        lambda s, x: (
            torch.baddbmm(
                torch.empty(1, 1, 1, dtype=x.dtype),
                x.flatten(2).mT,
                x.flatten(2),
                beta=0,
                alpha=0.3,
            )[:, None, :, 0]
            .softmax(-1)
            .view(len(x), 1, *x.shape[2:])
            * x
        )
    ),
    "attention between positions": lambda: Middle(
        lambda s, x: torch.bmm(
            x.flatten(2), (x.flatten(2).mT @ x.flatten(2)).softmax(-1).permute(0, 2, 1)
        ).view(x.shape)
    ),
    "products channel by channel": lambda: Middle(lambda s, x: x @ x.mT),
    "positions mixed": lambda: Middle(
        lambda s, x: F.linear(x.flatten(2), s.w).view(*x.shape[:2], 6, 6), w=row(36, 36)
    ),
    "weighted parts": lambda: Middle(
        lambda s, x: torch.cat([s.w[0] * x, s.w[1] * x.relu()], 1).chunk(2, 1)[1], w=row(2)
    ),
    "a filter per place": lambda: Middle(
        lambda s, x: (
            F.unfold(x, 3, padding=1).view(len(x), x.shape[1], 9, 6, 6) * s.p(x).softmax(1)[:, None]
        ).sum(2),
        p=nn.Conv2d(8, 9, 1),
    ),
    "a gate of its own layer": lambda: Middle(
        lambda s, x: s.c(x)[:, :1].sigmoid() * s.c(x)[:, 1:], c=nn.Conv2d(8, 9, 1)
    ),
    "one channel, copied": lambda: Middle(
        lambda s, x: s.c(x)[:, :1].expand_as(x) * x, c=nn.Conv2d(8, 9, 1)
    ),
    "as many as the last bits say": lambda: Middle(_chosen_by_rounding),
    "logsigmoid": lambda: Middle(lambda s, x: F.logsigmoid(x)),
    "rrelu": lambda: Middle(lambda s, x: F.rrelu(x)),
    "deformable": lambda: Middle(_deformable, w=row(8, 8, 3, 3), offset=nn.Conv2d(8, 18, 1)),
}


def _chosen_by_rounding(s: nn.Module, x: Tensor) -> Tensor:
    chosen = (x.sum(1) > x.flip(1).sum(1)).nonzero()
    marks = x.new_zeros(len(x), *x.shape[2:])
    marks[tuple(chosen.T)] = 1
    return x + 0 * marks.sum()


@pytest.mark.parametrize("name", WHOLE)
def test_nothing_is_protected_needlessly(name):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6, dtype=torch.double)
    model = calibrated(WHOLE[name](), x)
    graph = ms.trace(model, x)
    assert any(("a.weight", 0) in g.slots for g in graph.prunable)
    exact(model, x, graph, counted=name != "deformable")  # which PyTorch does not count
