"""Weights from a file, all of them or none."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from masksparsity.errors import MaskSparsityError

# Where training scripts keep the state dict.
_NESTS = ("state_dict", "model_state_dict", "model_state", "model", "net")


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Copy the weights in `path` into `model`, in place and strictly.

    Reads safetensors, or a torch file of plain tensors: a state dict, or one nested as training
    scripts do, with or without the prefix of data-parallel or compiled models. Files older than
    BatchNorm's `num_batches_tracked` need not have it.

    Raises:
        MaskSparsityError: the file is missing, damaged, not finite, needs to run code, or belongs
            to another architecture. The model is then unchanged.
    """
    path = Path(path)
    state = _state_dict(_read(path), path)
    own = model.state_dict(keep_vars=True)
    # Our archives hold them, too, and a tensor of several names once.
    extra = {n: b for n, b in model.named_buffers(remove_duplicate=False) if n not in own}
    for name, value in own.items():
        for other in own if name not in state else ():
            if own[other] is value and other in state:
                state[name] = state[other]
    complaints = {
        "missing": [
            name for name in own if name not in state and not name.endswith(".num_batches_tracked")
        ],
        "unexpected": [name for name in state if name not in own and name not in extra],
        "other shape": [
            f"{name} {list(state[name].shape)} for {list(value.shape)}"
            for name, value in {**own, **extra}.items()
            if name in state and state[name].shape != value.shape
        ],
    }
    if any(complaints.values()):
        listed = "; ".join(
            f"{len(names)} {kind}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
            for kind, names in complaints.items()
            if names
        )
        raise MaskSparsityError(
            f"{path} holds the weights of another architecture than this {type(model).__name__}: "
            f"{listed}"
        )
    model.load_state_dict({name: value for name, value in state.items() if name in own})
    for name in extra.keys() & state.keys():
        extra[name].copy_(state[name])


def _read(path: Path) -> object:
    if not path.is_file():
        raise MaskSparsityError(f"{path}: no such weights file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols; the file is read or it is not
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on a damaged file the readers raise anything
        # torch's own text goes on to recommend weights_only=False: take the reason alone.
        if needed := re.search(r"nsupported (?:global: )?GLOBAL (\S+)", str(error)):
            raise MaskSparsityError(
                f"{path} was refused: to be read it must run {needed[1]}, and a weights file may "
                "not run code; save the state_dict() alone, best as safetensors"
            ) from None
        raise MaskSparsityError(
            f"{path} is not a weights file, or is damaged or cut short ({type(error).__name__})"
        ) from error


def _state_dict(payload: object, path: Path) -> dict[str, Tensor]:
    for nest in _NESTS:
        if isinstance(payload, Mapping) and isinstance(payload.get(nest), Mapping):
            payload = payload[nest]
    if not isinstance(payload, Mapping) or not payload:
        raise MaskSparsityError(f"{path} holds no state dict but {type(payload).__name__}")
    for name, value in payload.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise MaskSparsityError(
                f"{path} holds no state dict: {name!r} is a {type(value).__name__}, not a tensor"
            )
        if value.is_floating_point() and not value.isfinite().all():
            raise MaskSparsityError(f"{path}: {name} is not finite everywhere")
    for prefix in ("_orig_mod.", "module.", "_orig_mod."):
        if all(name.startswith(prefix) for name in payload):
            payload = {name.removeprefix(prefix): value for name, value in payload.items()}
    return dict(payload)
