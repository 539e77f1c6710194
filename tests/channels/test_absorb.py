import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops import deform_conv2d

import masksparsity as ms
from masksparsity.tracing.network import named_tensors

from .networks import calibrated, random_mask

MODELS = {
    "resnet20-A": lambda: ms.models.create("resnet20"),
    "tv-mobilenet_v2": lambda: ms.models.create("torchvision/mobilenet_v2", width_mult=0.25),
    "flattened": lambda: nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.SiLU(),
        nn.Conv2d(6, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8), nn.Sigmoid(),
        nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2, 2), nn.BatchNorm2d(6),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5),
    ),
}  # fmt: skip


def silenced(model, graph, keep):
    """The removed channels' scales at zero and their shifts as they are: what is to be kept."""
    tensors = dict(named_tensors(model))
    with torch.no_grad():
        for norm in graph.norms:
            tensors[norm.weight][~keep.slot(norm.weight, 0)] = 0
    return model


@pytest.fixture(params=MODELS)
def case(request):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32).double()
    model = calibrated(MODELS[request.param](), x)
    graph = ms.trace(model, x)
    keep = random_mask(graph, 5, most=0.5)
    plain = {g.name: torch.ones(g.size, dtype=torch.bool) for g in graph.prunable if not g.scales}
    keep = ms.KeepMask(graph, dict(keep.items()) | plain)  # filters without a norm stay
    return silenced(model, graph, keep), graph, keep, x


def distance(a, b):
    return float((a - b).detach().abs().max() / b.detach().abs().max())


def test_exact_absorption_keeps_the_function(case):
    model, graph, keep, x = case
    slim = ms.prune(model, graph, keep, absorb="exact")
    assert distance(slim(x), model(x)) <= 1e-9
    assert distance(ms.prune(model, graph, keep)(x), model(x)) > 1e-3, "the constants must matter"
    dense, carried = graph.cost(keep).macs, ms.trace(slim, x).cost().macs
    assert dense <= carried < graph.cost().macs


def test_bias_absorption_is_exact_but_for_the_border(case):
    model, graph, keep, x = case
    slim = ms.prune(model, graph, keep, absorb="bias")
    assert ms.trace(slim, x).cost() == graph.cost(keep)
    assert distance(slim(x), model(x)) < distance(ms.prune(model, graph, keep)(x), model(x))


