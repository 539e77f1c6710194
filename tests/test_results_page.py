"""docs/results.md is what benchmarks/results_page.py makes of results/, and of what may come."""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("results_page")


def test_the_page_is_what_the_results_say(script: ModuleType) -> None:
    made = script.page(ROOT / "results")
    assert (ROOT / "docs/results.md").read_text() == made, "run benchmarks/results_page.py"


def write(folder: Path, name: str, content: dict[str, Any]) -> None:
    facts = {"command": "python b.py --data.root /some/where/set.tar.gz", "device": "a CPU"}
    (folder / name).write_text(json.dumps(facts | content))


def test_of_one_seed_there_is_no_spread_and_paths_are_short(
    script: ModuleType, tmp_path: Path
) -> None:
    row = {"finetuned_accuracy": 0.9, "macs_removed": 0.5, "params_removed": 0.5, "epochs": "1"}
    arms = {"dense": {"0": row}, "ours": {"0": {**row, "finetuned_accuracy": 0.92}}, "at-once": {}}
    write(tmp_path, "cifar10-jpeg-resnet20-50-table.json", {"arms": arms})
    made = script.page(tmp_path)
    assert "| dense | 1 | - | - | 90.00 | 2.00 | 50.0 % |" in made
    assert "`python b.py --data.root set.tar.gz`" in made
    assert "not comparable" in made
    assert "Open" in made


def test_timings(script: ModuleType, tmp_path: Path) -> None:
    timing = {"median_ms": 2.0, "quartiles_ms": [1.0, 3.0], "n": 9}
    keys = ("trace", "mask", "prune", "proof", "peer_trace", "peer_prune")
    rows: dict[str, dict[str, Any]] = {
        "step": {"network": "resnet20", "variant": "slim", "side": "graph", "macs": 1,
                 "images_per_second": 1e5, "ms_per_step": 1.28, "turns_ms_per_step": [1.28],
                 "operations": 300, "launches": 1, "gflops": 9.0, "share_of_limit": 0.31,
                 "ratio": 4.0, "ratio_quartiles": [3.0, 5.0]},
        "graph": {"net": "resnet18", **dict.fromkeys(keys, timing),
                  "trace_ratio": 0.4, "trace_ratio_quartiles": [0.3, 0.5],
                  "prune_ratio": 0.14, "prune_ratio_quartiles": [0.1, 0.2]},
        "penalty": {"net": "resnet50", "penalty": "Proximal", "median_ms": 2.0,
                    "quartiles_ms": [1.0, 3.0], "ratio": 1.2},
        "latency": {"network": "resnet56", "round_to": 8, "batch": 1, "runs": 15,
                    "macs_removed": 0.5, "dense_ms": 2.0, "slim_ms": 1.0, "speed_up": 2.0},
    }  # fmt: skip
    for name, row in rows.items():
        write(tmp_path, f"{name}.json", {"device": "NVIDIA H200", "rows": [row], "missed": ["x"]})
    made = script.page(tmp_path)
    assert (
        "| resnet20 slim | graph | 100000 | 1.28 | 300 (1) | 9.0 | 31.0% | 4.00 [3.00, 5.00] |"
        in made
    )
    assert (
        "| resnet18 |" + " 2.0 [1.0, 3.0] (9) |" * 6 + " 0.40 [0.30, 0.50] | 0.14 [0.10, 0.20] |"
        in made
    )
    assert "| resnet50 | Proximal | 2.000 [1.000, 3.000] | 1.20 |" in made
    assert "| resnet56 | 8 | 1 | 15 | 50.0% | 2.00 | 1.00 | 2.00 |" in made
    assert made.count("own bar: x.") == 4
