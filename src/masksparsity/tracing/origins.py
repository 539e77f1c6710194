"""Where tensors come from: the proof tells by it a choice between tensors of the same channels.

A number stands for how a tensor was made: by which operations, with which numbers, of which others.
It is the same in any two runs of the same code, whatever the widths. Nothing is known of what
forward finds outside of the model, or in dicts and sets: they may be caches, filled or not yet.
"""

import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from .memory import is_viewed, root

Origin = int | None
"""None: nothing is known, and it is like any other."""

ORIGIN, WRITTEN = "_masksparsity_origin", "_masksparsity_written"
VIEWS = frozenset(
    {"_reshape_alias", "as_strided", "expand", "permute", "select", "slice", "squeeze", "t",
     "transpose", "unsqueeze", "view"}
)  # fmt: skip
_MOVES = VIEWS | {"_to_copy", "_unsafe_view", "alias", "clone", "detach"}
"""These make nothing new, unless they record numbers: for one width a layout may be copied that for
another is only seen in another way."""


class Origins:
    """Of the tensors of one run; `names`: of parameters and buffers, by id."""

    def __init__(self, names: Mapping[int, str]):
        self.own = {x: hash(name) for x, name in names.items()}
        self.known: dict[int, int] = {}  # of what a forward begins with, by id
        self.held: list[Tensor] = []  # so that no other gets its id
        self.token = object()
        self.wrote = False  # anything to memory that was there
        self.made: list[weakref.ref[Tensor]] = []

    def begin(self, modules: Mapping[str, nn.Module], keep: bool, inputs: Iterable[Tensor]) -> None:
        """A forward begins: with what it is given, and what its modules keep, if they `keep`
        anything."""
        found: dict[Any, Tensor] = {("input", k): x for k, x in enumerate(inputs)}
        for path, module in modules.items() if keep else ():
            for key in vars(module).keys() - _REGISTERED:
                found |= {(path, key, place): x for place, x in _listed(vars(module)[key])}
        self.held = [*found.values()]
        self.known = {id(x): hash(place) for place, x in found.items()} | self.own
        self.wrote = False

    def of(self, args: Iterable[Any]) -> tuple[Origin, ...]:
        """Of the tensors among arguments, and in lists there."""
        of = self._of if self.wrote else self._own
        found: list[Origin] = []
        for a in args:
            if isinstance(a, Tensor):
                found.append(of(a))
            elif a and type(a) in (list, tuple) and type(a[0]) is not int:
                found += [of(x) for x in a if isinstance(x, Tensor)]
        return tuple(found)

    def follow(
        self,
        operation: str,
        inplace: bool,
        read: tuple[Origin, ...],
        numbers: list[Any],
        args: Any,
        out: Any,
    ) -> None:
        """An operation has made `out` of what comes from `read`; `numbers`: those it recorded."""
        made = [x for x in (out if isinstance(out, (list, tuple)) else (out,))
                if isinstance(x, Tensor)]  # fmt: skip
        self.made += map(weakref.ref, made)
        moved = operation in _MOVES and len(made) == 1
        if moved and made[0].dtype != args[0].dtype:
            numbers = [*numbers, made[0].dtype]
        if moved and not numbers:
            self._tell(made[0], self._own(args[0]) if operation in VIEWS else read[0])
            return
        how = None if None in read else _hash(("" if moved else operation, read, tuple(numbers)))
        for k, x in enumerate(made):
            self._tell(x, None if how is None else hash((how, k)))
        for x in made if inplace else ():
            if id(x) not in self.known and not is_viewed(x):
                continue  # all that shows this memory is told already
            before = self._written(x)
            known = how is not None and before is not None
            setattr(root(x), WRITTEN, (self.token, hash((before, how)) if known else None))
            self.wrote = True

    def _of(self, x: Tensor) -> Origin:
        own, written = self._own(x), self._written(x)
        if own is None or written is None:
            return None
        return hash((own, written)) if written else own

    def _own(self, x: Tensor) -> Origin:
        known = self.known.get(id(x))
        if known is not None:
            return known
        whose, origin = getattr(x, ORIGIN, _UNKNOWN)
        return origin if whose is self.token else None

    def _written(self, x: Tensor) -> Origin:
        whose, origin = getattr(root(x), WRITTEN, _UNKNOWN)
        return origin if whose is self.token else 0

    def _tell(self, x: Tensor, origin: Origin) -> None:
        if id(x) not in self.known:
            setattr(x, ORIGIN, (self.token, origin))


_UNKNOWN = (None, None)
_REGISTERED = frozenset(vars(nn.Module()))


def _hash(what: Any) -> int:
    try:
        return hash(what)
    except TypeError:  # lists of strides
        return hash(repr(what))


def _listed(value: Any, depth: int = 0) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """The tensors in lists, and in lists of lists, and where."""
    if isinstance(value, Tensor):
        yield (), value
    elif isinstance(value, (list, tuple, deque)) and depth < 4:
        for k, item in enumerate(value):
            for place, x in _listed(item, depth + 1):
                yield (k, *place), x
