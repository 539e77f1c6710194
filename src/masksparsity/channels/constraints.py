"""Constraints of a mask beyond the groups: pieces of an axis that keep equal counts.

Where code takes an axis apart (chunk, split, unflatten), it reads the pieces' lengths off the axis
or has them written down. In the first case all pieces have to keep as many channels, or the slim
model would cut in other places. In the second the numbers that are written down are attributes of
the module, and can follow.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import MaskSparsityError
from ..tracing.labels import Cut, Reason
from ..tracing.reshape import VIEWS
from ..tracing.tracer import Tracer

_MANY = 4096  # pieces: so many are no pieces of channels
_WIDTH = "a width written down"
_PERHAPS = ("slice", "constant_pad_nd", _WIDTH)  # or read off the axis: the proof sees


class Equal(NamedTuple):
    """Pieces of an axis that keep equal counts."""

    operation: str
    module: str
    pieces: Tensor
    """int64 [pieces, length]: units, -1 for what is of no group."""

    def __str__(self) -> str:
        number, length = self.pieces.shape
        return (
            f"{self.operation} in {self.module or 'the model itself'}: "
            f"{number} pieces of {length} channels keep equal counts"
        )

    def counts(self, keep: Tensor) -> Tensor:
        """int64 [pieces]: how many channels of each piece stay under `keep` (bool per unit)."""
        return _kept(keep, self.pieces).sum(1)

    def satisfied(self, keep: Tensor) -> bool:
        counts = self.counts(keep)
        return bool((counts == counts[0]).all())

    def repair(self, keep: Tensor, score: Tensor) -> Tensor:
        """`keep` with the best of the removed units back where a piece has fewer than others."""
        keep = keep.clone()
        for piece in self.pieces:
            most = int(self.counts(keep).max())
            removed = piece[~_kept(keep, piece)]
            missing = most - (len(piece) - len(removed))
            if missing > 0:
                best = torch.argsort(score[removed], descending=True, stable=True)[:missing]
                keep[removed[best]] = True
        return keep


def _kept(keep: Tensor, units: Tensor) -> Tensor:
    return keep[units] | (units < 0) if len(keep) else torch.ones_like(units, dtype=torch.bool)


def repair(constraints: Iterable[Equal], keep: Tensor, score: Tensor | None = None) -> Tensor:
    """The nearest mask over units that respects all constraints: units only come back, those of
    the highest score first, until nothing changes."""
    score = torch.zeros(len(keep)) if score is None else score
    constraints, todo = tuple(constraints), True
    while todo:
        todo = False
        for constraint in constraints:
            while not constraint.satisfied(keep):
                keep, todo = constraint.repair(keep, score), True
    return keep


def check(constraints: Iterable[Equal], keep: Tensor, refused: bool = False) -> None:
    """Refuse a mask that breaks a constraint, naming the module; one that may be none only if the
    proof has `refused` what came of it."""
    for constraint in constraints:
        if (refused or constraint.operation not in _PERHAPS) and not constraint.satisfied(keep):
            raise MaskSparsityError(
                f"refused: {constraint.operation} in {constraint.module or 'the model itself'} "
                f"takes pieces that have to keep equal counts of channels, and this mask leaves "
                f"{constraint.counts(keep).tolist()} of {constraint.pieces.shape[1]} each; "
                "keep.repaired() lets the missing ones back in, and selectors do so by themselves"
            )


def equal_pieces(cuts: list[Cut], modules: Mapping[str, nn.Module]) -> list[tuple[Cut, Tensor]]:
    """Ids [pieces, length] of the pieces that must keep equal counts: those of one length that one
    call takes; and what several calls take by a number that is written down in their module, or
    view by one that stands there as an attribute."""
    found: dict[Any, tuple[Cut, list[Tensor]]] = {}
    for k, cut in enumerate(cuts):
        place: Any = k
        pieces = cut.pieces
        if cut.operation == "split_with_sizes":
            if _lists(modules.get(cut.module), cut.numbers):
                continue  # each length is written down by itself
            place = cut.module
        elif cut.operation == "slice":
            pieces = _side_by_side(cut, cuts)
        elif not pieces and cut.operation in VIEWS and _has(modules.get(cut.module), cut.whole):
            place, pieces = (cut.module, _WIDTH), (cut.whole,)
            cut = cut._replace(operation=_WIDTH)
        for piece in pieces:
            if piece.numel():
                found.setdefault((place, piece.shape[1]), (cut, []))[1].append(piece)
    stacked = [(cut, torch.cat(pieces)) for cut, pieces in found.values()]
    return [(cut, rows) for cut, rows in stacked if 1 < len(rows) <= _MANY]


def _side_by_side(cut: Cut, cuts: list[Cut]) -> tuple[Tensor, ...]:
    """All pieces as long as this one, if it is the last and all others are taken, too."""
    length, (begin, end) = cut.whole.shape[1], cut.numbers
    size = end - begin
    if end != length or not 0 < size < length or length % size:
        return ()
    taken = {
        other.numbers
        for other in cuts
        if (other.operation, other.module) == ("slice", cut.module)
        and torch.equal(other.whole, cut.whole)
    }
    every = all((first, first + size) in taken for first in range(0, length, size))
    return cut.whole.split(size, 1) if every else ()


def _lists(module: Any, sizes: tuple[int, ...]) -> bool:
    lists = [v for v in vars(module).values() if isinstance(v, (list, tuple))]
    return any(all(type(n) is int for n in v) and tuple(v) == sizes for v in lists)


def _has(module: nn.Module | None, whole: Tensor) -> bool:
    """Whether an attribute of the user's module says how many channels there are."""
    if module is None or type(module).__module__.startswith("torch.nn."):
        return False
    return any(type(n) is int and n == whole.shape[1] for n in vars(module).values())


