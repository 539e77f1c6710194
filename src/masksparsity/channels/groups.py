"""Which slices of which tensors live and die together."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import rules as table
from .cost import Cost, Counter, Layer, count
from .errors import MaskSparsityError
from .trace import Norm, Reason, Record, Rule, Slot, Tracer, arguments, batch_size, named_tensors

if TYPE_CHECKING:
    from .mask import KeepMask


@dataclass(frozen=True)
class Slice:
    """The part of one axis of one tensor that belongs to a group."""

    tensor: str
    axis: int
    index: Tensor
    """int64 [size, k]: the k positions along the axis that each unit of the group owns."""


@dataclass(frozen=True)
class ChannelGroup:
    """`size` channels of one pattern: each can go by itself, everywhere at once."""

    name: str
    size: int
    start: int
    """Number of the group's first unit in the whole graph."""
    reason: Reason | None
    scales: tuple[str, ...]
    """Names of the BatchNorm modules whose scales are (partly) this group's."""
    slots: Mapping[Slot, Tensor] = field(repr=False)

    @cached_property
    def slices(self) -> tuple[Slice, ...]:
        """What goes with the group's channels, tensor by tensor."""
        found = []
        for (tensor, axis), units in self.slots.items():
            position = (
                ((units >= self.start) & (units < self.start + self.size)).nonzero().squeeze(1)
            )
            if len(position):
                position = position[torch.argsort(units[position], stable=True)]
                found.append(Slice(tensor, axis, position.view(self.size, -1)))
        return tuple(found)

    @property
    def prunable(self) -> bool:
        return self.reason is None

    def __repr__(self) -> str:
        what = "" if self.prunable else f"  protected: {self.reason}"
        return f"{self.name}: {self.size} channels in {len(self.slices)} tensors{what}"


@dataclass(frozen=True, eq=False, repr=False)
class ChannelGraph:
    """The coupled channels of a network, as `trace` found them. `print` it for a report."""

    groups: tuple[ChannelGroup, ...]
    slots: Mapping[Slot, Tensor]
    """(tensor, axis) -> int64 unit of every index, -1 where it belongs to none."""
    norms: tuple[Norm, ...]
    producers: frozenset[Slot]
    """Axes along which a channel is made: zero there, and it is zero."""
    exposed: frozenset[Slot]
    """The producers that something other than a norm reads."""
    consumers: frozenset[Slot]
    """Axes that a convolution or matrix product sums over."""
    behind: Mapping[str, str]
    """Weight -> running mean of the norm that alone reads what it makes."""
    records: tuple[Record, ...]
    layers: tuple[Layer, ...]
    shapes: Mapping[str, torch.Size]
    parameters: frozenset[str]
    example: tuple[tuple, dict]
    rules: Mapping[str, Rule]

    @cached_property
    def by_name(self) -> dict[str, ChannelGroup]:
        return {group.name: group for group in self.groups}

    @property
    def prunable(self) -> tuple[ChannelGroup, ...]:
        return tuple(group for group in self.groups if group.prunable)

    @property
    def protected(self) -> tuple[ChannelGroup, ...]:
        return tuple(group for group in self.groups if not group.prunable)

    @cached_property
    def counter(self) -> Counter:
        return Counter(self)

    @property
    def units(self) -> int:
        return sum(group.size for group in self.groups)

    def cost(self, keep: "KeepMask | None" = None) -> Cost:
        """MACs and parameters, dense or under a mask, without building the slim model."""
        return count(self, keep)

    def check(self, model: nn.Module) -> None:
        """Refuse a model of another shape than the traced one, naming the first difference."""
        shapes = {name: tensor.shape for name, tensor in named_tensors(model)}
        for name in {**self.shapes, **shapes}:
            if shapes.get(name) != self.shapes.get(name):
                raise MaskSparsityError(
                    f"this graph was traced from another model: {name} is "
                    f"{_shape(shapes.get(name))} here and {_shape(self.shapes.get(name))} there; "
                    "trace the model that you prune"
                )

    def __repr__(self) -> str:
        dense = self.cost()
        return (
            f"{len(self.prunable)} prunable groups with {sum(g.size for g in self.prunable)} "
            f"channels, {len(self.protected)} protected; {dense.macs / 1e6:,.1f} M MACs, "
            f"{dense.params / 1e6:,.2f} M parameters"
        )

    def __str__(self) -> str:
        lines = [repr(self)]
        for group in self.groups:
            made = [f"{s.tensor}" for s in group.slices if (s.tensor, s.axis) in self.producers]
            read = [f"{s.tensor}" for s in group.slices if (s.tensor, s.axis) in self.consumers]
            lines.append(repr(group))
            lines.append(f"    made by {_some(made)}; read by {_some(read)}")
        return "\n".join(lines)


