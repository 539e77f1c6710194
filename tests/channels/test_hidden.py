"""What a network does out of sight: each of these once slipped past the tracer."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d

import masksparsity as ms

from .middle import Middle, exact, free_and_exact, row, traced
from .networks import calibrated, random_mask
from .test_exact import TOLERANCE, _distance

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
    "divisor": lambda: Middle(lambda s, x: x / s.p[:, None, None], p=row(8)),
    "on the last axis": lambda: Middle(
        lambda s, x: (x.movedim(1, 3) * s.p).movedim(3, 1), p=row(1, 1, 1, 8)
    ),
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
    "write with out=": lambda: Middle(
        lambda s, x: (torch.add(x.mean((0, 2, 3)), 1, out=s.p), x - s.p[:, None, None])[1], p=row(8)
    ),
    "write to detached": lambda: Middle(lambda s, x: (x.detach().add_(1), x)[1]),
}


def _frozen() -> FrozenBatchNorm2d:
    norm = FrozenBatchNorm2d(8)
    norm.bias.copy_(row(8))
    norm.running_mean.copy_(row(8))
    return norm


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_on_their_way_are_producers(name):
    model, x, graph = traced(PARAMETERS[name])
    exact(model, x, graph)
    assert ms.scores.norm(model, graph).keys() <= {g.name for g in graph.prunable}
    assert name.startswith("write") or graph.prunable


def test_a_divisor_that_is_a_factor_elsewhere_is_protected():
    x = torch.randn(2, 3, 6, 6, dtype=torch.double)
    model = calibrated(
        Middle(lambda s, x: (x / s.p[:, None, None]) + s.p[:, None, None], p=row(8)), x
    )
    graph = ms.trace(model, x)
    assert not graph.prunable
    assert "something is divided by it" in str(graph)


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
            self.about = [{"stage": 1}]

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
        with pytest.warns(UserWarning, match="filters without a norm, are not zero"):
            slim = ms.prune(model, graph, keep, absorb="exact")
        assert _distance(ms.apply_mask(model, graph, keep)(x), slim(x)) <= TOLERANCE


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_what_is_scripted_keeps_its_width():
    def bottleneck() -> nn.Module:
        return nn.Sequential(nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 8, 1))

    model = nn.Sequential(nn.Conv2d(3, 8, 1), torch.jit.script(bottleneck()), bottleneck())
    graph = ms.trace(model, torch.randn(1, 3, 4, 4))
    assert [g.name for g in graph.prunable] == ["2.0"]
    assert "prune first, then script" in str(graph.by_name["1.0"].reason)
    assert graph.cost().params == sum(p.numel() for p in model.parameters())
    assert not ms.trace(torch.jit.script(bottleneck()), torch.randn(1, 8, 4, 4)).prunable
    free_and_exact(lambda s, x: s.f(x), f=torch.jit.script(_swish))  # a function has no width


def _swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n = nn.InstanceNorm2d(8, affine=True)
        self.p = nn.Parameter(row(8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.n(x) * self.p.view(1, -1, 1, 1)


class Windows(nn.Module):
    """The largest of nine neighbours, by way of a view that takes them apart."""

    def forward(self, x: Tensor) -> Tensor:
        return F.unfold(x, 3, padding=1).view(len(x), -1, 9, *x.shape[2:]).amax(2)


ALONE = {
    "residual": Residual,
    "instance norm": lambda: nn.InstanceNorm2d(8, affine=True),
    "frozen norm": lambda: FrozenBatchNorm2d(8),
    "windows": Windows,
}


@pytest.mark.parametrize("name", ALONE)
def test_one_channel_left(name):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), ALONE[name](), nn.Conv2d(8, 2, 1))
    x = torch.randn(3, 3, 7, 7, dtype=torch.double)
    graph = ms.trace(model.double(), x)
    keep = ms.KeepMask(graph, {"0": torch.arange(8) == 5})
    with torch.no_grad():
        slim = ms.prune(model, graph, keep)
        assert _distance(ms.apply_mask(model, graph, keep)(x), slim(x)) <= TOLERANCE


class Recurrent(nn.Module):
    """Convolutions that a recurrent layer reads, column by column."""

    def __init__(self, kind, **options):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.r, self.out = kind(16, 5, **options), nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(F.relu(self.a(x))).relu().permute(3, 0, 1, 2).flatten(2)
        y = self.r(y)[0] if isinstance(self.r, nn.RNNBase) else self.r(y[0])
        return self.out(y[0] if isinstance(y, tuple) else y)


class OfInput(nn.Module):
    """A recurrent cell on the network's input: its first hidden state is zeros beside that."""

    def __init__(self):
        super().__init__()
        self.cell, self.out = nn.Conv2d(9, 6, 3, padding=1), nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.new_zeros(len(x), self.out.in_channels, *x.shape[2:])
        for _ in range(2):
            hidden = self.cell(torch.cat([x, hidden], 1)).tanh()
        return self.out(hidden)


