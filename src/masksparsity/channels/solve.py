"""From the labels that a forward left behind to the channels that live and die together.

Labels that met are one component; components that own the same axes equally often are of one
pattern, and the components of a pattern are the units of a group.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..tracing.labels import ANONYMOUS, Cut, Product, Reason, Slot
from ..tracing.tracer import UNKNOWN, Rule, Tracer
from . import constraints as limits
from .cost import Layer
from .groups import ChannelGraph, ChannelGroup


def solve(tracer: Tracer, example: Any, batch: int, rules: Mapping[str, Rule]) -> ChannelGraph:
    """The graph of what `tracer` saw of its model on inputs of `batch` examples, by `rules`
    beside the table's."""
    component, met = _components(tracer.count, tracer.edges)
    tracer.pins.append((met, Reason(UNKNOWN, "", "")))
    _protect_zeros(tracer, component)
    pieces = limits.equal_pieces(tracer.cuts, tracer.modules)
    limits.protect_pieces(tracer, pieces, component)
    axes = _Axes(tracer, component)
    consumed = torch.cat([axes.consumed(tracer.consumers), component[_cat(tracer.swallowed)]])
    reasons, verdict = _verdict(tracer, component, consumed)
    first = axes.first(tracer.producers, component, met)
    alive, leader = _in_order(axes.pattern(verdict, len(reasons)), first, 2 * axes.total)
    unit = torch.full((tracer.count,), -1)
    unit[alive] = torch.arange(len(alive))

    # Most operations hand labels on as they are: each array is mapped once, and all in one go.
    arrays = axes.arrays
    seen = [ids for p in tracer.products for ids in (p.outputs, p.inputs, *p.rows)]
    seen += [ids for cut in tracer.cuts for ids in (cut.whole, *cut.pieces)]
    flats = {id(ids): tracer.flats.get(id(ids), ids) for ids in seen}
    number = dict(zip(flats, arrays.add(flats.values()), strict=True))
    mapped = unit[component[arrays.joined()]].split(arrays.lengths())
    units_of = {key: mapped[k] for key, k in number.items()}
    slots = {slot: mapped[k] for slot, k in zip(axes.slots, axes.array, strict=True)}

    def to_units(ids: Tensor) -> Tensor:
        return unit[component[ids.reshape(-1)]].view(ids.shape)

    why = verdict[alive]
    free = torch.cat([why < 0, torch.zeros(1, dtype=torch.bool)])
    return ChannelGraph(
        groups=_groups(tracer, axes, unit, leader, [*reasons, None], why, slots),
        slots=slots,
        norms=tuple(tracer.norms.values()),
        producers=frozenset(tracer.producers & tracer.slots.keys()),
        exposed=frozenset((tracer.exposed & tracer.producers | tracer.shut) & tracer.slots.keys()),
        consumers=frozenset(tracer.consumers),
        behind={n: mean for n, mean in tracer.behind.items() if (n, 0) not in tracer.exposed},
        swallowed=to_units(_cat(tracer.swallowed)),
        constraints=limits.constraints(pieces, to_units, free),
        cuts=tuple(_cut(c, units_of) for c in tracer.cuts),
        training=tracer.trained,
        doubled=tracer.doubled,
        records=tuple(tracer.records),
        labels=dict(tracer.slots),
        unit_of=unit[component],
        layers=tuple(_layer(p, batch, units_of) for p in tracer.products),
        modules={name: type(module) for name, module in tracer.modules.items()},
        shapes=tracer.shapes,
        parameters=frozenset(tracer.parameters),
        unused=tracer.untouched(),
        example=example,
        depthwise=frozenset(tracer.depthwise),
        made_up=tracer.made_up,
        rules=rules,
    )


def _layer(product: Product, batch: int, units_of: dict[int, Tensor]) -> Layer:
    """The same for one example, in units."""
    module, factor, outputs, inputs, rows = product
    made, read, *others = (units_of[id(ids)] for ids in (outputs, inputs, *rows))
    return Layer(module, factor / batch, made, read, tuple(others))


def _cut(cut: Cut, units_of: dict[int, Tensor]) -> Cut:
    """The same in units."""
    whole, *pieces = (units_of[id(ids)].view(ids.shape) for ids in (cut.whole, *cut.pieces))
    return cut._replace(whole=whole, pieces=tuple(pieces))


