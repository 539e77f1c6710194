"""A network to be penalised, and what steps it."""

from collections.abc import Callable

import torch
from torch import nn

import masksparsity as ms

LR, STRENGTH = 0.05, 5e-3
OPTIMIZERS: dict[str, Callable] = {
    "sgd": lambda p: torch.optim.SGD(p, LR, momentum=0.9),
    "sgd-fused": lambda p: torch.optim.SGD(p, LR, momentum=0.9, fused=True),
    "sgd-foreach": lambda p: torch.optim.SGD(p, LR, momentum=0.9, foreach=True),
    "adam": lambda p: torch.optim.Adam(p, LR),
    "adam-fused": lambda p: torch.optim.Adam(p, LR, fused=True),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 6, 3), nn.ReLU(),  # a producer without a norm
        nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


INPUTS, LABELS = (
    torch.randn(16, 3, 9, 9, generator=torch.Generator().manual_seed(1)),
    torch.arange(16) % 4,
)


def step(model, optimizer, scaler=None, scale=1.0) -> None:
    optimizer.zero_grad()
    loss = scale * nn.functional.cross_entropy(model(INPUTS), LABELS)
    if scaler is None:
        loss.backward()
        optimizer.step()
    else:
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()


PENALTIES = {
    "masked": lambda m, g, k: ms.MaskedL1(m, g, k, STRENGTH),
    "proximal": lambda m, g, k: ms.Proximal(m, g, k, STRENGTH),
    "decay": lambda m, g, k: ms.ScheduledDecay(m, g, k, steps=50),
}