def test_bias_absorption_is_exact_without_padding():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, bias=False),
        nn.BatchNorm2d(8), nn.Sigmoid(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip
    x = torch.randn(2, 3, 9, 9).double()
    model = calibrated(model, x)
    graph = ms.trace(model, x)
    keep = ms.KeepMask(graph, {graph.groups[0].name: torch.arange(6) % 3 > 0})
    silenced(model, graph, keep)
    assert distance(ms.prune(model, graph, keep, absorb="bias")(x), model(x)) <= 1e-9


READ_OTHERWISE = {
    "flipped": lambda x, c: F.conv2d(x, c.weight.flip(2, 3), padding=1),
    "turned": lambda x, c: F.conv2d(x, c.weight.transpose(2, 3).contiguous(), padding=1),
    "rounded": lambda x, c: F.conv2d(x, c.weight.float().to(x.dtype), padding=1),
    "from the left": lambda x, c: c.weight[..., 0, 0] @ x.flatten(2),
    "the other way": lambda x, c: F.conv_transpose2d(x, c.weight.transpose(0, 1)),
    "in parts": lambda x, c: sum(
        F.conv2d(a, w) for a, w in zip(x.chunk(2, 1), c.weight.chunk(2, 1), strict=True)
    ),
}


@pytest.mark.parametrize("how", ["exact", "bias"])
@pytest.mark.parametrize("read", READ_OTHERWISE)
def test_a_weight_that_is_not_read_as_it_is_takes_nothing_over(read, how):
    model, graph, keep, _ = between(READ_OTHERWISE[read])
    with pytest.raises(ms.MaskSparsityError, match=r"absorb: c\.weight is not read by a conv"):
        ms.prune(model, graph, keep, absorb=how)


def test_a_deformable_convolution_reads_constants_as_they_are():
    offsets = torch.randn(1, 18, 1, 1, generator=torch.Generator().manual_seed(0)).double()
    model, graph, keep, x = between(
        lambda x, c: deform_conv2d(x, offsets.expand(len(x), -1, 8, 8), c.weight, padding=1)
    )
    assert distance(ms.prune(model, graph, keep, absorb="exact")(x), model(x)) <= 1e-9
    with pytest.raises(ms.MaskSparsityError, match=r"c\.weight reads where offsets point"):
        ms.prune(model, graph, keep, absorb="bias")


def test_sparse_tensors_do_not_stand_in_the_way():
    same = torch.eye(8).double().to_sparse()
    model, graph, keep, x = between(lambda x, c: F.conv2d(x * same.to_dense()[0, 0], c.weight))
    assert distance(ms.prune(model, graph, keep, absorb="exact")(x), model(x)) <= 1e-9


@pytest.mark.parametrize("times", [0, 1, 2])
def test_a_bias_that_is_not_read_as_it_is_takes_nothing_over(times):
    read = (
        lambda x, c: F.conv2d(x, c.weight),
        lambda x, c: F.conv2d(x, c.weight, 2 * c.bias),
        lambda x, c: F.conv2d(x, c.weight, c.bias) + c.bias[:, None, None],
    )
    model, graph, keep, _ = between(read[times])
    with pytest.raises(ms.MaskSparsityError, match=r"c\.weight has no bias of its own, and no"):
        ms.prune(model, graph, keep, absorb="bias")


HEARD_TWICE = {
    "a weight with and without its bias": lambda x, s: s.c(x) + F.conv2d(x, s.c.weight),
    "a bias of two layers": lambda x, s: s.c(x) + F.conv2d(s.g(x), s.d.weight, s.c.bias),
    "a norm of two layers": lambda x, s: s.n(s.e(x)) + 2 * s.n(s.f(x)),
    "two norms": lambda x, s: (y := s.e(x), s.n(y) + 2 * s.m(y))[1],
    "a norm behind a border": lambda x, s: s.n(F.pad(s.e(x), (1, 1, 1, 1))),
    "a norm in another order": lambda x, s: s.n(s.e(x).flip(1)),
}


@pytest.mark.parametrize("name", HEARD_TWICE)
def test_neither_bias_nor_norm_takes_over_what_others_hear(name):
    model, graph, keep, _ = between(HEARD_TWICE[name], whole=True)
    with pytest.raises(ms.MaskSparsityError, match="of its own"):
        ms.prune(model, graph, keep, absorb="bias")


@pytest.mark.parametrize("how", ["exact", "bias"])
def test_what_is_constant_on_one_image_only_is_refused(how):
    def gated(x, s):
        return s.c(x * s.h(x).mean((2, 3), keepdim=True).sigmoid())

    model, graph, keep, x = between(gated, whole=True)
    graph = ms.trace(model, x[:1])
    with pytest.raises(ms.MaskSparsityError, match="not constant where"):
        ms.prune(model, graph, ms.KeepMask(graph, dict(keep.items())), absorb=how)


def test_a_bias_stands_for_the_mean_of_what_a_stride_spreads():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 9, 9).double()
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, 2)
    model = calibrated(nn.Sequential(*layers), x)
    graph = ms.trace(model, x)
    keep = ms.KeepMask(graph, {"0": torch.arange(8) % 2 > 0})
    silenced(model, graph, keep)
    slim = ms.prune(model, graph, keep, absorb="bias")
    assert distance(slim(x).mean((2, 3)), model(x).mean((2, 3))) <= 1e-9
    with pytest.raises(ms.MaskSparsityError, match="absorb='Exact': use 'exact', 'bias' or None"):
        ms.prune(model, graph, keep, absorb="Exact")


def between(read, whole=False):
    """conv -> norm -> what `read` makes of it with another conv, or with the whole network; half
    of it silenced."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
            self.c, self.d, self.g = nn.Conv2d(8, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(8, 4, 1)
            self.e, self.f = (nn.Conv2d(8, 4, 1, bias=False) for _ in range(2))
            self.h = nn.Conv2d(8, 1, 1)
            self.n, self.m = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x):
            x = self.norm(self.a(x)).relu()
            return read(x, self if whole else self.c).flatten(2).mean(2)

    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8).double()
    model = calibrated(Net(), x)
    graph = ms.trace(model, x)
    keep = ms.KeepMask(graph, {"a": torch.arange(8) % 2 > 0})
    return silenced(model, graph, keep), graph, keep, x


def test_what_is_not_constant_is_refused():
    """The shared filter hears two different constants of the same channel."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.b = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            x = self.norm(self.a(x))
            return (self.b(x) + self.b(torch.relu(x))).mean((2, 3))

    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8).double()
    model = calibrated(Twice(), x)
    with torch.no_grad():
        model.norm.bias.fill_(-1)
    graph = ms.trace(model, x)
    keep = ms.KeepMask(graph, {graph.groups[0].name: torch.arange(4) > 1})
    silenced(model, graph, keep)
    with pytest.raises(ms.MaskSparsityError, match="not constant"):
        ms.prune(model, graph, keep, absorb="exact")


@pytest.mark.parametrize("how", ["exact", "bias"])
def test_scales_that_are_not_zero_are_told(how):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        model[1].bias.fill_(0.5)
    keep = ms.KeepMask(graph := ms.trace(model, x), {"0": torch.arange(4) > 1})
    with pytest.warns(UserWarning, match="scales of the removed channels, or filters"):
        ms.prune(model, graph, keep, absorb=how)
    ms.prune(silenced(model, graph, keep), graph, keep, absorb=how)  # warnings are errors here
    with pytest.warns(UserWarning, match="still say a constant.*absorb='exact'"):
        ms.prune(model, graph, keep)
