"""What users' functions remember of an earlier forward: computed anew in a trace, left alone."""

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

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
