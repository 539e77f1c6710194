"""`create(config)`: a data set by its name, as loaders."""

from collections.abc import Callable
from difflib import get_close_matches

import torch

from masksparsity.data.cifar import cifar
from masksparsity.data.config import DataConfig
from masksparsity.data.folder import folder
from masksparsity.data.imageset import ImageSet, Pixels, Split
from masksparsity.data.loader import Data, Loader, Normalize, Plan
from masksparsity.data.npz import digits, npz, user
from masksparsity.data.resident import ResidentLoader
from masksparsity.data.streaming import StreamingLoader
from masksparsity.errors import MaskSparsityError

_SOURCES: dict[str, Callable[[DataConfig], ImageSet]] = {
    "digits": digits,
    "cifar10": cifar,
    "cifar100": cifar,
    "folder": folder,
    "npz": npz,
}


def create(
    config: DataConfig,
    *,
    batch_size: int,
    device: torch.device,
    seed: int,
    rank: int = 0,
    world: int = 1,
    eval_batch_size: int = 512,
) -> Data:
    """The data set that `config` names, as this rank of `world` reads it.

    Args:
        batch_size: training images per step and rank; `eval_batch_size` likewise for the test.
        seed: order and augmentation of an epoch follow from it and the epoch's index alone.

    Raises:
        MaskSparsityError: unknown name, files missing or damaged, settings that do not fit them.
    """
    if config.download and world > 1:
        raise MaskSparsityError("download in one process first: all ranks would write one file")
    images = _source(config)
    if isinstance(images, Data):
        return images
    if config.resident is False and isinstance(images.test, Pixels):
        raise MaskSparsityError(f"data {config.name!r} is always resident; only folder can stream")
    channels, height, width = _shape(config.name, images)
    normalize = Normalize(*_figures(config, images, channels), width, device)
    crop_padding = images.crop_padding if config.crop_padding is None else config.crop_padding
    flip = images.flip if config.flip is None else config.flip

    def loader(split: Split, batch_size: int, train: bool) -> Loader:
        plan = Plan(
            images=len(split.labels),
            batch_size=batch_size,
            train=train,
            seed=seed,
            rank=rank,
            world=world,
        )
        padding, mirror = (crop_padding, flip) if train else (0, False)
        if isinstance(split, Pixels):
            return ResidentLoader(
                split.images, split.labels, plan, normalize, crop_padding=padding, flip=mirror
            )
        return StreamingLoader(
            split, plan, normalize, crop_padding=padding, flip=mirror, workers=config.workers
        )

    return Data(
        train=loader(images.train, batch_size, True) if images.train else None,
        test=loader(images.test, eval_batch_size, False),
        classes=images.classes,
        channels=channels,
        size=(height, width),
        name=config.name,
    )


def _shape(name: str, images: ImageSet) -> tuple[int, int, int]:
    if images.train and images.train.shape != images.test.shape:
        raise MaskSparsityError(
            f"data {name!r}: training images {list(images.train.shape)} and test images "
            f"{list(images.test.shape)} have different shapes"
        )
    return images.test.shape


def _source(config: DataConfig) -> ImageSet | Data:
    if config.name in _SOURCES:
        return _SOURCES[config.name](config)
    if ":" in config.name:
        return user(config)
    close = get_close_matches(config.name, _SOURCES)
    raise MaskSparsityError(
        f"unknown data {config.name!r}: {f'did you mean {close[0]}? ' if close else ''}"
        f"There are {', '.join(_SOURCES)} and your own module:function"
    )


def _figures(
    config: DataConfig, images: ImageSet, channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if config.mean and config.std:
        mean, std = config.mean, config.std
    elif images.mean and images.std:
        mean, std = images.mean, images.std
    elif isinstance(images.train, Pixels):
        mean, std = images.train.figures()
    else:
        raise MaskSparsityError(
            f"data {config.name!r} holds only test images: say with --data.mean and --data.std "
            "what the network was trained with"
        )
    if not len(mean) == len(std) == channels or min(std) <= 0:
        raise MaskSparsityError(
            f"data {config.name!r} has {channels} channels; mean={mean} and std={std} do not fit"
        )
    return mean, std
