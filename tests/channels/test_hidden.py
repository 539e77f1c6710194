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


class Literal(nn.Module):
    """Two convolutions, and a size that is written down in the way to the classifier."""

    def __init__(self, operation, features: int):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 24, 3)
        self.inter, self.fc, self.out = 24, nn.Linear(features, 12), nn.Linear(12, 2)
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.fc(self.operation(self, F.relu(self.b(F.relu(self.a(x))))))))


LITERALS = {
    "view": (lambda s, x: x.view(-1, 24 * 16), 24 * 16),
    "reshape": (lambda s, x: x.reshape(len(x), 24, -1).mean(2), 24),
    "unflatten": (lambda s, x: x.unflatten(1, (24, 1)).flatten(2).mean(2), 24),
    "assert": (lambda s, x: _checked(x).mean((2, 3)), 24),
}


def _checked(x: Tensor) -> Tensor:
    if x.shape[1] != 24:
        raise TypeError("24 channels, please")
    return x


def _exact(model: nn.Module, x: Tensor, graph: ms.ChannelGraph, seeds: int = 3) -> None:
    for seed in range(seeds):
        keep = random_mask(graph, seed)
        with torch.no_grad():
            masked, slim = ms.apply_mask(model, graph, keep), ms.prune(model, graph, keep)
            assert _distance(masked(x), slim(x)) <= TOLERANCE


@pytest.mark.parametrize("name", LITERALS)
def test_a_literal_size_protects_only_what_it_is_the_size_of(name):
    model = Literal(*LITERALS[name]).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.double)
    graph = ms.trace(model, x)
    assert [g.name for g in graph.prunable] == ["a", "fc"]
    assert "does not follow other widths" in str(graph.by_name["b"].reason)
    _exact(model, x, graph)


def test_a_size_in_an_attribute_follows():
    model = Literal(lambda s, x: x.view(len(x), s.inter, -1).mean(2), 24).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.double)
    graph = ms.trace(model, x)
    assert [g.name for g in graph.prunable] == ["a", "b", "fc"]
    _exact(model, x, graph)


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_what_is_scripted_keeps_its_width():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), torch.jit.script(nn.Conv2d(8, 6, 1)), nn.ReLU())
    assert not ms.trace(model, torch.randn(1, 3, 4, 4)).prunable


def test_one_channel_left_of_an_instance_norm():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, affine=True), nn.Conv2d(8, 2, 1))
    x = torch.randn(3, 3, 7, 7, dtype=torch.double)
    graph = ms.trace(model.double(), x)
    keep = ms.KeepMask(graph, {"0": torch.arange(8) == 5})
    with torch.no_grad():
        slim = ms.prune(model, graph, keep)
        assert _distance(ms.apply_mask(model, graph, keep)(x), slim(x)) <= TOLERANCE
