"""Settings of data and how to read it; command-line flags are generated from the fields."""

from dataclasses import dataclass
from pathlib import Path

from masksparsity.errors import MaskSparsityError


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Images to train and evaluate on."""

    name: str = "digits"
    """digits (embedded), cifar10, cifar100, folder, npz, or your own module:function."""
    root: Path | None = None
    """Where the files are: a directory, for folder also a .tar or .tar.gz, for npz the file."""
    download: bool = False
    """Let torchvision fetch CIFAR into root if it is not there."""
    mean: tuple[float, ...] | None = None
    """Subtracted from every channel, as a share of 255. None: the set's own; folder: ImageNet's."""
    std: tuple[float, ...] | None = None
    """Every channel is divided by it, as a share of 255. None: like mean."""
    image_size: int | None = None
    """Side in pixels that images of a folder are brought to. None: as they are, all of one size."""
    crop_padding: int | None = None
    """Zeros around a training image before a random crop. None: digits 1, cifar 4, folder an
    eighth of the side under 64 pixels and 0 from there, others 0."""
    flip: bool | None = None
    """Mirror training images at random. None: cifar and folder yes, others no."""
    resident: bool | None = None
    """Decode a folder once and keep it on the device. None: up to 2 GiB of pixels."""
    workers: int = 2
    """Processes that decode images of a folder that is not resident."""

    def __post_init__(self) -> None:
        if (self.mean is None) != (self.std is None):
            raise MaskSparsityError("mean and std go together: give both or neither")
        if self.std is not None and min(self.std, default=0) <= 0:
            raise MaskSparsityError(f"std={self.std}: every value must be positive")
        for field, least in (("image_size", 1), ("crop_padding", 0), ("workers", 0)):
            value = getattr(self, field)
            if value is not None and value < least:
                raise MaskSparsityError(f"{field}={value}: must be at least {least}")
