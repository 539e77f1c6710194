"""The cost of a model, counted and measured."""

import statistics
import time
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .channels.analysis import trace
from .channels.groups import ChannelGraph
from .channels.mask import KeepMask
from .channels.surgery import remove
from .errors import MaskSparsityError
from .tracing.network import arguments, copied, like, unwrap
from .tracing.state import evaluating, untouched


class Profile(NamedTuple):
    """Counted and measured cost of one forward in eval mode."""

    macs: int
    """per example"""
    params: int
    latency_ms: float
    """median of one forward on the given inputs, all examples of them"""
    latency_spread_ms: tuple[float, float]
    """first and third quartile"""
    memory_mib: float
    """most that is held at once in one forward: parameters, buffers, inputs and activations, not
    what kernels take for themselves"""
    layers: tuple[tuple[str, int], ...]
    """(module, MACs per example) in order of execution"""


def profile(model: nn.Module, example_inputs: Any, runs: int = 20) -> Profile:
    """Count MACs and parameters, and time `runs` forwards after a quarter as many to warm up.

    Latency is of this machine, now, with `torch.get_num_threads()` threads; compare two models in
    one process only.

    Raises:
        MaskSparsityError: fewer than two runs, which have no spread.
    """
    if runs < 2:
        raise MaskSparsityError(f"runs={runs}: at least 2, or their times have no spread")
    graph = trace(model, example_inputs)
    cost, kept = graph.cost(), graph.counter.sizes
    args, kwargs = arguments(example_inputs)
    times = _times(model, args, kwargs, runs)
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    macs = graph.counter.macs_per_layer(kept).tolist()
    return Profile(
        cost.macs,
        cost.params,
        statistics.median(times),
        (low, high),
        _memory_mib(model, args, kwargs),
        tuple((layer.module, round(m)) for layer, m in zip(graph.layers, macs, strict=True)),
    )


def _times(model: nn.Module, args: tuple, kwargs: dict, runs: int) -> list[float]:
    """ms of each of `runs` forwards in eval mode, after a quarter as many to warm up."""
    on_cuda = any(t.is_cuda for t in model.parameters())
    args, kwargs = copied((args, kwargs))
    times = []
    # Tensors of inference mode that a forward keeps could not be trained with.
    with evaluating(model.modules()), untouched(model), torch.no_grad():
        for k in range(-(runs // 4) - 1, runs):
            begin = time.perf_counter()
            model(*args, **kwargs)
            if on_cuda:
                torch.cuda.synchronize()
            if k >= 0:
                times.append(1e3 * (time.perf_counter() - begin))
    return times


def latency(model: nn.Module, graph: ChannelGraph, runs: int = 20) -> Callable[[KeepMask], float]:
    """A function from a mask to the measured latency in ms of what it leaves of `model`, on the
    traced example; for `select.budget(..., pruned_latency=0.3, latency=ms.latency(model, graph))`.
    """
    if runs < 1:
        raise MaskSparsityError(f"runs={runs}: at least 1")

    def measure(keep: KeepMask) -> float:
        args, kwargs = like(graph.example, model)
        return statistics.median(_times(remove(model, graph, keep), args, kwargs, runs))

    return measure


def _memory_mib(model: nn.Module, args: tuple, kwargs: dict) -> float:
    """Counted, so that of two models each is shown its own, whatever the process holds."""
    model, held = unwrap(model), _Held()
    args, kwargs = copied((args, kwargs))
    held.add(tree_leaves((*model.parameters(), *model.buffers(), args, kwargs)))
    with evaluating(model.modules()), untouched(model), torch.no_grad(), held:
        model(*args, **kwargs)
    return held.most / 2**20


class _Held(TorchDispatchMode):
    """Bytes of all storages that are alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen: dict[int, weakref.ref] = {}

    def add(self, values: Iterable[Any]) -> None:
        for tensor in values:
            if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
                continue
            storage = tensor.untyped_storage()
            known = self.seen.get(storage._cdata)
            if known is None or known() is None:
                size = storage.nbytes()
                self.seen[storage._cdata] = weakref.ref(storage, partial(self.free, size))
                self.now += size
        self.most = max(self.most, self.now)

    def free(self, size: int, _: weakref.ref) -> None:
        self.now -= size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.add(tree_leaves(out))
        return out