class _Axes:
    """Every index of every labelled axis, in state-dict order, with its component.

    Axes that share one array of labels (the vectors of a norm, the weight behind it) are looked at
    once.
    """

    def __init__(self, tracer: Tracer, component: Tensor):
        every = ((name, k) for name, shape in tracer.shapes.items() for k in range(len(shape)))
        self.slots = [slot for slot in every if slot in tracer.slots]
        self.arrays = _Arrays()
        self.array = self.arrays.add(tracer.slots[slot] for slot in self.slots)
        self.sharing: list[list[int]] = [[] for _ in self.arrays.flat]
        for k, array in enumerate(self.array):
            self.sharing[array].append(k)
        self.arrays_of = torch.tensor(self.array, dtype=torch.int64)
        self.entries = component[self.arrays.joined()]
        lengths = self.arrays.lengths()
        self.lengths = torch.tensor(lengths, dtype=torch.int64)
        self.array_of = torch.repeat_interleave(torch.arange(len(self.sharing)), self.lengths)
        *self.begins, self.total = accumulate((lengths[k] for k in self.array), initial=0)

    def consumed(self, consumers: set[Slot]) -> Tensor:
        """The components that a product sums over."""
        chosen = torch.zeros(len(self.sharing), dtype=torch.bool)
        chosen[[k for k, s in zip(self.array, self.slots, strict=True) if s in consumers]] = True
        return self.entries[chosen[self.array_of]]

    def pattern(self, verdict: Tensor, reasons: int) -> Tensor:
        """A number per component: the sum of a random one for each index that it owns, the same
        for all indices of an axis, and of one for the reason why it is protected."""
        generator = torch.Generator().manual_seed(0)
        size = (len(self.slots) + 1 + reasons,)
        hashes = torch.randint(-(2**62), 2**62, size, generator=generator)
        why = hashes[len(self.slots) :][verdict + 1]
        per_array = torch.zeros_like(self.lengths).index_add(
            0, self.arrays_of, hashes[: len(self.slots)]
        )
        return why.index_add(0, self.entries, per_array[self.array_of])

    def first(self, producers: set[Slot], component: Tensor, met: Tensor) -> Tensor:
        """Where each component comes first: at a producer, or, behind all those, where it is read;
        twice the number of indices where nowhere."""
        never = 2 * self.total
        begin = torch.tensor(
            [
                begin if slot in producers else begin + self.total
                for begin, slot in zip(self.begins, self.slots, strict=True)
            ]
        ).long()
        begin = torch.full_like(self.lengths, never).scatter_reduce(
            0, self.arrays_of, begin, "amin"
        )
        within = self.lengths.cumsum(0) - self.lengths
        rank = (begin - within)[self.array_of] + torch.arange(len(self.entries))
        first = torch.full_like(component, never).scatter_reduce(0, self.entries, rank, "amin")
        # What is only read, and from nowhere (the network's input), is no channel.
        foreign = torch.zeros_like(component, dtype=torch.bool)
        foreign[component[met]] = True
        first.masked_fill_(foreign & (first >= self.total), never)
        first[component[ANONYMOUS]] = never
        return first


def _in_order(pattern: Tensor, first: Tensor, never: int) -> tuple[Tensor, Tensor]:
    """The components that are channels, group by group as their first producers come in the state
    dict; and for each where its group comes first."""
    alive = (first < never).nonzero().squeeze(1)
    _, group = torch.unique(pattern[alive], return_inverse=True)
    leader = torch.full_like(alive, never).scatter_reduce(0, group, first[alive], "amin")[group]
    order = torch.argsort(leader * (never + 1) + first[alive])
    return alive[order], leader[order]


