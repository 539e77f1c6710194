"""Trace, mask and prune half of every layer: ours against Torch-Pruning, net by net, in one run.

Claim: trace no slower than the peer summed over the table and at most 1.25 times on any net; prune,
the proof apart, under 120 ms (vgg16_bn 300 ms, densenet201 1 s). Batch 1, ImageNet size (CIFAR size
for resnet110-B). The two trace one right after the other, then each prunes: a ratio is the median
of those of the turns, since the machine's speed may change from one to the next. The peer's trace
builds its DependencyGraph; its prune is the step of a pruner that is built already.

    python benchmarks/graph.py --repeats 9 --json results/graph.json       # about ten minutes
    python benchmarks/graph.py --cpu-time     # on a busy machine: seconds of this process alone
"""

import argparse
import copy
import gc
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
import torchvision
from machine import about, finish, quartiles, tell
from torch import nn

import masksparsity as ms
from masksparsity.channels import surgery

NETS = (
    "resnet18", "resnet50", "densenet121", "densenet201", "mobilenet_v2", "efficientnet_b0",
    "vgg16_bn", "resnet110-B", "resnet50-user",
)  # fmt: skip
PRUNE_MS = {"vgg16_bn": 300.0, "densenet201": 1000.0}  # others 120
TRACE_RATIO = 1.25
OURS, PEER = ("trace", "mask", "prune", "proof"), ("peer_trace", "peer_prune")

Times = dict[str, list[float]]


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    if name == "resnet110-B":
        return ms.models.create("resnet110", shortcut="B"), torch.randn(1, 3, 32, 32)
    name, user, _ = name.partition("-user")
    model = torchvision.models.get_model(name, weights=None)
    if user:  # as if somebody had written it: traced with its values, in training too, and tried
        model.__class__ = type("Mine", (type(model),), {"__module__": "user"})
    return model, torch.randn(1, 3, 224, 224)


def measure(clock: Callable[[], float], times: Times, key: str, work: Callable, *args: Any) -> Any:
    if key != "proof":  # which runs inside of prune
        gc.collect()  # each pays for its own cycles, not for what the other left
    begin = clock()
    out = work(*args)
    times.setdefault(key, []).append(1e3 * (clock() - begin))
    return out


def ours(
    clock: Callable[[], float], times: Times, model: nn.Module, graph: ms.ChannelGraph
) -> None:
    keep = measure(
        clock, times, "mask", lambda: ms.select.uniform(graph, ms.scores.scale(model, graph), 0.5)
    )
    prove = surgery.prove
    surgery.prove = lambda *args: measure(clock, times, "proof", prove, *args)
    try:
        measure(clock, times, "prune", ms.prune, model, graph, keep)
    finally:
        surgery.prove = prove
    times["prune"][-1] -= times["proof"][-1]


def peer(clock: Callable[[], float], times: Times, model: nn.Module, x: torch.Tensor) -> None:
    pruner = tp.pruner.MagnitudePruner(
        copy.deepcopy(model),
        x,
        tp.importance.MagnitudeImportance(),
        pruning_ratio=0.5,
        ignored_layers=[[m for m in model.modules() if isinstance(m, nn.Linear)][-1]],
    )
    measure(clock, times, "peer_prune", pruner.step)


def row(name: str, clock: Callable[[], float], repeats: int) -> dict[str, Any]:
    model, x = build(name)
    times: Times = {}
    for k in range(repeats + 1):
        theirs = k <= 1 or sum(times["peer_prune"]) < 30_000  # a densenet201 takes them 15 s
        graph = measure(clock, times, "trace", ms.trace, model, x)
        if theirs:
            measure(clock, times, "peer_trace", tp.DependencyGraph().build_dependency, model, x)
        ours(clock, times, model, graph)
        if theirs:
            peer(clock, times, model, x)
        if k == 0:  # warm-up
            times.clear()
    found: dict[str, Any] = {"net": name}
    for key in (*OURS, *PEER):
        low, middle, high = quartiles(times[key])
        found[key] = {"median_ms": middle, "quartiles_ms": [low, high], "n": len(times[key])}
    for key in ("trace", "prune"):
        pairs = zip(times[key], times[f"peer_{key}"], strict=False)  # theirs may be fewer
        low, found[f"{key}_ratio"], high = quartiles([a / b for a, b in pairs])
        found[f"{key}_ratio_quartiles"] = [low, high]
    return found


def cell(value: dict[str, Any]) -> str:
    spread = (value["quartiles_ms"][1] - value["quartiles_ms"][0]) / 2
    return f"{value['median_ms']:9.1f} ±{spread:6.1f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", default=NETS, choices=NETS)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true", help="time of this process, not of day")
    parser.add_argument("--json", type=Path, help="write the table here, too")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    facts = about("torchvision", "torch-pruning")
    facts["clock"] = "CPU time" if options.cpu_time else "wall time"
    tell(facts)
    print("milliseconds: median ± half the distance of the quartiles; ratio: ours over the peer's")
    print(f"{'net':16}" + "".join(f"{key:>17}" for key in (*OURS, *PEER)) + "  trace ratio   prune")
    rows, missed = [], []
    for name in options.nets:
        found = row(name, time.process_time if options.cpu_time else time.perf_counter,
                    options.repeats)  # fmt: skip
        rows.append(found)
        cells = "".join(cell(found[key]) for key in (*OURS, *PEER))
        ratio = found["trace_ratio"]
        print(f"{name:16}{cells}{ratio:13.2f}{found['prune_ratio']:8.3f}", flush=True)
        if ratio > TRACE_RATIO or found["prune"]["median_ms"] > PRUNE_MS.get(name, 120):
            missed.append(name)
    table = [r for r in rows if not r["net"].endswith("-user")]  # as the peer has it
    total = {key: sum(r[key]["median_ms"] for r in table) for key in (*OURS, *PEER)}
    sums = "".join(f"{total[key]:9.1f}        " for key in (*OURS, *PEER))
    ratio = total["trace"] / total["peer_trace"]
    print(f"{'sum':16}{sums}{ratio:13.2f}{total['prune'] / total['peer_prune']:8.3f}")
    missed += ["the sum of traces"] if ratio > 1 else []
    return finish(facts, rows, missed, options.json)


if __name__ == "__main__":
    sys.exit(main())
