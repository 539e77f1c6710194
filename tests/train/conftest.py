from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from masksparsity.data import Data


class Blobs:
    """Images whose class is their brightest corner; the order is a pure function of the epoch."""

    def __init__(self, samples: int, batch: int) -> None:
        generator = torch.Generator().manual_seed(samples)
        self.labels = torch.randint(4, (samples,), generator=generator)
        self.images = torch.randn(samples, 1, 8, 8, generator=generator)
        corners = self.images.view(samples, 1, 2, 4, 2, 4)
        for i, label in enumerate(self.labels.tolist()):
            corners[i, :, label // 2, :, label % 2] += 1
        self.samples = samples
        self.batch = batch

    def __len__(self) -> int:
        return -(-self.samples // self.batch)

    def epoch(self, index: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(self.samples, generator=torch.Generator().manual_seed(index))
        for part in order.split(self.batch):
            yield self.images[part], self.labels[part]


@pytest.fixture
def data() -> Data:
    """Four classes that a small network learns in a few epochs; a last batch that is not full."""
    return Data(
        train=Blobs(200, 32), test=Blobs(101, 64), classes=4, channels=1, size=(8, 8), name="blobs"
    )


def _network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Conv2d(8, 8, 3, 4, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 4),
    )


@pytest.fixture
def network() -> Callable[[], nn.Module]:
    """A maker of small networks, all the same, with BatchNorm and dropout."""
    return _network
