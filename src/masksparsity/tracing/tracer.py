"""The labels of one network: which element of which tensor belongs to which channel.

Beside each tensor travel `Labels`: integer ids, one per element, kept *broadcast* (size 1 along
every axis where they do not vary), so that following a network costs little more than running it.
Parameters and buffers get labels per axis when an operation first uses them. What each operation
does to labels is the table in `rules.py`; what it does not know is protected.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..errors import MaskSparsityError
from .findings import LOOSE, Findings, lengths
from .labels import ANONYMOUS, NOTHING, Labels, Reason, Slot
from .memory import BLANK, VIEWED, Memory, is_viewed, root
from .network import keepers, tensors_in, tensors_of
from .origins import ORIGIN, WRITTEN, Origins
from .state import kept_by

_DECIDING = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero")
_LABELS = "_masksparsity_labels"
_NO_IDS = torch.zeros(0, dtype=torch.int64)
FOLD = "fold it first, with remove_parametrizations, remove_weight_norm or remove_spectral_norm"
WRITTEN_TO = "a parameter or buffer is written in forward"
UNKNOWN = "meets a tensor whose channels are unknown"

Rule = Callable[["Tracer", str, Any, Any, Any, bool], None]
"""`rule(tracer, operation, args, kwargs, out, inplace)`, called after the operation ran."""


class Tracer(Findings):
    """The labels of a model and of the tensors in its forward, and what rules may say of them.

    With `given` (slot -> ids) the labels of all parameters are known beforehand: nothing is united
    or protected, and only the records count. That is how the proof replays a slim model.
    """

    def __init__(
        self,
        model: nn.Module,
        rules: Mapping[str, Rule],
        given: dict[Slot, Tensor] | None = None,
        made_up: bool = False,
        theirs: bool = True,
    ):
        super().__init__(given is not None)
        self.rules = rules
        self.made_up = made_up  # convolutions give ones: where channels go, values seldom decide
        self.modules = dict(model.named_modules())
        self.tensors = dict(tensors_of(self.modules.items()))
        kinds = [(n, t) for n, t in self.tensors.items() if type(t) is not Tensor]  # soon told
        tables = [m._parameters for m in self.modules.values() if type(m._parameters) is not dict]
        scripted = {id(p) for table in tables for p in table.values() if type(p) is Tensor}
        self.parameters = [n for n, t in kinds if isinstance(t, nn.Parameter)]
        if scripted:  # in a copy
            self.parameters += [n for n, t in self.tensors.items() if id(t) in scripted]
        if lazy := next((n for n, t in kinds if is_lazy(t)), None):
            raise MaskSparsityError(f"{lazy} has no shape yet: run the model once first")
        self.shapes = {name: tensor.shape for name, tensor in self.tensors.items()}
        self.names = {id(tensor): name for name, tensor in self.tensors.items()}
        self.paths = {id(module): name for name, module in self.modules.items()}
        self.failed: str | None = None  # the module whose forward raised
        self.fault: tuple[Exception | None, list[Tensor]] = (None, [])
        self.slots: dict[Slot, Tensor] = dict(given or {})
        self._placed: dict[tuple[int, int, int], Tensor] = {}
        self.flats: dict[int, Tensor] = {}
        # Labels of all filters, made in one go: many small tensors take time.
        sizes = {(n, 0): shape[0] for n, shape in self.shapes.items() if len(shape) > 1}
        self.count = ANONYMOUS + 1 + sum(sizes.values())
        fresh, lengths = torch.arange(ANONYMOUS + 1, self.count), [*sizes.values()]
        self.fresh = dict(zip(sizes, fresh.split(lengths), strict=True))
        maps = fresh.view(1, -1, 1, 1).split(lengths, 1)  # as images have them
        for flat, ids in zip(self.fresh.values(), maps, strict=True):
            self._place(flat, ids, 1)
        self.token = object()
        self.keepers = keepers(self.modules.values(), theirs)
        self.memory = Memory(self.names, lambda: kept_by(self.keepers))
        self.sources = Origins(self.names)
        self.silent: dict[int, Tensor | None] = {}  # by id: a label, if no channel comes out
        self._own: dict[str, tuple[Labels, ...]] = {}

    def labels(self, tensor: Tensor) -> tuple[Labels, ...]:
        """The labels of a tensor; a parameter's are handed out at its first use."""
        name = self.names.get(id(tensor))
        if name is None:
            # A tensor that the model keeps may still carry what an earlier run put there.
            whose, labels = getattr(tensor, _LABELS, (None, ()))
            return labels if whose is self.token else ()
        if name not in self._own:
            self._own[name] = tuple(
                Labels(self.along(self.slot(name, axis, size), axis, tensor.ndim),
                       frozenset({axis}), True, frozenset({(name, axis)}))
                for axis, size in enumerate(tensor.shape)
                if self._labelled((name, axis))
            )  # fmt: skip
        return self._own[name]

    def is_labelled(self, tensor: Any) -> bool:
        """Whether it carries labels, be they of an earlier trace."""
        return hasattr(tensor, _LABELS)

    def along(self, flat: Tensor, axis: int, ndim: int) -> Tensor:
        """1-D ids along one of `ndim` axes. The same ids give the same tensor, and `flat` gives
        them back: one `is` tells then, from here to the proof, what would take comparing."""
        key = (id(flat), axis, ndim)
        if key not in self._placed:
            self._place(flat, flat.view((1,) * axis + (-1,) + (1,) * (ndim - axis - 1)), axis)
        return self._placed[key]

    def flat(self, ids: Tensor, axis: int) -> Tensor:
        """Of ids along one axis: 1-D."""
        if id(ids) not in self.flats:
            self._place(ids.reshape(-1), ids, axis)
        return self.flats[id(ids)]

    def _place(self, flat: Tensor, ids: Tensor, axis: int) -> None:
        self._placed[id(flat), axis, ids.ndim], self.flats[id(ids)] = ids, flat

    def slot(self, name: str, axis: int, size: int) -> Tensor:
        """The ids of one axis of a parameter, fresh ones if it has none yet."""
        slot = (name, axis)
        if slot not in self.slots:
            if slot not in self.fresh:
                self.fresh[slot] = torch.arange(self.count, self.count + size)
                self.count += size
            self.slots[slot] = self.fresh[slot]
        return self.slots[slot]

    def set(self, out: Tensor, labels: Iterable[Labels], inplace: bool = False) -> None:
        """Give a tensor its labels, in place of those it had."""
        labels = tuple(labels)
        if inplace and id(out) in self.names:
            # Such as running statistics: where zero stays zero, later forwards find what they know.
            self.pin([m for m in labels if not m.clean], WRITTEN_TO)
            return
        if inplace and is_viewed(out):
            # Others see the same memory and still believe that its zeros stay zero.
            self.pin([m for m in labels if not m.clean], "a view is overwritten")
        if labels or self.is_labelled(out):
            setattr(out, _LABELS, (self.token, labels))

    def suspect(self, tensor: Tensor) -> None:
        """Code outside of PyTorch may fill it: the proof compares its values where it is read."""
        if tensor.layout == torch.strided:
            self.suspects[id(root(tensor))] = root(tensor)

    def spoil(self, labels: Iterable[Labels], why: str) -> None:
        """Channels are protected if those that own these have to be zero."""
        slots = frozenset().union(*(m.sources for m in labels))
        self.spoilt |= dict.fromkeys(slots, Reason(why, self.operation, self.module))

    def read(
        self, tensor: Tensor, axis: int, elsewhere: str | None = None
    ) -> tuple[Tensor, Labels | None]:
        """What a consumer sees along one axis of its input: 1-D ids, and the labels they are from.

        Labels that also vary along other axes (a pixel shuffle) are united there; two labels on one
        element (an outer product) or none along this axis give anonymous ids. `elsewhere`: why
        labels along other axes alone are protected, if they are.
        """
        axis %= tensor.ndim
        found = self.labels(tensor)
        if not found and (zeros := self.zeros_of(tensor, axis)):
            found = (zeros,)
        if len(found) == 1 and len(found[0].axes) == 1 and axis in found[0].axes:
            return self.flat(found[0].ids, axis), found[0]  # nearly always
        along = [m for m in found if axis in m.axes]
        if elsewhere and len(along) < len(found):
            self.pin([m for m in found if axis not in m.axes], elsewhere)
        if len(along) != 1:
            self.pin(along, "two channels meet on one element")
            return torch.zeros(tensor.shape[axis], dtype=torch.int64), None
        (m,) = along
        if len(m.axes) == 1:
            return self.flat(m.ids, axis), m
        flat = m.ids.movedim(axis, 0).reshape(tensor.shape[axis], -1)
        self.unite(flat, flat[:, :1])
        return flat[:, 0], m

    def zeros_of(self, tensor: Tensor, axis: int) -> Labels | None:
        """Labels for zeros that forward made, such as a first hidden state: channels of their own,
        until they meet those that take their place later. None for any other tensor."""
        size = tensor.shape[axis]
        if self.given and self._next_zeros() not in self.slots:
            return None
        if (size == 1 and not self.given) or not self.memory.is_zero(tensor, _NO_IDS):
            return None  # a lone one broadcasts
        ids = self.fresh_zeros(size)
        if not ids.any():
            return None
        self.memory.is_zero(tensor, ids)  # again: now it is known which channels count on it
        for module in self.around():
            self.cut(ids[None], (), module=module)
        return Labels(self.along(ids, axis, tensor.ndim), frozenset({axis}))

    def fresh_zeros(self, size: int) -> Tensor:
        """Ids for so many channels of zeros that forward makes; in the proof those that it had
        before, or anonymous ones if there are others."""
        slot = self._next_zeros()
        ids = self.slots.get(slot) if self.given else self.slot(*slot, size)
        self.zeros.append(_NO_IDS if ids is None else ids)
        return torch.zeros(size, dtype=torch.int64) if ids is None or len(ids) != size else ids

    def _next_zeros(self) -> Slot:
        return f"zeros {len(self.zeros)}", 0

    def around(self) -> list[str]:
        """The modules that run now: any of them may have a width in an attribute."""
        path = self.module.split(".")
        return [".".join(path[:k]) for k in range(len(path) + 1)]

    def consume(
        self, tensor: Tensor, axis: int, weight: Tensor, into: int, elsewhere: str | None = None
    ) -> tuple[Tensor, Labels | None]:
        """`read`, by something that sums over the channels, along axis `into` of a weight: what is
        removed must have been zero, or the weight is."""
        ids, m = self.read(tensor, axis, elsewhere)
        if m is not None:
            self._sum(m, NOTHING if m.clean else self.in_slots(weight, into))
        return ids, m

    def swallow(self, m: Labels) -> None:
        """Something without weights of its own sums over the channels."""
        self._sum(m)
        self.swallowed.append(m.ids)

    def _sum(self, m: Labels, by: frozenset[Slot] = NOTHING) -> None:
        self.expose([m])
        if m.clean:
            return
        if by and m.finite and all(map(self._labelled, by)):
            self.shut |= by
        else:
            self.pin(m.ids, "zero does not stay zero on the way here")

    def meet(self, tensor: Tensor | None, axis: int, ids: Tensor) -> None:
        """Channels `ids` arrive at one axis of a weight: its slot takes their labels over."""
        if tensor is None:
            return
        name = self.names.get(id(tensor))
        if name is None:  # the proof asks how it lies
            lying, m = self.read(tensor, axis)
            self.record((m,) if m else ())
            self.unite(lying, ids)
            if m is None:
                self.pin(ids, UNKNOWN)
            return
        self.touched.add(name)
        slot = (name, axis)
        own = self.slots.get(slot)
        if own is None and self._labelled(slot):
            self.slots[slot] = ids
        elif own is not None:
            self.unite(own, ids)

    def out_ids(self, tensor: Tensor, axis: int) -> tuple[Tensor, frozenset[Slot], bool]:
        """The ids that a weight hands out along its output axis, the slots behind them, and
        whether its filters are zero when those are."""
        name = self.names.get(id(tensor))
        if name is None:
            ids, m = self.read(tensor, axis)
            return (ids, m.sources, m.clean) if m else (ids, NOTHING, True)
        if not self._labelled((name, axis)):
            return torch.zeros(tensor.shape[axis], dtype=torch.int64), NOTHING, True
        return self.slot(name, axis, tensor.shape[axis]), frozenset({(name, axis)}), True

    def is_clean(self, tensor: Tensor | None, axis: int) -> bool:
        """Whether a weight or bias is zero along an axis wherever its producers are. One that is
        computed need not be."""
        if tensor is None or id(tensor) in self.names:
            return True
        return all(m.clean for m in self.labels(tensor) if axis in m.axes)

    def in_slots(self, tensor: Tensor | None, axis: int) -> frozenset[Slot]:
        """The slots that a weight or bias has along an axis; of a computed one, its sources."""
        if tensor is None:
            return NOTHING
        name = self.names.get(id(tensor))
        if name is not None:
            self.touched.add(name)
            return frozenset({(name, axis)})
        self.foreign |= isinstance(tensor, nn.Parameter)
        return frozenset().union(*(m.sources for m in self.labels(tensor) if axis in m.axes))

    def unknown(self, args: Any, kwargs: Any, out: Any) -> None:
        """Protect all that flows in; what comes out has no channels that we know."""
        self.mattered = True
        self.decided |= self.operation in _DECIDING
        found = [m for t in tensors_in((args, kwargs)) for m in self.labels(t)]
        for tensor in tensors_in((args, kwargs)):  # it may write, or show its memory
            self.memory.overwrite(tensor)
        # What it computes may follow from the width of a tensor of ones.
        sizes = [n for t in tensors_in((args, kwargs)) if not self.labels(t) for n in lengths(t)]
        if found or sizes:
            self.record(found, sizes)
        self.expose(found)
        hooks = getattr(self.modules.get(self.module), "_forward_pre_hooks", {}).values()
        makes = any(isinstance(h, (SpectralNorm, WeightNorm)) for h in hooks)
        computed = makes or ".parametrizations." in self.module
        self.pin(found, f"counts into a weight: {FOLD}" if computed else "unknown operation")
        for tensor in tensors_in(out):
            if tensor._is_view():
                self.memory.share(root(tensor))
            self.set(tensor, ())
            self.memory.blank(tensor, frozenset())

    def blame(self, error: Exception, args: Any) -> None:
        """Keep what flowed into the operation that raised; the innermost of those passing it on."""
        if self.fault[0] is not error:
            flowing = [x for x in tensors_in(args) if id(x) not in self.names]
            self.fault = (error, [m.ids for x in flowing for m in self.labels(x)])

    def forget(self) -> None:
        """Take off what travels beside tensors: those that live on, wherever, carry nothing."""
        for reference in (*self.sources.made, *self.memory.shared):
            if (tensor := reference()) is not None:
                for key in (_LABELS, ORIGIN, WRITTEN, LOOSE, VIEWED, BLANK):
                    vars(tensor).pop(key, None)
        self.sources.made, self.memory.shared = [], []

    def _labelled(self, slot: Slot) -> bool:
        # Of weights with a kernel only the two channel axes; an axis of size 1 broadcasts. What
        # varies along one axis alone, as a scale does, has no kernel.
        if self.given:
            return slot in self.slots
        name, axis = slot
        tensor, shape = self.tensors[name], self.shapes[name]
        channels = axis < 2 or len(shape) == 3 or shape[axis] == shape.numel()
        return shape[axis] > 1 and channels and tensor.is_floating_point()

    def untouched(self) -> tuple[str, ...]:
        """The parameters that no operation used."""
        return tuple([n for n in self.parameters if n not in self.touched and n not in self._own])
