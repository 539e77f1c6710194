"""docs/results.md from the files in results/: what was run, on what, how often, what came out.

python benchmarks/results_page.py
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import paper_table
import seeds
import sweep

Found = dict[str, Any]

INTRO = """# Results

Made by `python benchmarks/results_page.py` from the files in [results/](../results); not written by
hand. Accuracies are in % of the test set after the last epoch. ± is the standard deviation over n
seeds; of one seed there is none. [a, b] are quartiles. MACs are multiply-accumulates of
convolutions and linear layers. A recipe in a command is the one of the day of the run, which `git
log` of the file tells. Of absolute paths only the last part is shown.
"""
ARMS = """"Ours minus arm" is taken seed by seed, after finetuning. "Kept scale" is the mean |gamma|
of the channels that stay, right before removal.
"""
PUBLISHED = """### Published figures on CIFAR-10

As their authors print them, last column as MACs or FLOPs. They are on the original CIFAR-10 with
full-length schedules: not comparable with short runs on a JPEG copy.
"""
# Each read in its paper or its authors' own logs.
FIELD = (
    ("ResNet-56", "DepGraph", "93.53 → 93.77", "53 %"),
    ("ResNet-56", "DepGraph", "93.53 → 93.64", "61 %"),
    ("ResNet-56", "Group-BN in Torch-Pruning", "93.53 → 93.29", "53 %"),
    ("ResNet-56", "ResRep", "93.71 → 93.71", "52.9 %"),
    ("ResNet-56", "Polarization", "93.80 → 93.83", "47 %"),
    ("ResNet-56", "Polarization", "93.80 → 92.63", "71 %"),
    ("ResNet-56", "Network Slimming, re-run", "93.80 → 93.27", "48 %"),
    ("ResNet-56", "Network Slimming, re-run", "93.80 → 91.20", "68 %"),
    ("ResNet-56", "PPSM", "93.44 → 93.57", "54.6 %"),
    ("ResNet-56", "PPSM", "93.44 → 93.22", "75.6 %"),
    ("ResNet-56", "CORING, longer training", "93.26 → 94.22", "47.4 %"),
    ("ResNet-56", "CORING, longer training", "93.26 → 92.84", "72.3 %"),
    ("ResNet-56", "plain L1, finetuned well", "93.78 → 93.51", "49.8 %"),
    ("ResNet-110", "MaskSparsity", "no loss", "63.0 %"),
    ("ResNet-110", "HRankPlus", "93.50 → 93.81", "59.6 %"),
    ("ResNet-110", "PPSM", "93.60 → 93.83", "68.7 %"),
    ("VGG-16", "CORING", "93.96 → 94.20", "66.6 %"),
    ("VGG-16", "Polarization", "93.88 → 93.92", "54 %"),
)
OPEN = """## Open

To be run on a GPU: the tables of controls for ResNet-56 and ResNet-110 on CIFAR-10 at full length
(`benchmarks/paper_table.py`), and the latency of slim networks (`benchmarks/latency.py`).
"""


def page(results: Path) -> str:
    parts, shown = [INTRO], False
    for title, pattern, render, note in SECTIONS:
        files = sorted(results.glob(pattern))
        if files:
            parts += [f"## {title}\n", *([note] if note else [])]
        for file in files:
            name = file.relative_to(results)
            parts += [f"### [{name}](../results/{name})\n", render(file)]
        if not shown and any(f.relative_to(results).parts[0].startswith("cifar10") for f in files):
            shown = True
            parts += [PUBLISHED, table(("network", "method", "accuracy", "removed"), FIELD)]
    return "\n".join([*parts, OPEN])


def table(heading: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    heading = list(heading)
    return "".join(f"| {' | '.join(row)} |\n" for row in (heading, ["---"] * len(heading), *rows))


def origin(found: Found) -> str:
    """Command, hardware, versions, and what else is said about all of a file's numbers."""
    plain = {k: v for k, v in found.items() if isinstance(v, str) and k != "command"}
    said = "; ".join(
        f"{key}: {value}" for key, value in (plain | found.get("versions", {})).items()
    )
    return short(f"`{found['command']}`\n\n{said}\n")


def short(text: str) -> str:
    return re.sub(r"(?<![\w.])/\S*/", "", text)


def described(module: ModuleType) -> str:
    """What the script says of its arms, without its commands and its files."""
    return "```text\n" + "\n\n".join((module.__doc__ or "").split("\n\n")[2:-1]) + "\n```\n"