def trace(
    model: nn.Module,
    example_inputs: Any,
    *,
    protect: tuple[str, ...] = (),
    rules: Mapping[str, Rule] | None = None,
) -> ChannelGraph:
    """Find the coupled channels of `model` by one forward on `example_inputs`.

    Args:
        example_inputs: a tensor, a tuple or list of inputs, or a dict of keyword inputs, on the
            model's device; costs are per example of its first axis.
        protect: names of modules or parameters whose channels stay, or prefixes of names.
        rules: rows to add to the table of operations: ATen name without suffix -> function, as in
            `masksparsity.channels.rules`.

    Raises:
        MaskSparsityError: if a name of `protect` is not in the model.

    The model, its mode and the random state stay as they were.
    """
    args, kwargs = arguments(example_inputs)
    tracer = Tracer(model, {**table.RULES, **(rules or {})})
    tracer.run(model, args, kwargs)
    for name in protect:
        _protect(tracer, name)
    return _solve(tracer, model, (args, kwargs), batch_size(args, kwargs))


def _protect(tracer: Tracer, name: str) -> None:
    slots = [s for s in tracer.producers if s[0] == name or s[0].startswith(f"{name}.")]
    if not slots:
        raise MaskSparsityError(
            f"protect: no layer named {name!r} in this model; print(graph) shows the names"
        )
    tracer.operation = "protect="
    for slot in slots:
        tracer.pin(tracer.slots[slot], "protected by the caller")


def _solve(tracer: Tracer, model: nn.Module, example: Any, batch: int) -> ChannelGraph:
    component = _components(tracer.count, tracer.edges)
    shapes = {name: tensor.shape for name, tensor in named_tensors(model)}
    order = {name: k for k, name in enumerate(shapes)}
    slots = sorted(tracer.slots, key=lambda slot: (order[slot[0]], slot[1]))
    owners = [component[tracer.slots[slot].reshape(-1)] for slot in slots]
    reasons, verdict = _verdict(tracer, component, slots, owners)

    # Every index of every labelled axis, in state-dict order: its component and its axis.
    entries = torch.cat([torch.zeros(0, dtype=torch.int64), *owners])
    slot_of = torch.repeat_interleave(
        torch.arange(len(slots)), torch.tensor([len(o) for o in owners], dtype=torch.int64)
    )
    # Components of one pattern own the same axes equally often: a random hash per axis, summed.
    hashes = torch.randint(
        -(2**62),
        2**62,
        (len(slots) + len(reasons) + 1,),
        generator=torch.Generator().manual_seed(0),
    )
    pattern = hashes[len(slots) + 1 :][verdict] if reasons else torch.zeros_like(verdict)
    pattern = torch.where(verdict < 0, hashes[len(slots)], pattern)
    pattern = pattern.index_add(0, entries, hashes[slot_of])
    # They are numbered as their producers come in the state dict; those without one come last.
    made = torch.tensor([slot in tracer.producers for slot in slots], dtype=torch.bool)[slot_of]
    rank = torch.arange(len(entries)) + ~made * len(entries)
    last = 2 * len(entries)
    first = torch.full((tracer.count,), last).scatter_reduce(0, entries, rank, "amin")
    first[component[0]] = last
    alive = (first < last).nonzero().squeeze(1)
    _, group = torch.unique(pattern[alive], return_inverse=True)
    leader = torch.full((len(alive),), last).scatter_reduce(0, group, first[alive], "amin")[group]
    by_group = torch.argsort(leader * (last + 1) + first[alive])
    alive, leader = alive[by_group], leader[by_group]
    unit = torch.full((tracer.count,), -1)
    unit[alive] = torch.arange(len(alive))

    units: dict[Slot, Tensor] = {s: unit[o] for s, o in zip(slots, owners, strict=True)}
    flat: dict[int, Tensor] = {}  # most operations hand labels on as they are: map each once

    def units_of(ids: Tensor) -> Tensor:
        if id(ids) not in flat:
            flat[id(ids)] = unit[component[ids.reshape(-1)]]
        return flat[id(ids)]

    _, sizes = torch.unique_consecutive(leader, return_counts=True)
    groups: list[ChannelGroup] = []
    taken: set[str] = set()
    start = 0
    scales = _scales(tracer, units, sizes)
    for k, size in enumerate(sizes.tolist()):
        slot = slots[int(slot_of[leader[start] % len(entries)])]
        why = int(verdict[alive[start]])
        groups.append(
            ChannelGroup(
                name=_unique(
                    slot[0] if slot[0].count(".") == 0 else slot[0].rpartition(".")[0], taken
                ),
                size=size,
                start=start,
                reason=reasons[why] if why >= 0 else None,
                scales=scales.get(k, ()),
                slots=units,
            )
        )
        start += size
    return ChannelGraph(
        groups=tuple(groups),
        slots=units,
        norms=tuple(tracer.norms.values()),
        producers=frozenset(tracer.producers & tracer.slots.keys()),
        exposed=frozenset(tracer.exposed & tracer.producers & tracer.slots.keys()),
        consumers=frozenset(tracer.consumers),
        behind={n: mean for n, mean in tracer.behind.items() if (n, 0) not in tracer.exposed},
        records=tuple(r._replace(ids=tuple(map(units_of, r.ids))) for r in tracer.records),
        layers=tuple(
            Layer(p.module, p.factor / batch, units_of(p.outputs), units_of(p.inputs))
            for p in tracer.products
        ),
        shapes=shapes,
        parameters=frozenset(name for name, _ in model.named_parameters()),
        example=example,
        rules=tracer.rules,
    )


