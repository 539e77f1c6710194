"""Channels left alone, and layers left without any, among code that weighs, writes or converts."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, fx, nn

import masksparsity as ms
from masksparsity.channels.silence import silent_modules

from .networks import calibrated


class Weighted(nn.Module):
    """Branches times elements of a learnt vector, as in differentiable architecture search."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)
        self.inner, self.outer = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 1)
        self.alpha = nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.alpha[0] * torch.relu(self.inner(x))
        return self.head((x + self.alpha[1] * self.outer(y)).mean((2, 3)))


class Routed(nn.Module):
    """An expert for some of the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)
        self.inner, self.outer = nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        pixels = torch.relu(self.stem(x)).permute(0, 2, 3, 1).flatten(0, 2)
        chosen = (pixels.sum(1) > pixels.sum(1).mean()).nonzero(as_tuple=True)[0]
        out = torch.zeros_like(pixels)
        out[chosen] = self.outer(torch.relu(self.inner(pixels[chosen])))
        return self.head((pixels + out).view(len(x), -1, pixels.shape[1]).mean(1))


def emptied(model: nn.Module, group: str, inputs: Tensor) -> tuple[nn.Module, nn.Module]:
    """What `apply_mask` and `prune` make without one group."""
    graph = ms.trace(model, inputs)
    keep = ms.KeepMask(graph, {group: torch.zeros(graph.by_name[group].size, dtype=torch.bool)})
    masked = ms.apply_mask(model, graph, keep)
    return masked, ms.prune(masked, graph, keep)


@pytest.mark.parametrize("kind", [Weighted, Routed])
def test_a_branch_goes_from_between_such_code(kind):
    torch.manual_seed(0)
    inputs = torch.randn(2, 3, 8, 8, dtype=torch.double)
    masked, slim = emptied(kind().double().eval(), "inner", inputs)
    assert silent_modules(slim)
    expected = masked(inputs + 1)
    assert (expected - slim(inputs + 1)).abs().max() <= 1e-9 * expected.abs().max()


class Bordered(nn.Module):
    """A learnt value for each channel around the maps, as re-parametrised blocks pad with."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.border = nn.Conv2d(3, 8, 1), nn.Parameter(torch.randn(8))
        self.head = nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.pad(self.stem(x), [1] * 4)
        x[:, :, 0:1, :] = x[:, :, -1:, :] = self.border.view(1, -1, 1, 1)
        return self.head(x).mean((2, 3))


class SideBySide(nn.Module):
    """Two layers' channels written into one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 6, 1)
        self.head = nn.Conv2d(14, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.left(x), self.right(x)
        both = x.new_zeros(len(x), a.shape[1] + b.shape[1], *x.shape[2:])
        both[:, : a.shape[1]], both[:, a.shape[1] :] = a, b
        return self.head(both).relu().mean((2, 3))


@pytest.mark.parametrize("kind", [Bordered, SideBySide])
def test_one_channel_may_be_left_alone_where_code_writes(kind):
    torch.manual_seed(0)
    inputs = torch.randn(2, 3, 8, 8, dtype=torch.double)
    model = kind().double().eval()
    graph = ms.trace(model, inputs)
    keep = ms.select.uniform(graph, ms.scores.norm(model, graph), 0.9)
    assert all(keep[group.name].sum() == 1 for group in graph.prunable)
    masked = ms.apply_mask(model, graph, keep)
    slim = ms.prune(masked, graph, keep)
    assert (masked(inputs) - slim(inputs)).abs().max() <= 1e-9 * masked(inputs).abs().max()


@pytest.fixture
def slim() -> nn.Module:
    torch.manual_seed(0)
    inputs = torch.randn(2, 3, 16, 16)
    model = calibrated(ms.models.create("resnet20"), inputs.double()).float()
    return emptied(model, "layer2.0.conv1", inputs)[1].eval()


def test_graph_tracers_follow(slim: nn.Module):
    inputs = torch.randn(3, 3, 20, 16)
    assert torch.equal(fx.symbolic_trace(slim)(inputs), slim(inputs))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch.jit itself
        warnings.simplefilter("error", torch.jit.TracerWarning)
        assert torch.equal(torch.jit.trace(slim, inputs[:1])(inputs), slim(inputs))


def test_what_converts_layers_leaves_silent_ones_alone(slim: nn.Module):
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(slim))
    inputs = torch.randn(2, 3, 16, 16)
    assert any(isinstance(m, nn.SyncBatchNorm) for m in converted.modules())
    torch.testing.assert_close(converted(inputs), slim(inputs))


def test_a_shallow_copy_of_a_silent_layer_says_its_own_bias(slim: nn.Module):
    layer = slim.get_submodule("layer2.0.conv2")
    again = copy.copy(layer)  # as DataParallel makes them
    again.__dict__["_parameters"] = {"weight": layer.weight, "bias": torch.ones(len(layer.weight))}
    x = torch.randn(2, 1, 4, 4)
    assert torch.equal(again(x), layer(x) + 1)


class Grouped(nn.Module):
    """A branch whose grouped convolution may keep one input of each group, and no output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 4)
        self.inner, self.grouped = nn.Conv2d(6, 4, 1), nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.outer = nn.Conv2d(4, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.outer(torch.relu(self.grouped(torch.relu(self.inner(x)))))
        return self.head((x + y).mean((2, 3)))


def test_a_silent_grouped_layer_is_pruned_and_loaded_again(tmp_path):
    torch.manual_seed(0)
    inputs = torch.randn(2, 3, 8, 8)
    model = Grouped().eval()
    graph = ms.trace(model, inputs)
    keep = ms.KeepMask(
        graph, {"grouped": torch.zeros(2, dtype=torch.bool), "inner": torch.tensor([True, False])}
    )
    slim = ms.prune(ms.apply_mask(model, graph, keep), graph, keep)
    again = ms.trace(slim, inputs)
    later = ms.KeepMask(again, {"stem": torch.arange(6) < 4})
    slimmer = ms.prune(ms.apply_mask(slim, again, later), again, later)
    ms.save(slimmer, tmp_path / "m.safetensors")
    loaded = ms.load(tmp_path / "m.safetensors", model=model)
    assert torch.equal(loaded(inputs), slimmer(inputs))
