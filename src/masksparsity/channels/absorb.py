"""What a removed channel still said moves into its consumers.

A channel whose scale is zero is not silent: behind its norm it is the shift, behind an activation
`act(shift)`, a constant. Zero padding makes that constant visible at the border of a convolution:
a bias can stand for it in the interior only; one channel that stays constant can stand for all
others of its group everywhere.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import MaskSparsityError
from ..tracing.copies import duplicate
from ..tracing.labels import Slot
from ..tracing.network import like, named_tensors, noisy, tensors_in
from ..tracing.state import evaluating
from .groups import ChannelGraph
from .mask import KeepMask

Constants = dict[str, tuple[int, Tensor]]
"""Consumer -> its input axis, and [groups, length]: the constant of every removed index, else 0."""

_SMALL = 1e-6  # relative to the largest constant: below it there is nothing to hand over


_PRODUCTS = {  # operation -> where its input, weight and bias are among its arguments
    "convolution": (0, 1, 2), "torchvision::deform_conv2d": (0, 1, 4), "linear": (0, 1, 2),
    "addmm": (1, 2, 0), "mm": (0, 1, 2),
}  # fmt: skip
_CONVOLUTIONS = ("convolution", "torchvision::deform_conv2d")


class _Inputs(TorchDispatchMode):
    """Lowest and highest value of every input channel of every weight that sums over channels;
    which tensors were read, and which by operations that could do anything with them."""

    def __init__(self, tensors: dict[str, Tensor]):
        super().__init__()
        self.tensors = tensors
        # Products see a transposed view of a weight: memory tells whose.
        real = [(name, x) for name, x in tensors.items() if _has_memory(x)]
        self.owners = {x.untyped_storage().data_ptr(): name for name, x in real}
        self.owners |= {x.data_ptr(): name for name, x in real}
        self.seen: dict[tuple[str, int | None], tuple[Tensor, Tensor]] = {}
        self.spread: dict[str, int] = {}  # transposed: positions that share a kernel out
        self.read: set[str] = set()
        self.otherwise: set[str] = set()
        self.deformed: set[str] = set()
        # Which biases and norms go with which weights, and with nothing else.
        self.biases: set[tuple[str | None, str | None]] = set()
        self.means: set[tuple[str | None, str | None]] = set()
        self.made: dict[int, tuple[Tensor, str]] = {}  # results of products, kept for their ids

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        given = [(self._owner(x), x) for x in tensors_in((args, kwargs))]
        owned = [(owner, x) for owner, x in given if owner is not None]
        self.read |= {owner for owner, _ in owned}
        if any(r.alias_info for r in func._schema.returns) and not func._schema.is_mutable:
            return out  # a view
        scaled = any(value != 1 for value in (kwargs or {}).values())  # by alpha or beta
        places = _PRODUCTS.get(name, ()) if not scaled else ()
        x, weight, bias = [args[k] if k < len(args) else None for k in places] or [None] * 3
        if "batch_norm" in name:
            _, maker = self.made.get(id(args[0]), (None, None))
            self.means.add((maker, self._owner(args[3]) if args[3] is not None else None))
        for owner, tensor in owned:
            if x is not None and tensor is weight and self._is_whole(owner, tensor, name):
                self._note(owner, name, x, args)
                self.biases.add((owner, None if bias is None else self._owner(bias)))
                self.made[id(out)] = out, owner
            elif tensor is not bias:
                self.otherwise.add(owner)
        return out

    def _note(self, owner: str, name: str, x: Tensor, args: Any) -> None:
        convolution = name in _CONVOLUTIONS
        transposed = name == "convolution" and args[6]
        if transposed:
            self.spread[owner] = math.prod(args[3])
        if name == "torchvision::deform_conv2d":
            self.deformed.add(owner)
        rows = x.movedim(1 if convolution else x.ndim - 1, 0).flatten(1)
        place = owner, (0 if transposed else 1) if convolution else None
        low, high = self.seen.get(place, (rows[:, 0], rows[:, 0]))
        self.seen[place] = torch.minimum(low, rows.amin(1)), torch.maximum(high, rows.amax(1))

    def _is_whole(self, owner: str, weight: Tensor, name: str) -> bool:
        """Matrices may be seen transposed, or be convolutions of one pixel."""
        own = self.tensors[owner].shape
        return weight.shape == own if name in _CONVOLUTIONS else weight.numel() == own.numel()

    def partner(self, pairs: set[tuple[str | None, str | None]], weight: str) -> str | None:
        """What goes with a weight, and with no other, wherever it is read."""
        found = {other for name, other in pairs if name == weight}
        if len(found) != 1 or {name for name, other in pairs if other in found} != {weight}:
            return None
        return found.pop()

    def _owner(self, x: Tensor) -> str | None:
        """Whose memory it shows."""
        if not _has_memory(x):
            return None
        name = self.owners.get(x.data_ptr())
        return name or self.owners.get(x.untyped_storage().data_ptr())


def _has_memory(x: Tensor) -> bool:
    return x.layout == torch.strided and x.numel() > 0


def absorb(
    model: nn.Module, graph: ChannelGraph, keep: KeepMask, how: Literal["exact", "bias"]
) -> tuple[nn.Module, KeepMask]:
    """A model and a mask from which `prune` keeps what the removed channels' constants said.

    The function kept is that of `model` with the scales (and filters without a norm) of the
    removed channels at zero and their shifts as they are.

    - "exact": one removed channel of each group stays, as a constant, and takes over the weights
      of the others in every consumer. Costs a channel per group that has constants to hand over.
    - "bias": the consumers' biases, or the running means of the norms behind them, take the
      constants over. Costs nothing; exact for linear layers and convolutions without padding, in
      eval mode, and wrong by what the border misses for padded and for transposed ones. Of a
      transposed one with a stride, whose positions differ, the mean.

    Constants are those of inputs of the traced size: one that follows from it, as a sum over space
    does, is another for others.

    Raises:
        MaskSparsityError: where a removed channel is no constant at a consumer, or no single
            channel can stand for the others, or a weight is read in another way than by a layer,
            or ("bias") a consumer has neither a bias nor a norm of its own.
    """
    if how not in ("exact", "bias"):
        raise MaskSparsityError(f"absorb={how!r}: use 'exact', 'bias' or None")
    model = duplicate(model)
    tensors = dict(named_tensors(model))
    _refuse_sums(graph, keep, tensors)
    for name, axis in filters_and_scales(graph):
        gone = (~keep.slot(name, axis)).nonzero().squeeze(1)
        with torch.no_grad():
            tensors[name].index_fill_(axis, gone.to(tensors[name].device), 0)
    constants, watch = _constants(model, graph, keep, tensors)
    if how == "exact":
        return model, _carry(graph, keep, constants, tensors)
    if deformed := sorted(watch.deformed & constants.keys()):
        raise MaskSparsityError(
            f"absorb: {deformed[0]} reads where offsets point, which may be outside of the image, "
            "and no bias can stand for that; use absorb='exact'"
        )
    _into_biases(graph, constants, tensors, watch)
    return model, keep


def filters_and_scales(graph: ChannelGraph) -> set[Slot]:
    """What a constant channel has at zero: all that makes it but its shifts."""
    names = {name for name, _ in graph.consumers} | {norm.weight for norm in graph.norms}
    return {slot for slot in graph.producers if slot[0] in names}


def _refuse_sums(graph: ChannelGraph, keep: KeepMask, tensors: dict[str, Tensor]) -> None:
    """What has no weights of its own (a norm, attention) cannot take anything over."""
    summed = torch.zeros(graph.units + 1, dtype=torch.bool)
    summed[graph.swallowed] = True
    summed[-1] = False
    for name, axis in sorted(graph.producers):
        said = tensors[name].detach().cpu()
        gone = ~keep.slot(name, axis) & summed[graph.slots[name, axis]]
        if said.ndim == 1 and said[gone].any() and (name, 1) not in graph.consumers:
            raise MaskSparsityError(
                f"absorb: removed channels of {name} are summed over by an operation without "
                "weights, where nothing can stand for them; prune with absorb=None, or drive them "
                "to zero with ScheduledDecay"
            )


def _constants(
    model: nn.Module, graph: ChannelGraph, keep: KeepMask, tensors: dict[str, Tensor]
) -> tuple[Constants, _Inputs]:
    """The constants of removed channels at each consumer; and how forward read the tensors."""
    watch, other = _Inputs(tensors), _Inputs(tensors)
    example = like(graph.example, model)
    for seeing, (args, kwargs) in ((watch, example), (other, noisy(example))):
        with evaluating(model.modules()), torch.no_grad(), seeing:
            model(*args, **kwargs)
    found = {}
    for name, axis in sorted(graph.consumers & graph.slots.keys()):
        gone = ~keep.slot(name, axis).to(tensors[name].device)
        if not gone.any():
            continue
        seen, again = (w.seen.get((name, axis), w.seen.get((name, None))) for w in (watch, other))
        if name in watch.otherwise or (seen is None and name in watch.read):
            raise MaskSparsityError(
                f"absorb: {name} is not read by a convolution or linear layer as it is, so nothing "
                "can be folded into it; prune with absorb=None, or drive the channels to zero with "
                "ScheduledDecay"
            )
        if seen is None:  # in training only
            continue
        # Of a grouped convolution each index is a channel of every group.
        low, high = (x.view(-1, len(gone)) for x in seen)
        scale = torch.maximum(low.abs(), high.abs())[:, gone].amax()
        # On other inputs, too: of one image many things are constant. What they make NaN tells
        # nothing.
        both = again or seen
        lowest = torch.fmin(low, both[0].view_as(low))
        highest = torch.fmax(high, both[1].view_as(high))
        if ((highest - lowest)[:, gone] > _SMALL * scale).any():
            raise MaskSparsityError(
                f"absorb: a removed channel is not constant where {name} reads it, so nothing can "
                "stand for it; prune with absorb=None, or drive it to zero with ScheduledDecay"
            )
        found[name] = (axis, torch.where(gone, low, 0))
    return found, watch


def _carry(
    graph: ChannelGraph,
    keep: KeepMask,
    constants: Constants,
    tensors: dict[str, Tensor],
) -> KeepMask:
    """Choose a carrier in every group, and fold the others' weights into its own."""
    units = keep.units.clone()
    for group in graph.prunable:
        gone = (~keep[group.name]).nonzero().squeeze(1) + group.start
        views = []  # per consumer of this group: name, axis, positions of the removed, constants
        for s in group.slices:
            if s.tensor in constants and constants[s.tensor][0] == s.axis and len(gone):
                position = s.index[gone - group.start]  # [gone, k]
                value = constants[s.tensor][1][:, position.to(constants[s.tensor][1].device)]
                if value.abs().amax() > 0:
                    views.append((s.tensor, s.axis, position, value))
        if not views:
            continue
        heard = torch.stack([v.abs().amin((0, 2)) / v.abs().amax() for *_, v in views])
        carriers = _carriers(heard, group.name)
        units[gone[carriers]] = True
        for (name, axis, position, value), loudness in zip(views, heard, strict=True):
            best = carriers[int(loudness[carriers].argmax())]
            others = torch.tensor([k for k in range(len(gone)) if k == best or k not in carriers])
            _fold(
                tensors[name],
                axis,
                position[others],
                value[:, others],
                position[best],
                value[:, best],
            )
    mask = KeepMask(graph)
    mask.units, mask.origin = units, {**keep.origin, "absorb": "exact"}
    return mask


