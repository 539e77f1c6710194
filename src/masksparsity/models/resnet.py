"""The CIFAR ResNets of He et al., 2015, section 4.2: three stages of two-convolution blocks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from masksparsity.errors import MaskSparsityError

DEPTHS = (20, 32, 44, 56, 110)


class ZeroPad(nn.Module):
    """Option-A shortcut: every second pixel, and zero channels on both sides of those there are.

    The zeros are buffers, not sizes in `forward`, so that surgery slices them like any other
    tensor, down to none at all. They hold no information and stay out of the state dict.
    """

    pad_before: Tensor
    pad_after: Tensor

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        before = (out_channels - in_channels) // 2
        after = out_channels - in_channels - before
        self.register_buffer("pad_before", torch.zeros(1, before, 1, 1), persistent=False)
        self.register_buffer("pad_after", torch.zeros(1, after, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        size = (x.shape[0], -1, x.shape[2], x.shape[3])
        # Without the casts, autocast would widen the whole concatenation to float32.
        before = self.pad_before.to(x.dtype).expand(size)
        after = self.pad_after.to(x.dtype).expand(size)
        return torch.cat((before, x, after), 1)


def _projection(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
    )


_SHORTCUTS = {"A": ZeroPad, "B": _projection}


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut; input [B, in, H, W], output [B, out, H/stride, ...]."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        same = stride == 1 and in_channels == out_channels
        self.shortcut: nn.Module = (
            nn.Identity() if same else _SHORTCUTS[shortcut](in_channels, out_channels, stride)
        )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out, inplace=True)


class CifarResNet(nn.Module):
    """ResNet of 6n + 2 layers for small images: [B, in_channels, H, W] -> logits [B, num_classes].

    Names and state dict are those of akamaster/pytorch_resnet_cifar10, whose weights load.

    Args:
        depth: one of `DEPTHS`.
        shortcut: "A" pads with zero channels (no parameters, the paper's choice for CIFAR),
            "B" projects with a 1x1 convolution.
        width: channels of the first stage; the others have 2 and 4 times as many.
        zero_init_residual: start every block as its shortcut (last scale of the block 0).
    """

    def __init__(
        self,
        depth: int,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        shortcut: str = "A",
        width: int = 16,
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__()
        if shortcut not in _SHORTCUTS:
            raise MaskSparsityError(f"shortcut={shortcut!r}: a CIFAR ResNet has 'A' or 'B'")

        def stage(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
            blocks = [Block(in_channels, out_channels, stride, shortcut)]
            for _ in range((depth - 2) // 6 - 1):
                blocks.append(Block(out_channels, out_channels, 1, shortcut))
            return nn.Sequential(*blocks)

        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = stage(width, width, 1)
        self.layer2 = stage(width, 2 * width, 2)
        self.layer3 = stage(2 * width, 4 * width, 2)
        self.linear = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, Block) and zero_init_residual:
                nn.init.zeros_(module.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))
