"""Slim archives: one safetensors file that rebuilds a pruned model, and cannot run code.

Its tensors are all parameters and buffers; its metadata holds the constructor (a name of our
registry with plain arguments) and the groups of convolutions, which no shape tells.
"""

import json
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from masksparsity.channels.rebuild import formatted, rebuild
from masksparsity.channels.silence import SilentConvolution
from masksparsity.channels.surgery import WRITTEN_DOWN
from masksparsity.errors import MaskSparsityError
from masksparsity.models.registry import Constructor, constructor
from masksparsity.tracing.network import named_tensors, unwrap

from . import atomic, tensors

_FORMAT = "masksparsity archive 1"
_HEADER: dict[str, Callable[[Any], bool]] = {
    "groups": lambda x: isinstance(x, dict),
    "constructor": lambda x: x is None or (isinstance(x, dict) and {"name", "kwargs"} <= x.keys()),
    "attributes": lambda x: isinstance(x, dict) and all(isinstance(v, dict) for v in x.values()),
    "frozen": lambda x: x is None or isinstance(x, list),
    "altered": lambda x: x is None or isinstance(x, str),
}


def save(model: nn.Module, path: str | Path) -> None:
    """Write a model, pruned or not, so that `load(path)` rebuilds it.

    Models that `masksparsity.models.create` did not build, or that have been altered since, are
    saved as well; `load` then needs `model=`, a dense one to shrink.

    Raises:
        MaskSparsityError: a parameter or buffer that has no plain numbers to store.
    """
    model = unwrap(model)
    built = constructor(model)
    about = {
        "format": _FORMAT,
        "constructor": None
        if built is None
        else {"name": built.name, "kwargs": dict(built.kwargs)},
        "groups": _groups(model),
        "attributes": getattr(model, WRITTEN_DOWN, {}),
        "frozen": [n for n, p in model.named_parameters() if not p.requires_grad],
        "altered": None,
    }
    own = dict(named_tensors(model))
    for name, tensor in own.items():
        _check_storable(name, tensor)
    about["altered"] = _altered(model, about)
    tensors.write(Path(path), own, {"masksparsity": json.dumps(atomic.plain(about))})


