"""The settings of a whole run, and their way to JSON and back."""

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from masksparsity.data import DataConfig
from masksparsity.errors import MaskSparsityError
from masksparsity.pipeline.typed import build
from masksparsity.train.config import Phase, TaughtPhase, TrainConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The dense network."""

    name: str
    """Ours (resnet20, vgg16, ...), torchvision/NAME, timm/NAME, or module:function of your own."""
    input: tuple[int, int, int] = (3, 32, 32)
    """Channels, height and width of one image."""
    classes: int = 10
    """How many classes it tells apart."""
    options: tuple[str, ...] = ()
    """Further arguments of the constructor, as KEY=VALUE."""
    weights: str | None = None
    """Weights that the baseline starts from; random if not given."""

    def __post_init__(self) -> None:
        if min(*self.input, self.classes) < 1:
            raise MaskSparsityError("model.input and model.classes must be at least 1")


@dataclass(frozen=True, kw_only=True)
class SparsifyConfig(Phase):
    """The penalty on all scales, from which the mask is read."""

    strength: float = 5e-4
    """Sparsity factor: weight of the penalty."""
    kind: Literal["l1", "l2", "smooth_l1", "polarization"] = "l1"
    """Form of the penalty."""


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """Which channels stay."""

    file: str | None = None
    """A mask that is given: nothing is chosen, and `sparsify` is not needed."""
    scores: Literal["scale", "norm", "taylor"] = "scale"
    """What a channel counts for: its BatchNorm scale, the norm of its filter, or what the loss on
    training images would change without it, to first order."""
    select: Literal["budget", "threshold", "optimal", "fraction", "uniform"] = "budget"
    """How scores become a mask; each takes the setting named after it below."""
    pruned_macs: float = 0.5
    """budget: share of the MACs to remove, unless another budget is given."""
    pruned_params: float | None = None
    """budget: share of the parameters to remove."""
    pruned_latency: float | None = None
    """budget: share of the latency to remove, as measured on this machine, one image at a time."""
    per_cost: bool = False
    """budget: the lowest scores per MAC (or parameter) saved go; for scores that add up, as
    Taylor's do."""
    rounds: int = 1
    """budget: rounds that spend it, a share each; scores and costs are read again after each."""
    threshold: float = 0.01
    """threshold: scores below it are pruned."""
    energy: float = 1e-4
    """optimal: the smallest scores of a layer, up to this share of its energy, are pruned."""
    pruned_fraction: float = 0.5
    """fraction and uniform: share of the channels to prune, over all or in each group."""
    round_to: int = 1
    """Keep a multiple of this many channels; tensor cores like 8."""
    min_keep: int = 1
    """Keep at least this many channels of every group."""
    ignore: tuple[str, ...] = ()
    """Layers to leave whole."""
    max_pruned: tuple[str, ...] = ()
    """SHARE, or LAYER=SHARE for each of some layers: what a layer may lose of its channels."""