def _components(count: int, edges: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The smallest label that each label is connected with: int64 [count]."""
    label = torch.arange(count)
    if not edges:
        return label
    pairs = [torch.broadcast_tensors(a, b) for a, b in edges]
    a = torch.cat([x.reshape(-1) for x, _ in pairs])
    b = torch.cat([y.reshape(-1) for _, y in pairs])
    while True:
        # Hook the larger root of every edge on the smaller, then shorten all paths to their roots.
        x, y = label[a], label[b]
        apart = x != y
        if not apart.any():
            return label
        a, b, x, y = a[apart], b[apart], x[apart], y[apart]
        label.scatter_reduce_(0, torch.maximum(x, y), torch.minimum(x, y), "amin")
        while not torch.equal(label, shorter := label[label]):
            label = shorter


def _verdict(
    tracer: Tracer, component: Tensor, slots: list[Slot], owners: list[Tensor]
) -> tuple[list[Reason], Tensor]:
    """Why each component is protected: the reasons, and an index into them or -1."""
    numbers: dict[Reason, int] = {}
    unknown = Reason("meets a tensor whose channels are unknown", "", "")
    unread = Reason("no known operation consumes these channels", "", "")
    verdict = torch.full_like(component, numbers.setdefault(unread, 0))
    for slot, owner in zip(slots, owners, strict=True):
        if slot in tracer.consumers:
            verdict[owner] = -1
    # Reversed, so that the first reason given is the one that stays.
    for ids, reason in [(component[:1], unknown), *tracer.pins][::-1]:
        verdict[component[ids.reshape(-1)]] = numbers.setdefault(reason, len(numbers))
    return list(numbers), verdict


def _scales(tracer: Tracer, units: dict[Slot, Tensor], sizes: Tensor) -> dict[int, tuple[str, ...]]:
    """Group number -> names of the norms that scale its channels."""
    group_of = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    scales: dict[int, tuple[str, ...]] = {}
    for norm in tracer.norms.values():
        owned = units.get((norm.weight, 0), sizes[:0])
        for k in group_of[owned[owned >= 0]].unique().tolist():
            scales[k] = (*scales.get(k, ()), norm.module)
    return scales


def _unique(name: str, taken: set[str]) -> str:
    candidate, k = name, 1
    while candidate in taken:
        k += 1
        candidate = f"{name}#{k}"
    taken.add(candidate)
    return candidate


def _some(names: list[str], most: int = 6) -> str:
    names = list(dict.fromkeys(n.removesuffix(".weight") for n in names if not n.endswith(".bias")))
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "nothing known"


def _shape(shape: torch.Size | None) -> str:
    return "absent" if shape is None else "x".join(map(str, shape)) or "a scalar"
