"""Operations that people write between two layers: followed exactly, refused or protected."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import masksparsity as ms

from .networks import calibrated, random_mask
from .test_exact import TOLERANCE, _distance


class Between(nn.Module):
    """conv -> norm -> the operation -> conv, on eight channels."""

    def __init__(self, operation):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
        self.operation = operation

    def forward(self, x):
        return self.b(self.operation(self.norm(self.a(x)))).mean((2, 3))


OPERATIONS = {
    "full_like": lambda x: x * torch.full_like(x, 1 / x.shape[1]),
    "tensor": lambda x: x * torch.tensor(float(x.shape[1])),
    "full1": lambda x: x * torch.full((1,), float(x.shape[1]), dtype=x.dtype),
    "ones.mul": lambda x: x * torch.ones(1, dtype=x.dtype).mul(x.shape[1]),
    "ones_like*": lambda x: x * (torch.ones_like(x) * x.shape[1]),
    "new_full": lambda x: x * x.new_full((1, 1, 1, 1), x.shape[1]),
    "fill": lambda x: x * torch.empty_like(x).fill_(x.shape[1]),
    "arange": lambda x: x * torch.arange(x.shape[1], dtype=x.dtype)[:, None, None],
    "linspace": lambda x: x * torch.linspace(0, 1, x.shape[1], dtype=x.dtype)[:, None, None],
    "sum/C": lambda x: x - x.sum(1, keepdim=True) / x.shape[1],
    "mean": lambda x: x - x.mean(1, keepdim=True),
    "normalize": lambda x: F.normalize(x, dim=1),
    "l2 keep": lambda x: x / x.norm(dim=1, keepdim=True),
    "lrn": lambda x: F.local_response_norm(x, 3),
    "softmax": lambda x: x.softmax(1),
    "glu": lambda x: torch.cat([F.glu(x, 1)] * 2, 1),
    "sort": lambda x: x.sort(1)[0],
    "topk": lambda x: x.topk(8, 1)[0],
    "roll": lambda x: x.roll(1, 1),
    "flip": lambda x: x.flip(1),
    "repeat": lambda x: x[:, :4].repeat(1, 2, 1, 1),
    "repint": lambda x: x[:, :4].repeat_interleave(2, 1),
    "tile": lambda x: torch.tile(x[:, :4], (1, 2, 1, 1)),
    "index": lambda x: x[:, [1, 0, 3, 2, 5, 4, 7, 6]],
    "indexC": lambda x: x[:, torch.arange(x.shape[1] - 1, -1, -1)],
    "where": lambda x: torch.where(x > 0, x, x.exp()),
    "where2": lambda x: torch.where(x >= 0, torch.ones_like(x), -torch.ones_like(x)),
    "mask": lambda x: x.masked_fill(x < 0, -1.0),
    "item": lambda x: x * x.max().item(),
    "std": lambda x: x / x.std(),
    "numel": lambda x: x / x.numel(),
    "seeded": lambda x: x * (1 + torch.rand(x.shape[1], 1, 1, generator=_seeded()).to(x)),
    "power": lambda x: x * x.square().mean((2, 3), keepdim=True).pow(torch.tensor(-0.25).to(x)),
    "len": lambda x: x * len(x[0]),
    "pad": lambda x: F.pad(x, (0, 0, 0, 0, 0, 2))[:, :8],
    "padrep": lambda x: F.pad(x, (1, 1, 1, 1), value=2.0),
    "pixshuf": lambda x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2),
    "einsum": lambda x: torch.einsum("bchw,dc->bdhw", x, torch.eye(8, dtype=x.dtype)),
    "gram": lambda x: (
        x * (x.flatten(2) @ x.flatten(2).transpose(1, 2)).diagonal(dim1=1, dim2=2)[:, :, None, None]
    ),
    "cumsum": lambda x: x.cumsum(1),
    "maxpool3d": lambda x: F.max_pool3d(x.unsqueeze(1), (3, 1, 1), 1, (1, 0, 0)).squeeze(1),
    "eca": lambda x: (
        x
        * torch.sigmoid(
            F.conv1d(x.mean((2, 3))[:, None], torch.ones(1, 1, 3, dtype=x.dtype), padding=1)
        )[:, 0, :, None, None]
    ),
    "maxout": lambda x: torch.cat([x.unflatten(1, (x.shape[1] // 2, 2)).amax(2)] * 2, 1),
    "inst": lambda x: F.instance_norm(x),
    "inst+relu": lambda x: F.relu(F.instance_norm(x)),
    "gn": lambda x: F.group_norm(x, 2),
    "ln": lambda x: F.layer_norm(x, x.shape[1:]),
    "ln2": lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (x.shape[1],)).permute(0, 3, 1, 2),
    "inplace half": lambda x: (x[:, :4].mul_(2), x)[1],
    "inplace half+1": lambda x: (x[:, :4].add_(1), x)[1],
    "add const": lambda x: x + 1,
    "cos": lambda x: x.cos(),
    "clamp1": lambda x: x.clamp(min=1),
    "clampt": lambda x: torch.clamp(x, min=torch.tensor(0.5, dtype=x.dtype)),
    "lerp": lambda x: torch.lerp(x, x.sigmoid(), 0.5),
    "addcmul": lambda x: torch.addcmul(x, x, x.exp()),
    "dot": lambda x: x * torch.tensordot(x, x, dims=([0, 1, 2, 3], [0, 1, 2, 3])),
    "interp": lambda x: F.interpolate(x.transpose(1, 2), size=(x.shape[1], 8)).transpose(1, 2),
    "interpc": lambda x: F.interpolate(x.permute(0, 2, 1, 3), size=(8, 8)).permute(0, 2, 1, 3),
    "strided": lambda x: torch.as_strided(x, x.shape, x.stride()),
    "as_strided": lambda x: torch.as_strided(
        x.contiguous(), (x.shape[0], x.shape[1], 8, 8), x.contiguous().stride()
    ).flip(1),
    "scatter": lambda x: torch.zeros_like(x).scatter(1, torch.zeros_like(x).long(), x),
    "bucket": lambda x: x * (x.abs() > x.abs().median()),
    "chunkmul": lambda x: torch.cat([x.chunk(2, 1)[0] * x.chunk(2, 1)[1]] * 2, 1),
    "sp": lambda x: F.softplus(x),
    "view batch": lambda x: (
        x.reshape(x.shape[0] * 2, -1, 8, 8).mul(2).reshape(x.shape[0], -1, 8, 8)
    ),
    "stack": lambda x: torch.stack([x, x], 1).sum(1),
    "stack2": lambda x: torch.stack([x, x], 2).flatten(1, 2)[:, ::2],
    "unfold": lambda x: F.fold(F.unfold(x, 3, padding=1), (8, 8), 3, padding=1),
    "dw": lambda x: F.conv2d(
        x, torch.ones(x.shape[1], 1, 3, 3, dtype=x.dtype), padding=1, groups=x.shape[1]
    ),
    "bmm": lambda x: torch.bmm(
        x.flatten(2), torch.eye(64, dtype=x.dtype).expand(x.shape[0], 64, 64)
    ).view_as(x),
    "dist": lambda x: x * torch.cdist(x.flatten(2), x.flatten(2)).mean((1, 2))[:, None, None, None],
    "cosine": lambda x: x * F.cosine_similarity(x, x + 1, dim=1)[:, None],
    "str": lambda x: x * float(str(x.shape[1])),
    "global": lambda x: x * (x.shape[1] ** -0.5),
    "mean all": lambda x: x * x.mean(),
    "sum all": lambda x: x * x.sum(),
    "count": lambda x: x / torch.ones_like(x).sum(1, keepdim=True),
    "count by conv": lambda x: (
        x / F.conv2d(torch.ones_like(x), torch.ones(1, x.shape[1], 3, 3, dtype=x.dtype), padding=1)
    ),
    "count by product": lambda x: x * torch.ones_like(x).flatten(1).mm(x.new_ones(512, 1)).mean(),
    "share of ones": lambda x: x * torch.ones_like(x).softmax(1)[:, :1],
    "mean square": lambda x: x * F.mse_loss(torch.ones_like(x), torch.zeros_like(x)),
    "x log x": lambda x: (x.abs() * x.abs().log()).nan_to_num(5.0),
    "x rsqrt x": lambda x: (x * x.abs().rsqrt()).nan_to_num(5.0),
    "x / x": lambda x: (x / x).nan_to_num(5.0),
    "remainder": lambda x: torch.remainder(x, x.abs()).nan_to_num(5.0),
    "times infinity": lambda x: (x * torch.tensor(math.inf)).nan_to_num(5.0, 0.0, 0.0),
    "times an infinite number": lambda x: (x * math.inf).nan_to_num(5.0, 0.0, 0.0),
    "times log 0": lambda x: (x * x.new_zeros(1).log()).nan_to_num(5.0, 0.0, 0.0),
    "over zero": lambda x: (x / x.new_zeros(1)).nan_to_num(5.0, 0.0, 0.0),
    "over the number 0": lambda x: (x / 0.0).nan_to_num(5.0, 0.0, 0.0),
    "least length": lambda x: x / (1 + x.norm(p=-math.inf, dim=1, keepdim=True)),
    "harmonic length": lambda x: x / (1 + x.norm(p=-1, dim=1, keepdim=True)),
    "out=": lambda x: _written(x, lambda y: torch.sigmoid(x, out=y))[1],
    ".data =": lambda x: _written(x, lambda y: setattr(y, "data", x.sigmoid()))[0],
    "unsqueeze_": lambda x: x * x.mean((2, 3)).sigmoid().unsqueeze_(-1).unsqueeze_(-1),
    "squeeze_": lambda x: (
        x * F.linear(x.mean((2, 3))[:, None].squeeze_(1), torch.eye(8).to(x))[:, :, None, None]
    ),
    "value by width": lambda x: x * torch.arange(100.0)[x.shape[1]],
    "values up to width": lambda x: x * torch.arange(100.0)[: x.shape[1]].sum(),
    "roll by width": lambda x: x * torch.arange(100.0).roll(x.shape[1])[:1],
    "view by width": lambda x: x * torch.arange(840.0).view(-1, x.shape[1])[1, 0],
    "turned by width": lambda x: x * torch.arange(840.0).view(-1, x.shape[1]).t().reshape(-1)[1],
    "split by width": lambda x: x * torch.arange(840.0).split(x.shape[1])[1][0],
    "behind ones": lambda x: x * torch.cat([x.new_ones(x.shape[1]), x.new_zeros(9)])[6],
    "padded ones": lambda x: x * F.pad(x.new_ones(x.shape[1]), (0, 9))[6],
    "long list": lambda x: x * torch.tensor([float(x.shape[1])] * 65, dtype=x.dtype)[:1],
    "pairs apart": lambda x: (
        x.reshape(len(x), -1, 2, 8, 8).transpose(1, 2).reshape(len(x), -1, 8, 8)
    ),
    "gate sum": lambda x: x * torch.sigmoid(x.sum(1, keepdim=True)),
    "max c": lambda x: x * torch.sigmoid(x.amax(1, keepdim=True)),
}


def _seeded():
    return torch.Generator().manual_seed(5)


def _written(x, write):
    """A tensor that is overwritten, and a view of it that was taken before."""
    y = x * 1
    view = y.flatten(2)
    write(y)
    return y, view.view_as(x)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_exact_refused_or_protected(operation, layout):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8).double().to(memory_format=layout)
    model = calibrated(Between(OPERATIONS[operation]).to(memory_format=layout), x)
    graph = ms.trace(model, x)
    for seed in range(4):
        keep = random_mask(graph, seed)
        keep = keep.repaired() if seed % 2 else keep
        try:
            slim = ms.prune(model, graph, keep)
        except ms.MaskSparsityError:
            continue
        with torch.no_grad():
            assert _distance(ms.apply_mask(model, graph, keep)(x), slim(x)) <= TOLERANCE


def test_pooling_to_a_pixel_in_channels_last_hides_nothing():
    """There the pooled tensor is given other strides in place."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    ).to(memory_format=torch.channels_last)
    x = torch.randn(1, 3, 8, 8).to(memory_format=torch.channels_last)
    assert ms.trace(model, x).groups[0].prunable
