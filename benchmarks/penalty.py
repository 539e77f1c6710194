"""What a penalty adds to a step, against a plain foreach `s * sign(gamma)` in the same run.

Claim: each costs at most 1.5 times the three plain calls (sign, times s, add to the gradient) on
all BatchNorm scales. Half of every layer is masked. The contestants take turns.

    python benchmarks/penalty.py --repeats 200 --json results/penalty.json
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from machine import about, finish, quartiles, tell
from torch import nn

import masksparsity as ms

NETS: dict[str, Callable[[], tuple[nn.Module, int]]] = {
    "resnet110-B": lambda: (ms.models.create("resnet110", shortcut="B"), 32),
    "resnet50": lambda: (torchvision.models.resnet50(), 64),
}
RATIO, STRENGTH = 1.5, 5e-4


def contestants(model: nn.Module, size: int) -> dict[str, Callable[[], None]]:
    graph = ms.trace(model, torch.randn(1, 3, size, size))
    keep = ms.select.uniform(graph, ms.scores.scale(model, graph), 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()  # momentum is there
    parameters = dict(model.named_parameters())
    scales = [parameters[norm.weight] for norm in graph.norms]

    @torch.no_grad()
    def plain() -> None:
        direction = torch._foreach_sign(scales)
        torch._foreach_mul_(direction, STRENGTH)
        torch._foreach_add_([s.grad for s in scales], direction)

    penalties = {
        "MaskedL1": ms.MaskedL1(model, graph, keep, STRENGTH),
        "global L1": ms.MaskedL1(model, graph, None, STRENGTH),
        "Proximal": ms.Proximal(model, graph, keep, STRENGTH),
        "ScheduledDecay": ms.ScheduledDecay(model, graph, keep, steps=10**6),
    }
    for penalty in penalties.values():
        penalty.attach(optimizer)
    return {"plain": plain, **{name: penalty.apply for name, penalty in penalties.items()}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--cpu-time", action="store_true", help="time of this process, not of day")
    parser.add_argument("--json", type=Path, help="write the table here, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    clock = time.process_time if options.cpu_time else time.perf_counter
    facts = {**about("torchvision"), "clock": "CPU time" if options.cpu_time else "wall time"}
    facts |= {"n": str(options.repeats)}
    tell(facts)
    print(f"{'net':14}{'penalty':16}{'median ms':>11}{'quartiles':>18}{'ratio':>8}")
    rows = []
    for net, build in NETS.items():
        torch.manual_seed(0)
        works = contestants(*build())
        times: dict[str, list[float]] = {name: [] for name in works}
        for k in range(options.repeats + 10):  # ten to warm up
            for name, work in works.items():
                begin = clock()
                work()
                if k >= 10:
                    times[name].append(1e3 * (clock() - begin))
        for name, values in times.items():
            low, middle, high = quartiles(values)
            ratio = middle / statistics.median(times["plain"])
            rows.append({"net": net, "penalty": name, "median_ms": middle,
                         "quartiles_ms": [low, high], "ratio": ratio})  # fmt: skip
            print(f"{net:14}{name:16}{middle:11.3f}{low:9.3f}{high:9.3f}{ratio:8.2f}")
    missed = [f"{r['penalty']} on {r['net']}" for r in rows if r["ratio"] > RATIO]
    return finish(facts, rows, missed, options.json)


if __name__ == "__main__":
    sys.exit(main())
