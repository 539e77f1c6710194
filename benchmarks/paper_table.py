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

Last epoch everywhere. Goes on from what is complete under --runs; flags after the recipe go to its
config. With --at-once N that many trainings of a process share the GPU (turns.py), and with
--processes N that many processes share out the seeds. Writes results/RECIPE-table.txt and .json.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import tyro
from safetensors.torch import load_file
from turns import Turns

import masksparsity as ms
from masksparsity.files import atomic
from masksparsity.pipeline.config import Config
from masksparsity.pipeline.origin import origin
from masksparsity.pipeline.runner import execute
from masksparsity.pipeline.workspace import Workspace
from masksparsity.recipes import recipe
from masksparsity.train.config import Phase

Row = dict[str, Any]
Table = dict[str, dict[str, Row]]  # arm -> seed -> row
Write = Callable[[Row, Table], None]
BY_SCALE: Row = {"scores": "scale", "per_cost": False}  # the order of the scales, as published
ACCURACIES = ("before_removal_accuracy", "after_removal_accuracy", "finetuned_accuracy")
HEADING = (
    "arm", "n", "before removal", "right after", "finetuned", "ours minus arm",
    "MACs removed", "params removed", "kept scale", "epochs",
)  # fmt: skip


class Arms:
    """All arms of one seed. Each is a function that returns its row of the table."""

    def __init__(self, config: Config, out: Path, turns: Turns | None = None):
        self.config, self.out = config, out
        self.base = Workspace(config, out / "base")
        if turns:
            data = self.base.data
            self.base.data = replace(data, train=turns.share(data.training()))
        for stage in ("train", "sparsify", "mask"):
            execute(self.base, stage)
        self.dense = out / "base/train/model.safetensors"
        self.mask = out / "base/mask/mask.json"
        own = (config.sparsify, config.mask_sparsify, config.finetune)
        self.epochs = {"B": config.baseline.epochs}
        self.epochs |= dict(zip("SMF", (phase.epochs for phase in own), strict=True))
        self.epochs["T"] = total = self._sum("SMF")
        short = round(total * 40 / 240)
        self.epochs |= {"s": (total - short) // 2, "m": -(-(total - short) // 2), "f": short}
        self.epochs["l"] = self._sum("SF") - self._sum("s")
        self.long = self._finetune("T")

    def dense_on(self) -> Row:
        work = self._work("dense", {"weights": self.dense}, finetune=self.long)
        return self._row(work, {"finetuned": execute(work, "finetune")}, "B + T")

    def slimming(self) -> Row:
        weights = self.sparsified("slimming", epochs=self._sum("sm"))
        mask = self.chosen("slimming", weights, **BY_SCALE)
        return self.removed("slimming", weights, mask, "B + sm + f", finetune=self._finetune("f"))

    def uniform(self) -> Row:
        mask = self.uniform_mask("uniform", self.mask)
        return self.removed("uniform", self.dense, mask, "B + T", finetune=self.long)

    def scratch(self) -> Row:
        phase = replace(self.config.scratch, epochs=self._sum("BT"))
        work = self._work("scratch", {"mask": self.mask}, scratch=phase)
        return self._row(work, {"finetuned": execute(work, "scratch")}, "BT", self.mask)

    def published(self) -> Row:
        rate = {"lr": self.config.sparsify.lr, "schedule": self.config.sparsify.schedule}
        return self.masked(
            "published", self.l1_mask(), "B + s (mask) + m + f",
            finetune=self._finetune("f"), penalty="masked-l1", epochs=self._sum("m"), **rate,
        )  # fmt: skip

    def ours(self) -> Row:
        return self.masked("ours", self.mask)

    def ours_l1_mask(self) -> Row:
        left = self._finetune("l")
        return self.masked("l1-mask", self.l1_mask(), "B + s (mask) + M + l", finetune=left)

    def ours_uniform_mask(self) -> Row:
        mask = self.uniform_mask("uniform", self.mask)
        return self.masked("uniform-mask", mask, "B + M + SF", finetune=self._finetune("SF"))

    def at_once(self) -> Row:
        return self.masked("at-once", self.mask, penalty="decay", decay_span=1.0)

    def l1_mask(self) -> Path:
        """The mask of the paper's own pipeline."""
        weights = self.sparsified("published", epochs=self._sum("s"))
        return self.chosen("published", weights, **BY_SCALE)

    def sparsified(self, name: str, **settings: Any) -> Path:
        """Weights after a penalty on all scales, trained from the baseline."""
        sparsify = replace(self.config.sparsify, **settings)
        execute(self._work(name, {"weights": self.dense}, sparsify=sparsify), "sparsify")
        return self.out / name / "sparsify/model.safetensors"

    def chosen(self, name: str, weights: Path, **settings: Any) -> Path:
        """The mask that the recipe with these settings reads from `weights`."""
        mask = replace(self.config.mask, **settings)
        execute(self._work(name, {"weights": weights}, mask=mask), "mask")
        return self.out / name / "mask/mask.json"

    def uniform_mask(self, name: str, like: Path) -> Path:
        """Uniform fraction by filter L1 norm: the smallest that removes the MACs of `like`."""
        model = self.base.network(self.dense)
        graph = self.base.trace(model)
        scores = ms.scores.norm(model, graph)
        target = graph.cost(ms.KeepMask.load(like, graph)).macs
        low, high = 0.0, 1.0
        while high - low > 1e-3:
            middle = (low + high) / 2
            cost = graph.cost(ms.select.uniform(graph, scores, middle)).macs
            low, high = (middle, high) if cost > target else (low, middle)
        path = self.out / name / "chosen.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        ms.select.uniform(graph, scores, high).save(path)
        return path

    def masked(
        self,
        name: str,
        mask: Path,
        spent: str = "B + S (mask) + M + F",
        finetune: Phase | None = None,
        **settings: Any,
    ) -> Row:
        """MaskSparsity with a mask: from the baseline to the finetuned slim network."""
        phase = replace(self.config.mask_sparsify, **settings)
        given = {"weights": self.dense, "mask": mask}
        execute(self._work(name, given, mask_sparsify=phase), "mask-sparsify")
        weights = self.out / name / "mask-sparsify/model.safetensors"
        return self.removed(name, weights, mask, spent, finetune)

    def removed(
        self, name: str, weights: Path, mask: Path, spent: str, finetune: Phase | None = None
    ) -> Row:
        """Removal and finetuning."""
        given = {"weights": weights, "mask": mask}
        pruned = execute(self._work(name, given), "prune")
        work = self._work(name, {}, finetune=finetune or self.config.finetune)
        found = {
            "before_removal": pruned["before_removal"],
            "after_removal": pruned["after_removal"],
        }
        found["finetuned"] = execute(work, "finetune")
        return self._row(work, found, spent, mask, weights, pruned)

    def _row(
        self,
        work: Workspace,
        found: dict[str, Row],
        spent: str,
        mask: Path | None = None,
        weights: Path | None = None,
        pruned: Row | None = None,
    ) -> Row:
        graph = self.base.trace(self.base.dense())
        keep = ms.KeepMask.load(mask, graph) if mask else ms.KeepMask(graph)
        dense, slim = graph.cost(), graph.cost(keep)
        row: Row = {f"{k}_accuracy": v["accuracy"] for k, v in found.items()}
        row |= {"macs_removed": 1 - slim.macs / dense.macs, "epochs": self._spell(spent)}
        row |= {"params_removed": 1 - slim.params / dense.params}
        row["test_images"] = found["finetuned"]["total"]
        if pruned and weights:
            tensors = load_file(weights)
            scales = [tensors[f"{n}.weight"][k].abs() for n, k in keep.by_norm().items()]
            row["kept_scale"] = float(sum(s.sum() for s in scales) / sum(map(len, scales)))
            row["latency_ms"] = pruned["latency_ms"]
        return row

    def _work(self, name: str, given: dict[str, Path], **sections: Any) -> Workspace:
        work = Workspace(replace(self.config, **sections), self.out / name, given=given)
        work.data = self.base.data  # decoded once
        return work

    def _finetune(self, letters: str) -> Phase:
        return replace(self.config.finetune, epochs=self._sum(letters))

    def _sum(self, letters: str) -> int:
        return sum(self.epochs[letter] for letter in letters)

    def _spell(self, spent: str) -> str:
        parts = [part.partition(" ") for part in spent.split(" + ")]
        spelt = [(self._sum(letters), note) for letters, _, note in parts]
        return " + ".join(f"{n} {note}".strip() for n, note in spelt if n)


ARMS: dict[str, Callable[[Arms], Row]] = {
    "dense": Arms.dense_on,
    "slimming": Arms.slimming,
    "uniform": Arms.uniform,
    "scratch": Arms.scratch,
    "published": Arms.published,
    "ours": Arms.ours,
    "l1-mask": Arms.ours_l1_mask,
    "uniform-mask": Arms.ours_uniform_mask,
    "at-once": Arms.at_once,
}

SHARES = {"l1-mask": "published", "uniform-mask": "uniform"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", default="digits-resnet20")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=1, help="from one seed to the next")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--runs", type=Path, default=Path("runs/table"))
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--name", help="of the results' files; the recipe's if not given")
    parser.add_argument("--at-once", type=int, default=1, help="trainings that share the GPU")
    parser.add_argument("--processes", type=int, default=1, help="that share out the seeds")
    args, flags = parser.parse_known_args()
    args.name = args.name or args.recipe
    args.results.mkdir(parents=True, exist_ok=True)
    target = args.results / f"{args.name}-table.json"
    seeds = range(args.first_seed, args.first_seed + args.seeds * args.every, args.every)
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
    """The same, the seeds shared out to processes: where the host is slow, or has many cores."""
    shares = [seeds[k :: args.processes] for k in range(min(args.processes, len(seeds)))]
    outs = [args.runs / f"{args.name}-process-{share[0]}" for share in shares]
    running = [
        subprocess.Popen([
            sys.executable, *sys.argv, "--processes", "1", "--results", out, "--name", args.name,
            "--first-seed", str(share[0]), "--seeds", str(len(share)), "--every", str(share.step),
        ])
        for share, out in zip(shares, outs, strict=True)
    ]  # fmt: skip
    failed = sum(process.wait() != 0 for process in running)
    found = [
        json.loads(path.read_text())
        for out in outs
        if (path := out / f"{args.name}-table.json").exists()
    ]
    if found:
        table: Table = {}
        for arm in args.arms:
            rows = [item for one in found for item in one["arms"][arm].items()]
            table[arm] = dict(sorted(rows))
        write({key: value for key, value in found[0].items() if key != "arms"}, table)
    if failed:
        sys.exit(f"{failed} of {len(running)} processes failed; start again to go on")


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
