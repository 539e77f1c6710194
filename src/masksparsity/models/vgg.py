"""VGG-16 with BatchNorm as the pruning literature trains it on CIFAR."""

from torch import Tensor, nn

_PLAN = (1, 1, "pool", 2, 2, "pool", 4, 4, 4, "pool", 8, 8, 8, "pool", 8, 8, 8, "pool")


class CifarVGG(nn.Module):
    """13 convolutions and one linear classifier: [B, in_channels, H, W] -> logits [B, num_classes].

    Args:
        width: channels of the first two convolutions; 64 is VGG-16.
    """

    def __init__(self, *, num_classes: int = 10, in_channels: int = 3, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for step in _PLAN:
            if isinstance(step, str):
                # Rounded up, so that images under 32x32 keep their last pixel.
                layers.append(nn.MaxPool2d(2, ceil_mode=True))
                continue
            out_channels = step * width
            layers += [
                nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
                nn.BatchNorm2d(out_channels),
                nn.ReLU(inplace=True),
            ]
            in_channels = out_channels
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(in_channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))
