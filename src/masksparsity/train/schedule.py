"""Learning rates as pure functions of progress."""

import math
from collections.abc import Callable

from masksparsity.train.config import Phase


def _cosine(phase: Phase, progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2


def _step(phase: Phase, progress: float) -> float:
    return phase.gamma ** sum(progress >= step for step in phase.steps)


def _constant(phase: Phase, progress: float) -> float:
    return 1.0


_FACTORS: dict[str, Callable[[Phase, float], float]] = {
    "cosine": _cosine,
    "step": _step,
    "constant": _constant,
}


def learning_rate(phase: Phase, epoch: float) -> float:
    """The rate `epoch` epochs (a real number) into the phase."""
    rate = phase.lr * _FACTORS[phase.schedule](phase, epoch / phase.epochs)
    if epoch < phase.warmup:
        rate *= 0.1 + 0.9 * epoch / phase.warmup
    return rate
