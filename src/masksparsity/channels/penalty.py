"""Drive channels to zero while training: one line in anybody's loop, `penalty.attach(optimizer)`.

Each penalty costs a handful of `torch._foreach_*` calls a step, however many layers there are,
reads nothing back to the host, and leaves skipped steps of a GradScaler skipped.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .errors import MaskSparsityError
from .groups import ChannelGraph
from .mask import KeepMask
from .trace import named_tensors


class Penalty:
    """What the three forms share: the parameters, where they are masked, and the optimizer."""

    tensors: dict[str, Tensor]
    masked: dict[str, Tensor]
    """Per parameter: 1 where it is driven to zero, 0 elsewhere; broadcasts to the parameter."""

    def __init__(self, model: nn.Module, slots: Mapping[tuple[str, int], Tensor]):
        tensors = dict(named_tensors(model))
        self.tensors, self.masked = {}, {}
        for (name, axis), masked in slots.items():
            tensor = tensors[name]
            if masked.any() and tensor.requires_grad:
                shape = [-1 if a == axis else 1 for a in range(tensor.ndim)]
                mask = masked.to(tensor.device, tensor.dtype).view(shape)
                both = self.masked.get(name)
                self.tensors[name] = tensor
                self.masked[name] = mask if both is None else torch.maximum(both, mask)
        frozen = [n for (n, _), m in slots.items() if m.any() and not tensors[n].requires_grad]
        if frozen:
            raise MaskSparsityError(
                f"{frozen[0]} is frozen (requires_grad=False) but the mask wants it at zero; "
                "unfreeze it, or keep its channels"
            )
        self._optimizer: Optimizer | None = None
        self._handles: list[Any] = []

    def attach(self, optimizer: Optimizer) -> None:
        """Act at every step of `optimizer` until `detach`. Schedulers, AMP, accumulation and DDP
        need nothing more."""
        self.detach()
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, tensor in self.tensors.items():
            if id(tensor) not in held:
                raise MaskSparsityError(f"the optimizer does not hold {name}; give it all of them")
        self._optimizer = optimizer
        self._handles = [self._register(optimizer)]

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._optimizer, self._handles = None, []

    def _register(self, optimizer: Optimizer) -> Any:
        return optimizer.register_step_post_hook(lambda *_: self.apply())

    def apply(self) -> None:
        """One application, for loops that have their own place for it."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        own = self.state_dict()
        if own.keys() != state.keys():
            raise MaskSparsityError("this state belongs to a penalty on another model or mask")
        for key, value in own.items():
            value.copy_(state[key])

    def _skipped(self) -> Tensor | None:
        """1 where a fused optimizer skips this step because of an overflow (AMP)."""
        return getattr(self._optimizer, "found_inf", None)


