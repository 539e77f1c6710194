"""Masks as files: `mask.safetensors` holds the bools, `mask.json` beside it says what they are."""

import json
import os
import pickle
import re
from pathlib import Path

import torch
from torch import Tensor

from masksparsity.channels.groups import ChannelGraph
from masksparsity.channels.mask import KeepMask
from masksparsity.errors import MaskSparsityError, RunFailure

from . import atomic, tensors


def save_mask(keep: KeepMask, path: str | Path, model: str | None = None) -> None:
    """Write a mask to `path`.json and `path`.safetensors (a suffix of either kind is dropped).

    The tensors are `group/<name>`, one bool per unit, and `norm/<name>`, the same per BatchNorm
    channel; the JSON holds what people read: selector, budget, cost, and kept of size per group.
    """
    stem = _stem(path)
    file = stem.with_name(f"{stem.name}.safetensors")
    if file.exists() and not any(name.startswith("group/") for name in tensors.read(file)[0]):
        raise RunFailure(f"{file} holds something else than a mask; choose another name for it")
    dense, slim = keep.graph.cost(), keep.graph.cost(keep)
    bools = {f"group/{name}": values for name, values in keep.items()}
    bools |= {f"norm/{name}": values for name, values in keep.by_norm().items()}
    about = {
        "format": "masksparsity mask 1, True = stays",
        "model": model,
        "origin": atomic.plain(keep.origin),
        "pruned_fraction": keep.pruned_fraction,
        "macs": {"dense": dense.macs, "slim": slim.macs},
        "params": {"dense": dense.params, "slim": slim.params},
        "kept": {name: [int(v.sum()), len(v)] for name, v in keep.items()},
    }
    # The bools last: a mask exists once they do.
    atomic.write_json(stem.with_name(f"{stem.name}.json"), about)
    tensors.write(file, bools)


def load_mask(path: str | Path, graph: ChannelGraph) -> KeepMask:
    """Read what `save_mask` wrote, for the same graph.

    Raises:
        MaskSparsityError: a damaged file, or a mask of another model.
    """
    stem = _stem(path)
    file = stem.with_name(f"{stem.name}.safetensors")
    if not file.exists():
        raise MaskSparsityError(f"{file}: no such file; a mask is two, this and {stem.name}.json")
    bools, _ = tensors.read(file)
    groups = {n.removeprefix("group/"): v for n, v in bools.items() if n.startswith("group/")}
    if not groups:
        raise MaskSparsityError(f"{file} holds no mask")
    missing = [group.name for group in graph.prunable if group.name not in groups]
    if missing:
        raise MaskSparsityError(
            f"{file} says nothing of {missing[0]}, a channel group of this model: is it a mask of "
            "another one?"
        )
    try:
        keep = KeepMask(graph, groups)
    except MaskSparsityError as error:
        raise MaskSparsityError(f"{file}: {error}") from error
    about = stem.with_name(f"{stem.name}.json")
    if about.exists():
        try:
            keep.origin = dict(json.loads(about.read_text())["origin"])
        except (ValueError, KeyError, TypeError) as error:
            raise MaskSparsityError(f"{about} is damaged: {error}") from error
    return keep


def from_original(path: str | Path, graph: ChannelGraph, tie: str = "vote") -> KeepMask:
    """Read a mask of the original MaskSparsity project for a ResNet with torchvision's names.

    The file is a `torch.save`d dict: BatchNorm name in that project's ResNet -> bool, True = keep.
    Coupled norms that disagree are settled by `tie`, see `KeepMask.from_norms`.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise MaskSparsityError(f"{path}: no such file") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise MaskSparsityError(
            f"{path} cannot be read as plain tensors ({str(error).splitlines()[0]}); "
            "files that need more than weights_only=True are not opened"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise MaskSparsityError(f"{path}: expected a dict of BatchNorm name -> bool tensor")
    try:
        keep = KeepMask.from_norms(graph, {_rename(n): v for n, v in content.items()}, tie)
    except MaskSparsityError as error:
        raise MaskSparsityError(f"{path}: {error}") from error
    keep.origin = {"selector": "original", "file": Path(path).name}
    return keep


def _rename(name: str) -> str:
    """s1.b2.f.a_bn -> layer1.1.bn1; s1.b1.bn (the projection's) -> layer1.0.downsample.1."""
    if name == "stem.bn":
        return "bn1"
    found = re.fullmatch(r"s(\d+)\.b(\d+)\.(?:f\.([abc])_bn|bn)", name)
    if found is None:
        raise MaskSparsityError(f"{name!r} is no BatchNorm name of the original's ResNets")
    stage, block, letter = found.groups()
    inner = f"bn{'abc'.index(letter) + 1}" if letter else "downsample.1"
    return f"layer{stage}.{int(block) - 1}.{inner}"


def _stem(path: str | Path) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise MaskSparsityError(f"expected the path of a file, got a {type(path).__name__}")
    path = Path(path)
    if not path.name:
        raise MaskSparsityError(f"{str(path)!r} is no name of a file")
    return path.with_suffix("") if path.suffix in (".json", ".safetensors") else path
