"""Images that live on the device as uint8 and are augmented there, a whole batch at once."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from masksparsity.data.loader import Batch, Normalize, Plan


class ResidentLoader:
    """A `Loader` over images in device memory.

    Training images are padded once with zeros; crop, flip and the choice of images are then one
    gather of pixels, with one random offset and one coin per image.

    Args:
        images: uint8 [N, C, H, W], on any device.
        labels: int64 [N].
        crop_padding: pixels of zeros on each side; 0 for evaluation.
        flip: mirror half of the images; False for evaluation.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        plan: Plan,
        normalize: Normalize,
        *,
        crop_padding: int = 0,
        flip: bool = False,
    ) -> None:
        self.plan, self.normalize, self.flip = plan, normalize, flip
        device = normalize.device
        self.size = height, width = images.shape[2], images.shape[3]
        self.offsets = 2 * crop_padding + 1
        if crop_padding:
            images = F.pad(images, [crop_padding] * 4)
        self.padded_size = images.shape[2], images.shape[3]
        # Channels last, so that a pixel is one row to gather.
        self.pixels = images.permute(0, 2, 3, 1).reshape(-1, images.shape[1]).to(device)
        self.labels = labels.to(device)
        self.rows = torch.arange(height, device=device)
        columns = torch.arange(width, device=device)
        self.columns = torch.stack((columns, columns.flip(0)))  # as they are, mirrored

    @property
    def samples(self) -> int:
        return self.plan.samples

    def __len__(self) -> int:
        return len(self.plan)

    def epoch(self, index: int = 0) -> Iterator[Batch]:
        order, generator = self.plan.epoch(index)
        # Drawn for the whole epoch, on the CPU: the same on every device, and one copy for all.
        images = self.plan.images
        offset = torch.randint(self.offsets, (2, images), generator=generator)
        mirrored = torch.randint(1 + self.flip, (1, images), generator=generator)
        drawn = torch.cat((order[None], offset[:, order], mirrored[:, order]))
        drawn = drawn.to(self.labels.device)
        for start in range(0, self.samples, self.plan.batch_size):
            image, top, left, mirror = drawn[:, start : start + self.plan.batch_size]
            yield self.normalize(self._crop(image, top, left, mirror)), self.labels[image]

    def _crop(self, image: Tensor, top: Tensor, left: Tensor, mirror: Tensor) -> Tensor:
        """uint8 [B, H, W, C] of the given images, each at its own offset; all arguments [B]."""
        height, width = self.padded_size
        rows = (image * height + top)[:, None] + self.rows
        columns = left[:, None] + self.columns[mirror]
        pixels = rows[:, :, None] * width + columns[:, None, :]
        gathered = self.pixels.index_select(0, pixels.flatten())
        return gathered.view(len(image), *self.size, -1)
