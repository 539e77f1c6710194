"""Measured speed-up for the MACs removed: ResNet-56 and torchvision's ResNet-50 at half the MACs.

    python benchmarks/latency.py

Random weights: speed does not depend on them. Masks by filter norm under a MAC budget, with and
without `round_to=8`; dense and slim timed in turn, in one process, eval mode, float32.
"""

import argparse
import json
import platform
import statistics
import sys
import time

import torch
from torch import Tensor, nn

import masksparsity as ms

NETWORKS = {"resnet56": (3, 32, 32), "torchvision/resnet50": (3, 224, 224)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pruned-macs", type=float, default=0.5)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", help="write the rows here as well")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    print(f"{hardware or platform.machine()}, {args.threads} threads, torch {torch.__version__}")
    print(
        f"{'network':22} {'round_to':>8} {'batch':>6} {'MACs removed':>13} {'dense ms':>10} "
        f"{'slim ms':>10}   speed-up (quartiles)"
    )
    rows = []
    for name, shape in NETWORKS.items():
        torch.manual_seed(0)
        model = ms.models.create(name).to(device, memory_format=torch.channels_last).eval()
        graph = ms.trace(model, torch.randn(1, *shape, device=device))
        scores = ms.scores.norm(model, graph)
        for round_to in (1, 8):
            keep = ms.select.budget(graph, scores, pruned_macs=args.pruned_macs, round_to=round_to)
            slim = ms.prune(model, graph, keep)
            removed = 1 - graph.cost(keep).macs / graph.cost().macs
            for batch in args.batches:
                x = torch.randn(batch, *shape, device=device)
                x = x.to(memory_format=torch.channels_last)
                dense_ms, slim_ms = in_turn(model, slim, x, args.runs)
                ratios = [d / s for d, s in zip(dense_ms, slim_ms, strict=True)]
                low, middle, high = statistics.quantiles(ratios, n=4)
                d, s = statistics.median(dense_ms), statistics.median(slim_ms)
                print(
                    f"{name:22} {round_to:>8} {batch:>6} {removed:>13.1%} {d:>10.2f} {s:>10.2f}"
                    f"   {middle:.2f} ({low:.2f} to {high:.2f})",
                    flush=True,
                )
                rows.append(
                    {"network": name, "round_to": round_to, "batch": batch, "runs": args.runs,
                     "macs_removed": removed, "dense_ms": d, "slim_ms": s, "speed_up": middle}
                )  # fmt: skip
    command = " ".join(["python benchmarks/latency.py", *sys.argv[1:]])
    print(f"medians of {args.runs} forwards, dense and slim in turn; command: {command}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(
                {"command": command, "torch": torch.__version__, "rows": rows}, file, indent=1
            )


@torch.inference_mode()
def in_turn(dense: nn.Module, slim: nn.Module, x: Tensor, runs: int) -> tuple[list, list]:
    """ms of each forward, the two models alternating so that both see the same machine."""
    times: tuple[list[float], list[float]] = ([], [])
    for k in range(-3, runs):
        for model, into in zip((dense, slim), times, strict=True):
            begin = time.perf_counter()
            model(x)
            if x.is_cuda:
                torch.cuda.synchronize()
            if k >= 0:
                into.append(1e3 * (time.perf_counter() - begin))
    return times


if __name__ == "__main__":
    main()
