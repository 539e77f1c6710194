"""Trees of tensors and plain values in one safetensors file: nothing is pickled.

A tree is what `state_dict()` returns: dicts and lists of tensors, numbers, strings and None. The
tensors are stored under their path in the tree, the rest as JSON in the file's metadata; one file,
so that a checkpoint is written whole or not at all.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from masksparsity.errors import MaskSparsityError
from masksparsity.files import tensors

_KEY = "masksparsity.checkpoint"


def write(path: Path, tree: Any) -> None:
    """Write `tree` to `path`, whole or not at all."""
    found: dict[str, Tensor] = {}
    plain = _split(tree, "", found)
    tensors.write(path, found, {_KEY: json.dumps(plain)})


def read(path: Path) -> Any:
    """Read the tree that `write` put at `path`, its tensors on the CPU."""
    try:
        found, words = tensors.read(path)
        return _join(json.loads(words[_KEY]), found)
    except (MaskSparsityError, KeyError, ValueError) as error:
        raise MaskSparsityError(
            f"{path} is not a readable checkpoint ({error}). Remove it to start this stage anew."
        ) from error


def _split(tree: Any, path: str, found: dict[str, Tensor]) -> Any:
    if isinstance(tree, Tensor):
        found[path] = tree
        return {"tensor": path}
    if isinstance(tree, dict):
        return {"dict": [[key, _split(tree[key], f"{path}/{key}", found)] for key in tree]}
    if isinstance(tree, list | tuple):
        return {"list": [_split(item, f"{path}/{i}", found) for i, item in enumerate(tree)]}
    return tree


def _join(plain: Any, found: Mapping[str, Tensor]) -> Any:
    if not isinstance(plain, dict):
        return plain
    (kind, content), *_ = plain.items()
    if kind == "tensor":
        return found[content]
    if kind == "dict":
        return {key: _join(value, found) for key, value in content}
    return [_join(item, found) for item in content]


def optimizer_state(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]
) -> dict[str, dict[str, Any]]:
    """The optimizer's state by parameter name; its settings belong to the config."""
    return {names[p]: dict(state) for p, state in optimizer.state.items()}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    names: Mapping[Tensor, str],
    saved: dict[str, dict[str, Any]],
) -> None:
    """Give `optimizer` back what `optimizer_state` took, in the layout of each parameter."""
    for parameter, name in names.items():
        for key, value in saved.get(name, {}).items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                value = torch.empty_like(parameter).copy_(value)
            optimizer.state[parameter][key] = value
