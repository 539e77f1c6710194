"""Exact accuracy on a whole set."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from masksparsity.data import Loader
from masksparsity.tracing.state import in_mode
from masksparsity.train import dist


@dataclass(frozen=True)
class Evaluation:
    """Counts over every image of a set."""

    correct: int
    total: int
    loss: float

    @property
    def accuracy(self) -> float:
        """Share of the images whose highest output is their class."""
        return self.correct / self.total


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Loader,
    tick: Callable[[], None] = lambda: None,
    *,
    amp: bool = False,
) -> Evaluation:
    """Count what `model` gets right in eval mode; its modes stay as they were.

    In full float32, without TF32: the counts before and after a removal are compared to the image.
    With `amp` under bfloat16 autocast, which is enough to watch a training. `tick` is called once
    per batch.
    """
    device = next(model.parameters()).device
    totals = torch.zeros(3, dtype=torch.float64, device=device)
    exact = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
    with in_mode(model.modules()), exact:
        for images, labels in loader.epoch(0):
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                outputs = model(images)
            outputs = outputs.float() if amp else outputs
            totals[0] += (outputs.argmax(1) == labels).sum()
            totals[1] += len(labels)
            totals[2] += F.cross_entropy(outputs, labels, reduction="sum")
            tick()
    correct, total, loss = dist.sum_(totals).tolist()
    return Evaluation(int(correct), int(total), loss / total)
