"""What a forward does beside its operations: it enters modules, and values leave PyTorch."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .trace import Tracer

_DATA: Any = Tensor.data  # the attribute: what reads and sets it


class Escapes(TorchFunctionMode):
    """Values that leave PyTorch come back from nowhere: their channels are protected."""

    FUNCTIONS = frozenset(
        getattr(Tensor, name)
        for name in ("numpy", "__array__", "tolist", "data_ptr", "__dlpack__", "untyped_storage")
    )
    ALIASES = frozenset((_DATA.__get__, _DATA.__set__, Tensor.detach))

    def __init__(self, tracer: Tracer):
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention and not kwargs.get("scale"):
            self.tracer.operation = func.__name__
            for x in args[:2]:
                over = [m for m in self.tracer.labels(x) if x.ndim - 1 in m.axes]
                self.tracer.pin(over, "attention divides by the width")
        if func in self.ALIASES:  # through which the model's own tensor may be written to
            self.tracer.spare(args[0])
        if func == _DATA.__set__:
            self.tracer.operation = ".data ="
            self.tracer.unknown(args, {}, ())
            self.tracer.blank(args[0], False)
        if func in self.FUNCTIONS:
            self.tracer.operation = func.__name__
            found = self.tracer.labels(args[0])
            self.tracer.expose(found)
            self.tracer.pin(found, "values leave PyTorch")
        try:
            return func(*args, **kwargs)
        except Exception as error:  # `reshape` finds out before it becomes an operation
            self.tracer.blame(error, (args, kwargs))
            raise


@contextlib.contextmanager
def module_stack(tracer: Tracer) -> Iterator[None]:
    def enter(module: nn.Module, args: Any) -> None:
        tracer.stack.append(tracer.paths.get(id(module), tracer.module))
        tracer.failed = None

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        path = tracer.stack.pop()
        if out is None and tracer.failed is None:  # how `always_call` tells of an exception
            tracer.failed = path

    hooks = (
        nn.modules.module.register_module_forward_pre_hook(enter),
        nn.modules.module.register_module_forward_hook(leave, always_call=True),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