def protect_pieces(tracer: Tracer, cuts: list[tuple[Cut, Tensor]], root: Tensor) -> None:
    """Pieces that have to be as long as one that is protected are protected, too."""
    if not cuts:
        return
    pinned = torch.zeros(len(root), dtype=torch.bool)
    for ids, _ in tracer.pins:
        pinned[root[ids.reshape(-1)]] = True
    again = True
    while again:
        again = False
        for cut, pieces in cuts:
            whole = pinned[root[pieces]].all(1)
            if cut.operation not in _PERHAPS and whole.any() and not whole.all():
                why = "has to be as long as a piece that is protected"
                tracer.pins.append((pieces, Reason(why, cut.operation, cut.module)))
                pinned[root[pieces]] = again = True


def constraints(
    cuts: list[tuple[Cut, Tensor]], units_of: Callable[[Tensor], Tensor], prunable: Tensor
) -> tuple[Equal, ...]:
    """`prunable`: bool per unit, with one more at the end, False, for what is of no unit."""
    found: dict[Any, Equal] = {}
    for cut, pieces in cuts:
        units = units_of(pieces).view(pieces.shape).unique(dim=0)
        if prunable[units].any() and len(units) > 1:
            key = (units.shape, units.numpy().tobytes())
            found.setdefault(key, Equal(cut.operation, cut.module, units))
    return tuple(found.values())


def follow(slim: nn.Module, cuts: Iterable[Cut], keep: Tensor) -> dict[str, dict[str, Any]]:
    """Set the lengths that are written down in attributes of `slim`'s modules, as far as they are
    the lengths of pieces that the module takes. Returns what it set: module -> attribute -> value.

    That an attribute of the right value is a length is a guess: whoever calls this has to prove
    what comes out.
    """
    changed: dict[str, dict[str, Any]] = {}
    modules = dict(slim.named_modules())
    for name, lengths in _lengths(cuts, keep).items():
        if type(modules[name]).__module__.startswith("torch.nn."):
            continue
        for attribute, old in list(vars(modules[name]).items()):
            value = tuple(old) if isinstance(old, (list, tuple)) else old
            if any(type(n) is not int for n in (value if isinstance(value, tuple) else [value])):
                continue
            new = lengths.get(value)
            if new is not None and new != value:
                new = type(old)(new) if isinstance(old, (list, tuple)) else new
                setattr(modules[name], attribute, new)
                changed.setdefault(name, {})[attribute] = new
    return changed


def _lengths(cuts: Iterable[Cut], keep: Tensor) -> dict[str, dict[Any, Any]]:
    """Module -> length before -> length now. What calls were given goes before what else has such
    a length; None where one length becomes two."""
    given: dict[str, dict[Any, Any]] = {}
    others: dict[str, dict[Any, Any]] = {}
    for cut in cuts:
        whole, *pieces = [_count(keep, ids) for ids in (cut.whole, *cut.pieces)]
        pairs: list[tuple[Any, Any]] = []
        if cut.operation == "split_with_sizes":
            pairs = [(cut.numbers, tuple(pieces)), *zip(cut.numbers, pieces, strict=True)]
        elif cut.operation == "slice":
            bounds = (pieces[0], pieces[0] + pieces[1])
            pairs = [(n, b) for n, b in zip(cut.numbers, bounds, strict=True) if n]
            pairs = pairs[: 1 + (cut.numbers[1] < cut.whole.shape[1])]
        elif cut.operation == "constant_pad_nd":  # the last two numbers
            pairs = [(cut.numbers, (*cut.numbers[:-2], *pieces))]
            pairs += [(n, p) for n, p in zip(cut.numbers[-2:], pieces, strict=True) if n]
        elif cut.numbers:  # a view: numbers of rows stay, their length changes
            rows = [math.prod(cut.numbers[k:-1]) for k in range(1, len(cut.numbers))]
            pairs = [(n * cut.numbers[-1], n * pieces[0]) for n in rows]
            pairs += [(n, n) for n in cut.numbers[:-1]]
        elif cut.pieces:
            pairs = [(cut.pieces[0].shape[1], pieces[0])]
        _note(given.setdefault(cut.module, {}), pairs)
        lengths = [(p.shape[1], n) for p, n in zip(cut.pieces, pieces, strict=True)]
        _note(others.setdefault(cut.module, {}), [(cut.whole.shape[1], whole), *lengths])
    return {module: {**others[module], **given[module]} for module in given}


def _count(keep: Tensor, units: Tensor) -> int:
    """How long the rows of `units` are under `keep`; negative if they differ."""
    counts = _kept(keep, units).sum(1)
    return int(counts[0]) if len(counts) and bool((counts == counts[0]).all()) else -(10**9)


def _note(known: dict[Any, Any], pairs: list[tuple[Any, Any]]) -> None:
    for old, new in pairs:
        lost = not isinstance(new, tuple) and new < 0
        known[old] = new if known.get(old, new) == new and not lost else None
