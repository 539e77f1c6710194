"""The training loop: epochs, evaluation, checkpoints, and going on after a kill."""

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from masksparsity.channels.penalty import Penalty
from masksparsity.data import Data
from masksparsity.errors import MaskSparsityError, RunFailure
from masksparsity.files import atomic, checkpoint
from masksparsity.train import dist
from masksparsity.train.config import Phase, TrainConfig
from masksparsity.train.ema import Ema
from masksparsity.train.evaluate import evaluate
from masksparsity.train.progress import Meter, say
from masksparsity.train.schedule import learning_rate
from masksparsity.train.step import Step, Teacher, create_optimizer

CHECKPOINT = "checkpoint.safetensors"
METRICS = "metrics.jsonl"


class State:
    """Everything that a resumed run needs: weights and their average, optimizer, penalty, and the
    epochs so far."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        penalty: Penalty | None,
        ema: float,
        folder: Path,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.penalty = penalty
        self.ema = Ema(model, ema, penalty) if ema else None
        self.trained = model if self.ema is None else self.ema.network
        self.folder = folder
        self.names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        self.history: list[dict[str, Any]] = []

    def resume(self) -> None:
        """Take up the folder's checkpoint, if there is one."""
        path = self.folder / CHECKPOINT
        if path.exists():
            saved = checkpoint.read(path)
            try:
                self.model.load_state_dict(saved["model"])
                checkpoint.load_optimizer_state(self.optimizer, self.names, saved["optimizer"])
                if self.penalty is not None:
                    self.penalty.load_state_dict(saved["penalty"])
                if self.ema is not None:
                    self.trained.load_state_dict(saved["ema"])
                self.history = saved["history"]
                say(f"{self.folder.name}: goes on after epoch {len(self.history)}")
            except (KeyError, RuntimeError) as error:
                raise MaskSparsityError(
                    f"{path} is a checkpoint of something else ({error}). "
                    "Remove it to start this stage anew."
                ) from error

    def save(self, line: dict[str, Any]) -> None:
        """Close an epoch: its checkpoint, which decides, and then the metrics for people."""
        self.history.append(line)
        if dist.rank() == 0:
            tree = {
                "model": self.model.state_dict(),
                "optimizer": checkpoint.optimizer_state(self.optimizer, self.names),
                "penalty": self.penalty.state_dict() if self.penalty is not None else None,
                "ema": self.trained.state_dict() if self.ema is not None else None,
                "history": self.history,
            }
            checkpoint.write(self.folder / CHECKPOINT, tree)
            lines = "".join(json.dumps(line) + "\n" for line in self.history)
            atomic.write(self.folder / METRICS, lines.encode())


def fit(
    model: nn.Module,
    data: Data,
    phase: Phase,
    config: TrainConfig,
    *,
    folder: Path,
    seed: int,
    penalty: Penalty | None = None,
    teacher: Teacher | None = None,
) -> None:
    """Train `model` in place for one phase, or for what the checkpoint in `folder` leaves of it.

    A resumed run ends with the bits of an uninterrupted one: batches are a pure function of the
    epoch, and the generators are seeded anew in each.
    """
    optimizer = create_optimizer(model, phase)
    if penalty is not None:
        penalty.attach(optimizer)
    state = State(model, optimizer, penalty, phase.ema, folder)
    state.resume()

    train = data.training()
    step = Step(dist.wrap(model), optimizer, config, teacher)
    first, batches = len(state.history), len(train) + len(data.test)
    with Meter(folder.name, phase.epochs * batches, first * batches) as meter:
        for epoch in range(first, phase.epochs):
            start = time.monotonic()
            torch.manual_seed(((seed * 10_007 + epoch) * 1_009 + dist.rank()) % 2**63)
            step.reset()
            model.train()
            for batch, (images, labels) in enumerate(train.epoch(epoch), 1):
                lr = learning_rate(phase, epoch + (batch - 1) / len(train))
                step(images, labels, lr)
                if state.ema is not None:
                    state.ema.update()
                meter.advance()
                if batch % config.log_every == 0:
                    _finite(step.read()[0], folder, epoch, phase)

            loss, accuracy = step.read()
            for network in dict.fromkeys((model, state.trained)):
                dist.share_buffers(network)
            test = evaluate(state.trained, data.test, meter.advance, amp=config.amp)
            _finite(loss + test.loss, folder, epoch, phase)
            state.save(
                {
                    "epoch": epoch + 1,
                    "lr": lr,
                    "train_loss": loss,
                    "train_accuracy": accuracy,
                    "test_loss": test.loss,
                    "test_accuracy": test.accuracy,
                    "seconds": time.monotonic() - start,
                }
            )
            meter.tell(f"epoch {epoch + 1}  loss {loss:.3f}  test {test.accuracy:.2%}")
    if penalty is not None:
        penalty.detach()
    if state.ema is not None:
        model.load_state_dict(state.trained.state_dict())


def _finite(loss: float, folder: Path, epoch: int, phase: Phase) -> None:
    if not math.isfinite(loss):
        raise RunFailure(
            f"{folder.name}: the loss is not finite in epoch {epoch + 1}. Lower the learning rate "
            f"(it starts at {phase.lr:g}); {folder} keeps the last good checkpoint."
        )


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The metrics of the epochs trained in `folder` so far."""
    path = folder / METRICS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
