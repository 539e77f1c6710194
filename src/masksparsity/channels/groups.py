"""Which slices of which tensors live and die together."""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import constraints as limits
from . import rules as table
from .cost import Cost, Counter, Layer, count
from .errors import MaskSparsityError
from .trace import (
    ANONYMOUS,
    Cut,
    Norm,
    Reason,
    Record,
    Rule,
    Slot,
    Tracer,
    arguments,
    batch_size,
    named_tensors,
    unwrap,
)

if TYPE_CHECKING:
    from .mask import KeepMask


@dataclass(frozen=True)
class Slice:
    """The part of one axis of one tensor that belongs to a group."""

    tensor: str
    axis: int
    index: Tensor
    """int64 [size, k]: the k positions along the axis that each unit of the group owns."""


@dataclass(frozen=True, eq=False)
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
    constraints: tuple[limits.Equal, ...]
    """Pieces that must keep equal counts."""
    cuts: tuple[Cut, ...]
    """Where code takes axes apart, in units."""
    training: bool
    """Traced in train mode as well, since some parameters are used there only."""
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
        shapes = {name: tensor.shape for name, tensor in named_tensors(unwrap(model))}
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
        MaskSparsityError: if the model does not run on `example_inputs`, or a name of `protect` is
            not in it.

    The model, its mode and the random state stay as they were. Inside DistributedDataParallel and
    `torch.compile` the bare network is traced.
    """
    args, kwargs = arguments(example_inputs)
    model = unwrap(model)
    tracer = Tracer(model, {**table.RULES, **(rules or {})})
    try:
        tracer.run(model, args, kwargs)
    except RuntimeError as error:
        raise MaskSparsityError(
            f"the model does not run on example_inputs: {error} (in {tracer.failed or 'the model'})"
        ) from error
    if tracer.untouched():
        tracer.run_training(model, args, kwargs)
    for name in protect:
        _protect(tracer, name)
    solve = partial(_solve, tracer, model, (args, kwargs), batch_size(args, kwargs))
    if not any(cut.pieces for cut in tracer.cuts):
        return solve()
    from .probe import protect_what_is_refused  # which prunes, and so imports this module

    return protect_what_is_refused(tracer, model, solve)


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
    component, met = _components(tracer.count, tracer.edges)
    unknown = Reason("meets a tensor whose channels are unknown", "", "")
    tracer.pins.append((met, unknown))
    pieces = limits.equal_pieces(tracer.cuts, model)
    limits.protect_pieces(tracer, pieces, component)
    tensors = dict(named_tensors(model))
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    order = {name: k for k, name in enumerate(shapes)}
    slots = sorted(tracer.slots, key=lambda slot: (order[slot[0]], slot[1]))

    # Every index of every labelled axis, in state-dict order: its component and its axis. Axes that
    # share one array of labels (the vectors of a norm, the weight behind it) are looked at once.
    arrays = _Arrays()
    array_of_slot = torch.tensor([arrays.add(tracer.slots[slot]) for slot in slots]).long()
    sharing: list[list[int]] = [[] for _ in arrays.flat]
    for k, array in enumerate(array_of_slot.tolist()):
        sharing[array].append(k)
    labelled = len(sharing)
    entries = component[_cat(arrays.flat)]
    array_of = torch.repeat_interleave(torch.arange(labelled), arrays.lengths())
    consumed = torch.zeros(labelled, dtype=torch.bool)
    consumed[array_of_slot[[k for k, slot in enumerate(slots) if slot in tracer.consumers]]] = True
    swallowed = component[_cat(tracer.swallowed)]
    reasons, verdict = _verdict(
        tracer, component, torch.cat([entries[consumed[array_of]], swallowed])
    )
    # Components of one pattern own the same axes equally often: a random hash per axis, summed.
    hashes = torch.randint(
        -(2**62),
        2**62,
        (len(slots) + len(reasons) + 1,),
        generator=torch.Generator().manual_seed(0),
    )
    pattern = hashes[len(slots) + 1 :][verdict]
    pattern = torch.where(verdict < 0, hashes[len(slots)], pattern)
    hash_of = torch.zeros_like(arrays.lengths()).index_add(0, array_of_slot, hashes[: len(slots)])
    pattern = pattern.index_add(0, entries, hash_of[array_of])
    # They are numbered as their producers come in the state dict; those without one come last.
    *begins, total = accumulate((len(tracer.slots[slot]) for slot in slots), initial=0)
    begin = torch.tensor(begins).long()
    begin[[slot not in tracer.producers for slot in slots]] += total
    last = 2 * total
    begin = torch.full((labelled,), last).scatter_reduce(0, array_of_slot, begin, "amin")
    within = arrays.lengths().cumsum(0) - arrays.lengths()
    rank = (begin - within)[array_of] + torch.arange(len(entries))
    first = torch.full((tracer.count,), last).scatter_reduce(0, entries, rank, "amin")
    # What is only read, and from nowhere (the network's input), is no channel.
    foreign = torch.zeros_like(component, dtype=torch.bool).index_fill_(0, component[met], True)
    first[foreign & (first >= total)] = last
    first[component[0]] = last
    alive = (first < last).nonzero().squeeze(1)
    _, group = torch.unique(pattern[alive], return_inverse=True)
    leader = torch.full((len(alive),), last).scatter_reduce(0, group, first[alive], "amin")[group]
    by_group = torch.argsort(leader * (last + 1) + first[alive])
    alive, leader = alive[by_group], leader[by_group]
    unit = torch.full((tracer.count,), -1)
    unit[alive] = torch.arange(len(alive))

    # Most operations hand labels on as they are: each array is mapped once, and all in one go.
    seen = {id(ids): ids for record in tracer.records for ids in record.ids}
    seen |= {id(ids): ids for p in tracer.products for ids in (p.outputs, p.inputs)}
    array_of_ids = {key: arrays.add(ids) for key, ids in seen.items()}
    mapped = unit[component[_cat(arrays.flat)]].split(arrays.lengths().tolist())
    units = {slot: mapped[k] for slot, k in zip(slots, array_of_slot.tolist(), strict=True)}
    units_of = {key: mapped[k] for key, k in array_of_ids.items()}

    _, sizes = torch.unique_consecutive(leader, return_counts=True)
    belongs = torch.repeat_interleave(torch.arange(len(sizes)), sizes)  # unit -> group
    owned = unit[entries]
    pairs = (belongs[owned] * labelled + array_of)[owned >= 0]
    parts: list[list[int]] = [[] for _ in sizes]
    for pair in torch.bincount(pairs).nonzero().squeeze(1).tolist():
        parts[pair // labelled] += sharing[pair % labelled]
    groups: list[ChannelGroup] = []
    taken: set[str] = set()
    start = 0
    scaled_by = {norm.weight: norm.module for norm in tracer.norms.values()}
    for size, part in zip(sizes.tolist(), map(sorted, parts), strict=True):
        slot = slots[bisect_right(begins, int(leader[start]) % total) - 1]
        why = int(verdict[alive[start]])
        groups.append(
            ChannelGroup(
                name=_unique(
                    slot[0] if slot[0].count(".") == 0 else slot[0].rpartition(".")[0], taken
                ),
                size=size,
                start=start,
                reason=reasons[why] if why >= 0 else None,
                scales=tuple(scaled_by[slots[k][0]] for k in part if slots[k][0] in scaled_by),
                slots={slots[k]: units[slots[k]] for k in part},
            )
        )
        start += size

    def to_units(ids: Tensor) -> Tensor:
        return unit[component[ids.reshape(-1)]].view(ids.shape)

    free = torch.cat([verdict[alive] < 0, torch.zeros(1, dtype=torch.bool)])
    return ChannelGraph(
        groups=tuple(groups),
        slots=units,
        norms=tuple(tracer.norms.values()),
        producers=frozenset(tracer.producers & tracer.slots.keys()),
        exposed=frozenset(tracer.exposed & tracer.producers & tracer.slots.keys()),
        consumers=frozenset(tracer.consumers),
        behind={n: mean for n, mean in tracer.behind.items() if (n, 0) not in tracer.exposed},
        constraints=limits.constraints(pieces, to_units, free),
        cuts=tuple(
            c._replace(whole=to_units(c.whole), pieces=tuple(map(to_units, c.pieces)))
            for c in tracer.cuts
        ),
        training=tracer.trained,
        records=tuple(
            r._replace(ids=tuple(units_of[id(ids)] for ids in r.ids)) for r in tracer.records
        ),
        layers=tuple(
            Layer(p.module, p.factor / batch, units_of[id(p.outputs)], units_of[id(p.inputs)])
            for p in tracer.products
        ),
        shapes=shapes,
        parameters=frozenset(n for n, t in tensors.items() if isinstance(t, nn.Parameter)),
        example=example,
        rules=tracer.rules,
    )


def _components(count: int, edges: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The smallest label that each label is connected with: int64 [count]; and the labels that
    meet anonymous ones, which connect nothing."""
    label = torch.arange(count)
    if not edges:
        return label, label[:0]
    pairs = [torch.broadcast_tensors(a, b) for a, b in edges]
    a = torch.cat([x.reshape(-1) for x, _ in pairs])
    b = torch.cat([y.reshape(-1) for _, y in pairs])
    known = (a != ANONYMOUS) & (b != ANONYMOUS)
    met = torch.maximum(a, b)[~known]
    met = met[met != ANONYMOUS]
    a, b = a[known], b[known]
    while True:
        # Hook the larger root of every edge on the smaller, then shorten all paths to their roots.
        x, y = label[a], label[b]
        apart = x != y
        if not apart.any():
            return label, met
        a, b, x, y = a[apart], b[apart], x[apart], y[apart]
        label.scatter_reduce_(0, torch.maximum(x, y), torch.minimum(x, y), "amin")
        while not torch.equal(label, shorter := label[label]):
            label = shorter


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
    """Flat arrays of labels, each once, whatever number of tensors share its memory."""

    def __init__(self) -> None:
        self.flat: list[Tensor] = []
        self.numbers: dict[tuple[int, int, tuple[int, ...]], int] = {}

    def add(self, ids: Tensor) -> int:
        ids = ids.reshape(-1)
        number = self.numbers.setdefault(
            (ids.data_ptr(), ids.numel(), ids.stride()), len(self.flat)
        )
        if number == len(self.flat):
            self.flat.append(ids)
        return number

    def lengths(self) -> Tensor:
        return torch.tensor([ids.numel() for ids in self.flat], dtype=torch.int64)


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


def _some(names: list[str], most: int = 6) -> str:
    names = list(dict.fromkeys(n.removesuffix(".weight") for n in names if not n.endswith(".bias")))
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "nothing known"


def _shape(shape: torch.Size | None) -> str:
    return "absent" if shape is None else "x".join(map(str, shape)) or "a scalar"
