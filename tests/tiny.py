"""A run of seconds: the digits, a narrow network, few epochs."""

from dataclasses import replace
from typing import Any

from masksparsity.pipeline import Config
from masksparsity.recipes import digits_resnet20


def tiny(epochs: int = 2, **sections: Any) -> Config:
    config = digits_resnet20()
    phases = ("baseline", "sparsify", "mask_sparsify", "finetune", "scratch")
    short = {name: replace(getattr(config, name), epochs=epochs) for name in phases}
    model = replace(config.model, options=("in_channels=1", "width=8"))
    train = replace(config.train, batch_size=128)
    return replace(config, **{"model": model, "train": train, **short, **sections})
