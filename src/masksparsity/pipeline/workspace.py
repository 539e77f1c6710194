"""Shared by the stages of one command: settings, files, data, and the making of networks."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

import masksparsity as ms
from masksparsity.data import Data
from masksparsity.data import create as create_data
from masksparsity.errors import MaskSparsityError
from masksparsity.pipeline.config import Config
from masksparsity.pipeline.rundir import FILES, RunDir
from masksparsity.tracing.copies import shadow
from masksparsity.tracing.network import named_tensors
from masksparsity.tracing.state import evaluating
from masksparsity.train import dist

# Settings that change no number: a run may go on with others.
_NO_MATTER = {"data": ("workers", "download"), "train": ("log_every",)}


@dataclass(frozen=True)
class Stage:
    """A stage: what it does, which sections of the config it heeds, whose files it starts from."""

    name: str
    body: Callable[["Workspace", Path], dict[str, Any]]
    sections: tuple[str, ...]
    inputs: dict[str, str]


class Workspace:
    """One command's view of a run.

    Args:
        out: the run directory; runs/RECIPE by default.
        given: files that take the place of those of the stages before, by input.
    """

    def __init__(
        self, config: Config, out: Path | None = None, *, given: dict[str, Path] | None = None
    ) -> None:
        self.config = config
        self.runs = RunDir(Path(out or Path("runs") / config.recipe))
        # Absolute, so that a path is never taken for a stage's name.
        self.given = {name: str(path.absolute()) for name, path in (given or {}).items()}
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        torch.backends.cudnn.deterministic = True
        self.device = dist.start(config.device)

    def inputs(self, stage: Stage) -> dict[str, str]:
        """Where each input of `stage` comes from: a given file, or the stage of that name."""
        if stage.name == "mask" and self.config.mask.file:
            return {}
        taught = getattr(getattr(self.config, stage.sections[-1]), "distill", 0)
        return {
            name: self.given.get(name, maker)
            for name, maker in stage.inputs.items()
            if taught or name != "teacher"
        }

    def file(self, stage: Stage, name: str) -> Path:
        """The file of the input `name`, which is there."""
        source = self.inputs(stage)[name]
        if name in self.given:
            if not Path(source).exists():
                raise MaskSparsityError(f"there is no file {source} (--{name})")
            return Path(source)
        if not self.runs.complete(source):
            raise MaskSparsityError(
                f"{stage.name} needs the {name} of {source}, which is not complete in "
                f"{self.runs.path}; run `masksparsity {source}` first, or give a file with --{name}"
            )
        return self.runs.folder(source) / FILES[name]

    def asked(self, stage: Stage) -> dict[str, Any]:
        """The settings of `stage`: its sections of the config, and its inputs."""
        config = self.config.as_json()
        for section, names in _NO_MATTER.items():
            for name in names:
                del config[section][name]
        return {name: config[name] for name in stage.sections} | {"inputs": self.inputs(stage)}

    @cached_property
    def data(self) -> Data:
        """The data set, loaded when the first stage asks for it."""
        train, model = self.config.train, self.config.model
        if train.batch_size % dist.size():
            raise MaskSparsityError(
                f"--train.batch-size {train.batch_size} cannot be shared by {dist.size()} processes"
            )
        data = create_data(
            self.config.data,
            batch_size=train.batch_size // dist.size(),
            eval_batch_size=train.eval_batch_size,
            device=self.device,
            seed=self.config.seed,
            rank=dist.rank(),
            world=dist.size(),
        )
        if (data.channels, *data.size) != model.input:
            shape = " ".join(map(str, (data.channels, *data.size)))
            raise MaskSparsityError(f"{data.name} has images of {shape}: say --model.input {shape}")
        if data.classes != model.classes:
            raise MaskSparsityError(
                f"{data.name} has {data.classes} classes: say --model.classes {data.classes}"
            )
        return data

    def example(self) -> Tensor:
        """One random image on the device, the same every time."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(1, *self.config.model.input, generator=generator).to(self.device)

    def trace(self, model: nn.Module) -> ms.ChannelGraph:
        """The coupled channels of `model`."""
        return ms.trace(model, self.example())

    def dense(self, weights: str | Path | None = None) -> nn.Module:
        """The dense network: random from the seed, or with `weights` from a file."""
        return self.place(self._create(weights))

    def network(self, path: str | Path) -> nn.Module:
        """The network in a file: an archive, dense or slim, or weights of the dense network; of a
        run directory, the one that the run has come to."""
        path = RunDir(Path(path)).network() if Path(path).is_dir() else path
        if _is_archive(path):
            dense = self._create(None)
            loaded = ms.load(path, model=dense)
            # Saved in another precision, perhaps, than the images come in.
            for (_, own), (_, usual) in zip(
                named_tensors(loaded), named_tensors(dense), strict=True
            ):
                own.data = own.data.to(usual.dtype)
            return self.place(loaded)
        return self.dense(path)

    def check(self, model: nn.Module) -> None:
        """Try `model` on one image.

        Raises:
            MaskSparsityError: it has nothing to train, does not take the images, or gives no score
                for each of the classes.
        """
        name, classes = self.config.model.name, self.config.model.classes
        if not any(True for _ in model.parameters()):
            raise MaskSparsityError(f"{name} has no parameters: there is nothing to train or prune")
        try:
            with shadow(model) as net, evaluating(net.modules()), torch.no_grad():
                output = net(self.example())
        except Exception as error:  # the model may be the user's, and raise anything
            raise MaskSparsityError(
                f"{name} does not take images of {' '.join(map(str, self.config.model.input))}; do "
                f"--model.input and --model.options fit each other? {error}"
            ) from error
        shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        if not isinstance(output, Tensor) or output.ndim != 2 or output.shape[1] < classes:
            raise MaskSparsityError(
                f"{name} returns {shape} for one image: training and evaluation need a tensor of "
                f"[images, classes], here [1, {classes}] (--model.classes)"
            )

    def place(self, model: nn.Module) -> nn.Module:
        """`model` on the device, in the layout that the images come in."""
        return model.to(self.device).to(memory_format=torch.channels_last)

    def _create(self, weights: str | Path | None) -> nn.Module:
        torch.manual_seed(self.config.seed)
        model = self.config.model
        options = dict(map(_option, model.options))
        if ":" not in model.name:  # a function of the user's own may not know the argument
            options.setdefault("num_classes", model.classes)
        made = ms.models.create(model.name, **options)
        if lazy := next((name for name, p in made.named_parameters() if is_lazy(p)), None):
            raise MaskSparsityError(
                f"{model.name}: {lazy} has no size yet; let the function run its model once, on "
                "an example, before it returns it"
            )
        if weights is not None:
            ms.models.load_weights(made, weights)
        return made


def _is_archive(path: str | Path) -> bool:
    """Whether this is a file of `masksparsity.save`, rather than bare weights."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return "masksparsity" in (file.metadata() or {})
    except (OSError, safetensors.SafetensorError):
        return False


def _option(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator:
        raise MaskSparsityError(f"--model.options takes KEY=VALUE, not {text!r}")
    try:
        return key, json.loads(value.lower() if value in ("True", "False") else value)
    except ValueError:
        return key, value  # a bare word is a string
