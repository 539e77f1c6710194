"""Blocks that networks are made of: each prunes exactly, or says why it is protected."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import masksparsity as ms

from .networks import calibrated, random_mask

X = torch.randn(2, 3, 8, 8, dtype=torch.double)


class Net(nn.Module):
    """conv -> norm -> the block under test -> conv."""

    def __init__(self, block: nn.Module, width: int = 16, into: int | None = None):
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, width, 1), nn.BatchNorm2d(width)
        self.block = block
        self.b = nn.Conv2d(into or width, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.block(torch.relu(self.norm(self.a(x)))))


class Call(nn.Module):
    def __init__(self, function, **children: nn.Module):
        super().__init__()
        self.function = function
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Split(nn.Module):
    """Lengths that are written down: in one attribute, in several, or in a list."""

    def __init__(self, how: str):
        super().__init__()
        self.width, self.sizes, self.how = 4, (4, 4, 8), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "number":
            a, *more = torch.split(x, self.width, 1)
            return torch.cat([a, *(torch.relu(m) for m in more)], 1)
        if self.how == "list":
            a, b, c = torch.split(x, self.sizes, 1)
            return torch.cat([c, torch.relu(b), a], 1)
        return torch.cat([x[:, self.width :], torch.relu(x[:, : self.width])], 1)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, literal: bool, fused: bool = False):
        super().__init__()
        self.heads, self.fused = heads, fused
        self.head_dim = width // heads if literal else -1
        self.scale = (width // heads) ** -0.5
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        tokens = self.qkv(x.flatten(2).transpose(1, 2))
        tokens = tokens.view(n, h * w, 3, self.heads, self.head_dim)
        q, k, v = tokens.permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = (q @ k.transpose(-2, -1) * self.scale).softmax(-1) @ v
        out = self.project(out.transpose(1, 2).flatten(2))
        return out.transpose(1, 2).unflatten(2, (h, w))


class Cached(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias, self.cache = nn.Parameter(torch.randn(1, 1, 8, 8)), {}

    def forward(self, x: Tensor) -> Tensor:
        if "bias" not in self.cache:
            self.cache["bias"] = self.bias * 2
        a, b = x.chunk(2, 1)
        return torch.cat([b * self.cache["bias"], torch.relu(a)], 1)


def _gated(m: nn.Module, x: Tensor) -> Tensor:
    return F.glu(m.conv(x), 1)


def _paths(m: nn.Module, x: Tensor) -> Tensor:
    """Selective kernels: a softmax over paths, channel by channel."""
    paths = torch.stack([m.one(x), m.two(x)], 1)
    weights = m.choose(paths.sum(1).mean((2, 3), keepdim=True))
    weights = weights.view(len(x), 2, -1, 1, 1).softmax(1)
    return (paths * weights).sum(1)


def _norm_of_all(m: nn.Module, x: Tensor) -> Tensor:
    return x / (1 + x.norm(dim=1, keepdim=True))


def conv(a: int, b: int, k: int = 1, **kw) -> nn.Conv2d:
    return nn.Conv2d(a, b, k, padding=k // 2, **kw)


EXACT = {
    "chunk": (lambda: Call(lambda m, x: torch.cat([m.c(x.chunk(2, 1)[0]), x.chunk(2, 1)[1]], 1),
                           c=conv(8, 8, 3)), 16),
    "split by an attribute": (lambda: Split("number"), 16),
    "split by a list": (lambda: Split("list"), 16),
    "slices by an attribute": (lambda: Split("slices"), 16),
    "shuffle": (lambda: nn.Sequential(nn.ChannelShuffle(2), conv(16, 16)), 16),
    "group norm": (lambda: nn.Sequential(conv(16, 16), nn.GroupNorm(4, 16), nn.ReLU()), 16),
    "instance norm": (lambda: nn.InstanceNorm2d(16, affine=True), 16),
    "prelu": (lambda: nn.PReLU(16), 16),
    "glu": (lambda: Call(_gated, conv=conv(16, 32)), 16),
    "paths": (lambda: Call(_paths, one=conv(16, 16, 3), two=conv(16, 16, 3),
                           choose=conv(16, 32)), 16),
    "length of all channels": (lambda: Call(_norm_of_all), 16),
    "space to depth": (lambda: nn.Sequential(nn.PixelUnshuffle(2), conv(64, 16)), 16),
    "pixel shuffle": (lambda: nn.Sequential(conv(16, 64), nn.PixelShuffle(2)), 16),
    "unfold": (lambda: Call(lambda m, x: m.c(F.unfold(x, 2).unflatten(2, (7, 7))),
                            c=conv(64, 16)), 16),
    "reflection": (lambda: nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(16, 16, 3)), 16),
    "clamp and where": (lambda: Call(lambda m, x: torch.where(x > 1, x.clamp(max=2), x / 2)), 16),
    "layer scale": (lambda: Call(lambda m, x: x + m.c(x) * m.g.weight.view(1, -1, 1, 1),
                                 c=conv(16, 16, 3), g=nn.BatchNorm1d(16)), 16),
    "attention, width -1": (lambda: Attention(16, 2, literal=False), 16),
    "attention, width written down": (lambda: Attention(16, 2, literal=True), 16),
    "fused attention": (lambda: Attention(16, 2, literal=True, fused=True), 16),
    "by the sum of all": (lambda: Call(lambda m, x: x / (1 + x.abs().sum().item())), 16),
    "einsum": (lambda: Call(lambda m, x: torch.einsum("bchw,dc->bdhw", x, m.w.weight),
                            w=nn.Linear(16, 16)), 16),
    "weight norm": (lambda: parametrizations.weight_norm(conv(16, 16, 3)), 16),
    "transposed, in groups": (lambda: nn.ConvTranspose2d(16, 16, 2, groups=4), 16),
    "transposed, two to one": (lambda: nn.ConvTranspose2d(16, 8, 2, groups=8), 8),
    "transposed, depthwise": (lambda: nn.ConvTranspose2d(16, 16, 4, 2, 1, groups=16), 16),
    "depthwise, three each": (lambda: conv(16, 48, 3, groups=16), 48),
    "cached": (Cached, 16),
}  # fmt: skip


def outcome(model: nn.Module, seeds: int = 3) -> ms.ChannelGraph:
    """Trace, and compare pruned with masked under some masks."""
    graph = ms.trace(model, X)
    for seed in range(seeds):
        assert exact(model, graph, random_mask(graph, seed).repaired())
    return graph


def exact(model: nn.Module, graph: ms.ChannelGraph, keep: ms.KeepMask) -> bool:
    """Does pruned compute what masked computes? False if the mask is refused."""
    masked = ms.apply_mask(model, graph, keep)
    try:
        slim = ms.prune(model, graph, keep)
    except ms.MaskSparsityError:
        return False
    with torch.no_grad():
        torch.testing.assert_close(slim(X), masked(X), rtol=0, atol=1e-11)
    return True


def test_fused_attention_costs_what_its_products_cost():
    costs = []
    for fused in (False, True):
        model = Net(Attention(16, 2, literal=True, fused=fused)).double()
        graph = ms.trace(model, X)
        keep = random_mask(graph, 0).repaired()
        costs.append(graph.cost())
        assert graph.cost(keep) == ms.trace(ms.prune(model, graph, keep), X).cost()
    assert costs[0] == costs[1]


@pytest.mark.parametrize("name", EXACT)
def test_blocks_prune_exactly(name, tmp_path):
    build, into = EXACT[name]
    model = calibrated(Net(build(), into=into), X)
    graph = outcome(model)
    assert graph.prunable, graph
    keep = random_mask(graph, 1).repaired()
    slim = ms.prune(model, graph, keep)
    ms.save(slim, tmp_path / "slim")
    assert torch.equal(ms.load(tmp_path / "slim", model=model)(X), slim(X))


@pytest.mark.parametrize("name", EXACT)
def test_masks_that_break_constraints_are_refused_never_wrong(name):
    build, into = EXACT[name]
    model = calibrated(Net(build(), into=into), X)
    graph = ms.trace(model, X)
    for seed in range(12):
        keep = random_mask(graph, seed)
        fits = all(pieces.satisfied(keep.units) for pieces in graph.constraints)
        assert exact(model, graph, keep) or not fits


def test_one_channel_of_a_transposed_depthwise_convolution_may_stay():
    model = calibrated(Net(nn.ConvTranspose2d(16, 16, 2, groups=16)), X)
    graph = ms.trace(model, X)
    assert exact(model, graph, ms.KeepMask(graph, {"a": torch.arange(16) == 3}))


PROTECTED = {
    "normalised over channels": nn.GroupNorm(1, 16),
    "softmax over channels": nn.Softmax(1),
    "reduced over channels": Call(lambda m, x: x * x.amax(1, keepdim=True)),
    "channels are picked by an index": Call(lambda m, x: x[:, torch.arange(16).flip(0)]),
    "channels lie along another axis": Call(lambda m, x: m.c(x.transpose(1, 2)).transpose(1, 2),
                                            c=conv(8, 8, 3)),
    "code that does not follow other widths": Call(lambda m, x: torch.cat([x[:, 5:], x[:, :5]], 1)),
}  # fmt: skip


@pytest.mark.parametrize("why", PROTECTED)
def test_what_cannot_go_is_protected_with_its_reason(why):
    graph = outcome(calibrated(Net(copy.deepcopy(PROTECTED[why])), X))
    reasons = [str(g.reason) for g in graph.protected if g.name.startswith(("a", "norm"))]
    assert reasons
    assert all(why in reason for reason in reasons), reasons


def test_standardised_weights_keep_their_fan_in():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            flat = self.weight.view(1, len(self.weight), -1)
            weight = F.batch_norm(flat, None, None, training=True).view_as(self.weight)
            return F.conv2d(x, weight, self.bias, padding=1)

    block = nn.Sequential(Standardised(16, 12, 3, padding=1), nn.ReLU(), conv(12, 16))
    graph = outcome(calibrated(Net(block), X))
    assert {g.name: g.size for g in graph.prunable} == {"block.0": 12, "block.2": 16}


def test_a_constant_that_is_learnt_is_no_input_that_vanishes():
    """A parameter read as an input is zero only if it is masked, too."""

    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.start, self.conv = nn.Parameter(torch.randn(1, 16, 8, 8)), conv(16, 16, 3)

        def forward(self, x):
            return x + self.conv(self.start.expand(len(x), -1, -1, -1))

    graph = outcome(calibrated(Net(Constant()), X))
    assert ("block.start", 1) in graph.producers


def test_where_computed_weights_do_not_vanish_what_reads_them_does():
    squashed = Call(lambda m, x: F.conv2d(x, torch.sigmoid(m.c.weight)), c=conv(16, 16))
    graph = outcome(calibrated(Net(nn.Sequential(squashed, nn.ReLU(), conv(16, 16))), X))
    assert graph.by_name["block.0.c"].prunable
    assert ("block.2.weight", 1) in graph.exposed


def test_auxiliary_heads_shrink_with_the_trunk():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head, self.aux = conv(3, 8), conv(8, 8), conv(8, 2), conv(8, 2)

        def forward(self, x):
            x = torch.relu(self.a(x))
            return (self.head(self.b(x)), self.aux(x)) if self.training else self.head(self.b(x))

    model = Auxiliary().double().eval()
    graph = ms.trace(model, X[:1])
    keep = random_mask(graph, 0)
    masked, slim = ms.apply_mask(model, graph, keep), ms.prune(model, graph, keep)
    assert slim.aux.weight.shape[1] == slim.a.weight.shape[0] < 8
    for a, b in zip(masked.train()(X), slim.train()(X), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_selectors_respect_equal_pieces():
    build, into = EXACT["chunk"]
    model = calibrated(Net(build(), into=into), X)
    graph = ms.trace(model, X)
    (pieces,) = graph.constraints
    assert pieces.module == "block"
    for keep in (
        ms.select.budget(graph, ms.scores.norm(model, graph), pruned_macs=0.4),
        ms.select.fraction(graph, ms.scores.norm(model, graph), 0.3),
    ):
        assert pieces.satisfied(keep.units)
        ms.prune(model, graph, keep)
    lopsided = torch.ones(graph.units, dtype=torch.bool)
    lopsided[pieces.pieces[0][:3]] = False
    keep = ms.KeepMask(graph)
    keep.units = lopsided
    with pytest.raises(ms.MaskSparsityError, match=r"in block takes pieces .* \[5, 8\] of 8"):
        ms.prune(model, graph, keep)
    assert ms.prune(model, graph, keep.repaired())


@pytest.mark.parametrize("name", EXACT)
def test_a_repaired_mask_is_one_that_prunes(name):
    """What comes back because the network needs it may have to be as long as other pieces."""
    build, into = EXACT[name]
    graph = ms.trace(calibrated(Net(build(), into=into), X), X)
    for seed in range(8):
        keep = random_mask(graph, seed, empty=0.7)
        assert all(pieces.satisfied(keep.units) for pieces in graph.constraints)
        assert not graph.branches.missed(keep.kept).any()


def test_forward_may_cache_and_count():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls, self.seen, self.last = 0, [], {"shape": None}
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            self.seen.append(x.shape)
            self.last["shape"] = x.shape
            self.steps = self.steps + 1
            return x

    model = Net(Counting()).double()
    ms.trace(model, X)
    block = model.block
    assert (block.calls, block.seen, block.last, int(block.steps)) == (0, [], {"shape": None}, 0)


def test_a_model_that_keeps_tensors_with_a_history_prunes():
    model = calibrated(Net(Cached()), X)
    graph = ms.trace(model, X)
    model(X)  # with gradients: the cache now hangs on the graph of autograd
    keep = random_mask(graph, 0).repaired()
    masked, slim = ms.apply_mask(model, graph, keep), ms.prune(model, graph, keep)
    torch.testing.assert_close(slim(X), masked(X), rtol=0, atol=1e-12)
