"""What a model costs, counted and measured."""

import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from .channels.analysis import trace
from .channels.groups import ChannelGraph
from .channels.mask import KeepMask
from .channels.surgery import remove
from .errors import MaskSparsityError
from .tracing.network import arguments, evaluating, like


class Profile(NamedTuple):
    """Counted and measured cost of one forward in eval mode."""

    macs: int
    """per example"""
    params: int
    latency_ms: float
    """median of one forward on the given inputs"""
    latency_spread_ms: tuple[float, float]
    """first and third quartile"""
    memory_mb: float
    """peak: allocated on the device (CUDA), or resident of the whole process (CPU)"""
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
    on_cuda = any(t.is_cuda for t in model.parameters())
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    times = _times(model, args, kwargs, runs)
    low, _, high = statistics.quantiles(times, n=4)
    macs = graph.counter.macs_per_layer(kept).tolist()
    return Profile(
        cost.macs,
        cost.params,
        statistics.median(times),
        (low, high),
        _peak_memory_mb(on_cuda),
        tuple((layer.module, round(m)) for layer, m in zip(graph.layers, macs, strict=True)),
    )


def _times(model: nn.Module, args: tuple, kwargs: dict, runs: int) -> list[float]:
    """ms of each of `runs` forwards in eval mode, after a quarter as many to warm up."""
    on_cuda = any(t.is_cuda for t in model.parameters())
    times = []
    with evaluating(model.modules()), torch.inference_mode():
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

    def measure(keep: KeepMask) -> float:
        args, kwargs = like(graph.example, model)
        return statistics.median(_times(remove(model, graph, keep), args, kwargs, runs))

    return measure


def _peak_memory_mb(on_cuda: bool) -> float:
    if on_cuda:
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
