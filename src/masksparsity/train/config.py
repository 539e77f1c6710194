"""Settings of training: what all stages share, and what each phase of training has of its own."""

from dataclasses import dataclass
from typing import Literal

from masksparsity.errors import MaskSparsityError


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How every stage trains."""

    batch_size: int = 128
    """Images per step, over all devices together."""
    eval_batch_size: int = 512
    """Images per step of evaluation, on each device."""
    amp: bool = True
    """Train under bfloat16 autocast, and so evaluate between epochs; scales, shifts and statistics
    stay float32, and so does what a stage reports at its end."""
    label_smoothing: float = 0.0
    """Share of the target that goes to the other classes."""
    step: Literal["auto", "eager", "compile", "graph"] = "auto"
    """How a step runs: as written, compiled (and on a single GPU captured), or captured as one CUDA
    graph; auto captures on a single GPU. Compiled rounds otherwise; on CPUs it pays for slim
    networks, whose odd widths are slow as written."""
    log_every: int = 50
    """Steps between two looks at the loss, each of which waits for the device."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "eval_batch_size", "log_every"):
            if getattr(self, name) < 1:
                raise MaskSparsityError(f"train.{name} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase of training with SGD: how long, at what rate."""

    epochs: int
    """Passes over the training set; 0 takes the weights as they are."""
    lr: float
    """Learning rate at the start."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """How the rate falls."""
    steps: tuple[float, ...] = (0.3, 0.6, 0.9)
    """Where a step schedule multiplies the rate by gamma, as shares of the phase."""
    gamma: float = 0.1
    """Factor of a step schedule."""
    warmup: float = 0.0
    """Epochs over which the rate rises linearly from a tenth."""
    momentum: float = 0.9
    """Momentum of SGD."""
    nesterov: bool = True
    """Nesterov's form of momentum."""
    weight_decay: float = 1e-4
    """L2 on every parameter."""
    precise_bn: int = 0
    """Training images over which to recompute BatchNorm statistics at the end; 0 keeps them."""
    ema: float = 0.0
    """What stays, at each step, of a moving average of the weights, which the phase then ends with;
    0: none."""

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.lr <= 0 or self.precise_bn < 0:
            raise MaskSparsityError("epochs and precise_bn cannot be negative, lr must be positive")
        if not (0 <= self.momentum < 1 and 0 <= self.ema < 1):
            raise MaskSparsityError("momentum and ema are what stays of an average: below 1")


@dataclass(frozen=True, kw_only=True)
class TaughtPhase(Phase):
    """One in which the dense network may teach: knowledge distillation (Hinton et al., 2015)."""

    distill: float = 0.0
    """Share of the loss that asks for the dense network's outputs instead of the labels; 0: no
    teacher."""
    temperature: float = 4.0
    """distill: what both networks' scores are divided by; the higher, the more the wrong classes
    count."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.distill <= 1 and self.temperature > 0):
            raise MaskSparsityError("distill is a share of the loss, temperature above 0")
