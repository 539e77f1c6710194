"""One training step: forward, loss, backward, penalty, optimizer."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from masksparsity.train import dist
from masksparsity.train.config import Phase, TrainConfig


def create_optimizer(model: nn.Module, phase: Phase) -> torch.optim.SGD:
    """SGD over every parameter, in one fused kernel where the device has one."""
    parameters = list(model.parameters())
    return torch.optim.SGD(
        parameters,
        lr=phase.lr,
        momentum=phase.momentum,
        nesterov=phase.nesterov and phase.momentum > 0,
        weight_decay=phase.weight_decay,
        fused=parameters[0].device.type in ("cpu", "cuda"),
    )


class Step:
    """Trains on one batch per call, and keeps count on the device.

    The penalty, if any, is attached to the optimizer. Nothing is read back to the host until
    `read`.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.config = config
        self.device = next(model.parameters()).device
        # Sum of the losses, images right, images seen.
        self.totals = torch.zeros(3, dtype=torch.float64, device=self.device)

    def __call__(self, images: Tensor, labels: Tensor, lr: float) -> None:
        """Train on `images` at the rate `lr`."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.amp):
            outputs = self.model(images)
        outputs = outputs.float()
        loss = F.cross_entropy(outputs, labels, label_smoothing=self.config.label_smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()

        with torch.no_grad():
            right = (outputs.argmax(1) == labels).sum()
            self.totals[0] += loss * len(labels)
            self.totals[1] += right
            self.totals[2] += len(labels)

    def read(self) -> tuple[float, float]:
        """Mean loss and accuracy since `reset`, over all processes; waits for the device."""
        loss, correct, seen = dist.sum_(self.totals.clone()).tolist()
        return loss / seen, correct / seen

    def reset(self) -> None:
        """Start counting anew."""
        self.totals.zero_()
