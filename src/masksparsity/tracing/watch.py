"""Events of a forward beside its operations: it enters modules, and values leave PyTorch."""

import contextlib
import functools
import operator
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..errors import MaskSparsityError
from .findings import LOOSE
from .labels import Labels, Reason
from .memory import root
from .network import tensors_in
from .tracer import WRITTEN_TO, Tracer

_WAYS_OUT = (
    "numpy", "__array__", "tolist", "data_ptr", "__dlpack__", "untyped_storage", "apply_", "map_",
    "map2_",
)  # fmt: skip
_WAYS_IN = ("from_numpy", "as_tensor", "asarray", "frombuffer", "from_dlpack")
_LEAVING = frozenset(getattr(Tensor, name) for name in _WAYS_OUT)
LEFT = "values leave PyTorch"
ALONE = threading.RLock()  # hooks and patches are the whole process's: one forward has them


@contextlib.contextmanager
def escapes(tracer: Tracer) -> Iterator[None]:
    """Values that leave PyTorch come back from nowhere: their channels are protected.

    The ways out are patched: a mode that sees every call of a function costs too much. What goes
    another way (a method that was taken out of its class before) is left to `Calls`.
    """

    def leave(method: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        tracer.mattered = tracer.decided = True
        tracer.memory.share(x)
        tracer.memory.overwrite(x)
        tracer.memory.spare(root(x))
        tracer.suspect(x)
        if found := tracer.labels(x):
            tracer.operation = method.__name__
            tracer.expose(found)
            tracer.pin(found, LEFT)
        return method(x, *args, **kwargs)

    def attend(attention: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("scale"):
            tracer.operation = attention.__name__
            for x in (*args, *(kwargs[k] for k in ("query", "key") if k in kwargs))[:2]:
                over = [m for m in tracer.labels(x) if x.ndim - 1 in m.axes]
                tracer.pin(over, "attention divides by the width")
        return attention(*args, **kwargs)

    with ALONE, contextlib.ExitStack() as patches:
        for name in _WAYS_OUT:
            patches.enter_context(_patched(Tensor, name, leave))
        patches.enter_context(_patched(F, "scaled_dot_product_attention", attend))
        yield


@contextlib.contextmanager
def arrivals(tracer: Tracer) -> Iterator[None]:
    """Memory that comes in from outside of PyTorch may be filled by what is no operation."""

    def arrive(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        out = function(*args, **kwargs)
        tracer.suspect(out)
        return out

    with ALONE, contextlib.ExitStack() as patches:
        for name in _WAYS_IN:
            patches.enter_context(_patched(torch, name, arrive))
        yield


@contextlib.contextmanager
def assignments(tracer: Tracer) -> Iterator[None]:
    """Assignments to `.data` are followed, and undone."""
    data: Any = Tensor.data

    def assign(x: Tensor, other: Tensor) -> None:
        """Its labels are those of what it held."""
        if _is_same_memory(x, other):  # `x.data *= mask`: the multiplication has been seen
            return
        found = [*tracer.labels(x), *tracer.labels(other)]
        tracer.operation = ".data ="
        tracer.expose(found)
        tracer.pin(found, "values are taken over from another tensor")
        tracer.memory.blank(x, frozenset())
        tracer.memory.overwrite(x)
        tracer.memory.spare(x)
        data.__set__(x, other)

    with ALONE, contextlib.ExitStack() as patches:
        patches.callback(delattr, Tensor, "data")
        Tensor.data = property(data.__get__, assign)  # type: ignore[assignment]
        yield


@contextlib.contextmanager
def replacements(tracer: Tracer) -> Iterator[None]:
    """Parameters and buffers that forward puts others in the place of: as if it had written into
    them."""
    before = _registered(tracer)
    yield
    if all(map(operator.is_, _registered(tracer), before)):
        return  # as nearly always
    for path, module in tracer.modules.items():
        for key, now in (*module._parameters.items(), *module._buffers.items()):
            was = tracer.tensors.get(f"{path}.{key}" if path else key)
            if was is None or now is None or now is was:
                continue
            tracer.operation, tracer.stack[-1] = f"{key} =", path
            if now.shape == was.shape:
                tracer.rules["copy"](tracer, tracer.operation, (was, now), {}, was, True)
            else:
                tracer.pin(tracer.labels(now), WRITTEN_TO)
    tracer.stack[-1] = ""


def _registered(tracer: Tracer) -> list[Tensor | None]:
    """The parameters and buffers that modules have now, in order."""
    tables = (table for m in tracer.modules.values() for table in (m._parameters, m._buffers))
    return [x for table in tables for x in table.values()]


def _is_same_memory(a: Tensor, b: Tensor) -> bool:
    with torch._C.DisableTorchFunction():  # to ask is no way out
        where = [(_data_ptr(x), x.shape, x.stride(), x.dtype) for x in (a, b)]
    return a.numel() > 0 and where[0] == where[1]


_data_ptr = torch._C.TensorBase.data_ptr


@contextlib.contextmanager
def inference_mode_off() -> Iterator[None]:
    """Code that enters it runs without, as operations would arrive undivided."""
    with ALONE, contextlib.ExitStack() as patches:
        for name in ("__enter__", "__exit__"):
            patches.enter_context(_patched(torch.inference_mode, name, lambda *_: None))
        yield


@contextlib.contextmanager
def norms_alone() -> Iterator[None]:
    """Batch normalisation arrives without the empty tensor that PyTorch makes for cuDNN each time:
    to see that one takes longer than the norm itself."""

    def norm(batch_norm: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        x, *four = args[:5] or (None,)
        plain = len(args) == 9 and not args[5] and x.is_cpu and x.numel()
        # Of the lengths of scale, shift, mean and variance the operation itself does not ask.
        if plain and [getattr(t, "shape", None) for t in four] == [x.shape[1:2]] * 4:
            return torch.native_batch_norm(*args[:8])[0]
        return batch_norm(*args, **kwargs)

    with ALONE, _patched(torch, "batch_norm", norm):
        yield


@contextlib.contextmanager
def _patched(owner: Any, name: str, around: Callable[..., Any]) -> Iterator[None]:
    inherited, old = name not in vars(owner), getattr(owner, name)

    def new(*args: Any, **kwargs: Any) -> Any:
        return around(old, *args, **kwargs)

    setattr(owner, name, functools.update_wrapper(new, old))
    try:
        yield
    finally:
        if inherited:
            delattr(owner, name)
        else:
            setattr(owner, name, old)


class Calls(TorchFunctionMode):
    """Every call of a function of PyTorch, for the proof: it learns what flowed into the one that
    raised, and which values left."""

    def __init__(self, tracer: Tracer):
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _LEAVING:
            reason = Reason(LEFT, func.__name__, self.tracer.module)
            self.tracer.memory.overwrite(args[0])
            self.tracer.memory.spare(root(args[0]))
            self.tracer.suspect(args[0])
            self.tracer.left += [(m.ids, reason) for m in self.tracer.labels(args[0])]
        try:
            return func(*args, **kwargs)
        except Exception as error:  # `reshape` finds out before it becomes an operation
            self.tracer.blame(error, (args, kwargs))
            raise


@contextlib.contextmanager
def module_stack(tracer: Tracer) -> Iterator[None]:
    """Keeps the path of the running module on `tracer.stack`.

    Raises:
        MaskSparsityError: modules ran in another thread, where no operation is seen.
    """
    stack, paths, here = tracer.stack, tracer.paths, threading.get_ident()
    elsewhere: list[str] = []
    call = nn.Module.__call__

    def follow(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != here:
            elsewhere.extend(paths[key] for key in [id(module)] if key in paths)
            return call(module, *args, **kwargs)
        stack.append(paths.get(id(module), stack[-1]))
        tracer.failed = None
        try:
            out = call(module, *args, **kwargs)
            if id(module) in tracer.silent:
                _say(tracer, module, next(tensors_in((args, kwargs))), out)
            return out
        except Exception:
            if tracer.failed is None:
                tracer.failed = stack[-1]
            raise
        finally:
            stack.pop()

    # Hooks on all modules would do, but send every call the long way round.
    nn.Module.__call__ = follow  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__ = call  # type: ignore[method-assign]
    if elsewhere:
        raise MaskSparsityError(
            f"{elsewhere[0]} runs in a thread of its own, where its operations cannot be seen: to "
            "prune, run it in that of forward"
        )


def _say(tracer: Tracer, layer: Any, x: Tensor, out: Tensor) -> None:
    """A layer that has lost all channels on one side has given `out` for `x`: if none is left to
    come out, one of those that are gone stands for them, so that what reads it is told from what
    reads others."""
    if out is x:
        return  # a norm
    if hasattr(x, LOOSE):
        setattr(out, LOOSE, tracer.loose)
    lost = tracer.silent[id(layer)]
    if lost is not None:
        axis = out.ndim + 1 - layer.weight.ndim
        tracer.set(out, [Labels(tracer.along(lost, axis, out.ndim), frozenset({axis}))])
