"""`results.json`: what the stages of a run directory found, gathered from their files."""

from typing import Any

import torch
from torch import Tensor

import masksparsity as ms
from masksparsity.data import DataConfig
from masksparsity.files import atomic, tensors
from masksparsity.pipeline.rundir import FILES
from masksparsity.pipeline.stages import STAGES
from masksparsity.pipeline.workspace import Workspace

# Keys of the report, and the stages they come from.
ACCURACY = {
    "baseline": "train",
    "finetuned": "finetune",
    "scratch": "scratch",
    "recalibrated": "one-shot",
}
SCALES = {"baseline": "train", "global_l1": "sparsify", "masked": "mask-sparsify"}
BINS = 50


def collect(work: Workspace) -> dict[str, Any]:
    """Everything that is known of the run, complete or not."""
    found = {name: work.runs.result(name) for name in STAGES if work.runs.complete(name)}
    counts = {key: found[stage] for key, stage in ACCURACY.items() if stage in found}
    pruned = found.get("prune", found.get("one-shot", found.get("mask", {})))
    counts |= {key: pruned[key] for key in ("before_removal", "after_removal") if key in pruned}
    results: dict[str, Any] = {
        "recipe": work.config.recipe,
        "seed": work.config.seed,
        "model": work.config.model.name,
        "dataset": _dataset(work.config.data),
        "accuracy": {key: count["accuracy"] for key, count in counts.items()},
        "correct": {key: count["correct"] for key, count in counts.items()},
        "total": max((count["total"] for count in counts.values()), default=None),
        **{key: pruned[key] for key in ("macs", "params", "latency_ms") if key in pruned},
        "seconds": {name: result["seconds"] for name, result in found.items()},
        "curves": {name: c for name in found if (c := work.runs.metrics(name))},
        "warnings": [text for result in found.values() for text in result.get("warnings", [])],
        # Of the last stage: a report may be drawn elsewhere.
        **(list(found.values())[-1]["origin"] if found else {}),
    }
    if "mask" in found:
        results |= _scales(work, found)
    return results


def _dataset(config: DataConfig) -> str:
    """The set's name; a folder or a file is called by its own."""
    if config.name in ("folder", "npz") and config.root is not None:
        return config.root.name.partition(".")[0]
    return config.name


def write(work: Workspace) -> dict[str, Any]:
    """Write `results.json` into the run directory, and return what it holds."""
    results = collect(work)
    atomic.write_json(work.runs.path / "results.json", results)
    return results


def _scales(work: Workspace, found: dict[str, Any]) -> dict[str, Any]:
    """Kept channels, layer by layer, and the distribution of scales before and after."""
    graph = work.trace(work.dense())
    norms = ms.KeepMask.load(work.runs.folder("mask") / FILES["mask"], graph).by_norm()
    if not norms:
        return {}
    kept = torch.cat(list(norms.values()))
    scales = {}
    for key, stage in SCALES.items():
        untrained = stage == "sparsify" and work.config.sparsify.epochs == 0  # the baseline's
        if stage in found and not untrained:
            weights, _ = tensors.read(work.runs.folder(stage) / FILES["weights"])
            scales[key] = torch.cat([weights[f"{name}.weight"] for name in norms]).abs()
    top = max(float(s.max()) for s in scales.values()) if scales else 1.0
    edges = torch.linspace(0, top or 1.0, BINS + 1)
    return {
        "layers": [
            {"name": name, "dense": len(keep), "kept": int(keep.sum())}
            for name, keep in norms.items()
        ],
        "kept_scale_mean": {
            key: float(s[kept].mean()) for key, s in scales.items() if key != "baseline"
        },
        "scales": {
            key: {
                "edges": edges.tolist(),
                "kept": _histogram(s[kept], edges),
                "pruned": _histogram(s[~kept], edges),
            }
            for key, s in scales.items()
        },
    }


def _histogram(values: Tensor, edges: Tensor) -> list[int]:
    return [int(n) for n in torch.histogram(values.float(), edges).hist]
