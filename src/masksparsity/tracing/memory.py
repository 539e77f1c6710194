"""The memory of tensors: who shares it, what is zero in it, what has to be put back."""

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

EVERY, _NONE = frozenset(range(-64, 0)), frozenset[int]()  # axes, of which tensors have 64 at most
_UNKNOWN: tuple[Any, frozenset[int]] = (None, _NONE)
VIEWED, BLANK = "_masksparsity_viewed", "_masksparsity_blank"


@dataclass
class Canvas:
    """A tensor that forward made from sizes alone, and what has been written to it."""

    zero: bool
    """Whether it is zero where nothing was written."""
    views: list[weakref.ref] = field(default_factory=list)
    """Others that show its memory."""
    axes: frozenset[int] = frozenset()
    """Those along which channels were written."""
    ids: Tensor | None = None
    """Like those of `Labels`; -1 where no channel was written."""
    clean: bool = True
    covered: Tensor | None = None
    """bool, of its shape, if it is not zero: where it was written to."""


class Memory:
    """Who sees which memory, what is still as forward made it, and what was the model's own."""

    def __init__(self, names: Mapping[int, str], keeps: Callable[[], list[Tensor]]):
        self.names = names
        self.keeps = keeps  # what modules keep now
        self.token = object()  # what an earlier trace left behind is not believed
        self.canvases = WeakIdKeyDictionary()  # tensor -> Canvas
        self.trusted: list[tuple[weakref.ref, Tensor]] = []  # to be zero; the ids that count on it
        self.shared: list[weakref.ref[Tensor]] = []
        self.kept: list[Tensor] = []  # before forward, in attributes of modules
        self.owned: set[int] = set()  # ids of what is the model's own, or an input
        self.spared: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def begin(self, kept: list[Tensor], inputs: list[Tensor]) -> None:
        """A forward begins: with what modules keep in attributes, and what it is given."""
        self.kept = kept
        self.owned = {id(root(x)) for x in (*kept, *inputs)} | self.names.keys()

    def share(self, tensor: Tensor, views: Iterable[Tensor] = ()) -> None:
        """Others see its memory from now on: what is written to it has to fit all of them."""
        setattr(tensor, VIEWED, True)
        self.shared.append(weakref.ref(tensor))
        self.blank(tensor, _NONE)
        if self.canvases and (canvas := self.canvases.get(root(tensor))):
            canvas.views += map(weakref.ref, views)

    def blank(self, tensor: Tensor, axes: frozenset[int] = EVERY) -> None:
        """A tensor of one value, or of noise, has channels that are alike, along whatever axis; one
        that was made of what is expanded has them along some `axes`, counted from the last."""
        if axes != self.alike(tensor) and id(tensor) not in self.names:
            setattr(tensor, BLANK, (self.token, axes))

    def alike(self, tensor: Tensor) -> frozenset[int]:
        """The axes along which it is blank."""
        if self.canvases and tensor._base is not None and self.is_untouched(tensor):
            return EVERY  # a view of what nothing was written to
        whose, axes = getattr(tensor, BLANK, _UNKNOWN)
        return axes if whose is self.token else _NONE

    def is_blank(self, tensor: Tensor) -> bool:
        """Whether all its channels are alike, as those of a constant are."""
        return self.alike(tensor) is EVERY

    def varies(self, tensor: Tensor, axis: int) -> bool:
        """Whether values differ along an axis; those before its first are of length 1."""
        if axis < 0 or tensor.shape[axis] == 1:
            return False
        if tensor.layout == torch.strided and not tensor.stride(axis):
            return False  # expanded: one value, whatever its length
        return axis - tensor.ndim not in self.alike(tensor)

    def made_of(self, tensors: list[Tensor], out: Tensor) -> None:
        """What is made of these, element by element, is blank along the axes where they are."""
        every = bool(tensors) and all(map(self.is_blank, tensors))
        axes = range(-out.ndim if tensors else 0, 0)
        self.blank(out, EVERY if every else frozenset(
            [a for a in axes if not any(self.varies(x, a + x.ndim) for x in tensors)]
        ))  # fmt: skip

    def make(self, tensor: Tensor, zero: bool) -> None:
        """Forward makes it from sizes alone, or overwrites all of it by what is alike."""
        self.blank(tensor)
        if id(tensor) not in self.names and not tensor.is_inference():  # whose views know no base
            self.canvases[tensor] = Canvas(zero)

    def overwrite(self, tensor: Tensor) -> None:
        """It is written to by something that does not say what, and where."""
        if self.canvases:
            self.canvases.pop(root(tensor), None)

    def is_untouched(self, tensor: Tensor) -> bool:
        """Whether it, or the one whose numbers it shows, is as forward made it from sizes alone."""
        canvas = self.canvases.get(root(tensor)) if self.canvases else None
        return canvas is not None and canvas.ids is None and root(tensor).dtype == tensor.dtype

    def is_zero(self, value: Any, ids: Tensor | None = None, written: bool = False) -> bool:
        """Whether it is zero, as forward made it, or was, if it is written to by now. `ids` count
        on that: what is kept may be filled the next time. Without them, it has to be a number."""
        if not isinstance(value, Tensor):
            return bool(value == 0)
        if (value.ndim and ids is None) or not self.is_untouched(value):
            return False
        whole = root(value)
        if not self.canvases[whole].zero or (not written and bool(value.any())):
            return False
        if any(root(x) is whole for x in self.keeps()):  # it may be another one the next time
            return False
        if ids is not None:
            self.trusted.append((weakref.ref(whole), ids))
        return True

    def written(self, outputs: Iterable[Tensor]) -> list[Tensor]:
        """After a forward: the ids of what it wrote to memory that it still keeps, and of what
        counts on the zeros there."""
        given = {id(root(x)) for x in outputs}
        kept = [c for x, c in self.canvases.items() if id(x) not in given and c.ids is not None]
        trusting = [ids for zeros, ids in self.trusted if id(zeros()) not in {*given, id(None)}]
        self.trusted.clear()
        return trusting + [c.ids.clamp(min=0) for c in kept if c.ids is not None]

    def spare(self, tensor: Tensor) -> None:
        """A tensor is about to be written to: if it is the model's own or an input, keep what it
        holds."""
        if not self.is_blank(tensor):
            self.blank(tensor, _NONE)
        if id(tensor) in self.owned and id(tensor) not in self.spared:
            self.spared[id(tensor)] = (tensor, tensor.data, tensor.detach().clone())

    def restore(self) -> None:
        """Undo what was written to the model's own tensors and its inputs."""
        for tensor, data, value in self.spared.values():
            tensor.data = data
            tensor.data.copy_(value)
        self.spared.clear()


def is_viewed(tensor: Tensor) -> bool:
    """Whether others show its memory, too."""
    return getattr(tensor, VIEWED, False) or tensor._is_view()


def root(x: Tensor) -> Tensor:
    """The tensor whose memory `x` shows."""
    return x if x._base is None else x._base
