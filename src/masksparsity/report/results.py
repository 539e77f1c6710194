"""`results.json`, read, and put into words and rows that the page and the terminal share.

A run may have been partial: whatever is missing is left out, and never an error.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from masksparsity.errors import MaskSparsityError

Results = dict[str, Any]

# Every stage, and the key of the accuracy that was measured at its end.
STAGES = {
    "train": "baseline",
    "sparsify": "",
    "mask": "",
    "mask-sparsify": "before_removal",
    "prune": "after_removal",
    "finetune": "finetuned",
    "scratch": "scratch",
    "one-shot": "recalibrated",
}
ON_SLIM = ("prune", "finetune", "scratch", "one-shot")


def read(path: Path) -> Results:
    """The results in `path`; what is no results file is refused with its name."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MaskSparsityError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise MaskSparsityError(f"{path}: not JSON ({error}); run again to rewrite it") from error
    if not isinstance(results, dict) or not isinstance(results.get("accuracy"), dict):
        raise MaskSparsityError(f"{path}: holds no `accuracy`, so it is not the results of a run")
    return results


def number(results: Results, *keys: str) -> float | None:
    """The finite number under nested `keys`, if there is one."""
    value: Any = results
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def pair(results: Results, key: str) -> tuple[float, float] | None:
    """`dense` and `slim` of a cost, if both are known."""
    dense, slim = number(results, key, "dense"), number(results, key, "slim")
    return (dense, slim) if dense and slim is not None else None


def percent(share: float, digits: int = 2) -> str:
    """A share as it is read: 0.501 is 50.10 %."""
    return f"{100 * share:.{digits}f} %"


def change(dense: float, slim: float) -> str:
    """The relative change of a cost, with its sign: -50.3 %."""
    return f"{100 * (slim / dense - 1):+.1f} %".replace("-", "−")


def unit_of(value: float) -> tuple[str, float]:
    """The unit to print `value` in, and its size."""
    units = (("G", 1e9), ("M", 1e6), ("k", 1e3))
    return next(((unit, size) for unit, size in units if value >= size), ("", 1.0))


def count(value: float) -> str:
    """Four digits and a unit: 40.55 M."""
    unit, size = unit_of(value)
    return f"{value / size:.4g} {unit}".rstrip()


def shown(value: float | None, text: Callable[[float], str]) -> str:
    """`text(value)`, or nothing where there is no value."""
    return "" if value is None else text(value)


HEAD = ("stage", "epochs", "accuracy", "correct", "MACs", "parameters", "seconds")


def rows(results: Results) -> list[tuple[str, ...]]:
    """One row of text per stage that left an accuracy or a time, empty where it left nothing."""
    table = []
    for stage in [*STAGES, *(name for name in results.get("seconds", {}) if name not in STAGES)]:
        key, size = STAGES.get(stage, ""), "slim" if stage in ON_SLIM else "dense"
        accuracy, seconds = number(results, "accuracy", key), number(results, "seconds", stage)
        if accuracy is None and seconds is None:
            continue
        total, measured = number(results, "total"), accuracy is not None
        epochs = len(results.get("curves", {}).get(stage, [])) or None
        cells = (
            (epochs, "{:.0f}".format),
            (accuracy, percent),
            (number(results, "correct", key), f"{{:.0f}} / {total:.0f}".format if total else count),
            (number(results, "macs", size) if measured else None, count),
            (number(results, "params", size) if measured else None, count),
            (seconds, "{:.1f}".format),
        )
        # "prune · after removal", but no "finetune · finetuned".
        name = stage if key.startswith(stage) or not key else f"{stage} · {key.replace('_', ' ')}"
        table.append((name, *(shown(value, text) for value, text in cells)))
    return table


def title(results: Results) -> str:
    """The name of a run: its recipe, or else its model."""
    return str(results.get("recipe") or results.get("model") or "A run")


def summary(results: Results) -> str:
    """The result in one sentence; the accuracy around removal comes as counted images."""
    parts = []
    removed = [
        f"{percent(1 - cost[1] / cost[0], 1)} of the {name}"
        for key, name in (("macs", "MACs"), ("params", "parameters"))
        if (cost := pair(results, key))
    ]
    if removed:
        parts.append(" and ".join(removed) + " removed")
    ends = [number(results, "accuracy", k) for k in ("baseline", "finetuned", "recalibrated")]
    known = [percent(end) for end in ends if end is not None]
    if known:
        parts.append("accuracy " + " → ".join(known))
    before, after = (number(results, "correct", f"{when}_removal") for when in ("before", "after"))
    total = number(results, "total")
    if before is not None and after is not None and total is not None:
        if before == after:
            equal = f"equals accuracy before it to the image ({after:.0f} of {total:.0f})"
            parts.append(f"accuracy right after removal {equal}")
        else:
            parts.append(
                f"removal took accuracy from {before:.0f} to {after:.0f} of {total:.0f} images"
            )
    l1, masked = (number(results, "kept_scale_mean", key) for key in ("global_l1", "masked"))
    if l1 is not None and masked is not None:
        parts.append(
            f"kept scales average {l1:.2f} after global L1, {masked:.2f} after MaskSparsity"
        )
    subject = " on ".join(str(results[key]) for key in ("model", "dataset") if results.get(key))
    return f"{subject or title(results)}: {'; '.join(parts) or 'nothing measured yet'}."
