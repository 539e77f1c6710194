"""A user's network and its inputs: named, copied, run, and left as they were."""

import contextlib
import copy
import functools
import operator
import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import MaskSparsityError
from .findings import extents


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


def duplicate(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy, also of a model that keeps tensors with a history, such as caches. Hooks and
    functions in it that hold the model hold the copy there."""
    apart, memo = memo is None, dict(memo or {})
    for tensor in kept_by(model.modules()):
        if not tensor.is_leaf:
            memo.setdefault(id(tensor), tensor.detach().clone())
    for buffer in model.buffers():
        if extents(buffer) != [*buffer.shape]:  # expanded: one value cannot become zero alone
            memo.setdefault(id(buffer), buffer.clone(memory_format=torch.contiguous_format))
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise MaskSparsityError(
            f"the model cannot be copied, as pruning has to: {type(error).__name__}: {error}"
        ) from error
    own = {id(tensor) for _, tensor in named_tensors(model)} if apart else ()
    if shared := next((name for name, x in named_tensors(copied) if id(x) in own), None):
        raise MaskSparsityError(
            f"the model cannot be copied, as pruning has to: a copy has the same {shared}"
        )
    for module in copied.modules():
        if hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable"):
            del module.forward  # compiled for the model
        tables: tuple[Any, ...] = (vars(module), module._forward_hooks, module._forward_pre_hooks)
        for held in tables:
            held.update({k: _rebound(v, memo) for k, v in held.items() if type(v) is FunctionType})
    return copied


def _rebound(held: Any, memo: Mapping[int, Any]) -> Any:
    """What a copied function has to hold: the copy of what the function held, if there is one."""
    if id(held) in memo:
        return memo[id(held)]
    if type(held) is MethodType and id(held.__self__) in memo:
        return MethodType(held.__func__, memo[id(held.__self__)])
    if type(held) is not FunctionType:
        return held
    try:
        closed = [cell.cell_contents for cell in held.__closure__ or ()]
    except ValueError:  # one is empty
        return held
    before = [*closed, *(held.__defaults__ or ())]
    now = [x if x is held else _rebound(x, memo) for x in before]
    if all(map(operator.is_, before, now)):
        return held
    cells, defaults = tuple(map(CellType, now[: len(closed)])), tuple(now[len(closed) :])
    rebound = FunctionType(held.__code__, held.__globals__, held.__name__, defaults, cells)
    rebound.__kwdefaults__ = held.__kwdefaults__
    return functools.update_wrapper(rebound, held)


@contextlib.contextmanager
def shadow(model: nn.Module) -> Iterator[nn.Module]:
    """A copy that shares parameters and buffers, for users' code to run on: what it keeps in
    objects, generators and arrays is left alone. Of libraries' code, which keeps little, and of
    what cannot be copied, the model itself."""
    if not of_users(model):
        yield model
        return
    try:
        copied = duplicate(model, {id(tensor): tensor for _, tensor in named_tensors(model)})
    except Exception:
        copied = model
    with undisturbed(model):
        yield copied


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """While copies of it run: their hooks may hold it."""
    with unchanged(model.modules()), evaluating(model.modules()):
        yield


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Eval mode for runs of the model itself: what they write into it is undone."""
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    try:
        with unchanged(model.modules()), in_mode(model.modules()):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


def kept_by(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Tensors in attributes of modules, and in containers there, that are not registered."""
    return [x for x in _values_of(modules, _OWN)[0] if isinstance(x, Tensor)]


def _values_of(modules: Iterable[nn.Module], but: frozenset[str]) -> tuple[list[Any], list[Any]]:
    """Values of modules' attributes but some, and in containers there; and these containers."""
    states = map(vars, modules)
    values = [v for s in states for k, v in s.items() if k not in but and type(v) not in _PLAIN]
    found: dict[int, Any] = {}
    _containers(values, found)
    containers = [*found.values()]
    return values + [x for container in containers for x in _items(container)], containers


def _containers(values: Iterable[Any], found: dict[int, Any]) -> None:
    """Add containers to `found`, by their ids, and those in them; some hold themselves."""
    for value in values:
        if issubclass(type(value), _CONTAINERS) and id(value) not in found:
            if type(value) is tuple and _PLAIN.issuperset(map(type, value)):
                continue  # sizes, most of all
            found[id(value)] = value
            _containers(_items(value), found)


_PLAIN = frozenset({bool, int, float, str, type(None)})
_CONTAINERS = (dict, list, tuple, set, deque)  # `issubclass`, as `isinstance` takes its time


def _items(container: Any) -> Iterable[Any]:
    return container.values() if isinstance(container, dict) else container


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
    return (
        any(not kind.__module__.startswith(LIBRARIES) for kind in {type(m) for m in modules})
        or nn.modules.module._has_any_global_hook()
        or any(m._forward_hooks or m._forward_pre_hooks for m in modules)
        or any(_is_users(vars(m)["forward"]) for m in modules if "forward" in vars(m))
        or any(_is_users(v) for m in modules for v in vars(m).values() if type(v) in _FUNCTIONS)
    )


LIBRARIES = ("torch.nn.", "torchvision.", "timm.", "masksparsity.")  # scripts are users' code
_FUNCTIONS = (FunctionType, MethodType, functools.partial)


def _is_users(function: Any) -> bool:
    """Whether no library has written it, as with an activation that a module keeps."""
    while isinstance(function, functools.partial):
        function = function.func
    return not (getattr(function, "__module__", None) or "torch.nn.").startswith(LIBRARIES)


def batch_size(args: tuple, kwargs: dict) -> int:
    """The length of the first axis of the first input tensor that has another one."""
    lengths = (x.shape[0] for x in tensors_in((args, kwargs)) if x.ndim > 1)
    return max(1, next(lengths, 1))


def at_least_two(x: Any) -> Any:
    """A batch of one, doubled: in train mode a norm needs two values."""
    return torch.cat([x, x]) if isinstance(x, Tensor) and x.ndim and len(x) == 1 else x


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Also those inside dataclasses and plain objects, which PyTorch takes for leaves."""
    seen: set[int] = set()
    todo = [tree]
    while todo:
        for leaf in tree_leaves(todo.pop()):
            if isinstance(leaf, Tensor):
                yield leaf
            elif not isinstance(leaf, (type, nn.Module)) and id(leaf) not in seen:
                seen.add(id(leaf))
                names = {*getattr(leaf, "__dict__", ()), *getattr(type(leaf), "__slots__", ())}
                todo.append([getattr(leaf, name, None) for name in sorted(names)])


@contextlib.contextmanager
def evaluating(
    modules: Iterable[nn.Module], training: bool = False, seed: int = 0
) -> Iterator[Callable[[bool], bool]]:
    """Eval (or train) mode; modes and random state are restored afterwards.

    Gives a function that tells whether Python may have taken a way by random numbers: by its own
    or NumPy's, or by PyTorch's if values of tensors came to it (on a GPU, some may always have been
    drawn).
    """
    modules = list(modules)
    tensors = tensors_of(("", m) for m in modules) if torch.cuda.is_initialized() else ()
    devices = {t.device.index for _, t in tensors if t.is_cuda}
    with _seeded(devices, seed) as drawn, in_mode(modules, training):
        yield drawn


@contextlib.contextmanager
def in_mode(modules: Iterable[nn.Module], training: bool = False) -> Iterator[None]:
    """Eval (or train) mode; modes are restored afterwards."""
    modes = [(module, module.training) for module in modules]
    try:
        _set_modes((module, training) for module, _ in modes)
        yield
    finally:
        _set_modes(modes)


@contextlib.contextmanager
def _seeded(devices: set[int], seed: int) -> Iterator[Callable[[bool], bool]]:
    """Code that skips layers at random takes the same way each time; what the generators of
    PyTorch, Python and NumPy would have said next, they say afterwards."""
    numpy = getattr(sys.modules.get("numpy"), "random", None)
    with torch.random.fork_rng(devices=devices), contextlib.ExitStack() as states:
        states.callback(random.setstate, random.getstate())
        random.seed(seed)
        if numpy is not None:
            states.callback(numpy.set_state, numpy.get_state())
            numpy.seed(seed)
        torch.default_generator.manual_seed(seed)
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(seed)

        begun = [torch.get_rng_state(), random.getstate(), _position(numpy)]

        def drawn(decided: bool) -> bool:
            if begun[1:] != [random.getstate(), _position(numpy)]:
                return True
            return decided and (bool(devices) or not torch.equal(begun[0], torch.get_rng_state()))

        yield drawn


def _position(numpy: Any) -> Any:
    """How far NumPy's generator has come since it was seeded."""
    if numpy is None:
        return None
    _, key, *position = numpy.get_state()
    return key.tobytes(), position


def _set_modes(modes: Iterable[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        if module.training is not training:
            # A module's own way looks for parameters first.
            plain = type(module).__setattr__ is nn.Module.__setattr__
            (object.__setattr__ if plain else setattr)(module, "training", training)


def eager() -> contextlib.AbstractContextManager:
    """Compiled parts of a model run as they were written."""
    compiler = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if compiler else contextlib.nullcontext()


@contextlib.contextmanager
def fused_attention_off() -> Iterator[None]:
    """Attention and encoder layers run as the operations that they are made of."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


_OWN = frozenset(vars(nn.Module()))  # what every module has
_FIXED = _OWN - {"_parameters", "_buffers"}  # and no forward writes


@contextlib.contextmanager
def unchanged(modules: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """What forward writes into its modules (a cache, a counter, a generator) is undone. Gives the
    tensors that they hold."""
    modules = [*modules]
    kept = [(state, state.copy()) for state in map(vars, modules)]
    values, containers = _values_of(modules, _FIXED)
    inner = [(v, _shallow(v)) for v in containers if not isinstance(v, tuple)]
    drawn = [(x, x.get_state()) for x in values if type(x) is torch.Generator]
    tensors = [x for x in values if isinstance(x, Tensor)]
    told = [(x, x.requires_grad, x.grad, vars(x).copy()) for x in tensors if x.is_leaf]
    try:
        yield tensors
    finally:
        for x, learns, grad, attributes in told:
            if x.requires_grad is not learns:
                x.requires_grad_(learns)
            if x.grad is not grad:
                x.grad = grad
            if vars(x):
                vars(x).clear()
                vars(x).update(attributes)
        for generator, begun in drawn:
            generator.set_state(begun)
        for state, before in kept:
            state.update(before)  # sooner done than compared
            for key in state.keys() - before.keys() if len(state) > len(before) else ():
                del state[key]
        for value, was in inner:
            if type(value) not in _BUILTIN and _same(value, was):
                continue  # it may refuse to be written to, as a frozen config does
            value.clear()
            value.extend(was) if isinstance(value, (list, deque)) else value.update(was)


_BUILTIN = frozenset({dict, OrderedDict, list, set, deque})


def _shallow(container: Any) -> Any:
    return dict(container) if isinstance(container, dict) else [*container]


def _same(now: Any, was: Any) -> bool:
    """Whether these are the very same items."""
    parts = [(now, was)] + ([(now.values(), was.values())] if isinstance(now, dict) else [])
    return len(now) == len(was) and all(all(map(operator.is_, a, b)) for a, b in parts)
