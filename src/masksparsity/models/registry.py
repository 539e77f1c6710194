"""`create(name)`: a network by its name, and how it was built, kept as data."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from masksparsity.errors import MaskSparsityError
from masksparsity.models.resnet import DEPTHS, CifarResNet
from masksparsity.models.vgg import CifarVGG
from masksparsity.models.weights import load_weights
from masksparsity.userfunction import user_function

Factory = Callable[..., nn.Module]

_OURS: dict[str, Factory] = {
    **{f"resnet{depth}": partial(CifarResNet, depth) for depth in DEPTHS},
    "vgg16_bn": CifarVGG,
}

# Both warn unless told: False is what torchvision has announced as its default.
_TORCHVISION_DEFAULTS = {
    "googlenet": {"init_weights": False},
    "inception_v3": {"init_weights": False},
}

# What a file may pass to a constructor: nothing here reads a file or reaches the network.
# fmt: off
_FILE_KWARGS = frozenset({
    "num_classes", "in_channels", "in_chans", "shortcut", "width", "zero_init_residual",
    "aux_logits", "transform_input", "init_weights", "dropout", "drop_rate", "drop_path_rate",
    "stochastic_depth_prob", "groups", "width_per_group", "width_mult", "growth_rate",
    "global_pool", "output_stride", "img_size", "image_size",
})
# fmt: on

_ATTRIBUTE = "_masksparsity_constructor"


@dataclass(frozen=True)
class Constructor:
    """How a model was built: `create(name, **kwargs)` without its weights."""

    name: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """The model, freshly initialised.

        Raises:
            MaskSparsityError: the name is unknown, or the arguments do not fit it.
        """
        factory = _factory(self.name)
        try:
            model = factory(**self.kwargs)
        except TypeError as error:
            raise MaskSparsityError(
                f"model {self.name!r} cannot be made with {dict(self.kwargs) or 'no arguments'}: "
                f"{error} (from the shell, arguments are --model.options KEY=VALUE)"
            ) from error
        except MaskSparsityError:
            raise
        except Exception as error:
            raise MaskSparsityError(
                f"{self.name} raised {type(error).__name__}: {error}"
            ) from error
        if not isinstance(model, nn.Module):
            raise MaskSparsityError(f"{self.name} returned {type(model)}, not a torch.nn.Module")
        setattr(model, _ATTRIBUTE, self)
        return model

    @classmethod
    def from_untrusted(cls, name: object, kwargs: object) -> "Constructor":
        """A constructor that came from a file: only names of the registry, only harmless arguments.

        Raises:
            MaskSparsityError: building it could import code, read a file or reach the network.
        """
        if not isinstance(name, str) or not isinstance(kwargs, Mapping):
            raise MaskSparsityError(f"not a model's name and arguments: {name!r}, {kwargs!r}")
        if ":" in name or not (name in _OURS or name.startswith(tuple(_LIBRARIES))):
            raise MaskSparsityError(
                f"the file names {name!r}, which is not in the registry, and a file may not choose "
                "what code runs: build the model yourself and pass it as model="
            )
        for key, value in kwargs.items():
            if key not in _FILE_KWARGS or not isinstance(value, bool | int | float | str | None):
                raise MaskSparsityError(
                    f"the file builds {name!r} with {key}={value!r}, which a file may not set: "
                    "build the model yourself and pass it as model="
                )
        return cls(name, dict(kwargs))


def create(name: str, *, weights: str | Path | None = None, **kwargs: Any) -> nn.Module:
    """A network by its name, in training mode, on the CPU (or the device of the torch context).

    Args:
        name: `resnet20|32|44|56|110` and `vgg16_bn` for CIFAR, `torchvision/<name>`,
            `timm/<name>`, or `module:function` of your own.
        weights: a file that `load_weights` reads; None leaves the random initialisation.
        kwargs: handed to the constructor; ours take `num_classes`, `in_channels` and `width`, the
            ResNets also `shortcut` ("A" or "B") and `zero_init_residual`.

    Raises:
        MaskSparsityError: unknown name, arguments that do not fit, or weights that do not fit.
    """
    model = Constructor(name, kwargs).build()
    if weights is not None:
        load_weights(model, weights)
    return model


def constructor(model: nn.Module) -> Constructor | None:
    """How `create` built this model or the one it was copied from; None for any other model."""
    return getattr(model, _ATTRIBUTE, None)


def _torchvision(name: str) -> Factory:
    from torchvision import models

    # Classification only: the other models download a backbone unless told otherwise.
    known = models.list_models(module=models)
    if name not in known:
        raise _unknown(f"torchvision/{name}", (f"torchvision/{other}" for other in known))

    def build(**kwargs: Any) -> nn.Module:
        defaults: dict[str, Any] = _TORCHVISION_DEFAULTS.get(name, {})
        return models.get_model(name, weights=None, **{**defaults, **kwargs})

    return build


def _timm(name: str) -> Factory:
    try:
        import timm
    except ImportError as error:
        raise MaskSparsityError(f"timm/{name} needs timm: pip install timm") from error
    if not timm.is_model(name):  # also keeps out hf-hub: and local-dir: names
        raise _unknown(f"timm/{name}", (f"timm/{other}" for other in timm.list_models()))

    def build(**kwargs: Any) -> nn.Module:
        return timm.create_model(name, pretrained=False, **kwargs)

    return build


_LIBRARIES: dict[str, Callable[[str], Factory]] = {"torchvision/": _torchvision, "timm/": _timm}


def _factory(name: str) -> Factory:
    if name in _OURS:
        return _OURS[name]
    for prefix, library in _LIBRARIES.items():
        if name.startswith(prefix):
            return library(name.removeprefix(prefix))
    if ":" in name:
        return user_function(name)
    from torchvision import models

    theirs = (f"torchvision/{other}" for other in models.list_models(module=models))
    raise _unknown(name, (*theirs, *_OURS))


def _unknown(name: str, known: Iterable[str]) -> MaskSparsityError:
    by_leaf = {other.rpartition("/")[2]: other for other in known}
    close = get_close_matches(name.rpartition("/")[2], by_leaf)
    hint = f": did you mean {', '.join(by_leaf[leaf] for leaf in close)}?" if close else "."
    return MaskSparsityError(
        f"unknown model {name!r}{hint} There are {', '.join(_OURS)}, torchvision/<name>, "
        "timm/<name> and your own module:function"
    )