def test_a_recurrent_cell_may_read_the_input():
    model, x, graph = traced(OfInput)
    assert [(g.name, g.size) for g in graph.prunable] == [("cell", 6)]
    exact(model, x, graph)


KINDS = {
    "lstm": (nn.LSTM, {"bidirectional": True, "num_layers": 2}),
    "projected": (nn.LSTM, {"proj_size": 3}),
    "gru": (nn.GRU, {"num_layers": 2}),
    "rnn": (nn.RNN, {"bias": False}),
    "lstm cell": (nn.LSTMCell, {}),
    "gru cell": (nn.GRUCell, {}),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("dtype", [torch.float, torch.double])
@pytest.mark.parametrize("name", KINDS)
def test_recurrent_layers_read_channels_and_keep_their_units(name, dtype):
    """In single precision some of them are one operation."""
    kind, options = KINDS[name]
    model, x = Recurrent(kind, **options), torch.randn(2, 1, 2, 7)
    model(x)
    graph = ms.trace(model.to(dtype), x.to(dtype))
    assert {"a", "b"} == {g.name for g in graph.prunable}
    exact(model.double(), x.double(), graph)
    slim = ms.prune(model, graph, random_mask(graph, 1))
    assert slim.r.input_size < 16
    assert slim.r.hidden_size == 5


def test_a_refusal_behind_a_recurrent_layer():
    """In double precision, as the proof runs, it is other operations than it was when traced."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.lstm = nn.Linear(3, 16), nn.LSTM(16, 6)
            self.f, self.b = nn.Linear(6, 16), nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(self.f(self.lstm(y)[0]).reshape(y.shape))

    graph = ms.trace(Masked(), torch.randn(5, 1, 3))
    assert "does not follow other widths" in str(graph.by_name["f"].reason)


def test_a_layer_without_a_weight_until_its_hook_runs():
    def computed(layer: nn.Conv2d) -> nn.Conv2d:
        layer.weight_orig = nn.Parameter(layer._parameters.pop("weight").data)
        layer.register_forward_pre_hook(lambda m, _: setattr(m, "weight", m.weight_orig * 0.5))
        return layer

    class Scales(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.to_rgb = nn.Conv2d(3, 8, 1), nn.ModuleList()
            self.to_rgb.extend(computed(nn.Conv2d(8, 3, 1)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.to_rgb[1](self.a(x)).mean((2, 3))

    model, x = Scales().double(), torch.randn(2, 3, 4, 4, dtype=torch.double)
    exact(model, x, graph := ms.trace(model, x))
    assert [g.size for g in graph.prunable] == [8]


def test_a_report_tells_what_was_not_used():
    class Other(Middle):
        def __init__(self) -> None:
            super().__init__(lambda s, x: x)
            self.spare = nn.Conv2d(8, 8, 1)

    assert str(ms.trace(Other(), torch.randn(1, 3, 4, 4))).endswith("inputs: spare")


HELD: dict[str, nn.Module] = {}


def test_a_forward_that_finds_another_model_is_protected():
    model = HELD["model"] = Middle(lambda s, x: x).eval()
    model.forward = lambda x: HELD["model"].b(HELD["model"].a(x).relu())
    graph = ms.trace(model, row(2, 3, 8, 8))
    assert "does not read its own weight" in str(graph.by_name["a"].reason)


_take = Tensor.numpy  # no patch of the class reaches it


@pytest.mark.parametrize("library", [False, True])
def test_values_that_leave_by_a_method_out_of_its_class(library, monkeypatch):
    def gate(s, x):
        return x * float(_take(x.mean((0, 2, 3))).max())

    if library:  # whose code is not tried out while tracing
        monkeypatch.setattr(Middle, "__module__", "torchvision.models")
        gate.__module__ = "torchvision.models"
    model = Middle(gate).eval()
    graph = ms.trace(model, row(2, 3, 8, 8))
    assert graph.by_name["a"].prunable == library
    if library:
        with pytest.raises(ms.MaskSparsityError, match=r"values leave PyTorch \(numpy"):
            ms.prune(model, graph, ms.KeepMask(graph, {"a": torch.arange(8) > 2}))
