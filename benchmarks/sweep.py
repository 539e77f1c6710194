"""Accuracy against MACs, and how much ours depends on how its mask is made.

    python benchmarks/sweep.py digits-resnet20 --seeds 2 --mask.pruned-macs 0.9
    python benchmarks/sweep.py cifar10-resnet56 --sparsify.epochs 100 --data.root /path/to/cifar10

Arms and epochs B, S, M, F are those of paper_table.py. Equal in all points are the epochs in

    budgets    ours and network slimming with --budgets of the MACs removed

The others are ours at the recipe's own budget, with masks from elsewhere:

    factors    sparsity factor of the global L1, times 0.2, 1 and 5
    sources    global L1; polarization in its place; or, without S epochs, the baseline: uniform
               fraction by filter L1 norm; budget by filter L1 norm (norm), by Taylor (taylor),
               or by Taylor over the MACs that a channel costs (taylor per MAC)

Ours that is compared with is the recipe as it stands, at the same budget. Trainings that points
share are done once. Goes on from what is complete under --runs; flags after the recipe go to its
config. Writes results/RECIPE-sweep.txt and .json.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import tyro
from arms import BY_SCALE, Arms, Row
from paper_table import HEADING, cells, line

from masksparsity.files import atomic
from masksparsity.pipeline.config import Config
from masksparsity.pipeline.origin import origin
from masksparsity.recipes import recipe

FACTORS = (0.2, 1.0, 5.0)
SCORES: dict[str, dict[str, Any]] = {
    "norm": {"scores": "norm"},
    "taylor": {"scores": "taylor"},
    "taylor per MAC": {"scores": "taylor", "per_cost": True},
}
FROM_BASELINE = "B + M + F"

# Part of the sweep -> point -> seed -> what was found.
Sweep = dict[str, dict[str, dict[int, Row]]]


class Points(Arms):
    """All points of one seed. The trainings that several of them start from are done once."""

    def rows(self, budgets: list[float]) -> Iterator[tuple[str, str, Row]]:
        """Part, point and row, one after the other."""
        own = f"ours {self.config.mask.pruned_macs:.0%}"
        shared = self.out / "base/sparsify/model.safetensors"
        longer = self.sparsified("slimming", epochs=self._sum("SM"))
        for budget in budgets:
            name = f"ours {budget:.0%}"
            yield "budgets", name, self._ours(name, shared, pruned_macs=budget)
            name = f"slimming {budget:.0%}"
            mask = self.chosen(name, longer, pruned_macs=budget)
            yield "budgets", name, self.removed(name, longer, mask, "B + SM + F")
        for factor in FACTORS:
            name, strength = f"x{factor:g}", factor * self.config.sparsify.strength
            if factor == 1:
                yield "factors", name, self._ours(own, shared)
            else:
                weights = self.sparsified(name, strength=strength)
                yield "factors", name, self._ours(name, weights)
        yield "sources", "global L1", self._ours(own, shared)
        weights = self.sparsified("polarization", kind="polarization")
        yield "sources", "polarization", self._ours("polarization", weights)
        mask = self.uniform_mask("uniform", self.mask)
        yield "sources", "uniform", self.masked("uniform", mask, FROM_BASELINE)
        for name, settings in SCORES.items():
            yield "sources", name, self._ours(name, self.dense, FROM_BASELINE, **settings)

    def _ours(
        self, name: str, weights: Path, epochs: str = "B + S (mask) + M + F", **settings: Any
    ) -> Row:
        return self.masked(name, self.chosen(name, weights, **settings), epochs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", default="digits-resnet20")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.3, 0.5, 0.7, 0.8, 0.9])
    parser.add_argument("--runs", type=Path, default=Path("runs/sweep"))
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--name", help="of the results' files; the recipe's if not given")
    args, flags = parser.parse_known_args()
    config = tyro.cli(Config, default=recipe(args.recipe), args=flags)
    if not config.sparsify.epochs:
        parser.error("masks of a global L1 are compared here: give --sparsify.epochs")
    config = replace(config, mask=replace(config.mask, select="budget", **BY_SCALE))
    sweep: Sweep = {"budgets": {}, "factors": {}, "sources": {}}
    target = args.results / f"{args.name or args.recipe}-sweep"
    command = " ".join(["python benchmarks/sweep.py", *sys.argv[1:]])
    for seed in range(args.seeds):
        points = Points(
            replace(config, seed=seed), args.runs / f"{args.name or args.recipe}-{seed}"
        )
        where = origin(points.base.device) | {"command": command}
        for part, point, row in points.rows(args.budgets):
            sweep[part].setdefault(point, {})[seed] = row
            atomic.write(target.with_suffix(".txt"), text(sweep, where).encode())
            atomic.write_json(target.with_suffix(".json"), {**where, "sweep": sweep})
    print(text(sweep, where))


def tables(sweep: Sweep) -> Iterator[tuple[str, list[list[str]]]]:
    """The parts, and the cells of their points."""
    for part, points in sweep.items():
        found = []
        for name, rows in points.items():
            ours = {"factors": "x1", "sources": "global L1"}.get(part, f"ours {name.split()[-1]}")
            found.append(cells(name, rows, points.get(ours, {})))
        yield part, found


def text(sweep: Sweep, where: Row) -> str:
    """The sweep as people read it: accuracies in %, mean ± standard deviation over seeds."""
    lines = []
    for part, found in tables(sweep):
        lines += [part, line(HEADING), *map(line, found), ""]
    return "\n".join([*lines, json.dumps(where)]) + "\n"


if __name__ == "__main__":
    main()
