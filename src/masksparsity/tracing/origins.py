"""Where tensors come from: the proof tells by it a choice between tensors of the same channels.

A number stands for the way a tensor was made: from which others, by which operations. What only
moves values passes it on, as a layout may be copied for one width and not for another. What a layer
of PyTorch returns is told by the layer alone, as one that has lost all channels computes nothing.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from .network import tensors_in

ORIGIN = "_masksparsity_origin"
MOVES = frozenset(
    {
        "alias", "clone", "detach", "expand", "permute", "select", "slice", "squeeze", "t",
        "transpose", "unsqueeze", "view", "_reshape_alias", "_to_copy", "_unsafe_view",
    }
)  # fmt: skip
"""What of these matters for values is recorded as numbers."""


class Origins:
    """Of the tensors of one run; `names`: of parameters and buffers, by id."""

    def __init__(self, names: Mapping[int, str]):
        self.names = names
        self.token = object()
        self.calls: Counter[str] = Counter()

    def of(self, tensors: Iterable[Tensor]) -> tuple[int, ...]:
        return tuple([self._of(x) for x in tensors])

    def _of(self, x: Tensor) -> int:
        name = self.names.get(id(x))
        if name is not None:
            return hash(name)
        whose, origin = getattr(x, ORIGIN, (None, 0))
        return origin if whose is self.token else 0

    def give(self, tensors: Iterable[Tensor], *origin: Any) -> None:
        """They come, in this order, from what `origin` tells."""
        for k, x in enumerate(tensors):
            if id(x) not in self.names:
                setattr(x, ORIGIN, (self.token, hash((*origin, k, x.dtype))))

    def follow(self, operation: str, read: tuple[int, ...], args: Any, out: Any) -> None:
        """An operation has made `out` of what comes from `read`."""
        if operation in MOVES and isinstance(out, Tensor) and out.dtype == args[0].dtype:
            if id(out) not in self.names:
                setattr(out, ORIGIN, (self.token, read[0]))
        else:
            self.give(tensors_in(out), operation, read)

    def left(self, module: nn.Module, path: str, out: Any) -> None:
        """A module has returned `out`."""
        if not module._modules and type(module).__module__.startswith("torch.nn."):
            self.calls[path] += 1
            self.give(tensors_in(out), path, self.calls[path])
