"""Drive channels to zero while training: one line in anybody's loop, `penalty.attach(optimizer)`.

Each penalty gathers the parameters it works on into one vector, so that a step costs a handful of
operations and one `torch._foreach_*` call however many layers there are. It reads nothing back to
the host, and leaves skipped steps of a GradScaler skipped.
"""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from itertools import groupby
from typing import Any, Self
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import MaskSparsityError
from ..tracing.network import named_tensors, unwrap
from .groups import ChannelGraph, expect_graph
from .mask import KeepMask
from .vector import Vector

KINDS = ("l1", "l2", "smooth_l1", "polarization")
POLARIZATION_T = 1.2  # its authors' value for CIFAR


class Penalty(ABC):
    """Base of the three forms: the parameters, where they are masked, and the optimizer."""

    tensors: dict[str, Tensor]
    masked: dict[str, Tensor]
    """Per parameter: 1 where it is driven to zero, 0 elsewhere; broadcasts to the parameter."""
    shows_mask = ""
    """What of its state is zero where nothing is driven to zero, and nowhere else."""
    reaches_zero = True  # exactly, if it is given the steps
    drives_buffers = False  # else one is like a frozen parameter

    def __init__(self, model: nn.Module, slots: Mapping[tuple[str, int], Tensor]):
        tensors = dict(named_tensors(unwrap(model)))
        self.tensors, self.masked = {}, {}
        for (name, axis), masked in slots.items():
            tensor = tensors[name]
            if not masked.any():
                continue
            driven = self.drives_buffers and not isinstance(tensor, nn.Parameter)
            if not (tensor.requires_grad or driven):
                raise MaskSparsityError(
                    f"{name} is frozen (requires_grad=False) but the mask wants it at zero; "
                    "unfreeze it, or keep its channels"
                )
            shape = [-1 if a == axis else 1 for a in range(tensor.ndim)]
            mask = masked.to(tensor.device, tensor.dtype).view(shape)
            both = self.masked.get(name)
            self.tensors[name] = tensor
            self.masked[name] = mask if both is None else torch.maximum(both, mask)
        kinds = {(t.device, t.dtype) for t in self.tensors.values()}
        self.vectors = [
            Vector(
                {n: t for n, t in self.tensors.items() if (t.device, t.dtype) == kind}, self.masked
            )
            for kind in sorted(kinds, key=str)
        ]
        self._optimizer: Optimizer | None = None
        self._handles: list[Any] = []

    def attach(self, optimizer: Optimizer) -> Self:
        """Act at every step of `optimizer` until `detach`, or until `prune` gives it to the slim
        model. Schedulers, AMP, accumulation and DDP need nothing more. Returns the penalty."""
        self.detach()
        while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
            optimizer = inner  # Accelerate's wrapper takes no hooks
        held = {id(p): k for k, group in enumerate(optimizer.param_groups) for p in group["params"]}
        for name, tensor in self.tensors.items():
            if id(tensor) not in held and isinstance(tensor, nn.Parameter):
                raise MaskSparsityError(f"the optimizer does not hold {name}; give it all of them")
        for v in self.vectors:
            runs = groupby(v.tensors, key=lambda t: held.get(id(t), 0))  # 0: a buffer
            v.runs = [(sum(t.numel() for t in run), group) for group, run in runs]
        self._optimizer = optimizer
        self._handles = [self._register(optimizer)]
        _attached.add(self)
        return self

    def detach(self) -> None:
        """Act no more."""
        for handle in self._handles:
            handle.remove()
        self._optimizer, self._handles = None, []

    def _register(self, optimizer: Optimizer) -> Any:
        return optimizer.register_step_post_hook(lambda *_: self.apply())

    @abstractmethod
    def apply(self) -> None:
        """One application, for loops that have their own place for it."""

    def state_dict(self) -> dict[str, Tensor]:
        """State for a checkpoint, by name: the tensors themselves, not copies."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint's `state_dict`.

        Raises:
            MaskSparsityError: it is of a penalty on another model or mask, or of another span.
        """
        own = self.state_dict()
        if own.keys() != state.keys() or not all(
            self._fits(key, value, state[key]) for key, value in own.items()
        ):
            raise MaskSparsityError("this state is of a penalty on another model or mask, or span")
        for key, value in own.items():
            value.copy_(state[key])

    def _fits(self, key: str, own: Tensor, other: Tensor) -> bool:
        if own.shape != other.shape or not key.startswith(f"{self.shows_mask}."):
            return own.shape == other.shape
        return torch.equal(own != 0, other.to(own.device) != 0)

    def _named(self, what: str, vectors: list[Tensor]) -> dict[str, Tensor]:
        return {
            f"{what}.{name}": part
            for v, vector in zip(self.vectors, vectors, strict=True)
            for name, part in zip(v.names, v.split(vector), strict=True)
        }

    def _skipped(self) -> Tensor | None:
        """1 where a fused optimizer skips this step because of an overflow (AMP)."""
        return getattr(self._optimizer, "found_inf", None)