@dataclass(frozen=True, kw_only=True)
class MaskSparsifyConfig(TaughtPhase):
    """MaskSparsity: the penalty on the masked scales alone, again from the baseline."""

    penalty: Literal["masked-l1", "proximal", "decay"] = "decay"
    """As published (subgradient), proximal (exact zeros), or decay to zero on schedule."""
    strength: float = 5e-4
    """Sparsity factor of masked-l1 and proximal."""
    decay_fraction: float = 0.5
    """decay: share of the phase by which the masked channels are zero."""
    decay_span: float = 0.25
    """decay: share of that which one channel takes; they go in turn, the weakest first. 1: all at
    once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 < self.decay_fraction <= 1 and 0 < self.decay_span <= 1):
            raise MaskSparsityError(
                "decay_fraction and decay_span are shares of the phase, above 0 and up to 1"
            )


BUDGETS = ("mask.pruned_macs", "mask.pruned_params", "mask.pruned_latency")

READ_BY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (*BUDGETS, "mask.per_cost", "mask.rounds"), ("mask.select", "budget"),
    ),
    "mask.threshold": ("mask.select", "threshold"),
    "mask.energy": ("mask.select", "optimal"),
    "mask.pruned_fraction": ("mask.select", "fraction", "uniform"),
    "mask_sparsify.strength": ("mask_sparsify.penalty", "masked-l1", "proximal"),
    **dict.fromkeys(
        ("mask_sparsify.decay_fraction", "mask_sparsify.decay_span"),
        ("mask_sparsify.penalty", "decay"),
    ),
    **{f"{phase}.{name}": (f"{phase}.schedule", "step")
       for phase in ("baseline", "sparsify", "mask_sparsify", "finetune", "scratch")
       for name in ("steps", "gamma")},
    **{f"{phase}.temperature": (f"{phase}.distill",)
       for phase in ("mask_sparsify", "finetune", "scratch")},
}  # fmt: skip
"""Setting -> the setting that has to have one of the values behind it, or, if there are none, must
not be 0, or nothing reads it."""


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """Removal of the masked channels."""

    absorb: Literal["none", "exact", "bias"] = "none"
    """What becomes of the constants that channels with a shift but no scale still say: dropped,
    kept by one constant channel a group, or moved into biases (exact but for padded borders)."""


@dataclass(frozen=True, kw_only=True)
class OneShotConfig:
    """Pruning a trained network without training it (`prune --one-shot`)."""

    images: int = 2048
    """Training images to recompute BatchNorm statistics on afterwards; 0 keeps them."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides what a run computes, section by section."""

    recipe: str
    """Name of the run: its files are in runs/RECIPE unless --out says otherwise."""
    seed: int = 0
    """Seed of weights, order and augmentation."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU if there is one."""
    threads: int | None = None
    """CPU threads, if torch's own choice should not stand."""
    model: ModelConfig
    data: DataConfig
    train: TrainConfig = field(default_factory=TrainConfig)
    baseline: Phase
    sparsify: SparsifyConfig
    mask: MaskConfig = field(default_factory=MaskConfig)
    mask_sparsify: MaskSparsifyConfig
    prune: PruneConfig = field(default_factory=PruneConfig)
    one_shot: OneShotConfig = field(default_factory=OneShotConfig)
    finetune: TaughtPhase
    scratch: TaughtPhase

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise MaskSparsityError("threads must be at least 1")
        if not -(2**63) <= self.seed < 2**64:
            raise MaskSparsityError(f"seed={self.seed}: must have 64 bits at most")
        for name, value in _numbers(dataclasses.asdict(self)):
            # Means of channels are of whatever scale the user's images have.
            negative = value < 0 and name not in ("seed", "data.mean")
            if negative or not abs(value) < math.inf:
                raise MaskSparsityError(f"{name}={value}: must be finite and not negative")

    def as_json(self) -> dict[str, Any]:
        """The config in JSON's types."""
        values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self), default=str))
        return values

    @classmethod
    def read(cls, path: Path) -> Self:
        """The config saved in a JSON file."""
        try:
            config: Self = build(cls, json.loads(Path(path).read_text()))
            return config
        except FileNotFoundError as error:
            raise MaskSparsityError(f"there is no file {path} (--config)") from error
        except (OSError, ValueError) as error:
            raise MaskSparsityError(
                f"{path} is not the whole config of a run, as runs save it: {error}"
            ) from error


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, f"{name}.{key}".lstrip("."))
    elif isinstance(value, tuple):
        for item in value:
            yield from _numbers(item, name)
    elif isinstance(value, int | float):
        yield name, value


def defaults(kind: Any = Config) -> dict[str, Any]:
    """What a saved config without a setting stands for: the defaults, in JSON's types."""
    found: dict[str, Any] = {}
    for setting in dataclasses.fields(kind):
        if dataclasses.is_dataclass(setting.type):
            found[setting.name] = defaults(setting.type)
        elif setting.default is not dataclasses.MISSING:
            found[setting.name] = setting.default
    values: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return values
