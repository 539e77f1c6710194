"""Recurrent networks: states that begin as zeros, which forward makes from sizes alone."""

import pytest
import torch
from torch import Tensor, nn

import masksparsity as ms

from .test_exact import attempt

X = torch.randn(2, 3, 8, 8)


class Recurrent(nn.Module):
    """Three steps on one image."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.width, self.extra = 12, 8
        self.enter = nn.Conv2d(3, 8, 3, padding=1)
        self.joined = nn.Conv2d(8 + 12, 12, 3, padding=1)
        self.inputs = nn.Conv2d(8, 12, 3, padding=1)
        self.state = nn.Conv2d(12, 12, 3, padding=1, bias=False)
        self.leave = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.enter(x))
        return self.leave(self.steps(x).mean((2, 3)))

    def zeros(self, x: Tensor, width: int) -> Tensor:
        return x.new_zeros(len(x), width, *x.shape[2:])


class Joined(Recurrent):
    def steps(self, x: Tensor) -> Tensor:
        h = self.zeros(x, self.width)
        for _ in range(3):
            h = torch.tanh(self.joined(torch.cat([x, h], 1)))
        return h


class Literal(Joined):
    def zeros(self, x: Tensor, width: int) -> Tensor:
        return super().zeros(x, 12)


class Ones(Joined):
    def zeros(self, x: Tensor, width: int) -> Tensor:
        return super().zeros(x, width) + 1


class Gated(Recurrent):
    """The state is read by a layer of its own, and kept in part."""

    def steps(self, x: Tensor) -> Tensor:
        h = c = self.zeros(x, self.width)
        for _ in range(3):
            gate = torch.sigmoid(self.inputs(x) + self.state(h))
            c = (1 - gate) * c + gate * torch.tanh(self.inputs(x))
            h = torch.tanh(c)
        return h


class Written(Recurrent):
    """Zeros that were read, and are no zeros any more."""

    def steps(self, x: Tensor) -> Tensor:
        h = self.zeros(x, self.width)
        first = self.state(h)
        h[:, :6] = 1.0
        return first + self.state(h) + self.inputs(x)


class Beside(Recurrent):
    """Zeros that nothing takes the place of."""

    def steps(self, x: Tensor) -> Tensor:
        return self.joined(torch.cat([x, self.zeros(x, 12)], 1))


class Widened(Recurrent):
    """A shortcut padded by channels of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 4

    def steps(self, x: Tensor) -> Tensor:
        return torch.relu(self.inputs(x) + torch.cat([x, self.zeros(x, self.width)], 1))


class Padded(Recurrent):
    """The same by `pad`."""

    def __init__(self) -> None:
        super().__init__()
        self.sides: tuple[int, ...] = (0, 0, 0, 0, 0, 4)

    def steps(self, x: Tensor) -> Tensor:
        return torch.relu(self.inputs(x) + nn.functional.pad(x, self.sides))


class OnBothSides(Padded):
    def __init__(self) -> None:
        super().__init__()
        self.sides = (0, 0, 0, 0, 2, 2)


class PaddedByANumber(Padded):
    def steps(self, x: Tensor) -> Tensor:
        return torch.relu(self.inputs(x) + nn.functional.pad(x, (0, 0, 0, 0, 2, 2)))


class PaddedByTheDifference(Padded):
    def steps(self, x: Tensor) -> Tensor:
        y = self.inputs(x)
        return torch.relu(y + nn.functional.pad(x, (0, 0, 0, 0, 0, y.shape[1] - x.shape[1])))


class PaddedByOnes(Padded):
    def steps(self, x: Tensor) -> Tensor:
        return torch.relu(self.inputs(x) + nn.functional.pad(x, self.sides, value=1.0))


class PaddedAndCropped(Padded):
    def steps(self, x: Tensor) -> Tensor:
        return torch.relu(self.inputs(x) + nn.functional.pad(x, (0, 0, 0, 0, -1, 5)))


FREE = {
    Joined: {"enter": 8, "joined": 12},
    Literal: {"enter": 8},
    Ones: {"enter": 8},
    Gated: {"enter": 8, "inputs": 12},
    Written: {"enter": 8, "inputs": 12},
    Beside: {"enter": 8, "joined": 12},
    Widened: {"enter": 8, "inputs": 4},
    Padded: {"enter": 8, "inputs": 4},
    OnBothSides: {"inputs": 4, "enter": 8},
    PaddedByANumber: {"enter": 8},
    PaddedByTheDifference: {"enter": 8, "inputs": 4},
    PaddedByOnes: {},
    PaddedAndCropped: {},
}


@pytest.mark.parametrize("kind", FREE, ids=lambda kind: kind.__name__)
def test_states_are_as_wide_as_what_takes_their_place(kind):
    model = kind()
    graph = ms.trace(model, X)
    assert {group.name: group.size for group in graph.prunable} == FREE[kind]
    assert [attempt(model, seed, empty=0)[0] for seed in range(4)] == ["exact"] * 4
