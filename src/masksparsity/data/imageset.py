"""Images and labels of a source, before loaders are made of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from masksparsity.errors import MaskSparsityError

if TYPE_CHECKING:
    from masksparsity.data.decode import ImageFile

Figures = tuple[float, ...]


@dataclass(frozen=True)
class Pixels:
    """Decoded images, uint8 [N, C, H, W], and their labels, int64 [N]; in host memory."""

    images: Tensor
    labels: Tensor

    @classmethod
    def checked(cls, images: Any, labels: Any, where: object) -> "Pixels":
        """From arrays or tensors of others, channels first or last.

        Raises:
            MaskSparsityError: they are not uint8 images with one label each; names `where`.
        """
        try:
            images, labels = torch.as_tensor(images), torch.as_tensor(labels)
        except (TypeError, ValueError, RuntimeError) as error:
            raise MaskSparsityError(f"{where}: not arrays of numbers: {error}") from error
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise MaskSparsityError(
                f"{where}: images must be uint8 [N, C, H, W] or [N, H, W, C], not {images.dtype} "
                f"{list(images.shape)}"
            )
        if images.shape[1] not in (1, 3):
            if images.shape[3] not in (1, 3):
                raise MaskSparsityError(
                    f"{where}: no axis of 1 or 3 channels in images of shape {list(images.shape)}"
                )
            images = images.permute(0, 3, 1, 2)
        if labels.is_floating_point() or labels.is_complex() or labels.shape != images.shape[:1]:
            raise MaskSparsityError(
                f"{where}: labels must be integers [{len(images)}], not {labels.dtype} "
                f"{list(labels.shape)}"
            )
        labels = labels.long()  # first: torch finds no minimum of wide unsigned integers
        if not len(labels):
            raise MaskSparsityError(f"{where}: no images")
        if labels.min() < 0:
            raise MaskSparsityError(f"{where}: a negative label, {int(labels.min())}")
        return cls(images, labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return self.images.shape[1], self.images.shape[2], self.images.shape[3]

    def figures(self) -> tuple[Figures, Figures]:
        """Mean and standard deviation of every channel, as shares of 255."""
        means, stds = [], []
        values = torch.arange(256, dtype=torch.float64) / 255
        for channel in self.images.unbind(1):
            share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
            mean = float(share @ values)
            means.append(mean)
            stds.append(float(share @ (values - mean) ** 2) ** 0.5)
        return tuple(means), tuple(stds)


@dataclass(frozen=True)
class Files:
    """Images to be decoded anew in every epoch; `image_size` None leaves them at `size`."""

    files: "tuple[ImageFile, ...]"
    labels: tuple[int, ...]
    size: tuple[int, int]
    image_size: int | None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return 3, *self.size


Split = Pixels | Files


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """A data set with its own figures, which the user's settings override.

    `mean` and `std` None: measured on the training images.
    """

    train: Split | None
    test: Split
    classes: int
    mean: Figures | None = None
    std: Figures | None = None
    crop_padding: int = 0
    flip: bool = False


def existing_root(name: str, root: Path | None) -> Path:
    """`root`, which is there."""
    root = need_root(name, root)
    if not root.exists():
        raise MaskSparsityError(f"--data.root {root}: there is no such file or directory")
    return root


def need_root(name: str, root: Path | None) -> Path:
    """`root`, or an error that says how to give it."""
    if root is None:
        raise MaskSparsityError(f"data {name!r} needs its root: --data.root PATH")
    return root