def _groups(
    tracer: Tracer,
    axes: _Axes,
    unit: Tensor,
    leader: Tensor,
    reasons: list[Reason | None],
    why: Tensor,
    slots: dict[Slot, Tensor],
) -> tuple[ChannelGroup, ...]:
    _, sizes = torch.unique_consecutive(leader, return_counts=True)
    belongs = torch.repeat_interleave(torch.arange(len(sizes)), sizes)  # unit -> group
    belongs = torch.cat([belongs, torch.tensor([len(sizes)])])  # the last one: of no group
    width = len(axes.sharing)
    pairs = belongs[unit[axes.entries]] * width + axes.array_of
    parts: list[list[int]] = [[] for _ in range(len(sizes) + 1)]
    for pair in torch.bincount(pairs).nonzero().squeeze(1).tolist():
        parts[pair // width] += axes.sharing[pair % width]
    scaled_by = {norm.weight: norm.module for norm in tracer.norms.values()}
    groups: list[ChannelGroup] = []
    taken: set[str] = set()
    firsts = sizes.cumsum(0) - sizes
    found = zip(sizes.tolist(), firsts.tolist(), leader[firsts].tolist(), why[firsts].tolist(),
                parts[:-1], strict=True)  # fmt: skip
    for size, start, first, reason, numbers in found:
        part = [axes.slots[k] for k in sorted(numbers)]
        maker, _ = axes.slots[bisect_right(axes.begins, first % axes.total) - 1]
        module, _, _ = maker.rpartition(".")
        groups.append(
            ChannelGroup(
                name=_unique(module or maker, taken),
                size=size,
                start=start,
                reason=reasons[reason],  # the last one, None, for -1
                scales=tuple(scaled_by[name] for name, _ in part if name in scaled_by),
                slots={slot: slots[slot] for slot in part},
            )
        )
    return tuple(groups)


def _components(count: int, edges: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The smallest label that each label is connected with: int64 [count]; and the labels that
    meet anonymous ones, which connect nothing."""
    label = torch.arange(count)
    if not edges:
        return label, label[:0]
    pairs = [(a, b) if a.shape == b.shape else torch.broadcast_tensors(a, b) for a, b in edges]
    a = torch.cat([x.reshape(-1) for x, _ in pairs])
    b = torch.cat([y.reshape(-1) for _, y in pairs])
    known = (a != ANONYMOUS) & (b != ANONYMOUS)
    met = torch.maximum(a, b)[~known]
    met = met[met != ANONYMOUS]
    a = torch.where(known, a, b)
    while True:
        # Hook the larger root of every edge on the smaller, then shorten all paths to their roots.
        x, y = label.gather(0, a), label.gather(0, b)
        if torch.equal(x, y):
            return label, met
        label.scatter_reduce_(0, torch.maximum(x, y), torch.minimum(x, y), "amin")
        while not torch.equal(label, shorter := label.gather(0, label)):
            label = shorter


def _protect_zeros(tracer: Tracer, component: Tensor) -> None:
    """Zeros that forward made, and that nothing takes the place of later, stay."""
    if tracer.zeros:
        made = component[_cat([tracer.slots[s] for s in tracer.producers & tracer.slots.keys()])]
        ids = _cat(tracer.zeros)
        alone = ids[~torch.isin(component[ids], made)]
        tracer.pins.append((alone, Reason("always zero", "", "")))


def _verdict(tracer: Tracer, component: Tensor, consumed: Tensor) -> tuple[list[Reason], Tensor]:
    """Why each component is protected: the reasons, and an index into them or -1."""
    unread = Reason("no known operation consumes these channels", "", "")
    reasons = list(dict.fromkeys([*(reason for _, reason in tracer.pins), unread]))
    number = {reason: k for k, reason in enumerate(reasons)}
    pins = len(tracer.pins)
    order = torch.repeat_interleave(
        torch.arange(pins), torch.tensor([i.numel() for i, _ in tracer.pins], dtype=torch.int64)
    )
    where = component[_cat([ids for ids, _ in tracer.pins])]
    # The first reason given is the one that stays.
    first = torch.full_like(component, pins).scatter_reduce(0, where, order, "amin")
    verdict = torch.tensor([number[r] for _, r in tracer.pins] + [number[unread]])[first]
    read = torch.zeros_like(component, dtype=torch.bool)
    read[consumed] = True
    return reasons, verdict.masked_fill_((first == pins) & read, -1)


class _Arrays:
    """Flat arrays of labels, each once, however often it is used."""

    def __init__(self) -> None:
        self.flat: list[Tensor] = []
        self.numbers: dict[int, int] = {}  # the tracer keeps the tensors, and so their ids

    def add(self, arrays: Iterable[Tensor]) -> list[int]:
        """The number of each array."""
        result = []
        for ids in arrays:
            number = self.numbers.setdefault(id(ids), len(self.flat))
            if number == len(self.flat):
                self.flat.append(ids.reshape(-1))
            result.append(number)
        return result

    def joined(self) -> Tensor:
        return torch.cat([torch.zeros(0, dtype=torch.int64), *self.flat])

    def lengths(self) -> list[int]:
        return [ids.numel() for ids in self.flat]


def _cat(parts: list[Tensor]) -> Tensor:
    """All elements of many small index tensors: one operation on them instead of one on each."""
    return torch.cat([torch.zeros(0, dtype=torch.int64), *(part.reshape(-1) for part in parts)])


def _unique(name: str, taken: set[str]) -> str:
    candidate, k = name, 1
    while candidate in taken:
        k += 1
        candidate = f"{name}#{k}"
    taken.add(candidate)
    return candidate
