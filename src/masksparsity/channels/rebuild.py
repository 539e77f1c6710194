"""A copy of a model with tensors of other sizes: slice them, and fix the modules that hold them."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.weight_norm import WeightNorm

from ..errors import MaskSparsityError
from ..tracing.copies import duplicate
from ..tracing.network import named_tensors
from ..tracing.state import evaluating
from ..tracing.tracer import FOLD
from .silence import SilentConvolution, SilentLinear, SilentNorm, silence
from .verify import Refusal

_COMPUTING = (WeightNorm, BasePruningMethod)
"""Hooks that compute a weight before each forward."""


def kept_part(tensor: Tensor, axes: list[tuple[int, Tensor]]) -> Tensor:
    """The given indices of the given axes, in the tensor's own memory format."""
    out = tensor
    for axis, index in axes:
        out = out.index_select(axis, index.to(tensor.device))
    return formatted(out, tensor)


def formatted(new: Tensor, old: Tensor) -> Tensor:
    """In the memory format of `old`."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}
    if old.ndim in last and not old.is_contiguous():
        return new.contiguous(memory_format=last[old.ndim])
    return new


def rebuild(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of `model` with some parameters and buffers of another size, attributes fixed."""
    memo: dict[int, Tensor] = {}
    for name, old in named_tensors(model):
        if name in tensors:
            new = tensors[name]
            if isinstance(old, nn.Parameter):
                # One without elements, as in a branch that fell silent, gets no gradient, which
                # DistributedDataParallel would wait for.
                new = nn.Parameter(new, requires_grad=old.requires_grad and new.numel() > 0)
            new.__dict__.update(old.__dict__)
            memo[id(old)] = new
    slim = duplicate(model, memo)  # shared modules and tied weights stay shared and tied
    now = dict(named_tensors(slim))
    fixed = [name for name, new in tensors.items() if now[name].shape != new.shape]
    if fixed:
        raise MaskSparsityError(f"{fixed[0]} keeps its size in a copy of the model: protect it")
    pairs = [*zip(model.modules(), slim.modules(), strict=True)]
    names = [name for name, _ in slim.named_modules()]
    # A weight that is read in train mode may take a step, as spectral_norm does.
    with evaluating([module for pair in pairs for module in pair]), torch.no_grad():
        for name, (before, after) in zip(names, pairs, strict=True):
            try:
                _follow(before, after)
            except RuntimeError as error:
                why = f"its weight cannot be made of fewer channels: {error}"
                raise Refusal(why, "", name, f"To prune, {FOLD}") from error
    return slim


def _follow(before: nn.Module, after: nn.Module) -> None:
    """What a module has beside its tensors, of their shapes now."""
    for hook in after._forward_pre_hooks.values():
        if isinstance(hook, _COMPUTING):
            hook(after, ())
    fix = next((ATTRIBUTES[t] for t in type(after).__mro__ if t in ATTRIBUTES), None)
    unmade = isinstance(after, _WITH_WEIGHT) and not hasattr(after, "weight")
    if fix is not None and not unmade:  # by a hook that has not run yet
        fix(before, after)


def _conv(old: Any, new: Any) -> None:
    outputs, inputs = new.weight.shape[:2]
    depthwise = old.groups > 1 and old.weight.shape[1] == 1  # a group per input channel
    if depthwise and old.out_channels:
        new.groups = outputs * old.groups // old.out_channels
        inputs = 1
    new.out_channels, new.in_channels = outputs, inputs * new.groups
    silence(new)


def _conv_transpose(old: Any, new: Any) -> None:
    if old.groups == old.in_channels == old.out_channels:  # depthwise
        new.groups = new.weight.shape[0]
    new.in_channels, new.out_channels = new.weight.shape[0], new.weight.shape[1] * new.groups


def _linear(old: Any, new: Any) -> None:
    new.out_features, new.in_features = new.weight.shape
    silence(new)


def _norm(old: Any, new: Any) -> None:
    tensor = new.weight if new.weight is not None else new.running_mean
    if tensor is not None:
        new.num_features = len(tensor)
    silence(new)


def _group_norm(old: Any, new: Any) -> None:
    if new.weight is not None:
        new.num_groups = old.num_groups * len(new.weight) // old.num_channels
        new.num_channels = len(new.weight)


def _recurrent(old: Any, new: Any) -> None:
    first = "weight_ih_l0" if isinstance(new, nn.RNNBase) else "weight_ih"
    new.input_size = getattr(new, first).shape[1]


def _embedding(old: Any, new: Any) -> None:
    new.num_embeddings, new.embedding_dim = new.weight.shape


def _prelu(old: Any, new: Any) -> None:
    new.num_parameters = len(new.weight)


_WITH_WEIGHT = (nn.modules.conv._ConvNd, nn.Linear)

ATTRIBUTES: dict[type, Callable[[Any, Any], None]] = {
    nn.modules.conv._ConvNd: _conv,
    nn.modules.conv._ConvTransposeNd: _conv_transpose,
    nn.Linear: _linear,
    nn.modules.batchnorm._NormBase: _norm,
    nn.GroupNorm: _group_norm,
    nn.Embedding: _embedding,
    nn.PReLU: _prelu,
    nn.RNNBase: _recurrent,
    nn.RNNCellBase: _recurrent,
    SilentConvolution: _conv,
    SilentLinear: _linear,
    SilentNorm: _norm,
}
"""Module type -> fix(old, new), which sets the attributes that follow from the tensors' shapes."""