_attached: WeakSet[Penalty] = WeakSet()


def release(optimizer: Optimizer) -> None:
    """Detach what is attached to an optimizer: it holds another model now."""
    for penalty in [p for p in _attached if p._optimizer is optimizer]:
        penalty.detach()


def _scale_slots(
    model: nn.Module, graph: ChannelGraph, keep: KeepMask | None, shifts: bool
) -> dict[tuple[str, int], Tensor]:
    """(norm parameter, 0) -> bool: which of its channels are masked."""
    expect_graph(graph)
    graph.check(model, keep)
    if not graph.norms:
        raise MaskSparsityError(
            "this model has no BatchNorm scales to penalise; use ScheduledDecay, which also drives "
            "filters to zero"
        )
    masked = [] if keep is None else [n for n, stays in keep.items() if not stays.all()]
    if bare := [name for name in masked if not graph.by_name[name].scales]:
        warnings.warn(
            f"masked channels of {', '.join(bare)} have no BatchNorm scale, and this penalty "
            "drives nothing else to zero; ScheduledDecay drives their filters, too",
            stacklevel=4,
        )
    slots = {}
    for norm in graph.norms:
        for name in (norm.weight, norm.bias if shifts else None):
            if name is not None:
                units = graph.slots[name, 0]
                slots[name, 0] = (
                    torch.ones_like(units, dtype=torch.bool)
                    if keep is None
                    else ~keep.slot(name, 0)
                )
    return slots


def _not_negative(strength: float) -> None:
    if not 0 <= strength < math.inf:
        raise MaskSparsityError(f"strength={strength}: at least 0, and finite")


