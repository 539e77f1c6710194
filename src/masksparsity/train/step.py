"""One training step: forward, loss, backward, penalty, optimizer; eager, compiled or captured."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from masksparsity.errors import MaskSparsityError
from masksparsity.train import dist
from masksparsity.train.config import Phase, TrainConfig
from masksparsity.train.graph import Captured, CaptureStream

Network = Callable[[Tensor], Tensor]


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


def capturable(device: torch.device) -> bool:
    """Whether a step can be captured. Collectives between processes stay outside of captures."""
    return device.type == "cuda" and dist.size() == 1


def step_mode(asked: str, device: torch.device) -> str:
    """`asked`, or what it stands for on `device` if it is "auto".

    Raises:
        MaskSparsityError: that is not possible here.
    """
    if asked == "auto":
        return "graph" if capturable(device) else "eager"
    if asked == "graph" and not capturable(device):
        raise MaskSparsityError(
            "--train.step graph needs a GPU, and one process alone: use auto, eager or compile"
        )
    return asked


@dataclass(frozen=True)
class Teacher:
    """A trained network whose outputs are asked for beside the labels.

    Hinton, Vinyals, Dean: *Distilling the Knowledge in a Neural Network*, 2015, section 2.
    """

    model: nn.Module
    share: float
    """Of the loss that compares with its outputs."""
    temperature: float
    """What scores are divided by before they are compared."""

    def loss(self, own: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
        """`own`, and the divergence of `outputs` from the teacher's `targets`, both [B, classes],
        by their shares."""
        ours, theirs = (F.log_softmax(x.float() / self.temperature, 1) for x in (outputs, targets))
        apart = F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
        # The square keeps the gradients of one size whatever the temperature.
        return (1 - self.share) * own + self.share * self.temperature**2 * apart


class Step:
    """Trains on one batch per call, and keeps count on the device.

    The penalty, if any, is attached to the optimizer; a teacher is in eval mode. Nothing is read
    back to the host until `read`. What `config.step` says holds for batches of the first one's
    shape; others run eagerly.

    Raises:
        MaskSparsityError: `config.step` is not possible on the device of `model`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        teacher: Teacher | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.config = config
        self.teacher = teacher
        self.device = next(model.parameters()).device
        # Sum of the losses, images right, images seen.
        self.totals = torch.zeros(3, dtype=torch.float64, device=self.device)
        self.shape: torch.Size | None = None
        teach = None if teacher is None else teacher.model
        self.eager: Callable[[Tensor, Tensor], None] = partial(self._train, model, teach)
        self.usual: Callable[[Tensor, Tensor], None] = self.eager
        mode = step_mode(config.step, self.device)
        if mode == "compile":
            # What earlier stages compiled counts towards the limit of recompilations.
            torch.compiler.reset()
            taught = None if teach is None else torch.compile(teach, dynamic=False)
            self.usual = partial(self._train, torch.compile(model, dynamic=False), taught)
        if mode != "eager" and capturable(self.device):
            self.usual = Captured(self.usual, CaptureStream())
        if self.device.type == "cuda":
            # A captured step can only read the rate from the device; eagerly it is rounded alike.
            for group in optimizer.param_groups:
                group["lr"] = torch.tensor(float(group["lr"]), device=self.device)

    def __call__(self, images: Tensor, labels: Tensor, lr: float) -> None:
        """Train on `images` [B, C, H, W] with `labels` [B] at the rate `lr`."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        self.shape = self.shape or images.shape
        train = self.usual if images.shape == self.shape else self.eager
        train(images, labels)

    def _train(
        self, forward: Network, teach: Network | None, images: Tensor, labels: Tensor
    ) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.amp):
            outputs = forward(images)
            with torch.no_grad():
                targets = teach(images) if teach is not None else None
        outputs = outputs.float()
        loss = F.cross_entropy(outputs, labels, label_smoothing=self.config.label_smoothing)
        if self.teacher is not None and targets is not None:
            loss = self.teacher.loss(loss, outputs, targets)
        # To None: a backward pass then writes gradients instead of adding to them, and a captured
        # one to the graph's own memory, the same at every replay.
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
