"""Whole branches may go: their layers fall silent, and the network computes the same."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import masksparsity as ms
from masksparsity.channels.silence import silent_modules

from .networks import calibrated, random_mask


class Gated(nn.Module):
    """An inverted residual with a squeeze-and-excitation gate and a linear bottleneck."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.norm = nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding="same", groups=16)
        self.squeeze, self.excite = nn.Linear(16, 4), nn.Linear(4, 16)
        self.project, self.out = nn.Conv2d(16, 8, 3, padding=1, stride=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.relu6(self.norm(self.expand(x)))
        y = nn.functional.max_pool2d(self.depthwise(y), 3, 1, 1)
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(y.mean((2, 3))))))
        y = y * gate[:, :, None, None]
        return x + self.out(self.project(y))


def gated() -> nn.Module:
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Gated(), Gated(), *head)


CASES = {
    "resnet20": (lambda: ms.models.create("resnet20"), ["layer1.1.conv1", "layer3.2.conv1"]),
    "bottleneck": (
        lambda: ms.models.create("torchvision/resnet50"),
        ["layer2.1.conv1", "layer2.1.conv2"],
    ),
    "inverted": (
        lambda: ms.models.create("torchvision/mobilenet_v2", width_mult=0.35),
        ["features.3.conv.0.0"],
    ),
    "gated": (gated, ["3.expand", "3.squeeze"]),
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest):
    torch.manual_seed(0)
    build, branch = CASES[request.param]
    inputs = torch.randn(4, 3, 32, 32, dtype=torch.double)
    model = calibrated(build(), inputs)
    graph = ms.trace(model, inputs)
    none = {n: torch.zeros(graph.by_name[n].size, dtype=torch.bool) for n in branch}
    return model, graph, inputs, ms.KeepMask(graph, none)


def outputs(net: nn.Module, inputs: Tensor, train: bool = False) -> Tensor:
    for module in net.modules():
        module.training = train and not isinstance(module, nn.Dropout)
    return net(inputs)


def test_a_branch_goes_and_nothing_changes(case, tmp_path: Path):
    model, graph, inputs, keep = case
    masked, slim = ms.apply_mask(model, graph, keep), ms.prune(model, graph, keep)
    for train in (True, False):
        expected, actual = outputs(masked, inputs, train), outputs(slim, inputs, train)
        assert (expected - actual).abs().max() <= 1e-9 * expected.abs().max()
    assert (expected - model(inputs)).abs().max() > 1e-3 * expected.abs().max()
    assert silent_modules(slim)
    assert graph.cost(keep).params == sum(p.numel() for p in slim.parameters())
    ms.save(slim, tmp_path / "slim.safetensors")
    loaded = ms.load(tmp_path / "slim.safetensors", model=model)
    assert torch.equal(outputs(loaded, inputs), actual)
    assert torch.equal(outputs(copy.deepcopy(slim), inputs), actual)


def test_what_is_left_is_pruned_again(case):
    model, graph, inputs, keep = case
    slim = ms.prune(model, graph, keep)
    again = ms.trace(slim, inputs)
    assert again.cost() == graph.cost(keep)
    later = random_mask(again, 3)
    expected = outputs(ms.apply_mask(slim, again, later), inputs)
    actual = outputs(ms.prune(slim, again, later), inputs)
    assert (expected - actual).abs().max() <= 1e-9 * expected.abs().max()


def test_training_goes_on_with_its_optimizer(case):
    model, graph, inputs, keep = case
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    outputs(model, inputs, train=True).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    slim = ms.prune(model, graph, keep, optimizer=optimizer)
    outputs(slim, inputs, train=True).square().mean().backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in slim.parameters())
    # DistributedDataParallel waits for every gradient that is asked for.
    assert all(p.grad is not None for p in slim.parameters() if p.requires_grad)


def test_budgets_let_branches_go_only_if_asked(case):
    model, graph, _, keep = case
    scores = ms.scores.norm(model, graph)
    scores |= {n: 0 * scores[n] for n, kept in keep.items() if not kept.any()}
    share = 1 - graph.cost(keep).macs / graph.cost().macs
    gone = ms.select.budget(graph, scores, pruned_macs=share, min_keep=0)
    assert torch.equal(gone.kept == 0, keep.kept == 0)
    ms.prune(model, graph, gone)
    assert (ms.select.budget(graph, scores, pruned_macs=share).kept > 0).all()


