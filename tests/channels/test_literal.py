"""Lengths that code has written down."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import masksparsity as ms
from masksparsity.channels.probe import _some

from .middle import Middle, exact
from .networks import random_mask


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


@pytest.mark.parametrize("name", LITERALS)
def test_a_literal_size_protects_only_what_it_is_the_size_of(name):
    model = Literal(*LITERALS[name]).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.double)
    graph = ms.trace(model, x)
    assert [g.name for g in graph.prunable] == ["a", "fc"]
    assert "does not follow other widths" in str(graph.by_name["b"].reason)
    exact(model, x, graph)


def test_a_literal_size_behind_a_norm_of_two_groups_is_found():
    def operation(s: nn.Module, x: Tensor) -> Tensor:
        return s.n(x).view(len(x), 8, 36).view(x.shape)

    graph = ms.trace(Middle(operation, n=nn.GroupNorm(2, 8)), torch.randn(1, 3, 6, 6))
    assert not graph.prunable


@pytest.mark.parametrize(
    "operation",
    [
        lambda s, x: x.roll(1, 1),
        lambda s, x: x.roll(-2, 1),
        lambda s, x: torch.cat([x[:, -2:].tanh(), x[:, :-2]], 1),
        lambda s, x: torch.cat([x[:, :2].tanh(), x[:, 2:]], 1),
    ],
)
def test_few_channels_at_an_end_that_a_number_takes_are_found(operation):
    class Wide(Middle):
        def __init__(self):
            super().__init__(operation)
            self.a, self.b = nn.Conv2d(3, 64, 1), nn.Conv2d(64, 4, 1)

    model, x = Wide().double(), torch.randn(1, 3, 4, 4).double()
    graph = ms.trace(model, x)
    for seed in range(4):
        torch.manual_seed(seed)
        scores = {g.name: torch.rand(g.size) for g in graph.prunable}
        keep = ms.select.uniform(graph, scores, 0.5) if scores else ms.KeepMask(graph)
        masked, slim = ms.apply_mask(model, graph, keep), ms.prune(model, graph, keep)
        torch.testing.assert_close(slim(x), masked(x), rtol=0, atol=1e-12)


def _chunked(s: nn.Module, x: Tensor, n: int) -> Tensor:
    first, second, *others = x.chunk(n, 1)
    return torch.cat([first, s.m(second), *others], 1)


CHOSEN = {
    "two, written down": (2, lambda s, x: x.view(len(x), 2, *x.shape[2:]), {}),
    "two, divided by": (2, lambda s, x: x / x.shape[1], {}),
    "two, normalised": (2, lambda s, x: F.group_norm(x, 2), {}),
    "the first": (16, lambda s, x: x + x[:, :1].sum(1, keepdim=True), {}),
    "the last": (16, lambda s, x: x + x[:, -1:].norm(dim=1, keepdim=True), {}),
    "uneven thirds": (32, lambda s, x: _chunked(s, x, 3), {"m": nn.Conv2d(11, 11, 1)}),
    "uneven halves": (9, lambda s, x: _chunked(s, x, 2), {"m": nn.Conv2d(4, 4, 1)}),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_the_masks_of_selectors_are_not_refused(name):
    width, operation, own = CHOSEN[name]
    for seed in range(6):
        torch.manual_seed(seed)
        model = Middle(operation, **own)
        model.a, model.b = nn.Conv2d(3, width, 1), nn.Conv2d(width, 4, 1)
        x = torch.randn(2, 3, 6, 6)
        graph = ms.trace(model, x)
        for share in (0.3, 0.5):
            keep = ms.select.uniform(graph, ms.scores.norm(model, graph), share)
            slim = ms.prune(model, graph, keep)
            torch.testing.assert_close(slim(x), ms.apply_mask(model, graph, keep)(x))


def _weighted(parts: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([k * part for k, part in enumerate(parts, 1)], 1)


def _by_fours(x: Tensor) -> tuple[Tensor, ...]:
    return x[:, :4], x[:, 4:]


@pytest.mark.parametrize(
    ("cut", "free"), [(lambda x: x.tensor_split(4, 1), [8]), (lambda x: x.chunk(4, 1), [8]),
                      (_by_fours, [4])],
)  # fmt: skip
def test_slices_side_by_side_keep_equal_counts(cut, free):
    torch.manual_seed(0)
    model, x = Middle(lambda s, x: _weighted(cut(x))).double(), torch.randn(2, 3, 6, 6).double()
    graph = ms.trace(model, x)
    assert [g.size for g in graph.prunable] == free
    for seed in range(4):
        keep = random_mask(graph, seed).repaired()
        expected = ms.apply_mask(model, graph, keep)(x)
        torch.testing.assert_close(ms.prune(model, graph, keep)(x), expected, rtol=0, atol=1e-12)


def test_a_size_in_an_attribute_follows():
    model = Literal(lambda s, x: x.view(len(x), s.inter, -1).mean(2), 24).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.double)
    graph = ms.trace(model, x)
    assert [g.name for g in graph.prunable] == ["a", "b", "fc"]
    exact(model, x, graph)


def test_an_attribute_of_the_same_number_that_is_no_width_stays():
    def operation(s: nn.Module, x: Tensor) -> Tensor:
        x = F.max_pool2d(x, 2) if x.shape[2] > s.size else x
        return x.view(len(x), s.inter, -1).mean(2)

    model = Literal(operation, 24).double()
    model.size, model.classes, model.sizes = 24, 24, [24]
    graph = ms.trace(model, x := torch.randn(2, 3, 8, 8, dtype=torch.double))
    slim = ms.prune(model, graph, ms.KeepMask(graph, {"b": torch.arange(24) < 10}))
    assert (slim.size, slim.classes, slim.inter) == (24, 24, 10)
    assert slim.sizes == [24]
    assert slim.sizes is not model.sizes
    exact(model, x, graph)


class NonLocal(nn.Module):
    """One attribute is the width of two groups (arXiv 1711.07971)."""

    def __init__(self):
        super().__init__()
        self.inter = 8
        self.theta, self.phi, self.g = (nn.Conv2d(16, self.inter, 1) for _ in range(3))
        self.out = nn.Conv2d(self.inter, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        theta, phi, g = (f(x).view(len(x), self.inter, -1) for f in (self.theta, self.phi, self.g))
        y = g @ (theta.transpose(1, 2) @ phi).softmax(-1)
        return x + self.out(y.view(len(x), self.inter, *x.shape[2:]))


def test_groups_whose_width_is_one_attribute_keep_equal_counts():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 1), NonLocal(), nn.Conv2d(16, 4, 1)).double()
    graph = ms.trace(model, x := torch.randn(2, 3, 4, 4, dtype=torch.double))
    assert [g.size for g in graph.prunable] == [16, 8, 8], graph
    keep = ms.KeepMask(graph, {"0": torch.arange(16) < 9, "1.g": torch.arange(8) < 3})
    with pytest.raises(ms.MaskSparsityError, match=r"a width written down in 1 .*\[8, 3\]"):
        ms.prune(model, graph, keep)
    keep = ms.select.uniform(graph, ms.scores.norm(model, graph), 0.6)
    slim = ms.prune(model, graph, keep)
    assert slim[1].inter == 3
    assert torch.allclose(slim(x), ms.apply_mask(model, graph, keep)(x))


class Attending(nn.Module):
    """`nn.MultiheadAttention` divides what comes in by its heads; queries are not the values."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 32, 3), nn.Linear(32, 5)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).flatten(2).transpose(1, 2)
        return self.b(self.attention(x + 1, x + 1, x)[0].mean(1))