def images(rows: Iterable[Found]) -> str:
    counts = {r["test_images"] for r in rows if "test_images" in r}
    return "".join(f"\n{n} test images: one is {100 / n:.2f} points.\n" for n in sorted(counts))


def controls(file: Path) -> str:
    found = json.loads(file.read_text())
    arms = {arm: rows for arm, rows in found["arms"].items() if rows}
    lines = [paper_table.cells(arm, rows, arms.get("ours", {})) for arm, rows in arms.items()]
    every = [row for rows in arms.values() for row in rows.values()]
    return f"{origin(found)}{images(every)}\n{table(paper_table.HEADING, lines)}"


def swept(file: Path) -> str:
    found = json.loads(file.read_text())
    every = [
        r for points in found["sweep"].values() for rows in points.values() for r in rows.values()
    ]
    parts = [origin(found) + images(every)]
    for part, lines in sweep.tables(found["sweep"]):
        parts += [f"{part}\n", table(paper_table.HEADING, lines)]
    return "\n".join(parts)


def runs(file: Path) -> str:
    """Of one run (results.json), or of several with different seeds."""
    found = json.loads(file.read_text())
    every = found.get("runs", [found])
    stages = [s for s in (*seeds.STAGES, "scratch") if all(s in r["accuracy"] for r in every)]
    total = {
        **{s: [100 * r["accuracy"][s] for r in every] for s in stages},
        "MACs removed": [100 * (1 - r["macs"]["slim"] / r["macs"]["dense"]) for r in every],
        "params removed": [100 * (1 - r["params"]["slim"] / r["params"]["dense"]) for r in every],
        "finetuned minus baseline": [
            100 * (r["accuracy"]["finetuned"] - r["accuracy"]["baseline"]) for r in every
        ],
        "seconds": [sum(r["seconds"].values()) for r in every],
    }
    lines = [
        [str(r["seed"]), *(f"{values[k]:.2f}" for values in total.values())]
        for k, r in enumerate(every)
    ]
    if len(every) > 1:
        lines.append([f"n = {len(every)}", *map(paper_table.spread, total.values())])
    commands = {origin(r | {"command": found["command"]}): None for r in every}
    counted = images({"test_images": r["total"]} for r in every)
    heading = ["seed", *(name.replace("_", " ") for name in total)]
    return f"{''.join(commands)}{counted}\n{table(heading, lines)}{spent(every)}"


def spent(every: list[Found]) -> str:
    """The share of each stage in the time of a run, or of several."""
    seconds: Counter[str] = Counter()
    for run in every:
        seconds.update(run["seconds"])
    shares = [f"{stage} {s / seconds.total():.1%}" for stage, s in seconds.items()]
    return f"\nOf the seconds: {', '.join(shares)}.\n"


def coverage(file: Path) -> str:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    tally = Counter(row["status"] for row in rows)
    said = file.with_suffix(".txt")
    lines = said.read_text().splitlines() if said.exists() else []
    # What is not of a single network is of all; the tally is counted here.
    own = f"{file.stem.removeprefix('coverage-')}/"
    facts = [s for s in lines if s and not re.match(rf"{own}|\d+ networks", s)]
    prunable, channels = (sum(r.get(key, 0) for r in rows) for key in ("prunable", "channels"))
    # Larger ones are checked in single precision.
    double = [r for r in rows if r["status"] == "exact" and r["params"] < 3e8]
    facts = [
        short("; ".join(facts)) or "Command and versions are not recorded with this file.",
        f"{len(rows)} networks: {', '.join(f'{n} {s}' for s, n in tally.most_common())}. "
        f"{prunable / channels:.1%} of all channels can be pruned. Largest distance of masked and "
        f"slim network among the {len(double)} exact ones in double precision, relative to the "
        "output's scale: "
        f"{max(r['distance'] for r in double):.0e} in eval mode, "
        f"{max(r['train_distance'] for r in double):.0e} in training mode. The others:",
    ]
    others = [[r["name"], r["status"], why(r)] for r in rows if r["status"] != "exact"]
    return "\n\n".join([*facts, table(("network", "status", "why"), others)])


def why(row: Found) -> str:
    if "error" in row:
        return short(row["error"])
    if row["status"] == "nothing to prune":
        return "; ".join(row["protected"])
    distances = {k: f"{row[k]:.0e}" for k in ("distance", "train_distance") if k in row}
    return ", ".join(f"{k.replace('_', ' ')} {value}" for k, value in distances.items())


