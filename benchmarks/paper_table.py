"""The table of controls: every arm from the same baseline, at equal total epochs and MACs.

    python benchmarks/paper_table.py digits-resnet20 --seeds 3
    python benchmarks/paper_table.py cifar10-resnet56 --seeds 3 --data.root /path/to/cifar10

With B, S, M, F epochs of the recipe's baseline, sparsify, mask-sparsify and finetune stages, every
arm trains T = S+M+F epochs after the baseline, what its mask takes included. The controls share
them out as their authors do, s : m : f = 100 : 100 : 40, at the rates of sparsify and finetune.

    dense      the baseline, trained on for T
    slimming   L1 on all scales for s+m, the budget's mask, removal, finetuning for f
    uniform    uniform fraction by filter L1 norm, removal, finetuning for T
    scratch    our slim architecture from random weights for B+T
    published  MaskSparsity: L1 on all scales for s shows the mask; again from the baseline,
               subgradient on the masked scales for m, removal, finetuning for f
    ours       the recipe as it stands: mask (S), scheduled decay for M, removal, finetuning for F
    l1-mask    ours with the mask of published, whose s epochs the finetuning gives up (ablation)
    uniform-mask  ours with the mask of uniform (ablation)
    at-once    ours with all masked channels decaying at once instead of in turn (ablation)
    taught     ours, finetuned with half of the loss asking for the baseline's outputs (ablation)

Last epoch everywhere. Goes on from what is complete under --runs; flags after the recipe go to its
config. With --at-once N that many trainings of a process share the GPU (turns.py), and with
--processes N that many seeds have a process each. Writes results/RECIPE-table.txt and .json.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import tyro
from arms import ARMS, SHARES, Arms, Row
from turns import Turns

from masksparsity.files import atomic
from masksparsity.pipeline.config import Config
from masksparsity.pipeline.origin import origin
from masksparsity.recipes import recipe

Table = dict[str, dict[str, Row]]  # arm -> seed -> row
Write = Callable[[Row, Table], None]
ACCURACIES = ("before_removal_accuracy", "after_removal_accuracy", "finetuned_accuracy")
HEADING = (
    "arm", "n", "before removal", "right after", "finetuned", "ours minus arm",
    "MACs removed", "params removed", "kept scale", "epochs",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", default="digits-resnet20")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--runs", type=Path, default=Path("runs/table"))
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--name", help="of the results' files; the recipe's if not given")
    parser.add_argument("--at-once", type=int, default=1, help="trainings that share the GPU")
    parser.add_argument("--processes", type=int, default=1, help="each for one seed at a time")
    args, flags = parser.parse_known_args()
    args.name = args.name or args.recipe
    args.results.mkdir(parents=True, exist_ok=True)
    target = args.results / f"{args.name}-table.json"
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    command = " ".join(["python benchmarks/paper_table.py", *sys.argv[1:]])

    def write(where: Row, table: Table) -> None:
        where = where | {"command": command}
        atomic.write(target.with_suffix(".txt"), text(table, where).encode())
        atomic.write_json(target, {**where, "arms": table})

    if args.processes > 1:
        in_processes(args, seeds, write)
    else:
        config = tyro.cli(Config, default=recipe(args.recipe), args=flags)
        in_turns(args, config, seeds, write)
    print(target.with_suffix(".txt").read_text(), end="")


def in_turns(args: argparse.Namespace, config: Config, seeds: Sequence[int], write: Write) -> None:
    """Fill the table, and write it after each row."""
    # Arms that share files go one after the other.
    chains: dict[str, list[str]] = {}
    for arm in args.arms:
        chains.setdefault(SHARES.get(arm, arm), []).append(arm)
    turns = Turns(args.at_once)
    every: dict[int, Arms] = {}
    table: Table = {arm: {} for arm in args.arms}

    def begin(seed: int) -> None:
        every[seed] = Arms(replace(config, seed=seed), args.runs / f"{args.name}-{seed}", turns)

    def fill(seed: int, arms: list[str]) -> None:
        for arm in arms:
            row = ARMS[arm](every[seed])
            table[arm] = dict(sorted({**table[arm], str(seed): row}.items()))
            write(origin(every[seed].base.device), table)

    for first in range(0, len(seeds), args.at_once):
        some = seeds[first : first + args.at_once]
        turns.run([partial(begin, seed) for seed in some])
        turns.run([partial(fill, seed, arms) for seed in some for arms in chains.values()])


def in_processes(args: argparse.Namespace, seeds: Sequence[int], write: Write) -> None:
    """The same, each seed in a process: where the host is slow, and has cores."""

    def share(seed: int) -> tuple[bool, Path]:
        out = args.runs / f"{args.name}-table-{seed}"
        own = {"processes": 1, "first-seed": seed, "seeds": 1, "name": args.name, "results": out}
        flags = [word for key, value in own.items() for word in (f"--{key}", str(value))]
        done = subprocess.run([sys.executable, *sys.argv, *flags])
        return done.returncode == 0, out / f"{args.name}-table.json"

    with ThreadPoolExecutor(args.processes) as pool:
        shares = [*pool.map(share, seeds)]
    found = [json.loads(path.read_text()) for _, path in shares if path.exists()]
    table: Table = {arm: {} for arm in args.arms}
    for one in found:
        for arm, rows in one.pop("arms").items():
            table[arm] |= rows
    if found:
        write(found[0], table)
    if failed := sum(not done for done, _ in shares):
        sys.exit(f"{failed} of {len(shares)} processes failed; start again to go on")


def text(table: Table, where: Row) -> str:
    """The table as people read it: accuracies in %, mean ± standard deviation over seeds."""
    ours = table.get("ours", {})
    lines = [line(HEADING), *(line(cells(a, r, ours)) for a, r in table.items() if r)]
    return "\n".join([*lines, json.dumps(where)]) + "\n"


def cells(arm: str, rows: dict[Any, Row], ours: dict[Any, Row]) -> list[str]:
    """A line of a table: what an arm's seeds found, and how much better ours did, seed by seed."""
    found = [[100 * r[c] for r in rows.values() if c in r] for c in ACCURACIES]
    last = ACCURACIES[-1]
    gain = [100 * (ours[s][last] - rows[s][last]) for s in rows if s in ours and rows is not ours]
    scale = [r["kept_scale"] for r in rows.values() if "kept_scale" in r]
    removed = [
        f"{100 * statistics.mean(r[k] for r in rows.values()):.1f} %"
        for k in ("macs_removed", "params_removed")
    ]
    kept = f"{statistics.mean(scale):.3f}" if scale else "-"
    epochs = next(iter(rows.values()))["epochs"]
    return [arm, str(len(rows)), *map(spread, [*found, gain]), *removed, kept, epochs]


def line(cells: Sequence[str]) -> str:
    widths = (-16, 2, 15, 15, 15, 15, 13, 15, 11)
    padded = [f"{c:<{-w}}" if w < 0 else f"{c:>{w}}" for c, w in zip(cells, widths, strict=False)]
    return " ".join([*padded, f"  {cells[-1]}"])


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation; of a single value, itself."""
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


if __name__ == "__main__":
    main()