def test_the_network_stays_connected(case):
    """All scores zero, everything may go: what is left still runs from input to output."""
    model, graph, inputs, _ = case
    scores = {n: 0 * s for n, s in ms.scores.norm(model, graph).items()}
    keep = ms.select.threshold(graph, scores, 1.0, min_keep=0)
    slim = ms.prune(model, graph, keep)
    for module in slim.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.bias, 2.0)  # no activation is off
    x = inputs.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(outputs(slim, x, train=True).square().sum(), x)
    assert gradient.abs().max() > 0


def test_what_the_network_cannot_do_without_is_refused(case):
    model, graph, *_ = case
    nothing = ms.KeepMask(
        graph, {g.name: torch.zeros(g.size, dtype=torch.bool) for g in graph.prunable}
    )
    with pytest.raises(ms.MaskSparsityError, match=r"cannot do without; keep\.repaired"):
        ms.prune(model, graph, nothing)
    ms.prune(model, graph, nothing.repaired())


class SimpleGate(nn.Module):
    """Half of the channels, times the other half (NAFNet, arXiv 2204.04676)."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.project = nn.Conv2d(8, 16, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.expand(x).chunk(2, 1)
        return x + self.project(a * b)


def test_what_code_takes_apart_keeps_a_channel_to_take():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), SimpleGate(), nn.Conv2d(8, 2, 1)).double()
    graph = ms.trace(model, x := torch.randn(2, 3, 4, 4, dtype=torch.double))
    scores = {n: s * (n != "1.expand") for n, s in ms.scores.norm(model, graph).items()}
    keep = ms.select.threshold(graph, scores, 1e-9, min_keep=0)
    assert keep["1.expand"].sum() == 1
    assert torch.allclose(ms.prune(model, graph, keep)(x), ms.apply_mask(model, graph, keep)(x))


def test_limits_hold_for_what_nobody_hears_any_more():
    """With its reader silent a layer may go as well, unless it is to stay."""
    torch.manual_seed(0)
    branch = nn.Sequential(*(nn.Conv2d(8, 8, 1) for _ in range(3)))

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.branch, self.head = nn.Conv2d(3, 8, 1), branch, nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(x + self.branch(x))

    model = Residual()
    graph = ms.trace(model, torch.randn(2, 3, 4, 4))
    scores = {n: s + 1 for n, s in ms.scores.norm(model, graph).items()}
    scores["branch.1"] *= 0
    for limits in ({"ignore": ("branch.0",)}, {"ignore": "branch.0"}):
        keep = ms.select.threshold(graph, scores, 0.5, min_keep=0, **limits)
        assert keep["branch.0"].all()
        assert not keep["branch.1"].any()
    assert not ms.select.threshold(graph, scores, 0.5, min_keep=0)["branch.0"].any()


def test_silent_layers_are_pickled(case, tmp_path: Path):
    model, graph, inputs, keep = case
    slim = ms.prune(model, graph, keep)
    torch.save(slim, tmp_path / "slim.pt")
    again = torch.load(tmp_path / "slim.pt", weights_only=False)
    assert torch.equal(outputs(again, inputs), outputs(slim, inputs))


def test_a_forward_of_its_own_is_not_silenced():
    """Torch refuses to run it without channels, and so do we."""
    torch.manual_seed(0)
    model = gated()
    model[3].project.forward = lambda y: 2 + nn.Conv2d.forward(model[3].project, y)
    inputs = torch.randn(2, 3, 8, 8)
    graph = ms.trace(model, inputs)
    none = {
        n: torch.zeros(graph.by_name[n].size, dtype=torch.bool) for n in ("3.expand", "3.squeeze")
    }
    with pytest.raises(ms.MaskSparsityError):
        ms.prune(model, graph, ms.KeepMask(graph, none))


class Divided(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.back = (
            nn.Conv2d(3, 8, 1),
            nn.Conv2d(8, 6, 1),
            nn.Conv2d(6, 8, 1),
        )
        self.leave = nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        inner = self.inner(x)
        return self.leave(x + self.back(inner / inner.norm(dim=1, keepdim=True)))


def test_what_is_divided_by_its_own_norm_does_not_go_altogether():
    model, x = Divided().double(), torch.randn(2, 3, 4, 4, dtype=torch.double)
    graph = ms.trace(model, x)
    keep = ms.KeepMask(graph, {"inner": torch.zeros(6, dtype=torch.bool)})
    with pytest.raises(ms.MaskSparsityError, match="all 6 channels of inner"):
        ms.prune(model, graph, keep)
    keep = keep.repaired()
    torch.testing.assert_close(
        ms.prune(model, graph, keep)(x), ms.apply_mask(model, graph, keep)(x)
    )


class Choosing(nn.Module):
    """Beside a residual branch, a choice by the width of another layer."""

    def __init__(self, choose: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.inner, self.back = (
            nn.Conv2d(3, 8, 1),
            nn.Conv2d(8, 8, 1),
            nn.Conv2d(8, 8, 1),
        )
        self.wide, self.out, self.choose = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 4, 1), choose

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = torch.relu(x + self.back(torch.relu(self.inner(x))))
        return self.out(self.choose(torch.relu(self.wide(x))))


@pytest.mark.parametrize(
    "choose",
    [
        lambda x: x if x.shape[1] > 2 else x.tanh(),
        lambda x: x / torch.tensor(1.0 if x.shape[1] > 2 else 2.0),
    ],
    ids=["tensor", "number"],
)
def test_a_silent_branch_hides_nothing_beside_it(choose: Callable[[Tensor], Tensor]):
    model, inputs = Choosing(choose), torch.randn(2, 3, 6, 6)
    graph = ms.trace(model, inputs)
    narrow = {"wide": torch.tensor([True, True, False, False, False, False])}
    none = {"inner": torch.zeros(8, dtype=torch.bool)}
    ms.prune(model, graph, ms.KeepMask(graph, none))
    for mask in (narrow, {**narrow, **none}):
        with pytest.raises(ms.MaskSparsityError, match="refused"):
            ms.prune(model, graph, ms.KeepMask(graph, mask))


class Attending(nn.Module):
    """A branch whose values lie beside what a product without weights sums over."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.query, self.value = (
            nn.Conv2d(i, o, 1) for i, o in ((3, 8), (8, 4), (8, 5))
        )
        self.back, self.out = nn.Conv2d(5, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        query, value = self.query(x).flatten(2), self.value(x).flatten(2)
        read = value @ (query.mT @ query).softmax(-1)
        return self.out(x + self.back(read.view(len(x), -1, *x.shape[2:])))


def test_what_a_product_goes_on_with_keeps_a_channel():
    """Torch would compute it with one of zeros, and the cost be another than told."""
    inputs = torch.randn(2, 3, 6, 6)
    model = Attending().eval()
    graph = ms.trace(model, inputs)
    keep = ms.select.threshold(graph, {"value": torch.zeros(5)}, 0.5, min_keep=0)
    assert keep["value"].sum() == 1
    assert graph.cost(keep) == ms.trace(ms.prune(model, graph, keep), inputs).cost()


def test_a_norm_without_scale_falls_silent_too():
    torch.manual_seed(0)
    inner = [nn.Conv2d(8, 5, 3, padding=1), nn.BatchNorm2d(5, affine=False), nn.ReLU()]
    branch = nn.Sequential(*inner, nn.Conv2d(5, 8, 1))

    class Residual(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            x = self[0](x).relu()
            return self[2](x + self[1](x))

    model = Residual(nn.Conv2d(3, 8, 1), branch, nn.Conv2d(8, 4, 1)).double().eval()
    inputs = torch.randn(2, 3, 6, 6, dtype=torch.double)
    graph = ms.trace(model, inputs)
    keep = ms.KeepMask(graph, {"1.0": torch.zeros(5, dtype=torch.bool)})
    masked, slim = ms.apply_mask(model, graph, keep), ms.prune(model, graph, keep)
    torch.testing.assert_close(slim(inputs), masked(inputs))


class Tied(nn.Module):
    """A residual block that comes back through the weight by which it went."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.code = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1, bias=False)
        self.out = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        back = nn.functional.conv_transpose2d(self.code(x).relu(), self.code.weight)
        return self.out(x + back).mean((2, 3))


def test_a_weight_that_is_read_by_code_does_not_go_altogether():
    inputs = torch.randn(2, 3, 6, 6)
    model = Tied().eval()
    graph = ms.trace(model, inputs)
    scores = {"first": torch.ones(8), "code": torch.zeros(6)}
    keep = ms.select.threshold(graph, scores, 0.5, min_keep=0)
    assert keep["code"].sum() == 1
    masked, slim = ms.apply_mask(model, graph, keep), ms.prune(model, graph, keep)
    torch.testing.assert_close(outputs(slim, inputs), outputs(masked, inputs))
