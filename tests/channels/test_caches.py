"""What users' code remembers of an earlier forward: computed anew in a trace, left alone."""

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import masksparsity as ms

from .middle import Middle, exact


@functools.lru_cache
def rows(length: int, dtype: torch.dtype) -> Tensor:
    return torch.linspace(0, 1, length, dtype=dtype)


@functools.cache
def settings() -> Any:
    return np  # a module holds itself, and more


def cached(function):
    remembering = functools.lru_cache(maxsize=2)(function)
    return functools.wraps(function)(lambda *args: remembering(*args))


class Grid(Middle):
    """Positions that are computed once a size, as transformers and optical flow do."""

    @staticmethod
    @functools.lru_cache(maxsize=1)
    def columns(length: int, dtype: torch.dtype) -> Tensor:
        return torch.arange(length, dtype=dtype) + 1

    @staticmethod
    @cached
    def both(height: int, width: int, dtype: torch.dtype) -> Tensor:
        return rows(height, dtype)[:, None] * Grid.columns(width, dtype)

    def __init__(self):
        super().__init__(lambda s, x: x * Grid.both(*x.shape[2:], x.dtype) * settings().e)


@pytest.mark.parametrize("before", [0, 2])
def test_what_functions_remember_does_not_stand_in_the_way(before):
    rows.cache_clear()
    Grid.columns.cache_clear()
    model, x = Grid(), torch.randn(2, 3, 4, 4)
    own = Grid.columns, Grid.both, rows, settings
    for _ in range(before):
        model(x)
    graph = ms.trace(model, x)
    assert [g.size for g in graph.prunable] == [8], graph
    exact(model.double(), x.double(), graph)
    assert own == (Grid.columns, Grid.both, rows, settings)
    assert rows(4, x.dtype) is rows(4, x.dtype)


class Closed(type):
    def __setattr__(cls, name, value):
        raise TypeError("closed")


class Shut(Middle, metaclass=Closed):
    two = staticmethod(functools.cache(lambda: 2))


def test_a_class_that_refuses_to_be_written_to_keeps_its_cache():
    model = Shut(lambda s, x: s.two() * x)
    assert len(ms.trace(model, torch.randn(2, 3, 4, 4)).prunable) == 1


class Prepared(nn.Module):
    """Its `train` makes a table of the weights, for eval mode, as LeViT does; widths in attributes
    have to follow."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 4, 1)
        self.bias, self.width = nn.Parameter(torch.randn(16, generator=_SEEDED)), 8

    @torch.no_grad()
    def train(self, mode: bool = True) -> "Prepared":
        super().train(mode)
        self.__dict__.pop("table", None)
        if not mode:
            self.table = self.bias.exp()[:, None, None]
        return self

    def forward(self, x: Tensor) -> Tensor:
        scale = self.bias.exp()[:, None, None] if self.training else self.table
        return self.b(torch.cat((self.a(x) * scale).split([self.width] * 2, 1), 1)).mean((2, 3))


_SEEDED = torch.Generator().manual_seed(0)


@pytest.mark.parametrize("mode", [None, False, True])
def test_what_train_makes_of_weights_is_made_of_those_that_stay(mode):
    """None: as it was built, when nothing has been made yet."""
    model, x = Prepared().double(), torch.randn(2, 3, 4, 4, dtype=torch.double)
    model = model if mode is None else model.train(mode)
    made = hasattr(model, "table")
    graph = ms.trace(model, x)
    assert [g.size for g in graph.prunable] == [16]
    keep = ms.KeepMask(graph, {"bias": torch.arange(16) % 8 < 5})
    masked, slim = ms.apply_mask(model, graph, keep), ms.prune(model, graph, keep)
    assert hasattr(model, "table") == hasattr(slim, "table") == made
    assert ms.profile(model, x).macs == graph.cost().macs
    for net in (masked, slim):
        if mode is None:
            net.eval()
    with torch.no_grad():
        torch.testing.assert_close(slim(x), masked(x))
        # Of what is masked the table says what the weights say now.
        assert torch.equal(slim(x), slim.train(not slim.training).train(not slim.training)(x))


def test_parts_in_another_mode_stay_in_it_with_what_they_made():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Prepared()).train()
    model[1].eval()
    x = torch.randn(2, 3, 4, 4)
    graph = ms.trace(model, x)
    keep = ms.KeepMask(graph, {"1": torch.arange(16) % 8 < 5})
    slim = ms.prune(model, graph, keep)
    assert slim.training
    assert not slim[1].training
    torch.testing.assert_close(slim(x), ms.apply_mask(model, graph, keep)(x))


def test_runs_undo_what_train_writes_into_weights():
    class Merging(nn.Conv2d):
        merged = False

        def train(self, mode: bool = True) -> "Merging":
            if mode == self.merged:
                self.weight.data += 1 if not mode else -1
                self.merged = not mode
            return super().train(mode)

    model, x = nn.Sequential(Merging(3, 8, 1), nn.Conv2d(8, 2, 1)), torch.randn(2, 3, 4, 4)
    before = model[0].weight.detach().clone()
    ms.profile(model, x, runs=2)
    assert torch.equal(model[0].weight, before)
    assert not model[0].merged
