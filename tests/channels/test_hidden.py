"""What a network does out of sight: each of these once slipped past the tracer."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d

import masksparsity as ms

from .networks import calibrated, random_mask
from .test_exact import TOLERANCE, _distance


class Middle(nn.Module):
    """conv -> an operation with modules and parameters of its own -> conv."""

    def __init__(self, operation, **own):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 4, 1)
        for name, value in own.items():
            setattr(self, name, nn.Parameter(value) if isinstance(value, Tensor) else value)
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.operation(self, self.a(x))).mean((2, 3))


def row(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


PARAMETERS = {
    "bias by view": lambda: Middle(lambda s, x: x + s.p.view(1, -1, 1, 1), p=row(8)),
    "scale and shift": lambda: Middle(
        lambda s, x: x * s.p[:, None, None] + s.q[:, None, None], p=row(8), q=row(8)
    ),
    "expanded": lambda: Middle(lambda s, x: x + s.p.expand(len(x), -1, -1, -1), p=row(1, 8, 1, 1)),
    "resized": lambda: Middle(
        lambda s, x: x + F.interpolate(s.p, size=x.shape[2:], mode="bilinear"), p=row(1, 8, 3, 3)
    ),
    "pooled": lambda: Middle(lambda s, x: x + s.p.mean((2, 3), keepdim=True), p=row(1, 8, 3, 3)),
    "summed": lambda: Middle(lambda s, x: x + s.p.sum(0)[:, None, None], p=row(5, 8)),
    "chosen": lambda: Middle(lambda s, x: torch.where(x > 0, x, s.p), p=row(8, 1, 1)),
    "maximum": lambda: Middle(lambda s, x: torch.maximum(x, s.p), p=row(8, 1, 1)),
    "table": lambda: Middle(
        lambda s, x: x + s.e(torch.arange(len(x)) % 5)[:, :, None, None], e=nn.Embedding(5, 8)
    ),
    "frozen norm": lambda: Middle(lambda s, x: s.n(x), n=_frozen()),
    "prototypes": lambda: Middle(
        lambda s, x: x * ((x.mean((2, 3))[:, None] - s.p) ** 2).sum(-1).sum(1)[:, None, None, None],
        p=row(5, 8),
    ),
    "write to .data": lambda: Middle(lambda s, x: (x.data.add_(1), x)[1]),
    "write to detached": lambda: Middle(lambda s, x: (x.detach().add_(1), x)[1]),
}


def _frozen() -> FrozenBatchNorm2d:
    norm = FrozenBatchNorm2d(8)
    norm.bias.copy_(row(8))
    norm.running_mean.copy_(row(8))
    return norm


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_on_their_way_are_producers(name):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6, dtype=torch.double)
    model = calibrated(PARAMETERS[name](), x)
    graph = ms.trace(model, x)
    for seed in range(3):
        keep = random_mask(graph, seed)
        with torch.no_grad():
            masked, slim = ms.apply_mask(model, graph, keep), ms.prune(model, graph, keep)
            assert _distance(masked(x), slim(x)) <= TOLERANCE
    assert ms.scores.norm(model, graph).keys() <= {g.name for g in graph.prunable}
    assert name.startswith("write") or graph.prunable


@dataclass
class Result:
    features: Tensor
    scores: Tensor


@dataclass(slots=True)
class Slotted:
    features: Tensor


OUTPUTS = {
    "dataclass": lambda f, y: Result(f, y),
    "slots": lambda f, y: [Slotted(f), y],
    "object": lambda f, y: {"out": SimpleNamespace(f=f, more=[y, None, 3])},
}


class Features(nn.Module):
    def __init__(self, give, always: bool):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.give, self.always = give, always

    def forward(self, x: Tensor):
        features = self.a(x)
        scores = self.b(features)
        return self.give(features, scores) if self.always or self.training else scores


@pytest.mark.parametrize("always", [True, False])
@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_are_protected_wherever_they_are(kind, always):
    """In objects of any kind, and also if they are handed out in train mode only."""
    graph = ms.trace(Features(OUTPUTS[kind], always), torch.randn(2, 3, 4, 4))
    assert not graph.prunable
    assert graph.training


def test_a_list_of_tensors_beside_a_split():
    """Its comparison with the split's sizes has no truth value."""

    class Grid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
            self.grid, self.sizes = [torch.zeros(2), torch.zeros(2)], [3, 5]

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.cat(self.a(x).split(self.sizes, 1), 1))

    assert ms.trace(Grid(), torch.randn(1, 3, 4, 4)).prunable


def test_absorption_refuses_sums_without_weights():
    """`x.square().sum(1)` hears the shift of a removed channel, and nothing can stand for it."""
    model = Middle(lambda s, x: x * s.n(x).square().sum(1, keepdim=True), n=nn.BatchNorm2d(8))
    x = torch.randn(2, 3, 6, 6, dtype=torch.double)
    model = calibrated(model, x)
    graph = ms.trace(model, x)
    for how in ("exact", "bias"):
        with pytest.raises(ms.MaskSparsityError, match="operation without weights"):
            ms.prune(model, graph, random_mask(graph, 1), absorb=how)


def test_absorption_where_a_weight_is_used_both_ways():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.n = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
            self.w = nn.Parameter(row(12, 8, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.n(self.a(x)))
            return F.conv_transpose2d(F.relu(F.conv2d(y, self.w)), self.w).square()

    x = torch.randn(2, 3, 6, 6, dtype=torch.double)
    model = calibrated(Tied(), x)
    graph = ms.trace(model, x)
    keep = ms.KeepMask(graph, {"w": torch.arange(12) < 7})
    with torch.no_grad():
        slim = ms.prune(model, graph, keep, absorb="exact")
        assert _distance(ms.apply_mask(model, graph, keep)(x), slim(x)) <= TOLERANCE
