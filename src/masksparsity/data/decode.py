"""Bytes of an image file to pixels: the one place where image files are decoded."""

import io
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from masksparsity.errors import MaskSparsityError


@dataclass(frozen=True, slots=True)
class ImageFile:
    """One encoded image: a file, a stretch of a tar archive, or (of a compressed one) its bytes."""

    path: str
    member: str = ""
    offset: int = 0
    length: int = -1
    content: bytes | None = None

    @property
    def name(self) -> str:
        """What errors call it: its path, and its name inside an archive."""
        return f"{self.path}/{self.member}" if self.member else self.path

    def read(self) -> bytes:
        """Its bytes, as they are stored."""
        if self.content is not None:
            return self.content
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.length)

    def decode(self) -> Any:
        """The RGB image, a `PIL.Image`.

        Raises:
            MaskSparsityError: names the file that is not a readable image.
        """
        import numpy as np
        from PIL import Image, UnidentifiedImageError

        try:
            image: Image.Image = Image.open(io.BytesIO(self.read()))
            if image.mode in ("I", "F"):
                raise ValueError(f"pixels of mode {image.mode} have no known range")
            if image.mode.startswith("I;16"):  # which `convert` would clip
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return image.convert("RGB")
        except UnidentifiedImageError:
            raise MaskSparsityError(f"{self.name} is no image of a known format") from None
        except Exception as error:  # each of the format readers raises its own
            raise MaskSparsityError(f"{self.name} is not a readable image: {error}") from error


def center_crop(image_size: int) -> Callable[[Any], Any]:
    """The centre of an image whose shorter side is brought to 8/7 of the size; under 64, to it."""
    from torchvision.transforms import v2

    shorter = image_size if image_size < 64 else round(image_size / 0.875)
    return v2.Compose([v2.Resize(shorter), v2.CenterCrop(image_size)])


def pixels(image: Any, file: ImageFile, size: tuple[int, int]) -> Tensor:
    """uint8 [H, W, 3] of a decoded image, which must have `size` (height, width) by now."""
    import numpy as np

    if image.size != size[::-1]:
        raise MaskSparsityError(
            f"{file.name} has {image.height}x{image.width} pixels where others have "
            f"{size[0]}x{size[1]}; bring them to one size with --data.image-size"
        )
    return torch.from_numpy(np.array(image))


def decode_all(
    files: Sequence[ImageFile], size: tuple[int, int], image_size: int | None, where: object
) -> Tensor:
    """All images, uint8 [N, 3, H, W] in channels_last order, decoded in threads.

    Says on stderr how far it is, every two seconds.
    """
    transform = center_crop(image_size) if image_size else None
    chunk = 256  # images per task: many small ones would cost more to hand out than to decode
    images = torch.empty(len(files), *size, 3, dtype=torch.uint8)

    def decode(start: int) -> None:
        for index, file in enumerate(files[start : start + chunk], start):
            image = file.decode()
            images[index] = pixels(transform(image) if transform else image, file, size)

    spoken = time.monotonic()
    with ThreadPoolExecutor() as threads:
        for number, _ in enumerate(threads.map(decode, range(0, len(files), chunk)), 1):
            if time.monotonic() - spoken > 2:
                spoken = time.monotonic()
                done = min(number * chunk, len(files))
                print(f"{where}: decoded {done} of {len(files)} images", file=sys.stderr)
    return images.permute(0, 3, 1, 2)
