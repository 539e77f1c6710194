"""Images decoded anew in every epoch, by worker processes: for sets too large to be resident."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from masksparsity.data.decode import center_crop, pixels
from masksparsity.data.imageset import Files
from masksparsity.data.loader import Batch, Normalize, Plan
from masksparsity.errors import MaskSparsityError


class StreamingLoader:
    """A `Loader` over image files; workers hand over uint8, the device normalises.

    Training images from 64 pixels are a `RandomResizedCrop`; with `crop_padding`, the image padded
    with zeros and cropped at random. What is random about an image depends on the seed, the epoch
    and the image alone, not on the number of workers.
    """

    def __init__(
        self,
        split: Files,
        plan: Plan,
        normalize: Normalize,
        *,
        crop_padding: int = 0,
        flip: bool = False,
        workers: int = 2,
    ) -> None:
        self.plan, self.normalize, self.workers = plan, normalize, workers
        self.images = _Images(split, _transform(split, plan.train, crop_padding, flip))

    @property
    def samples(self) -> int:
        return self.plan.samples

    def __len__(self) -> int:
        return len(self.plan)

    def epoch(self, index: int = 0) -> Iterator[Batch]:
        device = self.normalize.device
        order, generator = self.plan.epoch(index)
        seeds = torch.randint(2**31, (self.plan.images,), generator=generator)[order]
        batches = DataLoader(
            self.images,
            batch_size=self.plan.batch_size,
            sampler=list(zip(order.tolist(), seeds.tolist(), strict=True)),
            num_workers=self.workers,
            pin_memory=device.type == "cuda",
            generator=generator,  # the loader draws from it, else from the global one
        )
        try:
            for images, labels in batches:
                images = images.to(device, non_blocking=True)
                yield self.normalize(images), labels.to(device, non_blocking=True)
        except MaskSparsityError as error:  # a worker's has its traceback before the message
            message = str(error).rpartition(f"{MaskSparsityError.__name__}: ")[2]
            raise MaskSparsityError(message.strip()) from error


class _Images(Dataset[tuple[Tensor, int]]):
    """Indexed by (image, seed of its augmentation)."""

    def __init__(self, split: Files, transform: Any) -> None:
        self.split, self.transform = split, transform

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        index, seed = key
        file = self.split.files[index]
        image = file.decode()
        with torch.random.fork_rng(devices=[]):  # without workers, this is the user's process
            torch.default_generator.manual_seed(seed)
            image = self.transform(image)
        return pixels(image, file, self.split.size), self.split.labels[index]


def _transform(split: Files, train: bool, crop_padding: int, flip: bool) -> Any:
    from torchvision.transforms import v2

    resized = train and not crop_padding and min(split.size) >= 64
    steps: list[Any] = [v2.RandomResizedCrop(split.size)] if resized else []
    if split.image_size and not resized:
        steps.append(center_crop(split.image_size))
    if train and crop_padding:
        steps.append(v2.RandomCrop(split.size, padding=crop_padding))
    if train and flip:
        steps.append(v2.RandomHorizontalFlip())
    return v2.Compose([v2.Identity(), *steps])  # which refuses to compose nothing