def _scale_slots(
    model: nn.Module, graph: ChannelGraph, keep: KeepMask | None, shifts: bool
) -> dict[tuple[str, int], Tensor]:
    """(norm parameter, 0) -> bool: which of its channels are masked."""
    graph.check(model)
    if not graph.norms:
        raise MaskSparsityError(
            "this model has no BatchNorm scales to penalise; use ScheduledDecay, which also drives "
            "filters to zero"
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


class MaskedL1(Penalty):
    """`grad += strength * sign(gamma) * (1 - keep)` before the step: MaskSparsity as published
    (arXiv 2201.06776). With `keep=None` the global L1 of network slimming (arXiv 1708.06519).

    Args:
        kind: "l1"; "l2": `strength * gamma`; "smooth_l1": `strength * clamp(gamma / (lr *
            strength), -1, 1)`, which does not step over zero (needs `attach`).

    Under momentum the scales hover about zero in a band of `lr * strength / (1 - momentum)` and
    the shifts are free: removal is not exact. `Proximal` and `ScheduledDecay` reach zero.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        keep: KeepMask | None = None,
        strength: float = 5e-4,
        kind: str = "l1",
    ):
        if kind not in ("l1", "l2", "smooth_l1"):
            raise MaskSparsityError(f"kind={kind!r}: use 'l1', 'l2' or 'smooth_l1'")
        super().__init__(model, _scale_slots(model, graph, keep, shifts=False))
        self.kind, self.strength = kind, strength
        self.weights = {name: strength * masked for name, masked in self.masked.items()}

    def _register(self, optimizer: Optimizer) -> Any:
        return optimizer.register_step_pre_hook(lambda *_: self.apply())

    @torch.no_grad()
    def apply(self) -> None:
        names = [name for name, tensor in self.tensors.items() if tensor.grad is not None]
        if not names:
            return
        scales = [self.tensors[name] for name in names]
        if self.kind == "l1":
            direction = list(torch._foreach_sign(scales))
        elif self.kind == "l2":
            direction = [s.clone() for s in scales]
        else:
            if self._optimizer is None:
                raise MaskSparsityError("smooth_l1 needs the learning rate: use attach(optimizer)")
            rates = _rates(self._optimizer)
            direction = [
                (s / (rates[id(s)][0] * self.strength)).nan_to_num_(0).clamp_(-1, 1) for s in scales
            ]
        torch._foreach_mul_(direction, [self.weights[name] for name in names])
        # A fused optimizer is handed gradients that are still scaled.
        factor = getattr(self._optimizer, "grad_scale", None)
        if factor is not None:
            torch._foreach_mul_(direction, factor)
        torch._foreach_add_([s.grad for s in scales if s.grad is not None], direction)


class Proximal(Penalty):
    """Soft threshold of masked scales and shifts after each step, by `lr * strength / (1 -
    momentum)`, so that strength means the same as in the published form (ISTA, arXiv 1802.00124).
    Gives exact zeros; what has reached zero stays there."""

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        keep: KeepMask | None = None,
        strength: float = 5e-4,
    ):
        super().__init__(model, _scale_slots(model, graph, keep, shifts=True))
        self.strength = strength
        self.alive = {name: torch.ones_like(tensor) for name, tensor in self.tensors.items()}

    @torch.no_grad()
    def apply(self) -> None:
        if self._optimizer is None:
            raise MaskSparsityError("Proximal needs the learning rate: use attach(optimizer)")
        tensors, alive = list(self.tensors.values()), list(self.alive.values())
        rates = _rates(self._optimizer)
        skipped = self._skipped()
        steps = []
        for tensor in tensors:
            lr, momentum = rates[id(tensor)]
            step = lr * (self.strength / (1 - momentum))
            steps.append(step if skipped is None else step * (1 - skipped))
        reach = (
            torch._foreach_mul(list(self.masked.values()), steps)
            if not isinstance(steps[0], Tensor)
            else [m * s for m, s in zip(self.masked.values(), steps, strict=True)]
        )
        pull = torch._foreach_minimum(tensors, reach)
        torch._foreach_neg_(reach)
        torch._foreach_maximum_(pull, reach)
        torch._foreach_sub_(tensors, pull)
        torch._foreach_mul_(tensors, alive)
        # Zero after the threshold and masked: no more alive. (Kept ones are not counted.)
        nonzero = torch._foreach_abs(torch._foreach_sign(tensors))
        torch._foreach_maximum_(nonzero, [1 - m for m in self.masked.values()])
        torch._foreach_mul_(alive, nonzero)

    def state_dict(self) -> dict[str, Tensor]:
        return {f"alive.{name}": value for name, value in self.alive.items()}


class ScheduledDecay(Penalty):
    """Every producer of a masked channel to exactly zero within `steps` optimizer steps.

    Scales, shifts and the filters of producers without a norm are capped, after each step, at
    `max(0, 1 - step / steps)` times the magnitude they had when this object was made. Removal is
    exact from then on, with nothing to absorb. Momentum of what is zero is cleared.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph, keep: KeepMask, steps: int):
        if steps < 1:
            raise MaskSparsityError(f"steps={steps}: at least 1")
        graph.check(model)
        slots = {slot: ~keep.slot(*slot) for slot in graph.exposed if slot[0] in graph.parameters}
        super().__init__(model, dict(sorted(slots.items())))
        self.steps = steps
        self.start = {
            name: tensor.detach().abs() * self.masked[name] for name, tensor in self.tensors.items()
        }
        # Where nothing is masked the cap is infinite.
        self.free = {
            name: torch.zeros_like(m).masked_fill_(m == 0, torch.inf)
            for name, m in self.masked.items()
        }
        device = next(iter(self.tensors.values())).device if self.tensors else None
        self.step = torch.zeros((), device=device)

    @torch.no_grad()
    def apply(self) -> None:
        if not self.tensors:
            return
        skipped = self._skipped()
        self.step += 1 if skipped is None else (1 - skipped).reshape(())
        share = (1 - self.step / self.steps).clamp_(min=0)
        tensors = list(self.tensors.values())
        cap = torch._foreach_mul(list(self.start.values()), share)
        torch._foreach_add_(cap, list(self.free.values()))
        torch._foreach_minimum_(tensors, cap)
        torch._foreach_neg_(cap)
        torch._foreach_maximum_(tensors, cap)
        self._clear_momentum(share)

    def _clear_momentum(self, share: Tensor) -> None:
        if self._optimizer is None:
            return
        moments, masks = [], []
        for name, tensor in self.tensors.items():
            for value in self._optimizer.state[tensor].values():
                if isinstance(value, Tensor) and value.shape == tensor.shape:
                    moments.append(value)
                    masks.append(self.masked[name])
        if moments:  # x -= x * masked * (share == 0)
            gone = torch._foreach_mul(masks, (share == 0).to(masks[0].dtype))
            torch._foreach_addcmul_(moments, moments, gone, value=-1)

    def state_dict(self) -> dict[str, Tensor]:
        return {"step": self.step, **{f"start.{n}": value for n, value in self.start.items()}}


def _rates(optimizer: Optimizer) -> dict[int, tuple[Any, float]]:
    """id of a parameter -> (learning rate, momentum)."""
    return {
        id(p): (group["lr"], group.get("momentum", 0.0))
        for group in optimizer.param_groups
        for p in group["params"]
    }