def _carriers(heard: Tensor, group: str) -> list[int]:
    """As few channels as a greedy choice needs for every consumer to hear one of them well.

    heard: [consumers, channels], relative to the loudest that each consumer hears.
    """
    carriers: list[int] = []
    deaf = torch.ones(len(heard), dtype=torch.bool)
    while deaf.any():
        well = heard[deaf] > 1e-3
        best = int((well.sum(0) + heard[deaf].mean(0)).argmax())
        if not well[:, best].any():
            raise MaskSparsityError(
                f"absorb: no channel of {group} can stand for the others at every place that reads "
                "them; use absorb='bias', or drive them to zero with ScheduledDecay"
            )
        carriers.append(best)
        deaf &= heard[:, best] <= 1e-3
    return carriers


@torch.no_grad()
def _fold(
    weight: Tensor, axis: int, position: Tensor, value: Tensor, into: Tensor, carried: Tensor
) -> None:
    """weight[into] := sum over the removed of weight * constant / carried.

    position [removed, k] and value [groups, removed, k] of what goes, `into` [k] and carried
    [groups, k] of what stays: k indices of the axis a channel, `groups` of the convolution.
    """
    flat = weight.movedim(axis, 1)
    for rows, constant, stays in zip(flat.chunk(len(value)), value, carried, strict=True):
        share = constant / stays
        for k in range(len(into)):
            scale = share[:, k].view(1, -1, *[1] * (rows.ndim - 2))
            rows[:, into[k]] = (rows[:, position[:, k]] * scale).sum(1)


@torch.no_grad()
def _into_biases(
    graph: ChannelGraph,
    constants: Constants,
    tensors: dict[str, Tensor],
    watch: _Inputs,
) -> None:
    for name, (axis, value) in constants.items():
        weight = tensors[name].movedim(axis, 1) if axis != 1 else tensors[name]
        groups = value.shape[0]
        kernel = weight.flatten(2).sum(2) if weight.ndim > 2 else weight
        kernel = kernel / watch.spread.get(name, 1)
        said = (kernel.view(groups, -1, kernel.shape[1]) * value[:, None]).sum(2).flatten()
        if not said.any():
            continue
        bias = watch.partner(watch.biases, name)
        mean = watch.partner(watch.means, name) if name in graph.behind else None
        if bias is not None and bias not in watch.otherwise:
            tensors[bias] += said
        elif mean is not None:
            tensors[mean] -= said
        else:
            raise MaskSparsityError(
                f"absorb: {name} has no bias of its own, and no norm of its own follows it, that "
                "could take the constants over; use absorb='exact'"
            )
