"""Masked channels to exactly zero by a given step, one after another."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import MaskSparsityError
from ..tracing.findings import extents
from ..tracing.network import named_tensors, unwrap
from . import scores
from .groups import ChannelGraph, expect_graph
from .mask import KeepMask
from .penalty import Penalty


class ScheduledDecay(Penalty):
    """Masked channels to exactly zero within `steps` optimizer steps.

    Scales, shifts, the filters of producers without a norm, and weights that read channels where
    zero does not stay zero (`graph.exposed`) are capped, after each step, at a share of the
    magnitude they had when this object was made; so are buffers that make channels, as those of
    FrozenBatchNorm2d do. Removal is exact from then on, with nothing to absorb. Momentum of what
    is zero is cleared.

    Args:
        span: share of the steps that one channel takes from its start to zero, linearly. The
            channels of a group go in turn, those of the smallest scale first. With 1 all go at
            once; then what the convolution and norm behind them do not see, a common factor, takes
            the kept scales of a heavily pruned layer down, too.
    """

    shows_mask = "turn"
    drives_buffers = True

    @torch.inference_mode(False)  # whose tensors no step could write to
    def __init__(
        self, model: nn.Module, graph: ChannelGraph, keep: KeepMask, steps: int, span: float = 0.25
    ):
        if not 1 <= steps < math.inf:
            raise MaskSparsityError(f"steps={steps}: at least 1")
        if not 0 < span <= 1:
            raise MaskSparsityError(f"span={span}: a share of the steps, above 0 and up to 1")
        if keep is None:  # which the other forms take
            raise MaskSparsityError("ScheduledDecay needs a mask of what goes to zero: keep=None")
        expect_graph(graph)
        graph.check(model, keep)
        own = dict(named_tensors(unwrap(model)))
        slots = {slot: ~keep.slot(*slot) for slot in graph.exposed if _speaks(own[slot[0]])}
        super().__init__(model, dict(sorted(slots.items())))
        self.steps, self.span = steps, span
        with torch.no_grad():
            self.start = [v.gather().abs() * v.masked for v in self.vectors]
        # Where nothing is masked the cap is infinite.
        self.free = [torch.zeros_like(m).masked_fill_(m == 0, torch.inf)
                     for m in (v.masked for v in self.vectors)]  # fmt: skip
        # Between what values may lie, in memory that lasts.
        self.bounds = [(torch.empty_like(v.out), torch.empty_like(v.out)) for v in self.vectors]
        # A channel begins at its turn * (1 - span) of the steps, and takes span of them.
        turns = 1 + _turns(model, graph, keep) * ((1 - span) / span)
        self.turn = [
            torch.cat([self._spread(turns, graph, name).reshape(-1) for name in v.names]) * v.masked
            for v in self.vectors
        ]
        device = self.vectors[0].masked.device if self.vectors else None
        self.step = torch.zeros((), dtype=torch.float32, device=device)
        self._span = torch.full_like(self.step, span)
        self._moments: tuple[Any, list[Tensor], list[Tensor]] | None = None

    def _spread(self, turns: Tensor, graph: ChannelGraph, name: str) -> Tensor:
        """The turn of every element of a parameter: of the first to go of the channels it is in."""
        tensor = self.tensors[name]
        turn = torch.full_like(tensor, torch.inf)
        for axis in range(tensor.ndim):
            if (name, axis) in graph.exposed:
                shape = [-1 if a == axis else 1 for a in range(tensor.ndim)]
                turn = torch.minimum(turn, turns[graph.slots[name, axis]].to(turn).view(shape))
        return turn

    @torch.no_grad()
    def apply(self) -> None:
        skipped = self._skipped()
        self.step += 1 if skipped is None else (1 - skipped).reshape(())
        # Rounding must not leave anything of the last ones.
        now = self.step / (self.steps * self.span)
        now.masked_fill_(self.step >= self.steps, torch.inf)
        for k, v in enumerate(self.vectors):
            low, high = self.bounds[k]
            share = torch.sub(self.turn[k], now, out=low).clamp_(0, 1)
            torch.addcmul(self.free[k], self.start[k], share, out=high)
            torch.clamp(v.gather(), torch.neg(high, out=low), high, out=v.out)
            torch._foreach_copy_(v.tensors, v.parts)
        if self._optimizer is not None:
            self._clear_momentum(self._optimizer)

    def _clear_momentum(self, optimizer: Optimizer) -> None:
        for v, (_, high) in zip(self.vectors, self.bounds, strict=True):
            torch.sign(high, out=v.out)  # 1 where momentum stays, 0 where nothing may
        # The lists last until the optimizer loads another state.
        if self._moments is None or self._moments[0] is not optimizer.state:
            found = [
                (value, part, tensor)
                for v in self.vectors
                for tensor, part in zip(v.tensors, v.parts, strict=True)
                for value in optimizer.state.get(tensor, {}).values()
                if isinstance(value, Tensor) and value.shape == tensor.shape
            ]
            moments, stays = [m for m, _, _ in found], [s for _, s, _ in found]
            parameters = sum(isinstance(t, nn.Parameter) for t in self.tensors.values())
            if len({id(tensor) for *_, tensor in found}) == parameters:
                self._moments = (optimizer.state, moments, stays)
        else:
            _, moments, stays = self._moments
        if moments:
            torch._foreach_mul_(moments, stays)

    def state_dict(self) -> dict[str, Tensor]:
        vectors = self._named("start", self.start) | self._named("turn", self.turn)
        return {"step": self.step, "span": self._span, **vectors}

    def _fits(self, key: str, own: Tensor, other: Tensor) -> bool:
        # By turns of another span the channels would go all at once, in the last step.
        return super()._fits(key, own, other) and (key != "span" or bool(own == other.to(own)))


def _speaks(tensor: Tensor) -> bool:
    """Whether it is more than a buffer of zeros, as a shortcut's padding is, or of one value."""
    if not tensor.is_floating_point() or isinstance(tensor, nn.Parameter):
        return tensor.is_floating_point()
    return bool(tensor.any()) and extents(tensor) == [*tensor.shape]


def _turns(model: nn.Module, graph: ChannelGraph, keep: KeepMask) -> Tensor:
    """float [units + 1]: when each masked unit begins to go, 0 first and 1 last; 1 for all else."""
    turns = torch.ones(graph.units + 1, dtype=torch.float32)
    by_scale = scores.scale(model, graph) if graph.norms else {}
    for name, score in (scores.norm(model, graph) | by_scale).items():
        gone = (~keep[name]).nonzero().squeeze(1)
        order = torch.argsort(score[gone], stable=True)
        in_turn = torch.linspace(0, 1, len(gone), dtype=turns.dtype)
        turns[graph.by_name[name].start + gone[order]] = in_turn
    return turns