def test_what_no_mask_may_remove_is_protected_where_pieces_keep_equal_counts():
    torch.manual_seed(0)
    model, x = Attending().double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.double)
    graph = ms.trace(model, x)
    assert [group.name for group in graph.prunable] == ["attention.out_proj"], graph


class Heads(nn.Module):
    """Four heads of one layer, which keep equal counts."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 32, 3), nn.ModuleList(nn.Conv2d(8, 4, 1) for _ in range(4))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [b(head) for b, head in zip(self.b, self.a(x).chunk(4, 1), strict=True)]


def test_masks_are_tried_that_take_from_pieces_that_keep_equal_counts():
    graph = ms.trace(Heads(), torch.randn(2, 3, 8, 8))
    (pieces,) = [constraint.pieces for constraint in graph.constraints]
    for seed in range(1, 9, 2):
        kept = _some(graph, seed).units[pieces].sum(1)
        assert kept.unique().numel() == 1
        assert kept[0] < 8


class Quarters(nn.Module):
    """The width of one layer cuts another."""

    def __init__(self):
        super().__init__()
        self.a, self.t = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1)
        self.p, self.z = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        t, p = self.t(x), self.p(x)
        length = t.shape[1] // 4
        sums = [b.reshape(len(b), 1, -1).square().sum(-1) for b in p.split(length, 1)]
        parts = [
            a * n.view(len(n), 1, 1, 1) for a, n in zip(t.split(length, 1), sums, strict=False)
        ]
        return self.z(torch.cat(parts, 1))


def test_masks_of_selectors_pass_where_the_width_of_one_layer_cuts_another():
    """Pieces keep equal counts in each of the two, but not in one as in the other."""
    torch.manual_seed(0)
    model, x = Quarters(), torch.randn(2, 3, 6, 6)
    graph = ms.trace(model, x)
    scores = ms.scores.norm(model, graph)
    for fraction in (0.25, 0.5, 0.75):
        keep = ms.select.fraction(graph, scores, fraction)
        slim = ms.prune(model, graph, keep)
        torch.testing.assert_close(slim(x), ms.apply_mask(model, graph, keep)(x))


class Numbered(nn.Module):
    """One forward for all layers, one of which a number follows the width of."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = (nn.Conv2d(i, 8, 1) for i in (3, 8, 8))
        self.out = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x - x.sum(1, keepdim=True) / x.shape[1]
        return self.out(torch.relu(self.last(torch.relu(self.inner(x)))))


def test_a_number_that_follows_a_width_protects_that_width_alone():
    graph = ms.trace(Numbered(), torch.randn(2, 3, 6, 6))
    assert [g.name for g in graph.prunable] == ["inner", "last"]
