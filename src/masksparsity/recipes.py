"""Named recipes: functions that return a config.

The published settings are those of `imagenet-resnet50`; the others are ours: the mask by a budget
of MACs, the masked channels to zero by schedule, cosine rates. On CIFAR-10 the mask is read from
the baseline itself, which costs no epochs, channels decay in a fifth of them at the full rate, and
the rest goes into finetuning, from that rate down.
"""

from collections.abc import Callable
from typing import Any

from masksparsity.data import DataConfig
from masksparsity.errors import MaskSparsityError
from masksparsity.pipeline.config import (
    Config,
    MaskConfig,
    MaskSparsifyConfig,
    ModelConfig,
    SparsifyConfig,
)
from masksparsity.train.config import Phase, TaughtPhase, TrainConfig


def digits_resnet20() -> Config:
    """ResNet-20 on 1,797 handwritten digits: the whole pipeline in under three minutes."""
    return Config(
        recipe="digits-resnet20",
        # More would only wait for each other on images this small.
        threads=1,
        model=ModelConfig(name="resnet20", input=(1, 8, 8), options=("in_channels=1",)),
        data=DataConfig(name="digits"),
        train=TrainConfig(batch_size=64, amp=False),
        baseline=Phase(epochs=30, lr=0.1),
        # Stronger than elsewhere: there are only 660 steps to move the scales.
        sparsify=SparsifyConfig(epochs=30, lr=0.05, strength=2e-3),
        mask=MaskConfig(pruned_macs=0.5),
        mask_sparsify=MaskSparsifyConfig(epochs=30, lr=0.05),
        finetune=TaughtPhase(epochs=20, lr=0.02),
        scratch=TaughtPhase(epochs=80, lr=0.1),
    )


def _cifar10(name: str, model: str, pruned_macs: float, weight_decay: float = 1e-4) -> Config:
    return Config(
        recipe=f"cifar10-{name}",
        model=ModelConfig(name=model),
        data=DataConfig(name="cifar10"),
        baseline=Phase(epochs=200, lr=0.1, warmup=5, weight_decay=weight_decay),
        sparsify=SparsifyConfig(epochs=0, lr=0.1, weight_decay=weight_decay),
        mask=MaskConfig(scores="taylor", per_cost=True, pruned_macs=pruned_macs),
        mask_sparsify=MaskSparsifyConfig(
            epochs=40, lr=0.1, schedule="constant", decay_fraction=1.0, weight_decay=weight_decay
        ),
        finetune=TaughtPhase(epochs=160, lr=0.1, weight_decay=weight_decay),
        scratch=TaughtPhase(epochs=400, lr=0.1, warmup=5, weight_decay=weight_decay),
    )


def cifar10_resnet20() -> Config:
    """ResNet-20 (option A) on CIFAR-10, half of the MACs removed."""
    return _cifar10("resnet20", "resnet20", 0.5)


def cifar10_resnet56() -> Config:
    """ResNet-56 (option A) on CIFAR-10, 55 % of the MACs removed."""
    return _cifar10("resnet56", "resnet56", 0.55)


def cifar10_resnet110() -> Config:
    """ResNet-110 (option A) on CIFAR-10, 63 % of the MACs removed, as in the paper."""
    return _cifar10("resnet110", "resnet110", 0.63)


def cifar10_vgg16() -> Config:
    """VGG-16 with BatchNorm on CIFAR-10, 60 % of the MACs removed."""
    return _cifar10("vgg16", "vgg16_bn", 0.6, weight_decay=5e-4)


def imagenet_resnet50() -> Config:
    """ResNet-50 on ImageNet with the original's settings."""
    steps: dict[str, Any] = {"epochs": 100, "lr": 0.1, "schedule": "step", "precise_bn": 8192}
    return Config(
        recipe="imagenet-resnet50",
        model=ModelConfig(
            name="torchvision/resnet50",
            input=(3, 224, 224),
            classes=1000,
            options=("zero_init_residual=true",),
        ),
        data=DataConfig(name="folder", image_size=224),
        train=TrainConfig(batch_size=256),
        baseline=Phase(**steps),
        sparsify=SparsifyConfig(**steps),
        mask=MaskConfig(select="threshold", threshold=0.01),
        mask_sparsify=MaskSparsifyConfig(**steps, penalty="masked-l1", strength=5e-4),
        finetune=TaughtPhase(
            epochs=40, lr=5e-4, schedule="step", steps=(0.25, 0.5, 0.75), precise_bn=8192
        ),
        scratch=TaughtPhase(**steps),
    )


RECIPES: dict[str, Callable[[], Config]] = {
    "digits-resnet20": digits_resnet20,
    "cifar10-resnet20": cifar10_resnet20,
    "cifar10-resnet56": cifar10_resnet56,
    "cifar10-resnet110": cifar10_resnet110,
    "cifar10-vgg16": cifar10_vgg16,
    "imagenet-resnet50": imagenet_resnet50,
}


def recipe(name: str) -> Config:
    """The config of the recipe called `name`."""
    if name not in RECIPES:
        raise MaskSparsityError(f"there is no recipe {name!r}; there are {', '.join(RECIPES)}")
    return RECIPES[name]()