class MaskedL1(Penalty):
    """`grad += strength * sign(gamma) * (1 - keep)` before the step: MaskSparsity as published
    (arXiv 2201.06776). With `keep=None` the global L1 of network slimming (arXiv 1708.06519).

    Args:
        kind: "l1"; "l2": `strength * gamma`; "smooth_l1": `strength * clamp(gamma / (lr *
            strength), -1, 1)`, which does not step over zero (needs `attach`); "polarization": the
            subgradient of `strength * (1.2 |g|_1 - |g - mean(g)|_1)`, g the magnitudes of all
            penalised scales (NeurIPS 2020), which spares those above their mean.

    Under momentum the scales hover about zero in a band of `lr * strength / (1 - momentum)` and
    the shifts are free: removal is not exact. `Proximal` and `ScheduledDecay` reach zero.
    """

    reaches_zero = False

    @torch.inference_mode(False)  # whose tensors no step could write to
    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        keep: KeepMask | None = None,
        strength: float = 5e-4,
        kind: str = "l1",
    ):
        if kind not in KINDS:
            raise MaskSparsityError(f"kind={kind!r}: use one of {', '.join(KINDS)}")
        _not_negative(strength)
        super().__init__(model, _scale_slots(model, graph, keep, shifts=False))
        self.kind, self.strength = kind, strength
        self.weights = [strength * v.masked for v in self.vectors]

    def _register(self, optimizer: Optimizer) -> Any:
        return optimizer.register_step_pre_hook(self._before)

    def _before(self, _: Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            self.apply()
            return None

        def penalised() -> Any:  # it clears the gradients that were there before the step
            loss = closure()
            self.apply()
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": penalised}
        return (args[0], penalised, *args[2:]), kwargs

    @torch.no_grad()
    def apply(self) -> None:
        # A fused optimizer is handed gradients that are still scaled.
        scaled = getattr(self._optimizer, "grad_scale", None)
        for v, weights in zip(self.vectors, self.weights, strict=True):
            torch.mul(self._direction(v), weights, out=v.out)
            if scaled is not None:
                v.out.mul_(scaled)
            grads = [(t.grad, d) for t, d in zip(v.tensors, v.parts, strict=True)]
            there = [(g, d) for g, d in grads if g is not None]
            if there:
                torch._foreach_add_(*map(list, zip(*there, strict=True)))

    def _direction(self, v: Vector) -> Tensor:
        scales = v.gather()
        if self.kind == "l1":
            return scales.sign_()
        if self.kind == "l2":
            return scales
        if self.kind == "polarization":
            share = v.masked / v.masked.sum()
            size = scales.abs()
            above = torch.sub(size, share.dot(size)).sign_()
            # The mean moves with every scale: the last term.
            return scales.sign_().mul_(POLARIZATION_T - above + share.dot(above))
        if self._optimizer is None:
            raise MaskSparsityError("smooth_l1 needs the learning rate: use attach(optimizer)")
        width = torch.full_like(scales, self.strength)
        scales /= v.times(width, self._optimizer, lambda group: group["lr"])
        return scales.nan_to_num_(0).clamp_(-1, 1)


class Proximal(Penalty):
    """Soft threshold of masked scales and shifts after each step, by `lr * strength / (1 -
    momentum)`, so that strength means the same as in the published form (ISTA, arXiv 1802.00124).
    Gives exact zeros; what has reached zero stays there.

    Optimizers without momentum, as Adam, take `lr * strength` in a step, which is little at the
    default: a scale of 1 is at zero after `1 / (lr * strength)` steps."""

    shows_mask = "pull"

    @torch.inference_mode(False)
    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        keep: KeepMask | None = None,
        strength: float = 5e-4,
    ):
        _not_negative(strength)
        super().__init__(model, _scale_slots(model, graph, keep, shifts=True))
        self.strength = strength
        # In units of the threshold: 0 free, 1 driven to zero, and out of reach once it got there.
        self.pull = [v.masked.clone() for v in self.vectors]

    @torch.no_grad()
    def apply(self) -> None:
        if self._optimizer is None:
            raise MaskSparsityError("Proximal needs the learning rate: use attach(optimizer)")
        skipped = self._skipped()
        for v, pull in zip(self.vectors, self.pull, strict=True):
            values, reach = v.gather(), v.times(pull, self._optimizer, self._reach)
            if skipped is not None:
                reach *= 1 - skipped
            torch.clamp(values, -reach, reach, out=v.out)
            torch.sub(values, v.out, out=v.out)
            torch._foreach_copy_(v.tensors, v.parts)
            # Finite, so that a learning rate of zero takes it to zero. (Comparisons would be slow.)
            far = torch.finfo(pull.dtype).max / 2
            arrived = (1 - v.out.sign().abs_()).mul_(v.masked)
            torch.maximum(pull, arrived.mul_(far), out=pull)

    def _reach(self, group: dict) -> Any:
        return group["lr"] * (self.strength / (1 - group.get("momentum", 0.0)))

    def state_dict(self) -> dict[str, Tensor]:
        return self._named("pull", self.pull)
