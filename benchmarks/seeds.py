"""One recipe over several seeds: mean and standard deviation of what every run reports.

    python benchmarks/seeds.py digits-resnet20 --seeds 5

Goes on from runs that are complete. Arguments it does not know go to `masksparsity run`. Writes
results/RECIPE-seeds.json and .txt.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path

from paper_table import spread

STAGES = ("baseline", "before_removal", "after_removal", "finetuned")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", default="digits-resnet20")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--runs", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--results", type=Path, default=Path("results"))
    args, rest = parser.parse_known_args()
    results = [run(args.recipe, seed, args.runs, rest) for seed in range(args.seeds)]
    command = " ".join(["python benchmarks/seeds.py", *sys.argv[1:]])
    args.results.mkdir(exist_ok=True)
    target = args.results / f"{args.recipe}-seeds"
    text = table(args.recipe, results, command)
    target.with_suffix(".txt").write_text(text)
    rows = [
        {k: v for k, v in r.items() if k not in ("curves", "layers", "scales")} for r in results
    ]
    target.with_suffix(".json").write_text(
        json.dumps({"command": command, "runs": rows}, indent=1) + "\n"
    )
    print(text)


def run(recipe: str, seed: int, runs: Path, rest: list[str]) -> dict:
    out = runs / f"{recipe}-{seed}"
    command = [sys.executable, "-m", "masksparsity", "run", recipe, "--seed", str(seed)]
    subprocess.run([*command, "--out", str(out), *rest], check=True)
    return json.loads((out / "results.json").read_text())


def table(recipe: str, results: list[dict], command: str) -> str:
    total = results[0]["total"]
    lines = [
        f"{recipe}: {len(results)} seeds, last epoch, {total} test images; accuracy in %, images "
        "right in brackets",
        "seed  " + "".join(f"{stage.replace('_', ' '):>18}" for stage in STAGES)
        + "   MACs removed   seconds   kept scale: global L1, masked",
    ]  # fmt: skip
    removed, seconds = [], []
    for r in results:
        removed.append(100 * (1 - r["macs"]["slim"] / r["macs"]["dense"]))
        seconds.append(sum(r["seconds"].values()))
        cells = [f"{100 * r['accuracy'][s]:.2f} ({r['correct'][s]})" for s in STAGES]
        kept = r["kept_scale_mean"]
        lines.append(
            f"{r['seed']:>4}  "
            + "".join(f"{c:>18}" for c in cells)
            + f"{removed[-1]:>14.2f} {seconds[-1]:>10.1f}"
            + f"{kept['global_l1']:>24.3f}, {kept['masked']:.3f}"
        )
    columns = [[100 * r["accuracy"][s] for r in results] for s in STAGES]
    lines.append(
        "mean  "
        + "".join(f"{spread(c):>18}" for c in columns)
        + f"{statistics.mean(removed):>14.2f} {statistics.mean(seconds):>10.1f}"
    )
    gain = [f - b for b, f in zip(columns[0], columns[3], strict=True)]
    drop = [a - b for a, b in zip(columns[2], columns[1], strict=True)]
    lines += [
        f"finetuned minus baseline, seed by seed: {spread(gain)} points",
        f"right after removal minus right before: {spread(drop)} points",
        f"{results[0]['device']}, {platform.machine()}; versions {results[0]['versions']}",
        f"command: {command}",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
