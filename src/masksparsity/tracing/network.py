"""A user's network and its inputs: named, unwrapped, and whose code it is."""

import functools
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Set, ValuesView
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import MaskSparsityError


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, each once, in state-dict order."""
    return tensors_of(model.named_modules())


def tensors_of(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of named modules, each once, under the first of its names."""
    seen: set[int] = set()
    for prefix, module in modules:
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield f"{prefix}.{name}" if prefix else name, tensor


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside data-parallel wrappers and `torch.compile`, which share its tensors."""
    if not isinstance(model, nn.Module):
        raise MaskSparsityError(f"expected an nn.Module, got a {type(model).__name__}")
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        else:
            return model


def require_values(model: nn.Module) -> None:
    """Raises MaskSparsityError if a parameter or buffer is on the meta device."""
    if empty := next((name for name, tensor in named_tensors(model) if tensor.is_meta), None):
        raise MaskSparsityError(
            f"{empty} is on the meta device and has no values: model.to_empty(device=...), then "
            "load its weights; only trace, costs and prune need none"
        )


def arguments(example_inputs: Any) -> tuple[tuple, dict]:
    """A tensor, a tuple or list of positional inputs, or a dict of keyword inputs. Tensors of a
    class that only carries something along, as image libraries have them, as tensors."""
    example_inputs = tree_map(_plain, example_inputs)
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    if not isinstance(example_inputs, Tensor):
        raise MaskSparsityError(
            f"example_inputs: a tensor, a tuple or a dict, not {type(example_inputs).__name__}"
        )
    return (example_inputs,), {}


def copied(inputs: Any) -> Any:
    """For a forward that may write to them."""
    return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, inputs)


def noisy(inputs: Any) -> Any:
    """Other ones of the same shapes: what is constant, or alike by chance, would hide something."""
    generator = torch.Generator().manual_seed(0)

    def disturbed(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        return x + torch.randn(x.shape, generator=generator).to(x)

    return tree_map(disturbed, inputs)


def _plain(x: Any) -> Any:
    carries = isinstance(x, Tensor) and type(x).__torch_dispatch__ is Tensor.__torch_dispatch__
    return x.as_subclass(Tensor) if carries and type(x) not in (Tensor, nn.Parameter) else x


def like(example: tuple[tuple, dict], model: nn.Module) -> tuple[tuple, dict]:
    """The traced inputs, in the dtype and on the device that the model has now."""
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    if first is None:
        return example

    def move(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.to(first.device, first.dtype if x.is_floating_point() else x.dtype)

    return tree_map(move, example)


def of_users(model: nn.Module) -> bool:
    """Whether code that runs in forward is not a library's: it may look at values, and do other
    things in train mode, such as return features. That of libraries asks for the mode for the sake
    of dropout, and of auxiliary heads, whose parameters tell."""
    modules = [*model.modules()]
    states = [vars(m) for m in _but_plain(modules)]
    states = [s for s in states if not _FUNCTIONS.isdisjoint(map(type, s.values()))]
    return (
        any(not kind.__module__.startswith(LIBRARIES) for kind in {type(m) for m in modules})
        or nn.modules.module._has_any_global_hook()
        or any(m._forward_hooks or m._forward_pre_hooks for m in modules)
        or any(_is_users(vars(m)["forward"]) for m in modules if "forward" in vars(m))
        or any(_is_users(v) for s in states for v in s.values() if type(v) in _FUNCTIONS)
    )


def keepers(modules: Collection[nn.Module], theirs: bool) -> list[nn.Module]:
    """Those in which forward may keep something: all but PyTorch's plain layers, unless code of
    users runs (`theirs`), which may write into any."""
    return [*modules] if theirs else _but_plain(modules)


def _but_plain(modules: Collection[nn.Module]) -> list[nn.Module]:
    plain = {kind for kind in {*map(type, modules)} if kind.__module__ in _LAYERS}
    return [m for m in modules if type(m) not in plain]


_LAYERS = frozenset(
    f"torch.nn.modules.{name}"
    for name in ("activation", "batchnorm", "container", "conv", "dropout", "linear", "pooling")
)
LIBRARIES = ("torch.nn.", "torchvision.", "timm.", "masksparsity.")  # scripts are users' code
_FUNCTIONS = frozenset({FunctionType, MethodType, functools.partial})


def _is_users(function: Any) -> bool:
    """Whether no library has written it, as with an activation that a module keeps."""
    while isinstance(function, functools.partial):
        function = function.func
    return not (getattr(function, "__module__", None) or "torch.nn.").startswith(LIBRARIES)


def batch_size(args: tuple, kwargs: dict) -> int:
    """The length of the first axis of the first input tensor that has another one."""
    length = next((x.shape[0] for x in tensors_in((args, kwargs)) if x.ndim > 1), 1)
    if not length:
        raise MaskSparsityError("example_inputs: there is no example in them")
    return length


def at_least_two(x: Any) -> Any:
    """A batch of one, doubled: in train mode a norm needs two values."""
    return torch.cat([x, x]) if isinstance(x, Tensor) and x.ndim and len(x) == 1 else x


_CONTAINERS = (Mapping, list, tuple, deque, Set, ValuesView)


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Also those inside what PyTorch takes for leaves: subclasses of containers, dataclasses and
    plain objects."""
    seen: set[int] = set()
    todo = [tree]
    while todo:
        for leaf in tree_leaves(todo.pop()):
            if isinstance(leaf, Tensor):
                yield leaf
            elif not isinstance(leaf, (type, nn.Module)) and id(leaf) not in seen:
                seen.add(id(leaf))
                if isinstance(leaf, _CONTAINERS):
                    todo.append([*leaf.values()] if isinstance(leaf, Mapping) else [*leaf])
                names = {*getattr(leaf, "__dict__", ()), *getattr(type(leaf), "__slots__", ())}
                todo.append([getattr(leaf, name, None) for name in sorted(names)])