def load(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Rebuild a model from its archive, to the bit and the dtype, on the CPU, in eval mode.

    Args:
        model: a dense model of the user's own to shrink (a copy; it stays as it is); without it
            the archive's constructor builds one.

    Raises:
        MaskSparsityError: a damaged file, one that is no archive, a constructor outside the
            registry, or tensors that do not fit the dense model; says which.
    """
    path = Path(path)
    stored, about = _read(path)
    try:
        model = _dense(about) if model is None else unwrap(model)
        own = dict(named_tensors(model))
        _check(model, stored)
        # Copies even where no axis changed: the slim model shares no memory with `model`.
        slim = rebuild(model, {name: formatted(x, own[name]) for name, x in stored.items()})
        _write_down(slim, about["attributes"])
        _freeze(slim, about["frozen"])
        if _groups(slim) != about["groups"]:
            raise MaskSparsityError("the groups of its convolutions are not this model's")
    except MaskSparsityError as error:
        raise MaskSparsityError(f"{path}: {error}") from error
    slim.eval()  # which a model of the user's may have changed to return nothing
    return slim


def _altered(model: nn.Module, about: dict[str, Any]) -> str | None:
    """What a model has that the one of its constructor, with as many channels, has not."""
    try:
        dense = _dense(about)
    except MaskSparsityError:  # which `load` will say
        return None
    try:
        shapes = {name: tensor.detach().to("meta") for name, tensor in named_tensors(model)}
        _check(dense, shapes)
        same = rebuild(dense, shapes)
        _write_down(same, about["attributes"])
    except MaskSparsityError as error:
        return str(error)
    ours, theirs = ({name: _says(m) for name, m in net.named_modules()} for net in (model, same))
    odd = next((n for n in {**ours, **theirs} if ours.get(n) != theirs.get(n)), None)
    return None if odd is None else f"{odd} is {ours.get(odd)}, not {theirs.get(odd)}"


def _says(module: nn.Module) -> str:
    """What it computes, in eval mode."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return "dropout"
    if isinstance(module, nn.modules.batchnorm._BatchNorm):  # synchronised or not
        return f"a norm of {module.num_features} with eps={module.eps}"
    return f"{type(module).__name__}({module.extra_repr()})"


def _check_storable(name: str, tensor: torch.Tensor) -> None:
    kinds = {
        "sparse": tensor.layout != torch.strided,
        "quantized": tensor.is_quantized,
        "meta": tensor.is_meta,
        "uninitialized": is_lazy(tensor),
        "complex128": tensor.dtype == torch.complex128,
    }
    for kind in [kind for kind, is_it in kinds.items() if is_it]:
        raise MaskSparsityError(
            f"{name} is {kind}, which an archive cannot hold: convert or fill it first"
        )


def _freeze(slim: nn.Module, frozen: list[str] | None) -> None:
    if frozen is not None:  # archives of before say nothing of it
        for name, parameter in slim.named_parameters():
            differentiable = parameter.is_floating_point() or parameter.is_complex()
            parameter.requires_grad_(differentiable and name not in frozen)


def _write_down(slim: nn.Module, attributes: dict[str, dict[str, Any]]) -> None:
    """Lengths that the modules hold as attributes: plain numbers in the place of plain numbers."""
    modules = dict(slim.named_modules())
    for name, values in attributes.items():
        for attribute, value in values.items():
            old = vars(modules[name]).get(attribute) if name in modules else None
            new = tuple(value) if isinstance(old, tuple) else value
            numbers = new if isinstance(new, (list, tuple)) else [new]
            if type(new) is not type(old) or any(type(n) is not int for n in numbers):
                raise MaskSparsityError(f"{name}.{attribute} is not what this model has there")
            setattr(modules[name], attribute, new)
    if attributes:
        setattr(slim, WRITTEN_DOWN, attributes)


def _dense(about: dict[str, Any]) -> nn.Module:
    made = about["constructor"]
    if made is None:
        raise MaskSparsityError("holds no constructor: pass the dense model as model=")
    if about["altered"]:
        raise MaskSparsityError(
            f"what {made['name']!r} makes has been altered ({about['altered']}): pass the dense "
            "model, altered likewise, as model="
        )
    built = Constructor.from_untrusted(made["name"], made["kwargs"])
    try:
        with torch.device("meta"):  # its own weights are never needed
            return built.build()
    except MaskSparsityError:  # as some compute their widths with tensors
        with torch.random.fork_rng(devices=()):
            return built.build()


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    stored, words = tensors.read(path)
    try:
        about = json.loads(words.get("masksparsity", "{}"))
    except ValueError as error:
        raise MaskSparsityError(f"{path} is damaged: {error}") from error
    if not isinstance(about, dict) or about.get("format") != _FORMAT:
        raise MaskSparsityError(
            f"{path} is no archive of a slim model (masksparsity.save writes them)"
        )
    about = {"attributes": {}, "frozen": None, "altered": None, **about}
    if any(key not in about or not is_valid(about[key]) for key, is_valid in _HEADER.items()):
        raise MaskSparsityError(f"{path} is damaged: masksparsity.save writes another header")
    return stored, about


def _check(model: nn.Module, stored: dict[str, torch.Tensor]) -> None:
    own = dict(named_tensors(model))
    convolutions = (m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd))
    kernels = {id(m._parameters.get("weight")) for m in convolutions}
    if own.keys() != stored.keys():
        odd = sorted(own.keys() ^ stored.keys())
        raise MaskSparsityError(f"another architecture: {odd[0]} is in one of the two only")
    for name, tensor in stored.items():
        dense = own[name].shape
        fits = len(dense) == tensor.ndim and all(map(operator.le, tensor.shape, dense))
        if not fits or (id(own[name]) in kernels and tensor.shape[2:] != dense[2:]):
            raise MaskSparsityError(
                f"another architecture: {name} is {tuple(tensor.shape)} in the file and "
                f"{tuple(dense)} in the dense model"
            )
        if own[name].requires_grad and not (tensor.is_floating_point() or tensor.is_complex()):
            raise MaskSparsityError(
                f"another architecture: {name} is {tensor.dtype} in the file and trained in the "
                "dense model"
            )


def _groups(model: nn.Module) -> dict[str, int]:
    return {
        name: module.groups
        for name, module in model.named_modules()
        if isinstance(module, (nn.modules.conv._ConvNd, SilentConvolution)) and module.groups != 1
    }
