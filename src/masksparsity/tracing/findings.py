"""Findings of a trace, of which the groups, their costs and the proof are made."""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .labels import Cut, Labels, Norm, Product, Reason, Record, Slot


class Findings:
    """The findings so far, and which operation runs now, in which module.

    If the labels are `given`, nothing is united, and the records count.
    """

    def __init__(self, given: bool):
        self.given = given
        self.operation = ""
        self.numbers: tuple[Any, ...] = ()  # among its arguments, not recorded yet
        self.origins: tuple[int | None, ...] = ()  # of its arguments
        self.stack: list[str] = [""]
        self.edges: list[tuple[Tensor, Tensor]] = []
        self.pins: list[tuple[Tensor, Reason]] = []
        self.records: list[Record] = []
        self.products: list[Product] = []
        self.norms: dict[str, Norm] = {}
        self.behind: dict[str, str] = {}  # weight -> running mean of the norm that reads it
        self.producers: set[Slot] = set()  # must be zero for a channel to be zero
        self.exposed: set[Slot] = set()  # producers that something other than a norm reads
        self.consumers: set[Slot] = set()  # axes that a product sums over
        self.shut: set[Slot] = set()  # consumers of what is not zero with its producers
        self.swallowed: list[Tensor] = []  # summed over by what has no weights
        self.cuts: list[Cut] = []
        self.zeros: list[Tensor] = []  # ids of channels of zeros that forward made
        self.left: list[tuple[Tensor, Reason]] = []  # values that left PyTorch during the proof
        self.touched: set[str] = set()  # names of the tensors that took part
        self.foreign = False  # parameters that are not the model's took part, too
        self.trained = 0  # forwards in train mode
        self.doubled = False  # of two examples, where there was one
        self.loose: set[int] = set()  # lengths that values ask for
        self.decided = False  # values came to Python, which may have chosen its way by them
        self.depthwise: set[str] = set()  # weights of transposed convolutions
        self.suspects: dict[int, Tensor] = {}  # by id
        self.spoilt: dict[Slot, Reason] = {}
        self.mattered = False  # values did, where they were made up

    @property
    def module(self) -> str:
        """Path of the module whose forward runs."""
        return self.stack[-1]

    def unite(self, a: Tensor, b: Tensor) -> None:
        """The channels that meet element by element live and die together."""
        if a is not b and not self.given:
            self.edges.append((a, b))

    def pin(self, labels: Iterable[Labels] | Tensor, why: str) -> None:
        """Protect channels."""
        found = [labels] if isinstance(labels, Tensor) else [m.ids for m in labels]
        reason = Reason(why, self.operation, self.module)
        self.pins += [(ids, reason) for ids in found]

    def cut(
        self,
        whole: Tensor,
        pieces: Iterable[Tensor],
        numbers: Iterable[int] = (),
        module: str | None = None,
    ) -> None:
        """Channels fall into pieces, whose lengths the code takes from somewhere: `module` has it,
        or the one that runs now."""
        if not self.given:
            module = self.module if module is None else module
            self.cuts.append(Cut(self.operation, module, whole, (*pieces,), (*numbers,)))

    def expose(self, labels: Iterable[Labels]) -> None:
        """Something other than a norm reads these: they are zero only if their producers are."""
        for m in labels:
            if m.sources:
                self.exposed |= m.sources
                self.producers |= m.sources

    def record(self, labels: Iterable[Labels], scalars: Iterable[Any] = ()) -> None:
        """Note what an operation reads, and its numbers, for the proof to compare."""
        labels, scalars, self.numbers = tuple(labels), (*scalars, *self.numbers), ()
        ids = tuple([m.ids for m in labels])
        shapes = tuple([m.ids.shape if len(m.axes) > 1 else None for m in labels])
        self.records.append(
            Record(self.operation, self.stack[-1], ids, scalars, shapes, self.origins)
        )


def numbers(args: Iterable[Any]) -> tuple[Any, ...]:
    """Python's numbers and words among the arguments of an operation: they may follow from a width,
    and then change with it. Sizes, which come in lists, follow by right."""
    return tuple(
        [rounded(a) for a in args if isinstance(a, _NUMBERS) or type(a) is torch.Generator]
    )


_NUMBERS = (int, float, complex, str)  # to ask so for a generator takes time


def rounded(number: Any) -> Any:
    """To fewer digits than may depend on the order of a sum; NaN is like NaN. A generator is its
    seed."""
    if type(number) is torch.Generator:
        return number.initial_seed()
    return _to_nine_digits(number) if type(number) is float else number


@functools.lru_cache(1024)  # nearly all are the constants of norms
def _to_nine_digits(number: float) -> Any:
    return float(f"{number:.9g}") if number == number else "nan"


LOOSE = "_masksparsity_loose"
"""On what has as many elements as values ask for, as `nonzero` gives, and on what is made of that:
such lengths, which may differ by the last bits of these values."""


def lengths(x: Tensor, axes: Iterable[int] | None = None) -> list[int]:
    """The lengths of all axes, or of some, as far as they are the code's."""
    sizes = [*x.shape] if axes is None else [x.shape[a] for a in axes]
    loose = getattr(x, LOOSE, ())
    return [n for n in sizes if n not in loose] if loose else sizes


def aside(out: Tensor, labels: Iterable[Labels]) -> list[int]:
    """The lengths of the axes along which no channels lie, but of those that broadcast.
    `labels`: of what is broadcast to `out`."""
    loose = getattr(out, LOOSE, ())
    # A lone channel may be labelled along another axis than its companions were.
    channels = {a - m.ids.ndim for m in labels for a in m.axes if m.ids.shape[a] > 1}
    sizes = enumerate(out.shape, -out.ndim)
    return [n for a, n in sizes if n > 1 and a not in channels and n not in loose]


def extents(x: Tensor) -> list[int]:
    """`lengths`, but 1 of axes along which a tensor was expanded, as it has one value there."""
    if x.layout != torch.strided:
        return lengths(x)
    loose = getattr(x, LOOSE, ())
    sizes = zip(x.shape, x.stride(), strict=True)
    return [n if stride else 1 for n, stride in sizes if n not in loose]