def quartiles(middle: float, both: list[float], digits: int = 1) -> str:
    return f"{middle:.{digits}f} [{both[0]:.{digits}f}, {both[1]:.{digits}f}]"


def step(r: Found) -> dict[str, str]:
    launches = "" if r["launches"] is None else f" ({r['launches']})"
    share = r["share_of_limit"]
    return {
        "network": f"{r['network']} {r['variant']}", "side": r["side"],
        "images/s": f"{r['images_per_second']:.0f}", "ms/step": f"{r['ms_per_step']:.2f}",
        "operations (launches)": f"{r['operations'] or '-'}{launches}",
        "GFLOP/s": f"{r['gflops']:.1f}",
        "of limit": "-" if share is None else f"{share:.1%}",
        "times the plain loop": quartiles(r["ratio"], r["ratio_quartiles"], 2),
    }  # fmt: skip


def graph(r: Found) -> dict[str, str]:
    timed = {k: v for k, v in r.items() if isinstance(v, dict) and "median_ms" in v}
    return {
        "network": r["net"],
        **{
            f"{k.replace('_', ' ')}, ms (n)": quartiles(v["median_ms"], v["quartiles_ms"])
            + f" ({v['n']})"
            for k, v in timed.items()
        },
        **{
            f"{k}, ours over the peer's": quartiles(r[f"{k}_ratio"], r[f"{k}_ratio_quartiles"], 2)
            for k in ("trace", "prune")
        },
    }


def penalty(r: Found) -> dict[str, str]:
    return {
        "network": r["net"], "penalty": r["penalty"],
        "ms": quartiles(r["median_ms"], r["quartiles_ms"], 3), "times plain": f"{r['ratio']:.2f}",
    }  # fmt: skip


def latency(r: Found) -> dict[str, str]:
    return {
        "network": r["network"], "round_to": str(r["round_to"]), "batch": str(r["batch"]),
        "n": str(r["runs"]), "MACs removed": f"{r['macs_removed']:.1%}",
        "dense, ms": f"{r['dense_ms']:.2f}", "slim, ms": f"{r['slim_ms']:.2f}",
        "speed-up": f"{r['speed_up']:.2f}",
    }  # fmt: skip


def timed(cells: Callable[[Found], dict[str, str]]) -> Callable[[Path], str]:
    def render(file: Path) -> str:
        found = json.loads(file.read_text())
        rows = [cells(row) for row in found["rows"]]
        missed = ""
        if "missed" in found:
            missed = (
                f"\nMisses of the benchmark's own bar: {', '.join(found['missed']) or 'none'}.\n"
            )
        return f"{origin(found)}\n{table(rows[0], (row.values() for row in rows))}{missed}"

    return render


SECTIONS: tuple[tuple[str, str, Callable[[Path], str], str], ...] = (
    (
        "Controls at equal total epochs", "*-table.json", controls,
        described(paper_table) + "\n" + ARMS,
    ),
    (
        "Accuracy against MACs, and masks from elsewhere", "*-sweep.json", swept,
        described(sweep),
    ),
    ("One recipe, several seeds", "*-seeds.json", runs, ""),
    ("Single runs", "*/results.json", runs, ""),
    (
        "Which networks prune, and is the result exact?", "coverage-*.jsonl", coverage,
        "Each network with a random mask, another fraction in every group "
        "(`benchmarks/coverage.py`).\n",
    ),
    (
        "A training step, against the loop that most CIFAR code has", "step*.json", timed(step),
        "`slim` is what a mask of half the MACs leaves. `graph x6` is six captured trainings on "
        "one GPU at once, their images/s added up. Medians.\n",
    ),
    (
        "Trace, mask and prune, against Torch-Pruning", "graph*.json", timed(graph),
        "Medians [quartiles] (n).\n",
    ),
    (
        "What a penalty adds to a step", "penalty*.json", timed(penalty),
        "`plain` is a foreach `s * sign(gamma)` on all scales, added to the gradients. Medians.\n",
    ),
    (
        "Latency of slim networks", "latency*.json", timed(latency),
        "Dense and slim in turn, in one process. Medians.\n",
    ),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    root = Path(__file__).resolve().parent.parent
    parser.add_argument("--results", type=Path, default=root / "results")
    parser.add_argument("--out", type=Path, default=root / "docs/results.md")
    args = parser.parse_args()
    args.out.write_text(page(args.results))


if __name__ == "__main__":
    main()
