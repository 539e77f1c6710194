"""The interface of data to the training loop, and what all loaders share."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from masksparsity.errors import MaskSparsityError

Batch = tuple[Tensor, Tensor]
"""Images [B, C, H, W], float32, normalised, channels_last, and labels [B], int64; on the device."""


class Loader(Protocol):
    """One split of a data set, as one rank reads it."""

    @property
    def samples(self) -> int:
        """Images per epoch on this rank."""

    def __len__(self) -> int:
        """Batches per epoch on this rank."""

    def epoch(self, index: int = 0) -> Iterator[Batch]:
        """The batches of epoch `index`: the same whenever and however often it is asked for."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """A data set, ready to train and evaluate on.

    `train` is None where there are only images to evaluate on. `size` is (height, width).
    """

    train: Loader | None
    test: Loader
    classes: int
    channels: int
    size: tuple[int, int]
    name: str

    def training(self) -> Loader:
        """`train`, or a MaskSparsityError where there is none."""
        if self.train is None:
            raise MaskSparsityError(
                f"{self.name}: there are only test images here, which may not be trained on; "
                "give a set with training images too"
            )
        return self.train


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which of a split's images a rank reads, in which order: a pure function of these fields.

    Training: a new permutation in every epoch, dealt to the ranks in turn; what does not fill a
    batch on every rank is left out for this epoch, unless that were all. Evaluation: every image
    once over all ranks, in order; a rank may have one more than another, or none.
    """

    images: int
    batch_size: int
    train: bool
    seed: int = 0
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1 or not 0 <= self.rank < self.world:
            raise MaskSparsityError(
                f"batch size {self.batch_size} on rank {self.rank} of {self.world}: no such share"
            )
        if self.train and self.images < self.world:
            raise MaskSparsityError(f"{self.images} training images are too few for {self.world}")

    @property
    def samples(self) -> int:
        """Images per epoch on this rank."""
        if not self.train:
            return len(range(self.rank, self.images, self.world))
        share = self.images // self.world
        return share // self.batch_size * self.batch_size or share

    def __len__(self) -> int:
        return -(-self.samples // self.batch_size)

    def epoch(self, index: int) -> tuple[Tensor, torch.Generator]:
        """This rank's images [samples], int64, and a generator for all else that is random.

        The generator is in the same state on all ranks: what is drawn from it for every image of
        the split is the same for an image whichever rank reads it.
        """
        # The CPU generator reads 32 bits of its seed: no shifting of the seed out of their reach.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + index) % 2**32)
        if not self.train:
            return torch.arange(self.images)[self.rank :: self.world], generator
        order = torch.randperm(self.images, generator=generator)
        return order[self.rank :: self.world][: self.samples], generator


class Normalize:
    """uint8 [B, H, W, C] -> float32 [B, C, H, W], channels_last: (pixel / 255 - mean) / std."""

    def __init__(
        self, mean: tuple[float, ...], std: tuple[float, ...], width: int, device: torch.device
    ) -> None:
        self.device = device
        # Repeated for a whole row of pixels: a last axis of 3 would be a very short inner loop.
        means, stds = (torch.tensor(v, dtype=torch.float64).repeat(width) for v in (mean, std))
        self.scale = (1 / (255 * stds)).to(device, torch.float32)
        self.shift = (-means / stds).to(device, torch.float32)

    def __call__(self, pixels: Tensor) -> Tensor:
        rows = torch.addcmul(self.shift, pixels.flatten(2), self.scale)
        return rows.view(pixels.shape).permute(0, 3, 1, 2)
