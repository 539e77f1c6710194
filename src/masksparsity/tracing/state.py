"""Runs that leave a user's network as it was: mode, attributes, buffers, random state."""

import contextlib
import inspect
import operator
import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .network import require_values, tensors_of


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """While copies of it run: their hooks may hold it."""
    with unchanged(model.modules()), evaluating(model.modules()):
        yield


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Eval mode for runs of the model itself: what they write into it is undone.

    Raises:
        MaskSparsityError: it has no values to run with.
    """
    require_values(model)
    merges = switches(model.modules())
    written = [*model.buffers(), *(model.parameters() if merges else ())]
    held = [(x, x.detach().clone()) for x in written]
    try:
        with unchanged(model.modules()), in_mode(model.modules()):
            if merges:
                model.train(False)
            yield
    finally:
        with torch.no_grad():
            for x, before in held:
                if not torch.equal(x, before):
                    x.copy_(before)


def switches(modules: Iterable[nn.Module]) -> bool:
    """Whether to set the mode does more in some module, as to merge weights; and not something
    else altogether in another, as to train."""
    ways = {kind.train for kind in {type(m) for m in modules}} - {nn.Module.train}
    return bool(ways) and all("mode" in inspect.signature(way).parameters for way in ways)


def made_anew(model: nn.Module) -> nn.Module:
    """`model`; what its own `train` makes of weights, and keeps, it has made of those of now."""
    modules = [*model.modules()]
    if switches(modules) and kept_by(modules):
        modes = [module.training for module in modules]
        model.train(not model.training)
        for module, mode in zip(modules, modes, strict=True):  # outer ones first
            if module.training is not mode:
                module.train(mode)
    return model


def kept_by(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Tensors in attributes of modules, and in containers there, that are not registered."""
    return [x for x in _values_of(modules)[0] if isinstance(x, Tensor)]


def _values_of(modules: Iterable[nn.Module]) -> tuple[list[Any], list[Any]]:
    """Values of modules' own attributes, and in containers there; and these containers."""
    states = map(vars, modules)
    values = [v for s in states for k, v in s.items() if k not in _OWN and type(v) not in _PLAIN]
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


@contextlib.contextmanager
def unchanged(modules: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """What forward writes into its modules (a cache, a counter, a generator) is undone. Gives the
    tensors that they hold."""
    modules = [*modules]
    kept = [(state, state.copy()) for state in map(vars, modules)]
    tables = (s.get(k) for s in map(vars, modules) for k in ("_parameters", "_buffers"))
    registered = [held for held in tables if isinstance(held, dict)]  # of scripts they are not
    values, containers = _values_of(modules)
    containers = registered + [v for v in containers if not isinstance(v, tuple)]
    inner = [(v, _shallow(v)) for v in containers]
    drawn = [(x, x.get_state()) for x in values if type(x) is torch.Generator]
    values += [x for held in registered for x in held.values()]
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
